"""Bake an edit into a copy of the original files.

Every file is copied as it is and then only the byte ranges of the edited matrices are overwritten, so names, order,
dtypes, shapes, headers, shard layout and untouched tensors are byte-equal because nothing else was ever written. The
arithmetic is float32 or better and is rounded once, to the tensor's own dtype. Two matrices are in memory at a time, or
one where memory is short, in the file's dtype and with a block of columns of each widened.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatch
from functools import partial
from mmap import mmap
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from perpend.core.edits import Edit
from perpend.core.linear import working
from perpend.core.maps import BLOCK, Geometry, HookMap, ModuleEdit, edit_bias, edit_weight
from perpend.core.quant import GROUP, RANGES, Cost, preserve
from perpend.errors import RunFailed, UsageError, nearest
from perpend.export.beside import is_report
from perpend.export.checkpoint import INDEX, Checkpoint, files
from perpend.export.names import Locator, TensorSlice, overlapping
from perpend.export.staging import staged
from perpend.models.headers import TensorEntry, read_header, read_into, read_range
from perpend.models.memory import free_memory
from perpend.progress import note, track

if TYPE_CHECKING:
    from perpend.models.anatomy import Anatomy

OTHER_WEIGHTS = (
    "model.bin",
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
    "consolidated*.pth",
    "tf_model*.h5",
    "flax_model*.msgpack",
    "rust_model.ot",
    "*.gguf",
    "*.onnx",
    "*.onnx_data",
    "*.ckpt",
    "*.tflite",
)
"""Files that hold the weights in another format: a copy would be a model without the edit in the same folder."""

COPY_CHUNK = 64 << 20
SHORT = (torch.bfloat16, torch.float16)
"""Dtypes beside which float32 is exact: a plain edit of them is computed in it, five times as fast as in float64."""
WORKERS = 2
"""Matrices that are edited at the same time, where memory holds as many."""
HELD = 1.5
"""What the editing of one takes at most, in sizes of the matrix, whatever the mode."""
FILES = 2
"""Files that are written at the same time, so that one is flushed while another is copied."""


@dataclass(frozen=True)
class ExportResult:
    """What was written.

    Attributes:
        path: The finished folder.
        files: Files copied.
        bytes: Their size together.
        edited: Names of the tensors that were overwritten, wholly or in part.
        changed: Files that hold them.
        left_out: Files of the source that were not copied, with the reason.
        rounding: Of an export that keeps its edit on a lattice: the type, and the RMS error of the edited matrices
            relative to their size, ours and that of a plain pass.
    """

    path: Path
    files: int
    bytes: int
    edited: tuple[str, ...]
    changed: tuple[str, ...]
    left_out: dict[str, str]
    rounding: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "path": str(self.path), "edited": list(self.edited), "changed": list(self.changed)}


@dataclass(frozen=True)
class Patch:
    """A byte range to overwrite.

    Attributes:
        piece: Where.
        edit: What to do there.
        matrix: For a bias, the matrix that it belongs to; None when `piece` is a matrix.
        lattice: Type whose plain pass the edit must survive; empty for the nearest value.
    """

    piece: TensorSlice
    edit: ModuleEdit
    matrix: TensorSlice | None = None
    lattice: str = ""


def bake(
    source: Path,
    edit: Edit,
    anatomy: Anatomy,
    out: Path,
    model: nn.Module,
    *,
    rounding: str = "auto",
    memory: int | None = None,
    check: Callable[[Path, ExportResult, list[Patch]], None] | None = None,
) -> ExportResult:
    """Write the edited checkpoint to `out`, which appears whole or not at all.

    Args:
        source: Folder of the original safetensors checkpoint.
        edit: Maps of the writers; a module with weight factor 0 is not touched.
        anatomy: Writers of the loaded model.
        out: Folder to make; may exist if empty. The work is done in `out.partial`.
        model: The loaded model, by whose values the tensors of the files are recognised; it is not changed.
        rounding: q4_0 or q8_0 for matrices whose edit survives a later plain pass of that type; else the nearest value.
        memory: Bytes that this process may hold altogether; None for as many as there are.
        check: Called with `out.partial`, the result and what was overwritten when all bytes are there and before it is
            renamed; gates, reload tests and the card belong here. What it raises leaves `out.partial` for inspection.

    Returns:
        What was written.

    Raises:
        UsageError: before anything is written: quantised or damaged checkpoint, writer not found in the files, output
            not empty, an earlier or running export on the same output, too little disk space.
        RunFailed: an edited value is not finite in the tensor's dtype, a file changed meanwhile, the disk is full.
    """
    source, out = Path(source), Path(out).expanduser().resolve()
    _refuse_output(source.resolve(), out)
    checkpoint = Checkpoint(source)
    patches = plan(checkpoint, edit, anatomy, model, lattice=rounding if rounding in RANGES else "")
    copies, left_out = choose_files(checkpoint, patches)
    sizes = {name: (source / name).stat().st_size for name in copies}
    total = sum(sizes.values())
    edited = tuple(sorted({patch.piece.entry.name for patch in patches}))
    changed = tuple(sorted({patch.piece.entry.shard for patch in patches}))
    result = ExportResult(out, len(copies), total, edited, changed, left_out)
    cost = [Cost()]
    with staged(out, total) as folder:
        try:
            steps = _write(checkpoint, folder, copies, patches, cost, at_once(patches, memory))
            for _ in track(steps, "export", total=total, size=int, unit="B"):
                pass
        except OSError as error:
            raise RunFailed(f"cannot be written: {error.strerror}; what is there is kept", where=str(folder)) from error
        if rounding in RANGES:
            result = replace(result, rounding={"type": rounding, **sum(cost, Cost()).to_json()})
        if check:
            check(folder, result, patches)
    return result


def plan(checkpoint: Checkpoint, edit: Edit, anatomy: Anatomy, model: nn.Module, *, lattice: str = "") -> list[Patch]:
    """Return the byte ranges that an edit overwrites, sorted by file and place; reads only samples.

    Raises:
        UsageError: quantised weights, an unknown writer, a writer that is not in the files, a shared matrix, or for a
            lattice one whose rows it cannot hold.
    """
    method = checkpoint.quantisation()
    if method:
        raise UsageError(
            f"weights are quantised ({method}): rounding to that grid would undo or distort the edit",
            where=str(checkpoint.path),
            valid="float32, bfloat16 or float16 weights",
            hint="edit the unquantised checkpoint and quantise the result",
        )
    writers = {writer.name: writer for writer in anatomy.writers}
    locator, patches = Locator(checkpoint, model, anatomy), []
    for name, change in edit.modules.items():
        if name not in writers:
            raise UsageError(f"no writer '{name}' in this model", where="edit", hint=nearest(name, writers))
        if change.weight == 0:
            continue
        matrices = locator.matrices(writers[name])
        for piece in matrices if lattice else ():
            length = piece.shape[0 if piece.transposed else 1]
            if length % GROUP:
                raise UsageError(f"{lattice} cannot hold rows of {length}", where=name, valid=f"multiples of {GROUP}")
        patches += [Patch(piece, change, lattice=lattice) for piece in matrices]
        patches += [
            Patch(piece, change, own) for piece, own in zip(locator.biases(writers[name]), matrices, strict=False)
        ]
    shared = overlapping(patch.piece for patch in patches)
    if shared:
        raise UsageError(f"tensor {shared.entry.name!r} belongs to two edited writers", where=str(checkpoint.path))
    return sorted(patches, key=lambda patch: (patch.piece.entry.shard, patch.piece.entry.begin + patch.piece.begin))


def choose_files(checkpoint: Checkpoint, patches: Sequence[Patch]) -> tuple[list[str], dict[str, str]]:
    """Return the files to copy, as paths relative to the checkpoint, and those left out, with the reason.

    Left out is what would put the unedited model beside the edited one: weights in another format, and safetensors
    files outside the checkpoint that hold an edited tensor in its original state. So is what was reported of it.
    """
    originals = list({patch.piece.entry.name: patch.piece.entry for patch in patches}.values())
    copies, left_out = [], {}
    for path in files(checkpoint.path):
        name = str(path.relative_to(checkpoint.path))
        if any(fnmatch(path.name, pattern) for pattern in OTHER_WEIGHTS):
            left_out[name] = "unedited weights in another format"
        elif is_report(path.name):
            left_out[name] = "the report of the unedited model"
        elif name == INDEX and checkpoint.index is None:
            left_out[name] = "index of files that a single-file checkpoint does not use"
        elif path.suffix == ".safetensors" and name not in checkpoint.shards and _repeats(path, checkpoint, originals):
            left_out[name] = "a second, unedited copy of the weights"
        else:
            copies.append(name)
    return copies, left_out


def _repeats(path: Path, checkpoint: Checkpoint, originals: Sequence[TensorEntry]) -> bool:
    """Say whether a safetensors file outside the checkpoint holds one of `originals`, byte for byte at its start."""
    for entry in read_header(path):
        count = min(entry.nbytes, 1 << 16)
        alike = [other for other in originals if count and (other.dtype, other.shape) == (entry.dtype, entry.shape)]
        start = read_range(path, entry.begin, entry.begin + count) if alike else b""
        if any(checkpoint.read(other, 0, count) == start for other in alike):
            return True
    return False


def _refuse_output(source: Path, out: Path) -> None:
    if not out.name:
        raise UsageError("not a folder that can be made", where=str(out))
    if out == source or source in out.parents or out in source.parents:
        raise UsageError("the output lies in the source or around it", where=str(out), hint="choose another folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError("already exists and is not empty", where=str(out), hint="choose another folder or remove it")


def at_once(patches: Sequence[Patch], memory: int | None = None) -> int:
    """Return how many matrices are edited at the same time: one where memory does not hold more of the largest.

    Args:
        patches: What is overwritten.
        memory: Bytes that this process may hold altogether; None for as many as there are.
    """
    largest = max((patch.piece.end - patch.piece.begin for patch in patches), default=0)
    room = free_memory(torch.device("cpu"), memory)
    found = max(1, min(WORKERS, int(room / (HELD * max(1, largest)))))
    if found < WORKERS:
        note("memory is short: matrices are edited one after the other")
    return found


def _write(
    checkpoint: Checkpoint,
    folder: Path,
    copies: Sequence[str],
    patches: Sequence[Patch],
    cost: list[Cost],
    workers: int,
) -> Iterator[int]:
    """Copy every file, overwrite its patches, flush it; yield the number of bytes just copied.

    While one file is flushed the next one is copied and edited. What rounding to a lattice cost is added to `cost`.
    """
    copied, stopped = SimpleQueue[int](), Event()

    def write(name: str) -> list[Cost]:
        own = [patch for patch in patches if patch.piece.entry.shard == name]
        with (folder / name).open("x+b", buffering=0) as writer:
            for count in _copy(checkpoint.path / name, writer.fileno()):
                copied.put(count)
                if stopped.is_set():
                    return []
            found = list(editors.map(partial(_overwrite, checkpoint, writer.fileno()), own))
            os.fsync(writer.fileno())
        return found

    with one_thread(), ThreadPoolExecutor(workers) as editors, ThreadPoolExecutor(FILES) as pool:
        for parent in {(folder / name).parent for name in copies}:
            parent.mkdir(parents=True, exist_ok=True)
        jobs = [pool.submit(write, name) for name in copies]
        try:
            for job in jobs:
                while not job.done() or not copied.empty():
                    with suppress(Empty):
                        yield copied.get(timeout=0.05)
                cost += job.result()
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch from splitting single operations: blocks fit the cache, and waiting for threads costs more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _copy(source: Path, target: int) -> Iterator[int]:
    """Copy a file in the kernel (a clone where the file system can), or through memory where it cannot."""
    with source.open("rb", buffering=0) as reader:
        size, done, kernel = os.fstat(reader.fileno()).st_size, 0, hasattr(os, "copy_file_range")
        while done < size:
            count = min(COPY_CHUNK, size - done)
            if kernel:
                try:
                    moved = os.copy_file_range(reader.fileno(), target, count, done, done)
                except OSError:
                    moved = 0
                kernel = moved > 0
            if not kernel:
                data = os.pread(reader.fileno(), min(count, 8 << 20), done)
                moved = _pwrite(target, data, done)
            if not moved:
                raise RunFailed("became shorter while it was copied", where=str(source))
            done += moved
            yield moved


def _pwrite(target: int, data: bytes | mmap, offset: int) -> int:
    view = memoryview(data)
    while view:
        count = os.pwrite(target, view[: 1 << 30], offset)
        view, offset = view[count:], offset + count
    return len(data)


def _overwrite(checkpoint: Checkpoint, target: int, patch: Patch) -> Cost:
    """Read a slice of the original, edit it in place in memory, write it over the copy; return what rounding cost."""
    piece, matrix = patch.piece, None
    data = mmap(-1, piece.end - piece.begin)  # goes back to the system at once, which a buffer of malloc need not
    read_into(checkpoint.path / piece.entry.shard, piece.entry.begin + piece.begin, memoryview(data))
    if patch.matrix and patch.edit.mode == "row":
        matrix = patch.matrix.view(checkpoint.read(patch.matrix.entry, patch.matrix.begin, patch.matrix.end))
    cost = edit_in_place(piece.view(data), patch.edit, matrix, name=piece.entry.name, lattice=patch.lattice)
    _pwrite(target, data, piece.entry.begin + piece.begin)
    return cost


@torch.no_grad()
def edit_in_place(
    tensor: Tensor, edit: ModuleEdit, matrix: Tensor | None = None, *, name: str = "", lattice: str = ""
) -> Cost:
    """Edit a matrix or a bias in place, with one rounding to its dtype, or one to a lattice that its dtype then holds.

    Only a block of columns is widened at a time: a plain or column-wise edit treats every column on its own, and of a
    row-wise one all that the columns share is gathered before the first of them is overwritten.

    Args:
        tensor: [d_out, d_in], or [d_out] for a bias, any floating dtype, on the CPU; overwritten.
        edit: Of its module.
        matrix: [d_out, d_in] before the edit, for a bias in row mode.
        name: For the message.
        lattice: Type whose plain pass the edit must survive.

    Returns:
        What rounding to the lattice cost.

    Raises:
        RunFailed: a result is not finite in the tensor's dtype.
    """
    short = HookMap.of(None, edit) if edit.mode == "plain" and tensor.ndim == 2 and tensor.dtype in SHORT else None
    rows = (
        Geometry.of(tensor, edit.directions, "row").at(edit.weight) if edit.mode == "row" and tensor.ndim == 2 else None
    )
    cost = Cost()
    for block in (tensor,) if tensor.ndim == 1 else torch.split(tensor, BLOCK, dim=1):
        if lattice and block.ndim == 2:
            exact = rows.edited(block.double()) if rows else edit_weight(block.double(), edit)
            new = preserve(exact, edit.directions, lattice, block.dtype)
            cost += Cost.of(exact, new, lattice)
        elif short:
            new = short.edited(block.float())
        elif rows:
            new = rows.edited(block.double()).to(working(block.dtype))
        else:
            new = edit_bias(block, edit, matrix) if block.ndim == 1 else edit_weight(block, edit)
        low, high = torch.aminmax(new)  # NaN comes through
        if not torch.finfo(tensor.dtype).min <= low <= high <= torch.finfo(tensor.dtype).max:
            raise RunFailed(f"tensor {name!r} is not finite after the edit", valid=f"values that fit {tensor.dtype}")
        block.copy_(new)
    return cost
