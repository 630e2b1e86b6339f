"""How much of a direction the writers of a model still write.

A matrix W `[d, n]` writes ‖V W‖² of its ‖W‖² along k directions V; were its output the same in all directions that
would be k/d of it. `written` is √(d/k) ‖V W‖ / ‖W‖: 1 for a direction like any other, and |1 - λ| times what it was
after an edit with weight factor λ. Real matrices are not the same in all directions, so random directions are put to
the same test, and a direction counts as missing when less than half of the least of them is written along it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perpend.core.linear import orthonormalise
from perpend.core.maps import blocks
from perpend.errors import UsageError
from perpend.export.checkpoint import Checkpoint
from perpend.export.names import Locator, TensorSlice
from perpend.forensics.pairs import Pairs
from perpend.models.anatomy import Anatomy, Writer
from perpend.progress import track

CONTROLS = 64
"""Random directions that every matrix is tested with."""
MISSING = 0.5
"""A direction is missing when less than this share of the least control is written along it."""


@dataclass(frozen=True)
class Written:
    """What one writer writes along a direction."""

    module: str
    layer: int
    component: str
    expert: int | None
    """The expert that writes least of it; None for a single matrix."""
    written: float
    """√(d/k) ‖V W‖ / ‖W‖: 1 for a direction like any other, 0 when nothing is written along it."""
    least: float
    """The least among random directions."""
    median: float
    """The median among random directions."""
    left: float | None
    """‖V W‖ relative to the base's ‖V W‖, None without a base: |1 - λ|."""
    missing: bool

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


class Writers:
    """The matrices of a checkpoint that write to the residual stream, read one at a time.

    Attributes:
        anatomy: Of the model.
    """

    def __init__(self, folder: Path, model: nn.Module, anatomy: Anatomy) -> None:
        """Find them by name and shape.

        Args:
            folder: The checkpoint.
            model: Its skeleton; no weights are needed.
            anatomy: Of that model.

        Raises:
            UsageError: no safetensors checkpoint.
        """
        self.checkpoint, self.anatomy = Checkpoint(folder), anatomy
        self._locator = Locator(self.checkpoint, model, anatomy)

    def slices(self, writer: Writer) -> list[TensorSlice]:
        """Return where a writer's matrices lie."""
        return self._locator.matrices(writer)

    def read(self, piece: TensorSlice) -> Tensor:
        """Return one matrix, `[d_out, d_in]`, in its own dtype."""
        return piece.view(self.checkpoint.read(piece.entry, piece.begin, piece.end))

    def all(self) -> Iterator[tuple[Writer, list[TensorSlice]]]:
        """Yield every writer with its matrices."""
        for writer in self.anatomy.writers:
            yield writer, self.slices(writer)


def written(matrix: Tensor, frames: Tensor) -> Tensor:
    """Return √(d/k) ‖V W‖ / ‖W‖ for several V at once.

    Args:
        matrix: `[d, n]` W, any float dtype.
        frames: `[c, k, d]` orthonormal rows.

    Returns:
        `[c]` float64; 0 for a matrix of zeros.
    """
    c, k, d = frames.shape
    along, whole = torch.zeros(c, dtype=torch.float64), 0.0
    flat = frames.double().reshape(c * k, d)
    for _, (w,) in blocks(matrix):
        along += (flat @ w).square().sum(1).view(c, k).sum(1)
        whole += float(w.square().sum())
    return (along / whole * d / k).sqrt() if whole else along


def controls(k: int, d: int, seed: int = 0) -> Tensor:
    """Return random orthonormal frames `[CONTROLS, k, d]` float64."""
    generator = torch.Generator().manual_seed(seed)
    return orthonormalise(torch.randn(CONTROLS, k, d, generator=generator, dtype=torch.float64))


@torch.no_grad()
def audit_writers(writers: Writers, directions: Mapping[str, Tensor], base: Path | None = None) -> list[Written]:
    """Measure how much of a direction every writer writes.

    Args:
        writers: Of the model.
        directions: `[k, d]` by name of the writer; writers without an entry are left out.
        base: Folder of the unedited checkpoint.

    Returns:
        A row per writer, in the order of the layers; of experts the one that writes least.

    Raises:
        UsageError: directions of another width, or a base of another architecture.
    """
    pairs = Pairs(base, writers.checkpoint.path) if base is not None else None
    matched = {pair.after.name: pair for pair in pairs.matched} if pairs else {}
    random: dict[int, Tensor] = {}
    rows = []
    chosen = [(w, s) for w, s in writers.all() if w.name in directions]
    for writer, pieces in track(chosen, "audit"):
        rows_of = directions[writer.name]
        k, d = rows_of.shape
        if d != writer.d_out:
            raise UsageError(f"directions of {d} dimensions", where=writer.name, valid=f"{writer.d_out}, as the model")
        if k not in random:
            random[k] = controls(k, d)
        frames = torch.cat([orthonormalise(rows_of)[None], random[k]])
        found = []
        for piece in pieces:
            matrix = writers.read(piece)
            values = written(matrix, frames)
            left = None
            if pairs is not None:
                if piece.entry.name not in matched:
                    raise UsageError(f"has no tensor like {piece.entry.name!r}", where=str(base))
                old = piece.view(pairs.before.read(matched[piece.entry.name].before, piece.begin, piece.end))
                left = _left(old, matrix, frames[0])
            found.append(_row(writer, piece, values, left))
        rows.append(min(found, key=lambda row: row.written))
    return rows


def _left(old: Tensor, new: Tensor, v: Tensor) -> float:
    before = after = 0.0
    for _, (w, w_new) in blocks(old, new):
        before += float((v @ w).square().sum())
        after += float((v @ w_new).square().sum())
    return math.sqrt(after / before) if before else 1.0


def _row(writer: Writer, piece: TensorSlice, values: Tensor, left: float | None) -> Written:
    random = values[1:]
    return Written(
        module=writer.name,
        layer=writer.layer,
        component=writer.component,
        expert=piece.expert,
        written=float(values[0]),
        least=float(random.min()),
        median=float(random.median()),
        left=left,
        missing=bool(values[0] < MISSING * random.min()),
    )
