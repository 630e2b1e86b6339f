"""Chat templates: prompts to token ids with exactly one BOS, and token ids back to the answer without its reasoning."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perpend.data import Prompt
from perpend.errors import MissingExtra, UsageError
from perpend.models.quiet import silenced

Message = Mapping[str, Any]

SWITCHES = ("enable_thinking", "thinking")
"""Template variables that turn reasoning off when they are false."""

BLOCKS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel>thought", "<channel|>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
)
"""How reasoning begins and ends, by family."""

SEES_NOT = "this model takes no images"


def strip_reasoning(text: str) -> str:
    """Return the answer in `text`: what follows its reasoning, and nothing when the reasoning never ended.

    A block that ends without having begun, because the template began it, goes from the start of the text.
    """
    for begin, end in BLOCKS:
        text = re.sub(f"(?s){re.escape(begin)}.*?{re.escape(end)}", "", text)
        text = text.rpartition(end)[2].partition(begin)[0]
    return text.strip()


def has_template(tokenizer: Any, processor: Any | None = None) -> bool:
    """Whether a model comes with a chat template."""
    return bool(getattr(processor, "chat_template", None) or tokenizer.chat_template)


def read_template(path: Path | str) -> str:
    """Return the text of a chat template, the way a tokenizer takes it.

    Raises:
        UsageError: no such file, not text, or not a Jinja template.
    """
    from jinja2 import Environment, TemplateSyntaxError

    where = f"--chat-template {path}"
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
        plain = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", text)  # a tag that transformers adds to Jinja
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except UnicodeDecodeError:
        raise UsageError("not UTF-8 text", where=where) from None
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", where=where) from None
    except TemplateSyntaxError as error:
        raise UsageError(f"line {error.lineno}: not a Jinja template: {error.message}", where=where) from None
    if not text.strip():
        raise UsageError("an empty chat template", where=where)
    return text


@dataclass(frozen=True)
class Encoded:
    """A padded batch.

    Attributes:
        inputs: Keyword arguments of the model, on the CPU: `input_ids` and `attention_mask` `[B, T]` int64, and what
            images need.
        start: Column after the last prompt token, the same in every row: prompts are padded on the left,
            continuations on the right.
    """

    inputs: dict[str, Tensor]
    start: int


class Chat:
    """Turns prompts into token ids the way the model was taught to read them, and ids into text.

    Reasoning is kept out of what is measured: a template that has a switch for it gets the switch, a template that
    opens a reasoning block gets the block closed at once, and what a model reasons all the same is not part of its
    answer. `describe` says which of these happened.
    """

    def __init__(
        self, tokenizer: Any, processor: Any | None = None, system: str | None = None, template: str | None = None
    ) -> None:
        """Read the template.

        Args:
            tokenizer: Of the model.
            processor: Of a model that takes images.
            system: System prompt before every prompt; None leaves it to the template.
            template: Text of a Jinja template in place of the model's own.

        Raises:
            UsageError: there is no chat template, or it takes no system prompt.
        """
        self.tokenizer, self.processor, self.system = tokenizer, processor, system
        own = template or getattr(processor, "chat_template", None) or tokenizer.chat_template
        if not own:
            name = getattr(tokenizer, "name_or_path", "")
            hint = "an instruction-tuned model, or --chat-template FILE"
            raise UsageError("the tokenizer has no chat template", where=name, hint=hint)
        self.given = template
        self.template = str(own if isinstance(own, str) else own.get("default", next(iter(own.values()))))
        self.switches = {name: False for name in SWITCHES if re.search(rf"\b{name}\b", self.template)}
        self.pad: int = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.bos: int | None = tokenizer.bos_token_id
        self._adds_bos = self.bos is not None and tokenizer("a").input_ids[:1] == [self.bos]
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._special = sorted(added | {*tokenizer.all_special_tokens} - {""}, key=len, reverse=True)
        raw = self._render([self.messages(Prompt("a"))])[0]
        self._closes = _close(raw) != raw

    def messages(self, prompt: Prompt) -> list[dict[str, Any]]:
        """Return the conversation that a prompt opens, in the form that the template takes."""
        parts = [{"type": "image"}] if prompt.image else []
        turns: list[tuple[str, str, list[Any]]] = [("system", self.system, [])] if self.system else []
        turns.append(("user", prompt.text, parts))
        if self.processor is None:
            return [{"role": role, "content": text} for role, text, _ in turns]
        return [{"role": role, "content": [*images, {"type": "text", "text": text}]} for role, text, images in turns]

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Return the ids of each prompt in its template, up to where the model's answer begins.

        Every list holds exactly one BOS, in front, where the model has one; text that spells a control token, such as
        `<eos>`, is read as text.

        Raises:
            UsageError: an image cannot be read, or the model takes none.
        """
        plain = [p for p in prompts if p.image is None]
        ids = iter(self.encode_messages([self.messages(p) for p in plain]))
        return [self._with_images([p])["input_ids"][0].tolist() if p.image else next(ids) for p in prompts]

    def encode_messages(self, conversations: Sequence[Sequence[Message]]) -> list[list[int]]:
        """Return the ids of each conversation, as `encode` does for prompts.

        Args:
            conversations: Lists of `{"role": ..., "content": ...}`.

        Raises:
            UsageError: the template refuses the conversation.
        """
        if not conversations:
            return []
        texts = [_close(text) for text in self._render(conversations)]
        with silenced():  # a tokenizer warns of lengths that are looked after elsewhere
            encoded: list[list[int]] = self.tokenizer(texts, add_special_tokens=False).input_ids
        for row, conversation in enumerate(conversations):
            if any(token in str(m["content"]) for m in conversation for token in self._special):
                encoded[row] = self._spelled(conversation, encoded[row])
        return [self._one_bos(ids) for ids in encoded]

    def conversation(self, messages: Sequence[Message], images: Sequence[Any] = ()) -> dict[str, Tensor]:
        """Return the model inputs of one conversation, up to where the model's answer begins.

        Args:
            messages: `{"role": ..., "content": ...}`; content is text, or parts `{"type": "text", "text": ...}` and
                `{"type": "image"}`. The system prompt is put in front where the first is none.
            images: Pillow images, as many as the messages hold places for.

        Raises:
            UsageError: the template refuses the conversation, or the model takes no images.
        """
        head = [{"role": "system", "content": self.system}] if self.system and messages[0]["role"] != "system" else []
        turns = [{**turn, "content": self._content(turn["content"])} for turn in (*head, *messages)]
        if images:
            return self._processed([turns], [list(images)])
        return self.pack(self.encode_messages([turns])).inputs

    def _content(self, content: str | Sequence[Mapping[str, Any]]) -> str | list[Mapping[str, Any]]:
        """Return the content of a turn as the template takes it: parts where there is a processor, text elsewhere."""
        parts: list[Mapping[str, Any]] = (
            [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
        )
        if self.processor is None and not any(part["type"] == "image" for part in parts):
            return "\n".join(part["text"] for part in parts)
        return parts

    def _render(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        from jinja2 import TemplateError

        try:
            texts: list[str] = self.tokenizer.apply_chat_template(
                list(conversations),
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=True,
                **self.switches,
            )
        except TemplateError as error:
            raise UsageError(f"the chat template refuses the conversation: {error}") from None
        return texts

    def _spelled(self, conversation: Sequence[Message], plain: list[int]) -> list[int]:
        """Encode a conversation in which somebody spells a control token; older transformers cannot tell them apart."""
        if "sanitize_control_tokens" not in inspect.signature(self.tokenizer.apply_chat_template).parameters:
            return plain
        ids: list[int] = self.tokenizer.apply_chat_template(
            list(conversation),
            chat_template=self.template,
            add_generation_prompt=True,
            sanitize_control_tokens=True,
            **self.switches,
        )["input_ids"]
        text = str(self.tokenizer.decode(ids))
        closing = _close(text).removeprefix(text)
        return ids + self.tokenizer(closing, add_special_tokens=False).input_ids if closing else ids

    def _one_bos(self, ids: list[int]) -> list[int]:
        """Put a BOS in front where the tokenizer does so for plain text and the template does not; drop a second."""
        if self._adds_bos and ids[:1] != [self.bos]:
            return [self.bos, *ids]  # type: ignore[list-item]
        while self.bos is not None and ids[:2] == [self.bos, self.bos]:
            ids = ids[1:]
        return ids

    def pack(self, ids: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]] | None = None) -> Encoded:
        """Pad encoded prompts on the left and continuations on the right, so that all prompts end in one column.

        Args:
            ids: At least one encoded prompt.
            continuations: Token ids that follow each prompt; none by default.
        """
        after: Sequence[Sequence[int]] = continuations or [()] * len(ids)
        start, width = max(map(len, ids)), max(map(len, after))
        tokens = torch.full((len(ids), start + width), self.pad)
        mask = torch.zeros_like(tokens)
        for row, (prompt, reply) in enumerate(zip(ids, after, strict=True)):
            span = slice(start - len(prompt), start + len(reply))
            tokens[row, span] = torch.tensor([*prompt, *reply], dtype=torch.long)
            mask[row, span] = 1
        return Encoded({"input_ids": tokens, "attention_mask": mask}, start)

    def batch(self, prompts: Sequence[Prompt], continuations: Sequence[Sequence[int]] | None = None) -> Encoded:
        """Encode and pad prompts, each followed by its continuation.

        Args:
            prompts: At least one; either all of them have an image or none.
            continuations: Token ids that follow each prompt; none by default.

        Raises:
            UsageError: some prompts have an image and some have none, or an image cannot be read.
        """
        if not any(p.image for p in prompts):
            return self.pack(self.encode(prompts), continuations)
        if not all(p.image for p in prompts):
            raise UsageError("prompts with and without an image in one batch")
        inputs = self._with_images(prompts)
        shape, start = inputs["input_ids"].shape, inputs["input_ids"].shape[1]
        after = self.pack([()] * len(prompts), continuations).inputs
        for key, value in list(inputs.items()):
            if value.shape == shape:  # one value per token, such as Gemma 3's token_type_ids: 0 is text
                tail = after.get(key, torch.zeros_like(after["input_ids"]))
                inputs[key] = torch.cat([value, tail.to(value.dtype)], dim=1)
        return Encoded(inputs, start)

    def _with_images(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Run the processor on prompts that all have an image; left-padded."""
        if self.processor is None:
            raise UsageError(SEES_NOT, where=str(prompts[0].image))
        return self._processed([self.messages(p) for p in prompts], [[read_image(str(p.image))] for p in prompts])

    def _processed(
        self, conversations: Sequence[Sequence[Message]], images: Sequence[Sequence[Any]]
    ) -> dict[str, Tensor]:
        """Run the processor on conversations and the images that they hold places for; left-padded."""
        if self.processor is None:
            raise UsageError(SEES_NOT)
        parts = [part for turns in conversations for turn in turns for part in turn["content"]]
        said = [str(part["text"]) for part in parts if part["type"] == "text"]
        for token in self._special:  # a processor reads it as what it spells, such as the place of one more image
            if any(token in text for text in said):
                raise UsageError(f"the text of a prompt with an image spells the control token {token}")
        texts = [_close(text) for text in self._render(conversations)]
        bos = self.tokenizer.bos_token
        if self._adds_bos:
            texts = [text if text.startswith(bos) else bos + text for text in texts]
        options = {"padding": True, "padding_side": "left", "add_special_tokens": False, "return_tensors": "pt"}
        return dict(self.processor(text=texts, images=[list(seen) for seen in images], **options))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the answer that generated ids hold: no special tokens, no reasoning."""
        raw = str(self.tokenizer.decode(list(ids), skip_special_tokens=False))
        if not any(mark in raw for block in BLOCKS for mark in block):
            return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()
        answer = strip_reasoning(raw)
        for token in self._special:
            answer = answer.replace(token, "")
        return answer.strip()

    def describe(self) -> dict[str, Any]:
        """Return, for the record, how every prompt was put."""
        switch = ", ".join(f"{name}=false" for name in self.switches)
        return {
            "template": "given" if self.given else "the model's own",
            "template_sha256": hashlib.sha256(self.template.encode()).hexdigest(),
            "system": self.system,
            "bos": "none" if self.bos is None else "added" if self._bos_is_added() else "by the template",
            "reasoning": switch or ("block closed at once" if self._closes else "not asked for"),
        }

    def _bos_is_added(self) -> bool:
        text = self._render([self.messages(Prompt("a"))])[0]
        return self._adds_bos and not text.startswith(self.tokenizer.bos_token)


def _close(text: str) -> str:
    """Close a reasoning block that the template leaves open at the end."""
    bare = text.rstrip()
    end = next((end for begin, end in BLOCKS if bare.endswith(begin)), None)
    return f"{bare}\n\n{end}\n\n" if end else text


def read_image(name: str) -> Any:
    """Return an image as RGB.

    Args:
        name: Path or URL.

    Raises:
        UsageError: no such image, or it cannot be read.
        MissingExtra: Pillow is not installed.
    """
    try:
        from transformers.image_utils import load_image
    except ImportError:
        raise MissingExtra("pillow", "vision", "reading images") from None
    try:
        return load_image(name).convert("RGB")
    except ImportError:
        raise MissingExtra("pillow", "vision", "reading images") from None
    except Exception as error:  # whatever a network or an image library raises on what it cannot read
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"image cannot be read: {reason[:160]}", where=name) from None
