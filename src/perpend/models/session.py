"""A loaded model with hooks: read residuals, put edits in place, generate, score.

Every result is in the order of what was asked for and does not depend on how it was batched, to rounding. Prompts are
padded on the left with position ids that skip the padding; batches hold prompts of similar length, the longest first,
as many as a budget of padded tokens allows; a batch that does not fit into memory is halved, and that is said.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from perpend.config import Machine
from perpend.core.edits import Edit
from perpend.data import Prompt
from perpend.errors import UsageError
from perpend.models import decode, load
from perpend.models.anatomy import Anatomy
from perpend.models.batching import Batch, Budget, plan
from perpend.models.chat import Chat, Message, read_template
from perpend.models.hooks import Install, in_place, prepare
from perpend.models.load import Loaded
from perpend.models.parallel import World
from perpend.models.replies import Reply, ReplyLog, Sampling
from perpend.models.runner import every
from perpend.models.sequence import residual
from perpend.models.streaming import Answers, Ask
from perpend.progress import track

__all__ = ["Batch", "Reply", "ReplyLog", "Sampling", "Session"]

T = TypeVar("T")

WINDOW = 512
"""Prompts that are sorted by length together when residuals are read; bounds what is held back for the order."""


class Session:
    """One model in memory.

    Attributes:
        engine: What computes.
    """

    engine = "transformers"

    def __init__(
        self,
        loaded: Loaded,
        machine: Machine | None = None,
        *,
        system: str | None = None,
        chat_template: Path | str | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        """Wrap a loaded model.

        Args:
            loaded: What `load_model` returned.
            machine: Batch size; by default as large as memory allows.
            system: System prompt before every prompt; None leaves it to the chat template.
            chat_template: Jinja file read in place of the model's own template.
            overrides: The recipe's `[edit.overrides]`, for `Anatomy.of`.

        Raises:
            UsageError: no chat template, or one that cannot be read.
        """
        self.loaded, self.machine = loaded, machine or Machine()
        self.model = cast(Any, loaded.model)
        template = read_template(chat_template) if chat_template is not None else None
        self.chat = Chat(loaded.tokenizer, loaded.processor, system, template)
        self.device, self.shelf = loaded.device, loaded.shelf
        self.world = World.of(self.machine)
        self.budget = Budget.of(self.model, self.device, self.machine)
        self._overrides = overrides
        self._edited = False

    @cached_property
    def anatomy(self) -> Anatomy:
        """Layers and writers of the model; found when first asked for."""
        return Anatomy.of(self.model, self._overrides)

    @property
    def cuda(self) -> list[torch.device]:
        """The session's device where it has random numbers of its own."""
        return [self.device] if self.device.type == "cuda" else []

    @property
    def n_layers(self) -> int:
        """Number of decoder layers (L)."""
        return self.anatomy.n_layers

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream (d)."""
        return self.anatomy.hidden_size

    def _encode(self, prompts: Sequence[Prompt], more: int = 0) -> list[list[int]]:
        """Encode prompts, each followed by at most `more` tokens.

        Raises:
            UsageError: longer than the model's context.
        """
        ids = self.chat.encode(prompts)
        longest = max(map(len, ids), default=0)
        if self.budget.context is not None and longest + more > self.budget.context:
            tail = f" and {more} tokens after it" if more else ""
            raise UsageError(f"a prompt of {longest} tokens{tail}: the model's context ends at {self.budget.context}")
        return ids

    # ------------------------------------------------------------------------------------------------ residuals

    @torch.no_grad()
    def capture(self, prompts: Sequence[Prompt], *, position: int = -1) -> Iterator[Tensor]:
        """Read residuals, under the edit that is in place.

        Args:
            prompts: What is encoded in the chat template, up to where the answer begins.
            position: Token that is read, counted from the end; -1 is the last template token.

        Yields:
            `[B, L, d]` float32 on the CPU, in prompt order; `[:, l]` is the output of layer l, before the final norm.

        Raises:
            UsageError: the position is that of the first token of a prompt, or before it.
        """
        prompts = list(prompts)
        ids = self._encode(prompts)
        shortest = min(map(len, ids), default=0)
        if ids and not -shortest < position < 0:
            raise UsageError(
                f"position {position} of a prompt of {shortest} tokens", valid=f"-1 to {1 - shortest}, never the first"
            )
        steps = track(
            self._read(prompts, ids, position), "read residuals", total=len(ids), size=lambda step: len(step[1])
        )
        found, missing = torch.empty(0), 0
        for window, rows, residuals in steps:
            if not missing:
                found, missing = torch.empty(len(window), *residuals.shape[1:]), len(window)
            found[[k - window.start for k in rows]] = residuals
            missing -= len(rows)
            if not missing:
                yield found

    def _read(
        self, prompts: list[Prompt], ids: list[list[int]], position: int
    ) -> Iterator[tuple[range, list[int], Tensor]]:
        """Yield a window, some of its rows and their residuals, window after window."""
        _ = self.anatomy  # found before batches travel together: finding it runs the model
        for first in range(0, len(ids), WINDOW):
            window = range(first, min(first + WINDOW, len(ids)))
            seen = [prompts[k].image is not None for k in window]
            groups = plan([len(ids[k]) for k in window], self.budget.forward, self.budget.rows, apart=seen)
            whole = [[window[k] for k in group] for group in groups]
            steps = self._run(
                whole,
                lambda rows: self._residuals(rows, prompts, ids, position),
                lambda rows: len(rows) * max(len(ids[k]) for k in rows),
                self.budget.waiting,
            )
            for rows, residuals in steps:
                yield window, rows, residuals

    def _residuals(self, rows: list[int], prompts: list[Prompt], ids: list[list[int]], position: int) -> Tensor:
        kept: dict[int, Tensor] = {}
        me = threading.get_ident()  # batches that go through an offloaded model together share its layers

        def keeper(layer: int) -> Callable[..., None]:
            def keep(module: nn.Module, args: Any, output: Any) -> None:
                if threading.get_ident() == me:
                    kept[layer] = residual(self.model, output)[:, position].to(torch.float32, copy=True)

            return keep

        inputs, _ = self._inputs(rows, prompts, ids)
        modules = self.anatomy.layer_modules(self.model)
        handles = [module.register_forward_hook(keeper(layer)) for layer, module in enumerate(modules)]
        try:
            load.body(self.model)(**load.with_positions(self.model, inputs), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack([kept[layer].to(self.device) for layer in range(len(modules))], dim=1).cpu()

    def _inputs(
        self,
        rows: Sequence[int],
        prompts: Sequence[Prompt],
        ids: Sequence[Sequence[int]],
        after: Sequence[Sequence[int]] | None = None,
    ) -> tuple[dict[str, Tensor], int]:
        """Pad some of the prompts, on the session's device; returns model inputs and the column where prompts end."""
        tails = [after[r] for r in rows] if after is not None else None
        if prompts and prompts[rows[0]].image is not None:
            encoded = self.chat.batch([prompts[r] for r in rows], tails)
        else:
            encoded = self.chat.pack([ids[r] for r in rows], tails)
        return {key: value.to(self.device) for key, value in encoded.inputs.items()}, encoded.start

    def _run(
        self, groups: Sequence[list[int]], work: Callable[[list[int]], T], tokens: Callable[[list[int]], int], most: int
    ) -> Iterator[tuple[list[int], T]]:
        """Yield each group with what `work` makes of it."""
        return every(groups, work, shelf=self.shelf, world=self.world, tokens=tokens, most=most)

    # ---------------------------------------------------------------------------------------------------- edits

    @contextmanager
    def edited(self, edit: Edit | None) -> Iterator[None]:
        """Put an edit in place inside the block; leaving it restores the model exactly. None changes nothing.

        The weights stay as they are: writers are hooked, and compute in float32 what the edited weights would give.

        Raises:
            UsageError: an edit is in place already, or this one names a module that is no writer.
        """
        if edit is None:
            yield
            return
        with self.held(self.prepare(edit)):
            yield

    def under(self, edit: Edit | None) -> Callable[[Batch], Tensor]:
        """Return `logits` under an edit, which is put in place for each batch and prepared once for all of them.

        Raises:
            UsageError: an edit is in place now, or will be when a batch comes, or this one names no writer.
        """
        steps = self.prepare(edit) if edit is not None else []

        def logits(batch: Batch) -> Tensor:
            with self.held(steps):
                return self.logits(batch)

        return logits

    def prepare(self, edit: Edit) -> list[Install]:
        """Return what puts an edit in place, for `held`.

        Raises:
            UsageError: an edit is in place already, or this one names a module that is no writer.
        """
        self._require_unedited()
        return prepare(self.model, [self.anatomy.writer(name) for name in edit.modules], edit)

    def _require_unedited(self) -> None:
        if self._edited:
            raise UsageError("an edit is in place already; two at once are never what was measured")

    @contextmanager
    def held(self, steps: list[Install]) -> Iterator[None]:
        """Put a prepared edit in place inside the block.

        Raises:
            UsageError: an edit is in place already.
        """
        self._require_unedited()
        self._edited = True
        try:
            with in_place(steps):
                yield
        finally:
            self._edited = False

    # ------------------------------------------------------------------------------------------------- generate

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        store: MutableMapping[str, Reply] | None = None,
    ) -> list[Reply]:
        """Let the model answer, under the edit that is in place.

        Args:
            prompts: What it is asked.
            max_new_tokens: Where an answer is cut.
            sampling: How tokens are drawn; greedy by default.
            store: Replies by prompt id. Those that are there are not made again, and new ones are put in as they come.
                Batches are the same with and without them, so that a resumed run gives the replies of an unbroken one.

        Returns:
            One reply per prompt, in order.
        """
        prompts = list(prompts)
        ids = self._encode(prompts, max_new_tokens)
        store = {} if store is None else store
        known = {k: store[p.id] for k, p in enumerate(prompts) if p.id in store}
        seen = [p.image is not None for p in prompts]
        lengths = [len(i) + max_new_tokens for i in ids]
        most = self.budget.cached if self.shelf is None else self.budget.forward
        groups = plan(lengths, most, self.budget.rows, apart=seen)
        missing = [group for group in groups if not all(k in known for k in group)]
        made: dict[int, Reply] = {}
        settings = self.settings(max_new_tokens, sampling)
        with load.generation(self.model, **settings) as config:
            work = self._run(
                missing,
                lambda group: self._replies(group, prompts, ids, config, sampling),
                lambda group: len(group) * max(lengths[k] for k in group),
                self.budget.cached,
            )
            for group, replies in track(work, "generate", total=sum(map(len, missing)), size=lambda item: len(item[0])):
                for k, reply in zip(group, replies, strict=True):
                    made[k] = known.get(k, reply)
                    if k not in known:
                        store[prompts[k].id] = reply
        return [known[k] if k in known else made[k] for k in range(len(prompts))]

    def settings(self, max_new_tokens: int, sampling: Sampling | None) -> dict[str, Any]:
        """Return what `load.generation` takes."""
        draw: dict[str, Any] = {"do_sample": False}
        if sampling is not None:
            draw = {"do_sample": True, "temperature": sampling.temperature}
            draw |= {"top_k": sampling.top_k, "top_p": sampling.top_p}
        ends = load.end_tokens(self.model, self.chat.tokenizer)
        return {"max_new_tokens": max_new_tokens, "eos_token_id": ends, "pad_token_id": self.chat.pad, **draw}

    def _replies(
        self,
        group: list[int],
        prompts: list[Prompt],
        ids: list[list[int]],
        config: Any,
        sampling: Sampling | None,
    ) -> list[Reply]:
        inputs, start = self._inputs(group, prompts, ids)
        with self._seeded(sampling, [prompts[k].id for k in group]):
            rows = decode.answers(self.model, inputs, config, start)
        ends = set(config.eos_token_id)
        return [Reply(self.chat.decode(row), tuple(row), bool(row) and row[-1] in ends) for row in rows]

    @contextmanager
    def _seeded(self, sampling: Sampling | None, names: Sequence[str]) -> Iterator[None]:
        """Seed by the setting and the rows, so that a batch draws the same whatever ran before it."""
        if sampling is None:
            yield
            return
        with torch.random.fork_rng(self.cuda):
            torch.manual_seed(sampling.seed_of(names))
            yield

    def stream(
        self, messages: Sequence[Message], sampling: Sampling | None = None, max_new_tokens: int = 512
    ) -> Iterator[str]:
        """Yield the answer to a conversation piece by piece, as it is generated.

        Args:
            messages: `{"role": ..., "content": ...}`, the user's last.
            sampling: How tokens are drawn; greedy by default.
            max_new_tokens: Where the answer is cut, if the model's context does not end before.
        """
        yield from (piece for _, piece in self.answers([Ask(messages, None, sampling, max_new_tokens)]) if piece)

    def answers(self, asks: Sequence[Ask]) -> Answers:
        """Return answers to several conversations, which grow side by side, each under its own edit.

        Raises:
            UsageError: a conversation that cannot be answered, or an edit that is not one of this model.
        """
        return Answers(self, asks)

    # ---------------------------------------------------------------------------------------------------- score

    def batches(
        self, prompts: Sequence[Prompt], continuations: Sequence[Sequence[int]], *, max_tokens: int | None = None
    ) -> Iterator[Batch]:
        """Group prompts with given continuations for teacher forcing, the longest first.

        Args:
            prompts: As many as continuations.
            continuations: Token ids of what the model is made to say; prompts without any are left out.
            max_tokens: Of each continuation, only so many.

        Yields:
            Batches of at most as many rows as memory allows for their logits.
        """
        prompts, after = list(prompts), [list(c)[:max_tokens] for c in continuations]
        ids = self._encode(prompts, max(map(len, after), default=0))
        some = [k for k, tail in enumerate(after) if tail]
        lengths = [len(i) + len(tail) for i, tail in zip(ids, after, strict=True)]
        groups = plan(
            [lengths[k] for k in some],
            self.budget.forward,
            self.budget.rows,
            tails=[len(after[k]) for k in some],
            tail_budget=self.budget.logits,
            apart=[prompts[k].image is not None for k in some],
        )
        for group in groups:
            rows = [some[k] for k in group]
            inputs, start = self._inputs(rows, prompts, ids, after)
            mask = inputs["attention_mask"][:, start:].bool()
            tokens = inputs["input_ids"][:, start:].masked_fill(~mask, 0)
            yield Batch(rows, load.with_positions(self.model, inputs), start, tokens, mask)

    def logits(self, batch: Batch) -> Tensor:
        """Return `[B, T, V]` float32 on the session's device; `[:, t]` predicts continuation token t.

        Only these positions reach the LM head. Differentiable where an edit that is in place is.
        """
        columns = torch.arange(batch.start - 1, batch.start - 1 + batch.tokens.shape[1], device=self.device)
        return load.logits_at(self.model, batch.inputs, columns).float()

    @torch.no_grad()
    def log_likelihood(self, prompts: Sequence[Prompt], continuations: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return the log-probability of every continuation token.

        Args:
            prompts: As many as continuations.
            continuations: Token ids of what the model is made to say.

        Returns:
            `[n_i]` float32 in nats on the CPU for each prompt, in order.
        """
        found = [torch.empty(0) for _ in prompts]
        batches = list(self.batches(prompts, continuations))

        def work(group: list[int]) -> Tensor:
            batch = batches[group[0]]
            logits = self.logits(batch)
            return (logits.gather(-1, batch.tokens[..., None])[..., 0] - logits.logsumexp(-1)).cpu()

        steps = self._run(
            [[k] for k in range(len(batches))],
            work,
            lambda group: batches[group[0]].inputs["input_ids"].numel(),
            self.budget.waiting,
        )
        for (at,), scores in steps:
            for k, row, mask in zip(batches[at].index, scores, batches[at].mask.cpu(), strict=True):
                found[k] = row[mask]
        return found
