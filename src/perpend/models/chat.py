"""Chat templates: prompts to token ids with exactly one BOS, and token ids back to the answer without its reasoning."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perpend.data import Prompt
from perpend.errors import UsageError

Message = Mapping[str, Any]

_SWITCHES = ("enable_thinking", "thinking")
_OPENED = re.compile(r"<(think|thinking|reasoning)>\s*$")


@dataclass(frozen=True)
class Encoded:
    """A padded batch.

    Attributes:
        inputs: Keyword arguments of the model: `input_ids` and `attention_mask` `[B, T]` int64, and what images need.
        start: Column after the last prompt token, the same in every row: prompts are padded on the left, continuations
            on the right.
    """

    inputs: dict[str, Tensor]
    start: int


class Chat:
    """Turns prompts into token ids the way the model was taught to read them."""

    def __init__(self, tokenizer: Any, processor: Any | None = None, system: str | None = None) -> None:
        self.tokenizer, self.processor, self.system = tokenizer, processor, system
        self.template = getattr(processor, "chat_template", None) or tokenizer.chat_template
        if not self.template:
            raise UsageError("the tokenizer has no chat template", hint="an instruction-tuned model")
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        text = self.template if isinstance(self.template, str) else str(self.template)
        self.switches = {name: False for name in _SWITCHES if re.search(rf"\b{name}\b", text)}
        bos = tokenizer.bos_token_id
        self.adds_bos = bos is not None and tokenizer("a").input_ids[:1] == [bos]

    def messages(self, prompt: Prompt) -> list[dict[str, Any]]:
        """Return the conversation that `prompt` opens."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        return [*head, {"role": "user", "content": prompt.text}]

    def encode_messages(self, conversations: Sequence[Sequence[Message]]) -> list[list[int]]:
        """Return the ids of each conversation up to where the model's answer begins."""
        texts = self.tokenizer.apply_chat_template(
            list(conversations), tokenize=False, add_generation_prompt=True, **self.switches
        )
        texts = [self._close(text) for text in texts]
        return [self._one_bos(ids) for ids in self.tokenizer(texts, add_special_tokens=False).input_ids]

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Return the ids of each prompt in its chat template, with exactly one BOS where the model has one."""
        return self.encode_messages([self.messages(p) for p in prompts]) if prompts else []

    def _close(self, text: str) -> str:
        opened = _OPENED.search(text)
        return f"{text.rstrip()}\n\n</{opened.group(1)}>\n\n" if opened else text

    def _one_bos(self, ids: list[int]) -> list[int]:
        bos = self.tokenizer.bos_token_id
        if self.adds_bos and ids[:1] != [bos]:
            return [bos, *ids]
        while bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        return ids

    def pack(self, ids: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]] | None = None) -> Encoded:
        """Pad prompts on the left and continuations on the right, so that all prompts end in one column."""
        after: Sequence[Sequence[int]] = continuations or [()] * len(ids)
        start, width = max(map(len, ids)), max(map(len, after))
        tokens = torch.full((len(ids), start + width), self.pad)
        mask = torch.zeros_like(tokens)
        for row, (prompt, reply) in enumerate(zip(ids, after, strict=True)):
            span = slice(start - len(prompt), start + len(reply))
            tokens[row, span] = torch.tensor([*prompt, *reply])
            mask[row, span] = 1
        return Encoded({"input_ids": tokens, "attention_mask": mask}, start)

    def batch(self, prompts: Sequence[Prompt], continuations: Sequence[Sequence[int]] | None = None) -> Encoded:
        """Encode and pad prompts, each followed by its continuation."""
        return self.pack(self.encode(prompts), continuations)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of generated ids, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def describe(self) -> dict[str, Any]:
        """Return what was done to every prompt, for the record."""
        return {"template_sha256": hashlib.sha256(str(self.template).encode()).hexdigest(), "system": self.system}


def strip_reasoning(text: str) -> str:
    """Return `text` without reasoning blocks, closed or not."""
    text = re.sub(r"(?s)<(think|thinking|reasoning)>.*?(</\1>|$)", "", text)
    return re.sub(r"(?s)^.*</(think|thinking|reasoning)>", "", text).strip()
