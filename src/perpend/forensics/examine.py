"""What was done to a checkpoint: every tensor compared with the base's, accounts tried, a verdict with its grounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perpend.core.kernels import Kernel, fit_kernel
from perpend.errors import UsageError
from perpend.export.checkpoint import Checkpoint
from perpend.forensics import accounts
from perpend.forensics.change import EXPLAINS, Change, measure
from perpend.forensics.pairs import Pair, Pairs, matrices, read_tensor
from perpend.forensics.shared import Shared, shared
from perpend.forensics.verdict import Rest, Verdict, judge
from perpend.progress import track

_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")


@dataclass(frozen=True)
class Vector:
    """A tensor that is no matrix, a norm or a bias, of which the other checkpoint has other numbers."""

    tensor: str
    moved: float

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return dict(vars(self))


@dataclass(frozen=True, eq=False)
class Examination:
    """Everything that two checkpoints say of each other."""

    tensors: int
    equal: int
    """Tensors that are the same byte for byte."""
    cast: int
    """Tensors of other bytes and the same numbers."""
    changes: tuple[Change, ...]
    vectors: tuple[Vector, ...]
    missing: tuple[str, ...]
    added: tuple[str, ...]
    reshaped: tuple[str, ...]
    unread: tuple[str, ...]
    """Tensors that differ and whose dtype is not read, such as packed integers."""
    n_layers: dict[str, int]
    """Layers by what comes before them in the names."""
    shared: Shared | None
    kernels: dict[str, tuple[list[float], Kernel]]
    """λ of every layer and the schedule that fits, by kind of matrix."""
    verdict: Verdict

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "verdict": self.verdict.to_json(),
            "tensors": {
                "matched": self.tensors,
                "equal": self.equal,
                "cast": self.cast,
                "changed": self.tensors - self.equal - self.cast,
                "missing": list(self.missing),
                "added": list(self.added),
                "reshaped": list(self.reshaped),
                "unread": list(self.unread),
            },
            "ablation": self.shared.to_json() if self.shared else None,
            "kernels": {kind: {"weights": w, **k.to_json()} for kind, (w, k) in self.kernels.items()},
            "changes": [change.to_json() for change in self.changes],
            "vectors": [vector.to_json() for vector in self.vectors],
        }


def hidden_size(checkpoint: Checkpoint) -> int | None:
    """Return the size of the residual stream from `config.json`, None when it does not say."""
    config = checkpoint.config()
    parts = [config.get(name) for name in ("text_config", "llm_config", "language_config")]
    for part in [p for p in parts if isinstance(p, dict)] + [config]:
        for name in _WIDTHS:
            if isinstance(part.get(name), int):
                return int(part[name])
    return None


@torch.no_grad()
def examine(before: Path, after: Path, third: Path | None = None) -> Examination:
    """Compare two checkpoints of one architecture, tensor by tensor; at most two or three tensors are in memory.

    Args:
        before: Folder of the base.
        after: Folder of the other.
        third: Folder of a model that the other may have been merged with.

    Raises:
        UsageError: a folder holds no safetensors checkpoint, or they have no tensor in common.
        RunFailed: a file cannot be read.
    """
    pairs = Pairs(before, after)
    other = Checkpoint(third) if third is not None else None
    hidden = hidden_size(pairs.before)
    changes: list[Change] = []
    vectors: list[Vector] = []
    unread: list[str] = []
    equal = cast = kept = 0
    for pair in track(pairs.matched, "compare"):
        if pairs.equal(pair):
            equal += 1
            kept += pair.is_matrix
            continue
        read = pairs.read(pair)
        if read is None:
            unread.append(pair.before.name)
            continue
        if _same(*read):
            cast += 1
            kept += pair.is_matrix
            continue
        if not pair.is_matrix:
            size = float(read[0].double().norm())
            vectors.append(Vector(pair.before.name, float((read[1].double() - read[0].double()).norm()) / (size or 1)))
            continue
        changes += _changes(pair, read, _third(other, pair), hidden)
    found = shared(changes)
    if found is not None:
        changes = [_along_shared(change, pairs, found) for change in changes]
        found = shared(changes)
    n_layers = _layers(pairs)
    rest = Rest(
        matrices=sum(pair.is_matrix for pair in pairs.matched),
        kept=kept,
        vectors=len(vectors),
        cast=cast,
        unread=len(unread),
        apart=len(pairs.missing) + len(pairs.reshaped),
        added=len(pairs.added),
        third=third is not None,
    )
    return Examination(
        tensors=len(pairs.matched),
        equal=equal,
        cast=cast,
        changes=tuple(changes),
        vectors=tuple(vectors),
        missing=pairs.missing,
        added=pairs.added,
        reshaped=pairs.reshaped,
        unread=tuple(unread),
        n_layers=n_layers,
        shared=found,
        kernels=_kernels(changes, n_layers) if found is not None else {},
        verdict=judge(changes, rest),
    )


def _layers(pairs: Pairs) -> dict[str, int]:
    """Return how many layers there are, by what comes before them in the names."""
    found: dict[str, int] = {}
    for pair in pairs.matched:
        if pair.place.layer is not None:
            found[pair.place.stem] = max(found.get(pair.place.stem, 0), pair.place.layer + 1)
    return found


def _same(a: Tensor, b: Tensor) -> bool:
    """Compare the numbers of two tensors of one shape, whatever their dtypes, some millions at a time."""
    parts = (torch.split(x.flatten(), 1 << 24) for x in (a, b))
    return all(torch.equal(x.double(), y.double()) for x, y in zip(*parts, strict=True))


def _third(checkpoint: Checkpoint | None, pair: Pair) -> Tensor | None:
    if checkpoint is None:
        return None
    entry = checkpoint.tensors.get(pair.before.name) or checkpoint.tensors.get(pair.after.name)
    if entry is None or entry.shape != pair.before.shape:
        raise UsageError(f"has no tensor {pair.before.name!r} of the base's shape", where=str(checkpoint.path))
    return read_tensor(checkpoint, entry)


def _changes(pair: Pair, read: tuple[Tensor, Tensor], third: Tensor | None, hidden: int | None) -> list[Change]:
    found = []
    for part, w, new in matrices(*read):
        other = third if third is None or part is None else third[part]
        change = measure(pair.before.name, part, w, new, other, hidden)
        if change.sizes.energy:
            found.append(change)
    return found


def _along_shared(change: Change, pairs: Pairs, found: Shared) -> Change:
    """Fit the shared direction to a matrix whose own is too faint to be found, or explains less."""
    own = change.ablation
    directions = found.at(change.place.layer)
    passed = own is not None and own.explained >= EXPLAINS and own.mode == found.mode
    if directions is None or passed or (own is None and change.told and change.low_rank < 0.1):
        return change
    side = 0 if found.side == "output" else 1
    if change.shape[side] != directions.shape[1]:
        return change
    read = pairs.read(pairs.by_name[change.tensor])
    assert read is not None
    w, new = read if change.part is None else (read[0][change.part], read[1][change.part])
    if side == 1:
        w, new = w.mT, new.mT
    made = accounts.told(w, new, change.sizes, found.side, found.mode, directions)
    if own is not None:
        made = replace(made, misses={**made.misses, **own.misses})
        if own.explained > made.explained:
            return change
    return replace(change, ablation=made) if made.explained > 0 or not change.told else change


def _kernels(changes: Sequence[Change], n_layers: dict[str, int]) -> dict[str, tuple[list[float], Kernel]]:
    """Fit a schedule to λ of every kind of matrix that some layer was ablated in; λ of experts is their mean."""
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    passed: set[tuple[str, str]] = set()
    for change in changes:
        made, place = change.ablation, change.place
        if made is None or place.layer is None:
            continue
        key = (place.stem, place.kind)
        found.setdefault(key, {}).setdefault(place.layer, []).append(made.weight)
        if change.told and made.explained >= EXPLAINS:
            passed.add(key)
    kernels = {}
    for stem, kind in sorted(passed):
        layers = found[stem, kind]
        weights = [sum(layers[k]) / len(layers[k]) if k in layers else 0.0 for k in range(n_layers[stem])]
        kernels[kind] = (weights, fit_kernel(weights))
    return kernels
