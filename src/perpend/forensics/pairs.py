"""Two checkpoints side by side: which tensors they share, which of them differ, one tensor in memory at a time."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from perpend.errors import UsageError
from perpend.export.checkpoint import Checkpoint
from perpend.export.names import TORCH_DTYPES
from perpend.models.headers import TensorEntry

CHUNK = 8 << 20
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.(.+)$")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Place:
    """Where in a model a tensor belongs, read from its name.

    Attributes:
        layer: Index of the decoder layer, None outside the layers.
        kind: The rest of the name, the same in every layer, such as `mlp.down_proj`; experts are `*`.
        stem: What comes before the layers, which tells the layers of a vision tower from those of the text.
    """

    layer: int | None
    kind: str
    stem: str = ""

    @classmethod
    def of(cls, name: str) -> Place:
        """Read a tensor's name."""
        found = _LAYER.search(name)
        kind = _NUMBER.sub("*", found[2] if found else name).removesuffix(".weight")
        return cls(int(found[1]) if found else None, kind, name[: found.start()] if found else "")


@dataclass(frozen=True)
class Pair:
    """One tensor in both checkpoints."""

    before: TensorEntry
    after: TensorEntry

    @property
    def place(self) -> Place:
        """Where it belongs, by its name in the base."""
        return Place.of(self.before.name)

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix or a stack of them, rather than a vector."""
        return len(self.before.shape) in (2, 3)


class Pairs:
    """The tensors of two checkpoints, matched by name.

    Attributes:
        before: The base.
        after: The other.
        matched: Tensors of the same shape, in the base's order.
        by_name: The same by their name in the base.
        missing: Names that only the base has.
        added: Names that only the other has.
        reshaped: Names whose shapes differ.
    """

    def __init__(self, before: Path, after: Path) -> None:
        """Read both headers; no weights.

        Raises:
            UsageError: no safetensors checkpoint, or not one tensor that both have.
        """
        self.before, self.after = Checkpoint(before), Checkpoint(after)
        names = _matched(self.before.tensors, self.after.tensors)
        pairs = [Pair(self.before.tensors[a], self.after.tensors[b]) for a, b in names.items()]
        self.matched = tuple(pair for pair in pairs if pair.before.shape == pair.after.shape)
        self.by_name = {pair.before.name: pair for pair in self.matched}
        self.reshaped = tuple(pair.before.name for pair in pairs if pair.before.shape != pair.after.shape)
        self.missing = tuple(sorted(set(self.before.tensors) - set(names)))
        self.added = tuple(sorted(set(self.after.tensors) - set(names.values())))
        if not self.matched:
            raise UsageError(
                "has no tensor of the same name and shape as the base",
                where=str(after),
                valid="a checkpoint of the same architecture",
            )

    def equal(self, pair: Pair) -> bool:
        """Say whether a tensor is the same byte for byte, a few megabytes at a time."""
        if (pair.before.dtype, pair.before.nbytes) != (pair.after.dtype, pair.after.nbytes):
            return False
        for start in range(0, pair.before.nbytes, CHUNK):
            stop = min(start + CHUNK, pair.before.nbytes)
            if self.before.read(pair.before, start, stop) != self.after.read(pair.after, start, stop):
                return False
        return True

    def read(self, pair: Pair) -> tuple[Tensor, Tensor] | None:
        """Read one tensor of both; None where a dtype is no plain floating point."""
        if pair.before.dtype not in TORCH_DTYPES or pair.after.dtype not in TORCH_DTYPES:
            return None
        return read_tensor(self.before, pair.before), read_tensor(self.after, pair.after)


def read_tensor(checkpoint: Checkpoint, entry: TensorEntry) -> Tensor:
    """Return one tensor in its own dtype and shape, on the CPU.

    Raises:
        UsageError: its dtype is no plain floating point.
    """
    if entry.dtype not in TORCH_DTYPES:
        raise UsageError(f"tensor {entry.name!r} has dtype {entry.dtype}", valid=", ".join(TORCH_DTYPES))
    dtype = TORCH_DTYPES[entry.dtype]
    if not entry.nbytes:
        return torch.empty(entry.shape, dtype=dtype)
    return torch.frombuffer(checkpoint.read(entry), dtype=dtype).view(entry.shape)


def matrices(before: Tensor, after: Tensor) -> Iterator[tuple[int | None, Tensor, Tensor]]:
    """Yield the matrices of a tensor with their index: one, or one per expert; none for vectors."""
    if before.ndim == 2:
        yield None, before, after
    elif before.ndim == 3:
        for index in range(before.shape[0]):
            yield index, before[index], after[index]


def _matched(before: dict[str, TensorEntry], after: dict[str, TensorEntry]) -> dict[str, str]:
    """Map names of the base to names of the other: the same, else the one with the same unique end."""
    found = {name: name for name in before if name in after}
    left, right = ([n for n in names if n not in found] for names in (before, after))
    ends = {name: _end(name) for name in (*left, *right)}
    once = [Counter(ends[n] for n in names) for names in (left, right)]
    by_end = {ends[name]: name for name in right if once[1][ends[name]] == 1}
    return found | {name: by_end[ends[name]] for name in left if once[0][ends[name]] == 1 and ends[name] in by_end}


def _end(name: str) -> str:
    """Return a name from its layer on, or its last two parts: what wrappers such as `model.` leave alone."""
    found = _LAYER.search(name)
    return f"{found[1]}.{found[2]}" if found else ".".join(name.split(".")[-2:])
