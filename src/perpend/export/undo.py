"""Take an edit back: the original bytes again, from the edited ones and a few kept numbers.

An edit W' = s ⊙ (W - λ Pᵀ (R W)) ⊙ t loses two things. The first is R W, one number per column and direction: nothing
of it is left at λ = 1. The second is what rounding to the file's dtype cut off. So both are kept: R W (with λ P, s and
t), and the entries for which W' ⊘ s ⊘ t + λ Pᵀ (R W), rounded, is not yet W. Those are few, since W lies on the grid of
its dtype and the guess is off by less than half a step wherever the edit did not make an entry larger by a power of
two. The guess is made of single multiplications and additions in float64, which every machine rounds alike, and the
result is proven by the SHA-256 of every file.

Without these numbers a plain or column-wise edit with λ ≠ 1 can be inverted on the edited weights, but not to the bit.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from perpend.core.linear import double, orthonormalise
from perpend.core.maps import BLOCK, Geometry, ModuleEdit
from perpend.core.store import STUMBLES
from perpend.errors import RunFailed, UsageError
from perpend.export.card import CARD
from perpend.export.checkpoint import Checkpoint
from perpend.export.names import TORCH_DTYPES
from perpend.export.shards import ExportResult, Patch
from perpend.models.headers import read_range
from perpend.progress import track

UNDO = "original.undo"
"""Name of the file; its form is that of safetensors, its name is not, so that no loader takes it for weights."""
FORM = "1"
REPLACED = (CARD, "NOTICE")
"""Files of the original that an export may write anew; they are kept whole."""
MAX_FILE = 64 << 20
"""Bytes that one of them may have."""


@dataclass(frozen=True)
class Kept:
    """What was kept of an original.

    Attributes:
        bytes: Size of the file.
        edited: Bytes of the tensors that it restores.
        corrected: Entries that rounding would have left wrong.
        entries: Entries of the tensors.
    """

    bytes: int
    edited: int
    corrected: int
    entries: int


def keep(source: Path, edited: Path, patches: Sequence[Patch], export: ExportResult) -> Kept:
    """Write into an edited folder what restores the original of it bit for bit.

    Args:
        source: The original checkpoint.
        edited: The edited one, whole; the file is added to it.
        patches: What was overwritten.
        export: What was written.

    Raises:
        RunFailed: what is kept does not restore the original, which is tried at once.
    """
    old = Checkpoint(source)
    tensors: dict[str, Tensor] = {}
    pieces: list[dict[str, Any]] = []
    corrected = 0
    for number, patch in enumerate(track(patches, "keep the original")):
        piece, begin = patch.piece, patch.piece.entry.begin + patch.piece.begin
        end = begin + piece.end - piece.begin
        original = _matrix(piece.view(old.read(piece.entry, piece.begin, piece.end)))
        changed = _matrix(piece.view(read_range(edited / piece.entry.shard, begin, end)))
        matrix = (
            patch.matrix.view(old.read(patch.matrix.entry, patch.matrix.begin, patch.matrix.end))
            if (patch.matrix and patch.edit.mode == "row")
            else None
        )
        own = _numbers(original, patch.edit, matrix, bias=len(piece.shape) == 1, dtype=piece.entry.dtype)
        fix, count = _corrections(original, _guess(changed, own))
        corrected += count
        tensors |= {f"{number}.{name}": value for name, value in {**own, "fix": fix}.items()}
        pieces.append(
            {
                "tensor": piece.entry.name,
                "shard": piece.entry.shard,
                "begin": begin,
                "end": end,
                "dtype": piece.entry.dtype,
                "shape": list(piece.shape),
                "transposed": piece.transposed,
            }
        )
    names = [name for name in sorted(_listed(source)) if name not in export.left_out]
    tensors |= {f"file.{name}": _squeezed((source / name).read_bytes()) for name in names if name in REPLACED}
    content = {
        "form": FORM,
        "pieces": pieces,
        "files": names,
        "sha256": {name: digest(source / name) for name in (*export.changed, *(n for n in names if n in REPLACED))},
        "left_out": export.left_out,
    }
    path = edited / UNDO
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"undo": json.dumps(content)})
    entries = sum(math.prod(piece["shape"]) for piece in pieces)
    return Kept(path.stat().st_size, sum(p["end"] - p["begin"] for p in pieces), corrected, entries)


def _listed(folder: Path) -> list[str]:
    from perpend.export.checkpoint import files

    return [str(path.relative_to(folder)) for path in files(folder)]


def restore(edited: Path, out: Path) -> tuple[int, dict[str, str]]:
    """Write the original of an edited folder, bit for bit.

    Args:
        edited: Folder with the kept numbers.
        out: An existing, empty folder.

    Returns:
        How many tensors were restored, and files of the original that the edited folder never had, with the reason.

    Raises:
        UsageError: the kept numbers cannot be read, or are not what Perpend keeps.
        RunFailed: a file does not come out as it was; says which.
    """
    path = edited / UNDO
    content, tensors = _read(path)
    try:
        for name in _within(content):
            target = out / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if f"file.{name}" in tensors:
                target.write_bytes(_expanded(tensors[f"file.{name}"], MAX_FILE))
            elif not (edited / name).is_file():
                raise RunFailed("missing file: the edited folder is not whole", where=str(edited / name))
            else:
                shutil.copyfile(edited / name, target)
        for number, piece in enumerate(track(content["pieces"], "restore")):
            own = {
                name: tensors[key]
                for name in ("write", "read", "in", "out", "fix")
                if (key := f"{number}.{name}") in tensors
            }
            _restore(out / piece["shard"], piece, own)
        for name, wanted in content["sha256"].items():
            if digest(out / name) != wanted:
                raise RunFailed(
                    "does not come out as the original was: the edited files are not those that were kept with it",
                    where=str(edited / name),
                )
        return len({piece["tensor"] for piece in content["pieces"]}), dict(content["left_out"])
    except (*STUMBLES, zlib.error) as error:
        raise UsageError(f"not what Perpend kept: {type(error).__name__} {str(error)[:200]}", where=str(path)) from None


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            content = json.loads((file.metadata() or {}).get("undo", "{}"))
            if not isinstance(content, dict) or content.get("form") != FORM:
                raise UsageError("not a file that Perpend kept", where=str(path), valid=f"form {FORM}")
            return content, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UsageError(f"cannot be read: {str(error)[:200]}", where=str(path)) from None


def _within(content: Mapping[str, Any]) -> list[str]:
    """Return the files to make, all of them inside the folder: whoever made the edited one chose the names.

    Raises:
        ValueError: one lies elsewhere, or a piece is of none of them.
    """
    names = list(content["files"])
    for name in names:
        parts = PurePosixPath(name).parts
        if not parts or parts[0] == "/" or ".." in parts or any(x in name for x in "\\\0:"):
            raise ValueError(f"a file outside the folder: {name}")
    for name in (*(piece["shard"] for piece in content["pieces"]), *content["sha256"]):
        if name not in names:
            raise ValueError(f"{name} is no file of the original")
    return names


def _restore(path: Path, piece: dict[str, Any], own: dict[str, Tensor]) -> None:
    """Overwrite one matrix or bias of a copied file with its original."""
    if not 0 <= piece["begin"] <= piece["end"] <= path.stat().st_size:
        raise ValueError(f"bytes {piece['begin']} to {piece['end']} of {path.name}")
    data = read_range(path, piece["begin"], piece["end"])
    stored = torch.frombuffer(data, dtype=TORCH_DTYPES[piece["dtype"]]).view(piece["shape"])
    tensor = _matrix(stored.T if piece["transposed"] else stored)
    tensor.copy_(_corrected(_guess(tensor, own), own["fix"]))
    with path.open("r+b") as file:
        file.seek(piece["begin"])
        file.write(data)


def _matrix(tensor: Tensor) -> Tensor:
    """Return a bias as a matrix of one column; shares memory."""
    return tensor[:, None] if tensor.ndim == 1 else tensor


def _numbers(original: Tensor, edit: ModuleEdit, matrix: Tensor | None, *, bias: bool, dtype: str) -> dict[str, Tensor]:
    """Return what is kept of one matrix: λ P `[k, d_out]`, R W `[k, d_in]`, and scales where the mode has them."""
    mode = edit.mode if edit.mode == "row" or not bias else "plain"
    whole = original if matrix is None else matrix
    made = Geometry.of(whole if mode != "plain" else None, edit.directions, mode).at(edit.weight)
    read = torch.cat([made.read @ double(part) for part in torch.split(original, BLOCK, dim=1)], dim=1)
    kept = {"write": edit.weight * made.write, "read": read}
    kept |= {"in": made.input_scale} if made.input_scale is not None else {}
    kept |= {"out": made.output_scale} if made.output_scale is not None else {}
    wide = torch.float64 if dtype in ("F32", "F64") else torch.float32
    return {name: value.to(wide) for name, value in kept.items()}


def _guess(edited: Tensor, own: dict[str, Tensor]) -> Tensor:
    """Return W' ⊘ s ⊘ t + λ Pᵀ (R W), rounded to the dtype of W' `[d_out, d_in]`."""
    guess = torch.empty_like(edited)
    write, read = own["write"].double(), own["read"].double()
    for start in range(0, edited.shape[1], BLOCK):
        columns = slice(start, start + BLOCK)
        w = edited[:, columns].double()
        w = w / own["out"].double()[:, None] if "out" in own else w
        w = w / own["in"].double()[columns] if "in" in own else w
        for p, a in zip(write, read[:, columns], strict=True):
            w = w + p[:, None] * a
        guess[:, columns] = w.to(edited.dtype)
    return guess


def _bits(tensor: Tensor) -> Tensor:
    """Return the bits of a floating tensor as flat integers."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(kind).flatten()


def _ordered(bits: Tensor) -> Tensor:
    """Return bits as integers that count up with the numbers, so that neighbours differ by 1; its own inverse."""
    return torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits)


def _corrections(original: Tensor, guess: Tensor) -> tuple[Tensor, int]:
    """Return the steps from the guess to the original as compressed bytes, and how many entries take one."""
    wanted, had = _bits(original), _bits(guess)
    places = (wanted != had).nonzero().flatten()
    steps = _ordered(wanted[places]).long() - _ordered(had[places]).long()
    gaps = torch.diff(places, prepend=places.new_full((1,), -1)) - 1
    signed = torch.where(steps < 0, -2 * steps - 1, 2 * steps)
    return _squeezed(_planes(gaps) + _planes(signed)), len(places)


def _corrected(guess: Tensor, fix: Tensor) -> Tensor:
    """Return the original: the guess with its corrections."""
    data = np.frombuffer(_expanded(fix, 16 * guess.numel()), np.uint8).reshape(2, 8, -1)
    gaps, signed = (np.ascontiguousarray(planes.T).view("<i8").flatten() for planes in data)
    places = torch.from_numpy(np.cumsum(gaps + 1) - 1)
    steps = torch.from_numpy(np.where(signed % 2, -(signed + 1) // 2, signed // 2))
    bits = _bits(guess)
    bits[places] = _ordered(_ordered(bits[places]) + steps.to(bits.dtype))
    return bits.view(guess.dtype).view(guess.shape)


def _planes(numbers: Tensor) -> bytes:
    """Return int64 numbers byte by byte, all lowest bytes first: what is small then hardly takes room."""
    return numbers.numpy().astype("<i8").view(np.uint8).reshape(-1, 8).T.tobytes()


def _squeezed(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(zlib.compress(data, 9), np.uint8).copy())


def _expanded(squeezed: Tensor, most: int) -> bytes:
    """Return bytes that were compressed, of which there may not be more than `most`."""
    unpacker = zlib.decompressobj()
    data = unpacker.decompress(squeezed.numpy().tobytes(), most + 1)
    if len(data) > most or not unpacker.eof:
        raise ValueError(f"compressed bytes that end early or are more than {most}")
    return data


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------- without what was kept


def require_invertible(edit: dict[str, ModuleEdit]) -> float:
    """Return by how much rounding grows along the directions when an edit is inverted: the largest 1 / |1 - λ|.

    Raises:
        UsageError: λ = 1 somewhere, or row mode; says where and why.
    """
    for name, part in edit.items():
        if part.mode == "row":
            raise UsageError(
                "a row-wise edit cannot be inverted: the norms of the edited rows are gone",
                where=name,
                hint="an output made with --reversible, or the base model itself",
            )
        if abs(1 - part.weight) < 1e-3:
            raise UsageError(
                f"weight factor {part.weight:g}: nothing of the direction is left to restore",
                where=name,
                hint="an output made with --reversible, or the base model itself",
            )
    return max((1 / abs(1 - part.weight) for part in edit.values()), default=1.0)


def invert_files(edited: Path, patches: Sequence[Patch], out: Path, names: Sequence[str]) -> None:
    """Copy an edited folder and invert the edit in the copy, with one rounding to the dtype of each tensor.

    Args:
        edited: Folder of an edited checkpoint.
        patches: What the edit overwrote, with weight factors other than 1; see `require_invertible`.
        out: An existing, empty folder.
        names: Files to copy, relative to `edited`.

    Raises:
        RunFailed: a result is not finite.
    """
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(edited / name, out / name)
    for patch in track(patches, "invert"):
        piece, path = patch.piece, edited / patch.piece.entry.shard
        begin = piece.entry.begin + piece.begin
        data = read_range(path, begin, begin + piece.end - piece.begin)
        tensor = piece.view(data)
        for block in (tensor,) if tensor.ndim == 1 else torch.split(tensor, 16 * BLOCK, dim=1):
            block.copy_(invert(block, patch.edit))
            if not bool(torch.isfinite(block).all()):
                raise RunFailed(
                    f"tensor {piece.entry.name!r} is not finite when the edit is taken back", where=str(path)
                )
        with (out / piece.entry.shard).open("r+b") as file:
            file.seek(begin)
            file.write(data)


def invert(edited: Tensor, part: ModuleEdit) -> Tensor:
    """Return W of a plain or column-wise edit from W', to rounding.

    Column mode: every column kept its norm, ‖w‖ = ‖w'‖, and with b = V w' that of the rest is ‖w'‖² - ‖b‖², so
    t² = (‖w'‖² - ‖b‖² + ‖b‖² / (1 - λ)²) / ‖w'‖² and w = (w' + λ / (1 - λ) Vᵀ b) / t.

    Args:
        edited: `[d_out, d_in]`, or `[d_out]` for a bias, which is edited plainly; any floating dtype.
        part: The edit, with λ ≠ 1.

    Returns:
        The same shape, float64.
    """
    w, v = double(_matrix(edited)), orthonormalise(part.directions)
    b = v @ w
    result = w + part.weight / (1 - part.weight) * v.mT @ b
    if part.mode == "column" and edited.ndim == 2:
        whole, along = w.square().sum(0), b.square().sum(0)
        t2 = (whole - along + along / (1 - part.weight) ** 2) / torch.where(whole > 0, whole, 1.0)
        result = result / torch.where(t2 > 0, t2, 1.0).sqrt()
    return result.reshape(edited.shape)
