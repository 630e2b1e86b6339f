"""What a later plain pass of llama.cpp would do to a checkpoint and to an edit of it: weights only, one at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from perpend.core.edits import Edit, realised
from perpend.core.maps import ModuleEdit
from perpend.core.quant import GROUP, RANGES, moved, simulate
from perpend.errors import UsageError, nearest
from perpend.export.checkpoint import Checkpoint
from perpend.export.names import Locator, TensorSlice
from perpend.export.shards import edit_in_place
from perpend.progress import track

if TYPE_CHECKING:
    from perpend.models.anatomy import Anatomy, Writer


@dataclass(frozen=True)
class Surveyed:
    """One writer before and after a plain pass; of several experts the one that changes or misses most.

    Attributes:
        module: Name of the writer.
        layer: Its layer.
        component: attention or mlp.
        moved: ‖Q(W) - W‖ / ‖W‖ of the untouched matrix by type; None for a type that cannot hold its rows.
        asked: Weight factor λ of the edit; None where it does not touch the writer.
        saved: λ in the dtype of the checkpoint, as `perpend apply` would write it.
        quantised: λ after the plain pass, by type; None as for `moved`.
    """

    module: str
    layer: int
    component: str
    moved: dict[str, float | None]
    asked: float | None
    saved: float | None
    quantised: dict[str, float | None]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


class Survey:
    """The writers of a checkpoint, read from its files."""

    def __init__(self, checkpoint: Checkpoint, model: nn.Module, anatomy: Anatomy, edit: Edit | None = None) -> None:
        """Find where they lie.

        Args:
            checkpoint: The untouched model.
            model: It in memory, or its skeleton.
            anatomy: Its writers.
            edit: What would be baked.

        Raises:
            UsageError: quantised weights, a writer that is not in the files, or an edit of another model.
        """
        method = checkpoint.quantisation()
        if method:
            raise UsageError(
                f"weights are quantised ({method})",
                where=str(checkpoint.path),
                valid="float32, bfloat16 or float16 weights",
            )
        self.checkpoint, self._asked = checkpoint, dict(edit.modules) if edit else {}
        names = {writer.name for writer in anatomy.writers}
        for name in self._asked:
            if name not in names:
                raise UsageError(f"no writer '{name}' in this model", where="edit", hint=nearest(name, names))
        locator = Locator(checkpoint, model, anatomy)
        self._pieces = {writer: locator.matrices(writer) for writer in anatomy.writers}

    def read(self, piece: TensorSlice) -> Tensor:
        """Return a matrix `[d_out, d_in]` in the dtype of its file, on the CPU."""
        return piece.view(self.checkpoint.read(piece.entry, piece.begin, piece.end))

    def saved(self, writer: Writer, rounding: str = "auto") -> Iterator[tuple[TensorSlice, Tensor]]:
        """Yield the matrices of a writer as `perpend apply` would write them, `[d_out, d_in]`, with where they lie.

        Args:
            writer: Any; without an edit its matrices come as they are.
            rounding: As in the recipe.
        """
        part = self._asked.get(writer.name)
        for piece in self._pieces[writer]:
            yield piece, _edited(self.read(piece), part, rounding)

    def rows(self, kinds: Sequence[str], rounding: str = "auto") -> Iterator[Surveyed]:
        """Read every writer once and put it through a plain pass of every type, untouched and edited.

        Args:
            kinds: q4_0, q8_0, bf16 or another type that `core.quant.simulate` knows.
            rounding: As in the recipe: q4_0 and q8_0 keep the edit.
        """
        for writer in track(list(self._pieces), "quantise"):
            part = self._asked.get(writer.name)
            part = None if part is None or part.weight == 0 else part
            found = [_row(writer, self.read(piece), part, kinds, rounding) for piece in self._pieces[writer]]
            yield found[0] if len(found) == 1 else _worst(found)


def _edited(before: Tensor, part: ModuleEdit | None, rounding: str) -> Tensor:
    if part is None or part.weight == 0:
        return before
    lattice = rounding if rounding in RANGES and before.shape[1] % GROUP == 0 else ""
    after = before.clone()
    edit_in_place(after, part, lattice=lattice)
    return after


@torch.no_grad()
def _row(writer: Writer, before: Tensor, part: ModuleEdit | None, kinds: Sequence[str], rounding: str) -> Surveyed:
    held = [kind for kind in kinds if kind == "bf16" or before.shape[1] % GROUP == 0]
    shares: dict[str, float | None] = dict.fromkeys(kinds)
    shares |= {kind: moved(before.contiguous(), kind) for kind in held}
    later: dict[str, float | None] = dict.fromkeys(kinds) if part else {}
    saved = None
    if part is not None:
        after = _edited(before, part, rounding).contiguous()
        saved = _weight(before, after, part)
        later |= {kind: _weight(before, simulate(after, kind), part) for kind in held}
    asked = part.weight if part else None
    return Surveyed(writer.name, writer.layer, writer.component, shares, asked, saved, later)


def _weight(before: Tensor, after: Tensor, part: ModuleEdit) -> float | None:
    """Return the realised λ, None for a matrix that writes nothing along the directions."""
    found = realised(before, after, part.directions, mode=part.mode).weight
    return None if math.isnan(found) else found


def _worst(rows: Sequence[Surveyed]) -> Surveyed:
    """Return one row for the experts of a writer."""
    asked = rows[0].asked

    def most(values: Sequence[float | None], middle: float) -> float | None:
        return max((v for v in values if v is not None), key=lambda v: abs(v - middle), default=None)

    return Surveyed(
        rows[0].module,
        rows[0].layer,
        rows[0].component,
        {kind: most([row.moved[kind] for row in rows], 0.0) for kind in rows[0].moved},
        asked,
        most([row.saved for row in rows], asked or 0.0),
        {kind: most([row.quantised[kind] for row in rows], asked or 0.0) for kind in rows[0].quantised},
    )
