"""A loaded model with hooks: read residuals, put edits in place, generate, score."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from perpend.config import Machine
from perpend.data import Prompt
from perpend.errors import UsageError
from perpend.models.chat import Chat, strip_reasoning
from perpend.models.load import Loaded, position_ids
from perpend.progress import track


@dataclass(frozen=True)
class Reply:
    """What the model answered: `tokens` end with the end token when `finished`."""

    text: str
    tokens: tuple[int, ...]
    finished: bool


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    @classmethod
    def of(cls, model: Any, seed: int = 0) -> Sampling:
        """Return the model's own settings."""
        own = model.generation_config
        return cls(own.temperature or 1.0, own.top_k or 0, own.top_p or 1.0, seed)


@dataclass(frozen=True)
class Batch:
    """A teacher-forcing batch.

    Attributes:
        index: Positions of the rows in the list that was asked for.
        inputs: Keyword arguments of the model.
        start: Column of the first continuation token.
        tokens: `[B, T]` int64 continuation tokens, 0 where a row has no more.
        mask: `[B, T]` bool, which of them are there.
    """

    index: list[int]
    inputs: dict[str, Tensor]
    start: int
    tokens: Tensor
    mask: Tensor


class Session:
    """One model in memory."""

    def __init__(self, loaded: Loaded, machine: Machine | None = None, *, system: str | None = None) -> None:
        self.loaded, self.machine = loaded, machine or Machine()
        self.model: Any = loaded.model
        self.chat = Chat(loaded.tokenizer, loaded.processor, system)
        self._layers: list[nn.Module] = list(self.model.get_decoder().layers)
        self._base = getattr(self.model, self.model.base_model_prefix)
        self.device = next(self.model.parameters()).device
        self.n_layers = len(self._layers)
        self.hidden_size = int(self.model.config.get_text_config().hidden_size)

    def _plan(self, lengths: Sequence[int], budget: int) -> list[list[int]]:
        """Group rows of similar length, longest first, into batches of at most `budget` padded tokens."""
        groups: list[list[int]] = []
        width = 0
        for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            full = groups and (
                len(groups[-1]) >= self.machine.batch_size
                if isinstance(self.machine.batch_size, int)
                else (len(groups[-1]) + 1) * width > budget
            )
            if not groups or full:
                groups.append([])
                width = lengths[row]
            groups[-1].append(row)
        return groups

    def _inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v.to(self.device) for k, v in (inputs | position_ids(self.model, inputs)).items()}

    @torch.no_grad()
    def capture(self, prompts: Sequence[Prompt], *, position: int = -1) -> Iterator[Tensor]:
        """Yield residuals `[B, L, d]` float32 in prompt order, `[:, l]` on the output of layer l."""
        ids = self.chat.encode(prompts)
        for first in range(0, len(ids), 256):
            window = ids[first : first + 256]
            out = torch.empty(len(window), self.n_layers, self.hidden_size)
            for rows in self._plan([len(i) for i in window], 8192):
                out[rows] = self._residuals(self.chat.pack([window[r] for r in rows]).inputs, position)
            yield out

    def _residuals(self, inputs: dict[str, Tensor], position: int) -> Tensor:
        kept: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            kept.append(hidden[:, position].to(torch.float32, copy=True))

        handles = [layer.register_forward_hook(keep) for layer in self._layers]
        try:
            self._base(**self._inputs(inputs), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack([k.cpu() for k in kept], dim=1)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        store: MutableMapping[str, Reply] | None = None,
    ) -> list[Reply]:
        """Return one reply per prompt, greedy unless `sampling` is given."""
        from transformers import GenerationConfig

        ids = self.chat.encode(prompts)
        done: dict[int, Reply] = {i: store[p.id] for i, p in enumerate(prompts) if store is not None and p.id in store}
        ends = self.model.generation_config.eos_token_id
        ends = {*(ends if isinstance(ends, list) else [ends]), self.chat.tokenizer.eos_token_id} - {None}
        draw = (
            {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0}
            if sampling is None
            else {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_k": sampling.top_k,
                "top_p": sampling.top_p,
            }
        )
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(ends),
            pad_token_id=self.chat.pad,
            repetition_penalty=1.0,
            **draw,
        )
        groups = self._plan([len(i) + max_new_tokens for i in ids], 16384)
        for rows in track(groups, "generate", total=len(ids), size=len):
            if all(r in done for r in rows):
                continue
            if sampling is not None:
                torch.manual_seed(sampling.seed + rows[0])
            packed = self.chat.pack([ids[r] for r in rows])
            inputs = {k: v.to(self.device) for k, v in packed.inputs.items()}
            with torch.no_grad():
                new = self.model.generate(**inputs, generation_config=config)[:, packed.start :]
            for r, tokens in zip(rows, new.tolist(), strict=True):
                end = next((i for i, t in enumerate(tokens) if t in ends), None)
                tokens = tokens if end is None else tokens[: end + 1]
                reply = Reply(strip_reasoning(self.chat.decode(tokens)), tuple(tokens), end is not None)
                done.setdefault(r, reply)
                if store is not None:
                    store.setdefault(prompts[r].id, reply)
        return [done[i] for i in range(len(ids))]

    def batches(
        self, prompts: Sequence[Prompt], continuations: Sequence[Sequence[int]], *, max_tokens: int | None = None
    ) -> Iterator[Batch]:
        """Yield teacher-forcing batches, longest first."""
        after = [list(c)[:max_tokens] for c in continuations]
        ids = self.chat.encode(prompts)
        for rows in self._plan([len(i) + len(a) for i, a in zip(ids, after, strict=True)], 4096):
            packed = self.chat.pack([ids[r] for r in rows], [after[r] for r in rows])
            mask = packed.inputs["attention_mask"][:, packed.start :].bool()
            tokens = packed.inputs["input_ids"][:, packed.start :].masked_fill(~mask, 0)
            yield Batch(rows, self._inputs(packed.inputs), packed.start, tokens.to(self.device), mask.to(self.device))

    def logits(self, batch: Batch) -> Tensor:
        """Return `[B, T, V]` float32; `[:, t]` predicts continuation token t."""
        keep = torch.arange(batch.start - 1, batch.start - 1 + batch.tokens.shape[1], device=self.device)
        with torch.no_grad():
            return self.model(**batch.inputs, use_cache=False, logits_to_keep=keep).logits.float()

    def log_likelihood(self, prompts: Sequence[Prompt], continuations: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return the log-probability of each continuation token, `[n_i]` float32 each, in prompt order."""
        found: list[Tensor] = [torch.empty(0)] * len(prompts)
        for batch in self.batches(prompts, continuations):
            logits = self.logits(batch)
            scores = logits.gather(-1, batch.tokens[..., None])[..., 0] - logits.logsumexp(-1)
            for row, i in enumerate(batch.index):
                found[i] = scores[row][batch.mask[row]].cpu()
        return found

    @contextmanager
    def edited(self, edit: Any) -> Iterator[None]:
        """Put an edit in place inside the block."""
        handles: list[Any] = []
        modules = dict(self.model.named_modules())
        if getattr(self, "_editing", False) and edit is not None:
            raise UsageError("an edit is already in place")
        self._editing = edit is not None
        try:
            for name, part in edit.modules.items() if edit is not None else ():
                handles.append(modules[name].register_forward_hook(_plain(part)))
            yield
        finally:
            self._editing = False
            for handle in handles:
                handle.remove()


def _plain(part: Any) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        v = part.directions.to(output.device)
        y = output.float()
        return (y - part.weight * (y @ v.T) @ v).to(output.dtype)

    return hook
