"""Batches: which prompts run together, and how many of them memory allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perpend.config import Machine
from perpend.models.memory import free_memory
from perpend.models.sequence import text_config

CPU_FORWARD = 2048
"""Padded tokens of one forward pass on a CPU: its cores are busy with fewer, and short batches waste less padding."""
CPU_CACHED = 24576
GPU_FORWARD = 32768
GPU_CACHED = 131072


@dataclass(frozen=True)
class Batch:
    """Prompts with given continuations, on the session's device.

    Attributes:
        index: Position of each row in the list that was asked for.
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

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True)
class Budget:
    """How large a batch may be.

    Attributes:
        forward: Padded tokens of a forward pass.
        cached: Padded tokens of a batch that generates, prompt and answer together.
        logits: Positions whose logits are held at once.
        context: Tokens after which the model's positions end, None where it does not say.
        rows: Rows, where the machine section says how many; None for as many as the rest allows.
        waiting: Padded tokens of all batches together that travel through an offloaded model.
    """

    forward: int
    cached: int
    logits: int
    context: int | None = None
    rows: int | None = None
    waiting: int = 1 << 20

    @classmethod
    def of(cls, model: Any, device: torch.device, machine: Machine) -> Budget:
        """Derive the budget from the model's widths and from the memory that is free, of which half is counted on."""
        config = text_config(model)
        hidden, layers = _width(config, "hidden_size", 1024), _width(config, "num_hidden_layers", 32)
        heads = _width(config, "num_attention_heads", 16)
        kv = _width(config, "num_key_value_heads", heads) * _width(config, "head_dim", max(1, hidden // heads))
        inner = _width(config, "intermediate_size", 4 * hidden)
        vocabulary = _width(config, "vocab_size", 50_000)
        size = torch.finfo(model.dtype).bits // 8 if model.dtype.is_floating_point else 2
        free = free_memory(device, machine.memory) // 2
        gpu = device.type != "cpu"
        return cls(
            forward=_between(free // ((10 * hidden + 4 * inner) * size), GPU_FORWARD if gpu else CPU_FORWARD),
            cached=_between(free // (2 * layers * kv * size), GPU_CACHED if gpu else CPU_CACHED),
            logits=_between(min(free // 3, 2**33 if gpu else 2**29) // (4 * vocabulary), GPU_CACHED),
            context=_width(config, "max_position_embeddings", 0) or None,
            rows=machine.batch_size if isinstance(machine.batch_size, int) else None,
            waiting=max(256, free // 2 // (12 * hidden * size)),
        )


def _width(config: Any, name: str, otherwise: int) -> int:
    value = getattr(config, name, None)
    return value if isinstance(value, int) and value > 0 else otherwise


def _between(tokens: int, most: int) -> int:
    return max(256, min(tokens, most))


def plan(
    lengths: Sequence[int],
    budget: int,
    rows: int | None = None,
    *,
    tails: Sequence[int] | None = None,
    tail_budget: int = 0,
    apart: Sequence[bool] | None = None,
) -> list[list[int]]:
    """Group rows of similar length, the longest first, so that what memory cannot hold shows at once.

    Args:
        lengths: Tokens of each row.
        budget: Rows times the longest length is at most this, or the group has one row.
        rows: At most so many rows in a group, in place of `budget`.
        tails: Positions of each row whose logits are needed.
        tail_budget: Rows times the longest tail is at most this, or the group has one row.
        apart: Rows that differ in this never share a group.

    Returns:
        Indices into `lengths`, each once.
    """
    apart = apart or [False] * len(lengths)
    groups: list[list[int]] = []
    width = tail = 0
    for k in sorted(range(len(lengths)), key=lambda k: (apart[k], -lengths[k], k)):
        group = groups[-1] if groups else []
        n = len(group) + 1
        fits = n <= rows if rows is not None else n * width <= budget
        if tails is not None:
            tail = max(tail, tails[k])
            fits = fits and n * tail <= tail_budget
        if group and fits and apart[group[0]] == apart[k]:
            group.append(k)
        else:
            groups.append([k])
            width, tail = lengths[k], tails[k] if tails is not None else 0
    return groups


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in text or "DefaultCPUAllocator" in text)
