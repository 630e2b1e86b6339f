"""Prove an export on its saved bytes: weights only, no forward pass, one matrix at a time.

`leak_gate` answers whether every edited module lost of its directions what was asked; `untouched_equal` whether
everything else is still the original, byte for byte.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from perpend.core.edits import Edit
from perpend.core.leak import Realised, realised
from perpend.core.maps import ModuleEdit
from perpend.core.quant import RANGES, simulate
from perpend.errors import GateFailed, RunFailed
from perpend.export.checkpoint import Checkpoint, files
from perpend.export.names import Locator, TensorSlice
from perpend.models.headers import read_range
from perpend.progress import track

if TYPE_CHECKING:
    from perpend.models.anatomy import Anatomy, Writer

TOLERANCE = 0.05
"""Largest difference between asked and realised weight factor that passes."""
_STREAM = 8 << 20


@dataclass(frozen=True)
class LeakRow:
    """What one module really lost, read from the saved file.

    Attributes:
        module: Name of the writer.
        layer: Its layer.
        component: attention or mlp.
        expert: The expert that misses by most, which the numbers are of; None for a single matrix.
        asked: Weight factor λ.
        realised: λ measured along the directions of the edit, in the space it was asked in; NaN when the matrix writes
            nothing along them.
        noise: What is left beyond (1 - λ) of the old, relative to the old.
        missing: 1 - what is left of the direction for whatever reason, scales of the mode included. Equal to
            `realised` in plain mode; in row mode it shows how much of the direction comes back.
        residual: λ measured behind the post-norm, where the residual stream receives it; None without a post-norm.
        ok: `realised` is within 0.05 of `asked`, and so is `quantised` where there is one.
        quantised: λ after a plain pass of the type that the export was rounded for; None when it was for none.
    """

    module: str
    layer: int
    component: str
    expert: int | None
    asked: float
    realised: float
    noise: float
    missing: float
    residual: float | None
    ok: bool
    quantised: float | None = None

    @property
    def miss(self) -> float:
        """|realised - asked|, before or after the plain pass, 0 when there was nothing to lose."""
        found = [self.realised] if self.quantised is None else [self.realised, self.quantised]
        return max((abs(value - self.asked) for value in found if not math.isnan(value)), default=0.0)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; NaN becomes null."""
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class Untouched:
    """How much of an export is the original.

    Attributes:
        tensors: Tensors that were compared whole and are equal.
        bytes: Bytes compared in shards, headers included.
        files: Other files that are equal.
        differing: Tensors and files that differ and should not; files that are missing or are too many.
    """

    tensors: int
    bytes: int
    files: int
    differing: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Nothing differs that should not."""
        return not self.differing

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "differing": list(self.differing), "ok": self.ok}


def leak_gate(
    source: Path,
    exported: Path,
    edit: Edit,
    anatomy: Anatomy,
    model: nn.Module,
    *,
    through_post_norm: bool = False,
    allow_leak: bool = False,
    rounding: str = "auto",
) -> list[LeakRow]:
    """Measure the realised weight factor of every edited module on the saved files.

    Args:
        source: The original checkpoint.
        exported: The edited one.
        edit: What was asked.
        anatomy: Writers of the loaded model.
        model: The unedited model in memory, by which tensors are recognised and gains of post-norms measured.
        through_post_norm: The directions were carried through the post-norms (`core.maps.through_post_norm`), so that
            what is missing in the module's output is missing in the residual stream too.
        allow_leak: Return rows that miss instead of failing.
        rounding: q4_0 or q8_0: the weight factor must hold after a plain pass of that type, too.

    Returns:
        A row per module with a weight factor other than 0, in the order of the edit.

    Raises:
        GateFailed: a module misses by more than 0.05, and leaks are not allowed.
        RunFailed: a tensor changed its name, dtype or shape.
    """
    before, after = Checkpoint(source), Checkpoint(exported)
    locator = Locator(before, model, anatomy)
    rows = []
    asked = [(anatomy.writer(name), part) for name, part in edit.modules.items() if part.weight != 0]
    for writer, part in track(asked, "verify"):
        gain = None if through_post_norm else anatomy.post_norm_gain(model, writer)
        lattice = rounding if rounding in RANGES else ""
        found = [
            leak_row(writer, part, p.expert, _pair(before, after, p), gain, lattice) for p in locator.matrices(writer)
        ]
        worst = max(found, key=lambda row: row.miss)
        if through_post_norm and writer.post_norm is not None:
            worst = replace(worst, residual=worst.missing)
        rows.append(worst)
    return require_realised(rows, allow_leak)


def require_realised(rows: list[LeakRow], allow_leak: bool = False) -> list[LeakRow]:
    """Refuse an export of which a module misses its weight factor.

    Args:
        rows: A row per module.
        allow_leak: Return rows that miss instead of failing.

    Raises:
        GateFailed: names the worst.
    """
    missed = [row for row in rows if not row.ok]
    if missed and not allow_leak:
        worst = max(missed, key=lambda row: row.miss)
        where = worst.module if worst.expert is None else f"{worst.module}, expert {worst.expert}"
        got = worst.realised if worst.quantised is None else worst.quantised
        raise GateFailed(
            f"{len(missed)} of {len(rows)} modules miss their weight factor; "
            f"the worst asked {worst.asked:.2f} and got {got:.2f}",
            where=where,
            valid=f"within {TOLERANCE}",
            hint="--allow-leak",
        )
    return rows


def _pair(before: Checkpoint, after: Checkpoint, piece: TensorSlice) -> tuple[Tensor, Tensor]:
    """Read a slice from both checkpoints, each from where its own header says, as [d_out, d_in]."""
    old, new = piece.entry, after.tensors.get(piece.entry.name)
    if new is None or (new.dtype, new.shape, new.shard) != (old.dtype, old.shape, old.shard):
        raise RunFailed(f"tensor {old.name!r} is not what it was", where=str(after.path / old.shard))
    pair = [piece.view(c.read(entry, piece.begin, piece.end)) for c, entry in ((before, old), (after, new))]
    return pair[0], pair[1]


@torch.no_grad()
def leak_row(
    writer: Writer,
    part: ModuleEdit,
    expert: int | None,
    pair: tuple[Tensor, Tensor],
    gain: Tensor | None,
    lattice: str = "",
) -> LeakRow:
    """Measure one matrix.

    Args:
        writer: What it belongs to.
        part: What was asked.
        expert: Which expert it is.
        pair: The matrix before and after, `[d_out, d_in]`.
        gain: Of the post-norm, `[d_out]`.
        lattice: Type whose plain pass it must survive.
    """
    found = realised(*pair, part.directions, mode=part.mode)
    whole = found if part.mode == "plain" else realised(*pair, part.directions)
    behind = Realised(math.nan, 0.0) if gain is None else realised(*pair, part.directions, gain)
    later = None
    if lattice:
        later = realised(pair[0], simulate(pair[1].contiguous(), lattice), part.directions, mode=part.mode).weight
    row = LeakRow(
        module=writer.name,
        layer=writer.layer,
        component=writer.component,
        expert=expert,
        asked=part.weight,
        realised=found.weight,
        noise=found.noise,
        missing=whole.weight,
        residual=None if gain is None else behind.weight,
        ok=True,
        quantised=later,
    )
    return replace(row, ok=row.miss <= TOLERANCE)


def untouched_equal(
    source: Path, exported: Path, edited: Collection[str], left_out: Collection[str] = (), added: Collection[str] = ()
) -> Untouched:
    """Compare two folders byte for byte, but for the data of the edited tensors.

    Args:
        source: The original checkpoint.
        exported: The edited one.
        edited: Names of the tensors that may differ, as `ExportResult.edited` has them.
        left_out: Files that were left out on purpose, relative to `source`.
        added: Files that were written anew, such as `README.md`; they may differ.

    Returns:
        Counts, and what differs although it should not.
    """
    checkpoint, differing, tensors, size, others = Checkpoint(source), [], 0, 0, 0
    names, written = (
        {str(path.relative_to(folder)) for path in files(Path(folder))} - {*left_out, *added}
        for folder in (source, exported)
    )
    differing += sorted(written - names)
    for name in sorted(names):
        old, new = Path(source) / name, Path(exported) / name
        if not new.is_file() or new.stat().st_size != old.stat().st_size:
            differing.append(name)
        elif name not in checkpoint.shards:
            equal = _equal(old, new, 0, old.stat().st_size)
            others += equal
            differing += [] if equal else [name]
        else:
            for label, begin, end in _ranges(checkpoint, name):
                if label in edited:
                    continue
                size += end - begin
                if not _equal(old, new, begin, end):
                    differing.append(f"{name}: {label}")
                elif label in checkpoint.tensors:
                    tensors += 1
    return Untouched(tensors, size, others, tuple(differing))


def _ranges(checkpoint: Checkpoint, shard: str) -> Iterator[tuple[str, int, int]]:
    """Yield the header and every tensor of a shard with its byte range; together they are the whole file."""
    entries = sorted((e for e in checkpoint.tensors.values() if e.shard == shard), key=lambda e: (e.begin, e.end))
    start = entries[0].begin if entries else (checkpoint.path / shard).stat().st_size
    yield "header", 0, start
    for entry in entries:
        yield entry.name, entry.begin, entry.end


def _equal(old: Path, new: Path, begin: int, end: int) -> bool:
    """Compare a byte range of two files, a few megabytes at a time."""
    for start in range(begin, end, _STREAM):
        stop = min(start + _STREAM, end)
        if read_range(old, start, stop) != read_range(new, start, stop):
            return False
    return True
