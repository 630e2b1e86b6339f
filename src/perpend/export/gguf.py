"""Edit a GGUF file: dequantise the tensors of the edited writers, edit, round to the same type, keep all other bytes.

Weights of a quantised file lie on the lattice of their type, where a plain pass rounds a small edit back; so codes are
chosen by `perpend.core.quant.preserve`, unless the nearest ones are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from perpend.core.edits import Edit
from perpend.core.maps import ModuleEdit, edit_bias, edit_weight
from perpend.core.quant import GROUP, LEVELS, RANGES, Cost, preserve, simulate
from perpend.errors import GateFailed, RunFailed, UsageError, nearest
from perpend.export.gguf_file import Replacement, appearing, layouts, targets, text_pairs, write
from perpend.export.gguf_names import find
from perpend.export.shards import ExportResult
from perpend.export.verify import LeakRow, Untouched, leak_row, require_realised
from perpend.models.gguf import Layout, TensorInfo
from perpend.models.headers import read_range
from perpend.progress import note, track

if TYPE_CHECKING:
    from perpend.models.anatomy import Anatomy, Writer

PLAIN: dict[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
LATTICES = {kind.upper(): kind for kind in (*RANGES, *LEVELS)}
"""Types whose codes can be written, and what `core.quant` calls them."""
_SAMPLE = 8


class Wanted(Protocol):
    """Says what an edited matrix or bias is to be."""

    def __call__(self, change: Change, before: Tensor, expert: int | None) -> Tensor:
        """Return the exact value for what the file holds, `[d_out, d_in]`, or `[d_out]` for a bias."""


@dataclass(frozen=True)
class Change:
    """A tensor to replace.

    Attributes:
        file: Which part of the model holds it.
        tensor: Where it lies.
        writer: Whose it is.
        edit: What to do.
        matrix: For a bias, the matrix that it belongs to; None for a matrix.
    """

    file: Layout
    tensor: TensorInfo
    writer: Writer
    edit: ModuleEdit
    matrix: TensorInfo | None = None


def values(path: Path, tensor: TensorInfo) -> Tensor:
    """Return a tensor dequantised.

    Returns:
        float32, of the tensor's shape, on the CPU.

    Raises:
        UsageError: a type that the package `gguf` cannot read.
    """
    import gguf

    kind = gguf.GGMLQuantizationType[tensor.type]
    data = torch.frombuffer(read_range(path, tensor.begin, tensor.begin + tensor.nbytes), dtype=torch.uint8).numpy()
    try:
        found = gguf.quants.dequantize(data.reshape(math.prod(tensor.shape[:-1]), -1), kind)
    except NotImplementedError:
        raise UsageError(f"type {tensor.type} cannot be read", where=tensor.name, hint="pip install -U gguf") from None
    return torch.from_numpy(found.copy()).reshape(tensor.shape)


def encoded(tensor: Tensor, kind: str) -> bytes:
    """Return values of a type's lattice, or of a floating type, as the bytes of that type.

    Args:
        tensor: Any shape, float.
        kind: Such as `Q4_0`.

    Raises:
        RunFailed: the bytes do not hold these values.
    """
    import gguf

    if kind in PLAIN:
        made = tensor.to(PLAIN[kind])
        if not bool(torch.isfinite(made).all()):
            raise RunFailed("is not finite after the edit", valid=f"values that fit {kind}")
        return made.contiguous().view(torch.uint8).numpy().tobytes()
    own = gguf.GGMLQuantizationType[kind]
    exact = tensor.float().contiguous()
    data = gguf.quants.quantize(exact.numpy(), own)
    if not torch.equal(torch.from_numpy(gguf.quants.dequantize(data, own)).reshape(exact.shape), exact):
        raise RunFailed(f"{kind} does not hold the rounded values")
    return bytes(data.tobytes())


def size_of(shape: Sequence[int], kind: str) -> int:
    """Return the bytes of a tensor of a type."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return math.prod(shape) // block * size


def plan(files: Sequence[Layout], edit: Edit, anatomy: Anatomy, model: nn.Module | None = None) -> list[Change]:
    """Return the tensors that an edit replaces; reads samples alone.

    Args:
        files: All parts of the model.
        edit: What is asked.
        anatomy: Writers of the model.
        model: What was loaded from these files; values are compared with it where it is in memory.

    Raises:
        UsageError: an unknown writer, or one that is not in the files as the model has it.
    """
    where = {name: file for file in files for name in file.tensors}
    tensors = {name: tensor for file in files for name, tensor in file.tensors.items()}
    architecture = str(files[0].facts.get("general.architecture", ""))
    writers, changes = {writer.name: writer for writer in anatomy.writers}, []
    for name, part in edit.modules.items():
        if name not in writers:
            raise UsageError(f"no writer '{name}' in this model", where="edit", hint=nearest(name, writers))
        if part.weight == 0:
            continue
        matrix, bias = find(tensors, architecture, anatomy, writers[name])
        _require_same(where[matrix.name], matrix, writers[name], model)
        changes.append(Change(where[matrix.name], matrix, writers[name], part))
        if bias is not None:
            changes.append(Change(where[bias.name], bias, writers[name], part, matrix))
    seen: set[str] = set()
    for change in changes:
        if change.tensor.name in seen:
            raise UsageError(f"tensor {change.tensor.name!r} belongs to two edited writers", where=str(files[0].path))
        seen.add(change.tensor.name)
    return changes


def _require_same(file: Layout, tensor: TensorInfo, writer: Writer, model: nn.Module | None) -> None:
    """Compare the first rows of a tensor with the loaded model.

    Raises:
        UsageError: they differ.
    """
    parameter = None if model is None else writer.weight(model).detach()
    if (
        parameter is None
        or parameter.is_meta
        or not parameter.is_floating_point()
        or tuple(parameter.shape) != writer.shape
    ):
        return
    rows = min(_SAMPLE, tensor.shape[-2])
    step = tensor.nbytes // math.prod(tensor.shape[:-1])
    first = values(file.path, replace(tensor, shape=(rows, tensor.shape[-1]), nbytes=rows * step))
    own = writer.matrix(parameter, None if writer.experts is None else 0)[:rows].cpu()
    if not torch.equal(first.to(own.dtype), own):
        raise UsageError(f"does not hold the values of {writer.name}", where=tensor.name)


def by_edit(change: Change, before: Tensor, expert: int | None) -> Tensor:
    """Return the exact edit of what the file holds, float64."""
    if change.matrix is None:
        return edit_weight(before.double(), change.edit)
    matrix = None
    if change.edit.mode == "row":
        whole = values(change.file.path, change.matrix)
        matrix = whole if expert is None else whole[expert]
    return edit_bias(before.double(), change.edit, matrix)


def kind_after(change: Change, fallback: str) -> str:
    """Return the type in which a tensor is written: its own where that can be, else `fallback`, else F16."""
    own = change.tensor.type
    if own in PLAIN or own in LATTICES:
        return own
    fits = change.tensor.shape[-1] % GROUP == 0 or fallback.upper() in PLAIN
    return fallback.upper() if fits else "F16"


def rounded(exact: Tensor, edit: ModuleEdit, kind: str, rounding: str) -> tuple[Tensor, Cost]:
    """Round a matrix `[d_out, d_in]` to a type.

    Args:
        exact: float64.
        edit: Whose directions are kept.
        kind: Such as `Q4_0` or `BF16`.
        rounding: auto keeps the edit on a lattice, and takes the nearest value of a floating type; nearest; q4_0 or
            q8_0 make floating values that survive a later plain pass of that type.
    """
    later = rounding if rounding in RANGES else ""
    lattice = LATTICES.get(kind, later)
    if not lattice:
        return exact, Cost()
    stored = PLAIN.get(kind, torch.float32)
    keeps = rounding != "nearest"
    made = preserve(exact, edit.directions, lattice, stored) if keeps else simulate(exact, lattice)
    return made, Cost.of(exact, made, lattice)


def _made(change: Change, wanted: Wanted, kind: str, rounding: str, costs: list[Cost]) -> bytes:
    """Return the bytes of a replaced tensor."""
    before = values(change.file.path, change.tensor)
    experts = [None] if change.writer.experts is None else range(change.writer.experts)
    made = torch.empty_like(before)
    for expert in experts:
        at = ... if expert is None else expert
        exact = wanted(change, before[at], expert)
        if change.matrix is None:
            exact, cost = rounded(exact, change.edit, kind, rounding)
            costs.append(cost)
        made[at] = exact.float()
    try:
        return encoded(made, kind)
    except RunFailed as error:
        raise RunFailed(error.what, where=change.tensor.name, valid=error.valid) from None


Check = Callable[[list[Path], ExportResult, list[Change]], None]


def _kinds(changes: Sequence[Change], fallback: str, rounding: str) -> dict[str, str]:
    """Return the type that each changed tensor is written in, by name."""
    kinds: dict[str, str] = {}
    for change in changes:
        kinds[change.tensor.name] = kind = kind_after(change, fallback)
        rows = change.tensor.shape[-1]
        if rounding in RANGES and kind in PLAIN and change.matrix is None and rows % GROUP:
            raise UsageError(
                f"{rounding} cannot hold rows of {rows}", where=change.tensor.name, valid="multiples of 32"
            )
    return kinds


def bake_gguf(
    source: Path,
    edit: Edit,
    anatomy: Anatomy,
    out: Path,
    *,
    model: nn.Module | None = None,
    wanted: Wanted = by_edit,
    rounding: str = "auto",
    fallback: str = "q8_0",
    said: Mapping[str, str] | None = None,
    beside: Sequence[Path] = (),
    check: Check | None = None,
) -> ExportResult:
    """Write the edited model as a GGUF file, which appears whole or not at all.

    Args:
        source: The file, or one of its numbered parts, all of which are read.
        edit: Maps of the writers.
        anatomy: Writers of the model.
        out: File to make; of a model in parts, `OUT.gguf` stands for `OUT-00001-of-0000N.gguf` and so on.
        model: What was loaded from the file, to be compared with it.
        wanted: What an edited matrix is to be; by default the edit of what the file holds.
        rounding: See `rounded`.
        fallback: Type in which a tensor is written whose own type cannot be.
        said: Provenance, written as keys `perpend.…`.
        beside: Files that appear with it; `check` fills their `.partial` files.
        check: Called with the `.partial` files when all bytes are there and before they are renamed. A `GateFailed`
            that it raises leaves them for inspection.

    Returns:
        What was written.

    Raises:
        UsageError: before anything is written: damaged file, missing part, writer not found, output exists.
        RunFailed: values that the type cannot hold, or the disk is full.
    """
    files = layouts(source)
    changes = plan(files, edit, anatomy, model)
    outs, costs, kinds = targets(out, len(files)), list[Cost](), _kinds(changes, fallback, rounding)
    _note_fallbacks(changes, kinds)
    steps = iter(track(changes, "export"))

    def make(change: Change) -> bytes:
        next(steps, None)
        return _made(change, wanted, kinds[change.tensor.name], rounding, costs)

    with appearing(outs, beside) as partial_files:
        for k, (file, target) in enumerate(zip(files, partial_files, strict=True)):
            own = [change for change in changes if change.file is file]
            replaced = {
                change.tensor.name: Replacement(kind, size_of(change.tensor.shape, kind), partial(make, change))
                for change in own
                for kind in (kinds[change.tensor.name],)
            }
            write(file, target, replaced, text_pairs(file, said or {}) if k == 0 else {})
        result = ExportResult(
            path=outs[0],
            files=len(outs),
            bytes=sum(path.stat().st_size for path in partial_files),
            edited=tuple(sorted(change.tensor.name for change in changes)),
            changed=tuple(sorted({change.file.path.name for change in changes})),
            left_out={},
            rounding=_cost(kinds.values(), rounding, costs),
        )
        if check:
            check(partial_files, result, changes)
    next(steps, None)
    return result


def _note_fallbacks(changes: Sequence[Change], kinds: Mapping[str, str]) -> None:
    """Say which tensors change their type."""
    changed = [change.tensor for change in changes if kinds[change.tensor.name] != change.tensor.type]
    pairs: dict[tuple[str, str], list[str]] = {}
    for tensor in changed:
        pairs.setdefault((tensor.type, kinds[tensor.name]), []).append(tensor.name)
    for (old, new), names in pairs.items():
        note(f"{len(names)} tensors of type {old}, which cannot be written, become {new}, such as {names[0]}")


def _cost(kinds: Any, rounding: str, costs: Sequence[Cost]) -> dict[str, Any]:
    total = sum(costs, Cost())
    types = sorted({LATTICES[kind] for kind in kinds if kind in LATTICES}) or [rounding]
    return {"type": "+".join(types), "kept": rounding != "nearest", **total.to_json()} if total.whole else {}


def leak_rows(
    changes: Sequence[Change],
    written: Sequence[Layout],
    anatomy: Anatomy,
    model: nn.Module | None = None,
    *,
    through_post_norm: bool = False,
    allow_leak: bool = False,
    rounding: str = "auto",
    before: Callable[[Change], Tensor] | None = None,
) -> list[LeakRow]:
    """Measure the realised weight factor of every edited module on the saved file, dequantised.

    Args:
        changes: What was asked, with the originals.
        written: All parts of the output.
        anatomy: Writers of the model.
        model: The loaded model, by which gains of post-norms are measured; None leaves them out.
        through_post_norm: The directions were carried through the post-norms.
        allow_leak: Return rows that miss instead of failing.
        rounding: q4_0 or q8_0: matrices of a floating type must keep it after a plain pass of that type, too.
        before: Gives unedited matrices, `[d_out, d_in]` or `[E, d_out, d_in]`; by default what the original holds.

    Raises:
        GateFailed: a module misses by more than 0.05, and leaks are not allowed.
    """
    after = {name: (file, tensor) for file in written for name, tensor in file.tensors.items()}
    rows = []
    for change in track([c for c in changes if c.matrix is None], "verify"):
        file, tensor = after[change.tensor.name]
        if tensor.shape != change.tensor.shape:
            raise GateFailed("has another shape", where=tensor.name)
        old = before(change) if before else values(change.file.path, change.tensor)
        new = values(file.path, tensor)
        gain = None if through_post_norm or model is None else anatomy.post_norm_gain(model, change.writer)
        lattice = rounding if rounding in RANGES and tensor.type in PLAIN else ""
        experts = [None] if change.writer.experts is None else range(change.writer.experts)
        found = [
            leak_row(change.writer, change.edit, e, (old, new) if e is None else (old[e], new[e]), gain, lattice)
            for e in experts
        ]
        worst = max(found, key=lambda row: row.miss)
        if through_post_norm and change.writer.post_norm is not None:
            worst = replace(worst, residual=worst.missing)
        rows.append(worst)
    return require_realised(rows, allow_leak)


def untouched(source: Sequence[Layout], written: Sequence[Layout], edited: Sequence[str]) -> Untouched:
    """Compare the data of every tensor that was not edited, and every key-value pair, byte for byte."""
    differing, size, tensors = list[str](), 0, 0
    for old, new in zip(source, written, strict=True):
        first = read_range(old.path, 24, old.pairs_end)
        if read_range(new.path, 24, min(old.pairs_end, new.pairs_end)) != first:
            differing.append(f"{new.path.name}: metadata")
        size += len(first)
        if list(old.tensors) != list(new.tensors):
            differing.append(f"{new.path.name}: names of tensors")
            continue
        for name, before in old.tensors.items():
            after = new.tensors[name]
            if name in edited:
                continue
            size, tensors = size + before.nbytes, tensors + 1
            if (before.type, before.shape) != (after.type, after.shape) or not _equal(old, before, new, after):
                differing.append(f"{new.path.name}: {name}")
    return Untouched(tensors, size, 0, tuple(differing))


def _equal(old: Layout, before: TensorInfo, new: Layout, after: TensorInfo) -> bool:
    for start in range(0, before.nbytes, 8 << 20):
        count = min(8 << 20, before.nbytes - start)
        pair = [read_range(f.path, t.begin + start, t.begin + start + count) for f, t in ((old, before), (new, after))]
        if pair[0] != pair[1]:
            return False
    return True
