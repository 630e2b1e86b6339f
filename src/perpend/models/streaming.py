"""Answers as they are made: one, or several side by side, each under its own edit, from the same weights."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from perpend.core.edits import Edit
from perpend.errors import UsageError
from perpend.models import load
from perpend.models.chat import BLOCKS, Message
from perpend.models.hooks import only_hooks
from perpend.models.replies import Sampling

if TYPE_CHECKING:
    from perpend.models.session import Session

Finish = Literal["", "stop", "length"]


@dataclass(frozen=True)
class Ask:
    """What is to be answered, and how.

    Attributes:
        messages: `{"role": ..., "content": ...}`, the user's last. Content is text, or parts, each `{"type": "text",
            "text": ...}` or `{"type": "image"}`. The session's system prompt is put in front where the first is none.
        edit: In place while this is answered; None for the model as it is.
        sampling: How tokens are drawn; greedy by default.
        max_new_tokens: Where the answer is cut, if the model's context does not end before.
        stop: Texts that end the answer and are no part of it.
        images: Pillow images, in the order in which the messages hold a place for one.
    """

    messages: Sequence[Message]
    edit: Edit | None = None
    sampling: Sampling | None = None
    max_new_tokens: int = 512
    stop: tuple[str, ...] = ()
    images: tuple[Any, ...] = ()


@dataclass
class Answer:
    """One answer while it grows.

    Attributes:
        prompt_tokens: Tokens of the conversation, as the model reads it.
        text: What a reader has seen of it so far: no special tokens, no reasoning, nothing that may yet turn out to
            belong to either or to a text that ends the answer.
        tokens: Generated ids, reasoning and end token included.
        finish: Empty while it grows; `stop` when the model or a given text ended it, `length` when it was cut.
    """

    prompt_tokens: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish: Finish = ""


class Answers:
    """Answers to several conversations, which grow a token at a time in turn.

    Each is what it would be alone: the model is run for one of them at a time, with the edit of that one in place and
    with random numbers of its own. Edits that overwrite fused experts are not put in place and undone for every token;
    with one of these, the answers are made one after the other.

    Attributes:
        answers: One per `Ask`, in order.
    """

    def __init__(self, session: Session, asks: Sequence[Ask]) -> None:
        """Encode conversations and prepare edits.

        Args:
            session: The model.
            asks: At least one.

        Raises:
            UsageError: a conversation that the template refuses or that fills the model's context, an image that the
                model cannot take, or an edit that is not one of this model.
        """
        self._session, self._asks = session, list(asks)
        self._inputs = [session.chat.conversation(ask.messages, ask.images) for ask in asks]
        self.answers = [Answer(inputs["input_ids"].shape[1]) for inputs in self._inputs]
        context = session.budget.context
        longest = max(answer.prompt_tokens for answer in self.answers)
        if context is not None and longest >= context:
            raise UsageError(f"a conversation of {longest} tokens: the model's context ends at {context}")
        self._rooms = [
            ask.max_new_tokens if context is None else min(ask.max_new_tokens, context - answer.prompt_tokens)
            for ask, answer in zip(self._asks, self.answers, strict=True)
        ]
        self._steps = [session.prepare(ask.edit) if ask.edit is not None else [] for ask in asks]
        self._texts = [_Text(session.chat.decode, ask.stop) for ask in asks]
        self._ended = [False] * len(asks)
        self._made: queue.SimpleQueue[tuple[int, int | BaseException | None]] = queue.SimpleQueue()

    def __iter__(self) -> Iterator[tuple[int, str]]:
        """Yield which answer got a token, and what a reader sees more of it: often nothing.

        Closing the iterator stops the model after the token that it is at.

        Raises:
            Exception: whatever generation raises.
        """
        session, turns = self._session, _Turns(len(self._asks), all(map(only_hooks, self._steps)))
        with ExitStack() as stack:
            settings = [session.settings(n, ask.sampling) for n, ask in zip(self._rooms, self._asks, strict=True)]
            configs = [stack.enter_context(load.generation(session.model, **values)) for values in settings]
            if any(ask.sampling for ask in self._asks):
                stack.enter_context(torch.random.fork_rng(session.cuda))
            threads = [
                threading.Thread(target=self._work, args=(k, config, turns), daemon=True)
                for k, config in enumerate(configs)
            ]
            for thread in threads:
                thread.start()
            try:
                yield from self._read(configs[0].eos_token_id)
            finally:
                self._ended = [True] * len(threads)
                for thread in threads:
                    thread.join()

    def _read(self, ends: list[int]) -> Iterator[tuple[int, str]]:
        growing = len(self._asks)
        while growing:
            k, made = self._made.get()
            if isinstance(made, BaseException):
                raise made
            answer, text = self.answers[k], self._texts[k]
            if made is None:
                growing -= 1
                piece = "" if self._ended[k] else text.close()
                last = answer.tokens[-1] if answer.tokens else None
                answer.finish = answer.finish or ("stop" if last in ends else "length")
            elif self._ended[k]:
                continue
            else:
                answer.tokens.append(made)
                piece, self._ended[k] = text.add(made)
                answer.finish = "stop" if self._ended[k] else ""
            answer.text += piece
            yield k, piece

    def _work(self, k: int, config: Any, turns: _Turns) -> None:
        session, ask, steps = self._session, self._asks[k], self._steps[k]
        numbers = _Numbers(session, ask.sampling, str(self._inputs[k]["input_ids"].tolist()))
        with turns.of(k), ExitStack() as held:

            def begin() -> None:
                held.enter_context(session.held(steps) if steps else nullcontext())
                numbers.go_on()

            def token(tokens: Tensor, scores: Any, **_: Any) -> Tensor:
                self._made.put((k, int(tokens[0, -1])))
                if turns.shared:
                    numbers.keep()
                    held.close()
                    turns.pass_on(k)
                    begin()
                return torch.full((1,), self._ended[k], device=tokens.device)

            try:
                begin()
                inputs = {key: value.to(session.device) for key, value in self._inputs[k].items()}
                if not self._ended[k]:
                    session.model.generate(**inputs, generation_config=config, stopping_criteria=load.stopping([token]))
                self._made.put((k, None))
            except BaseException as error:
                self._made.put((k, error))


class _Turns:
    """Who may run the model now."""

    def __init__(self, n: int, each_token: bool) -> None:
        self._order, self._each_token = list(range(n)), each_token
        self._changed = threading.Condition()

    @property
    def shared(self) -> bool:
        """Whether the model goes to another after each token."""
        return self._each_token and len(self._order) > 1

    def of(self, k: int) -> ExitStack:
        """Wait for the first turn of k; leaving the context gives up all others."""
        stack = ExitStack()
        stack.callback(self._leave, k)
        self._wait(k)
        return stack

    def pass_on(self, k: int) -> None:
        """Let all others have a turn first."""
        with self._changed:
            self._order.append(self._order.pop(0))
            self._changed.notify_all()
        self._wait(k)

    def _wait(self, k: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._order[0] == k)

    def _leave(self, k: int) -> None:
        with self._changed:
            self._order.remove(k)
            self._changed.notify_all()


class _Numbers:
    """The random numbers of one answer, while others draw from the same generators."""

    def __init__(self, session: Session, sampling: Sampling | None, name: str) -> None:
        self._session, self._sampling, self._name = session, sampling, name
        self._states: Mapping[str, Tensor] | None = None

    def go_on(self) -> None:
        if self._sampling is None:
            return
        if self._states is None:
            torch.manual_seed(self._sampling.seed_of([self._name]))
            return
        torch.set_rng_state(self._states["cpu"])
        for device in self._session.cuda:
            torch.cuda.set_rng_state(self._states[str(device)], device)

    def keep(self) -> None:
        if self._sampling is not None:
            kept = {str(device): torch.cuda.get_rng_state(device) for device in self._session.cuda}
            self._states = {"cpu": torch.get_rng_state(), **kept}


class _Text:
    """What can be shown of an answer whose tokens come one by one."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: tuple[str, ...]) -> None:
        self._decode, self._stop = decode, stop
        self._marks = (*(mark for block in BLOCKS for mark in block), *stop)
        self._tokens: list[int] = []
        self._shown = ""

    def add(self, token: int) -> tuple[str, bool]:
        """Return what is to be shown more, and whether a given text has ended the answer."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            return self._more(text[: min(found)]), True
        return self._more(text[: _settled(text, self._marks)]), False

    def close(self) -> str:
        """Return what was held back."""
        return self._more(self._decode(self._tokens))

    def _more(self, text: str) -> str:
        """Return what `text` has more than was shown; all of it where reasoning turned out to come before it."""
        if self._shown.startswith(text):
            return ""
        more = text.removeprefix(self._shown)
        self._shown = text
        return more


def _settled(text: str, marks: Sequence[str]) -> int:
    """Return how much of `text` stays as it is whatever follows: no half of a character, no beginning of a mark."""
    end = len(text.rstrip("�"))
    held = max((n for mark in marks for n in range(1, len(mark)) if text[:end].endswith(mark[:n])), default=0)
    return end - held
