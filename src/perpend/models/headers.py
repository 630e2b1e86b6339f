"""Where the tensors of one safetensors file lie, from its header, and its bytes.

Headers are parsed with bounds on everything that a hostile or damaged file could claim, so that what is later read and
overwritten are byte ranges that exist, do not overlap, and have the size that dtype and shape ask for. The format: 8
bytes little-endian header length, a JSON header, then the data (https://github.com/huggingface/safetensors#format). No
tensor is loaded and torch is not needed.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from perpend.errors import RunFailed, UsageError

MAX_HEADER = 100_000_000
"""Largest header that the reference reader of the format accepts, in bytes."""
MAX_RANK = 64

BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Bits per element of every dtype of the format."""

REPAIR = "download the checkpoint again"
UNPICKLE = "a revision with model.safetensors, or convert it where its maker's code may run: docs/security.md"


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies.

    Attributes:
        name: Its name in the checkpoint.
        shard: File name, relative to the checkpoint folder.
        dtype: As the format spells it, such as `BF16`.
        shape: Row-major.
        begin: First byte, counted from the start of the file.
        end: One past the last byte.
    """

    name: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.end - self.begin


def parse_json(text: bytes, where: str) -> Any:
    """Parse JSON without duplicate keys; whatever the parser meets becomes one line."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise UsageError(f"key {twice!r} appears twice", where=where, hint=REPAIR)
        return result

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0][:120]
        raise UsageError(f"not valid JSON: {reason}", where=where, hint=REPAIR) from None


def read_header(path: Path, shard: str | None = None) -> list[TensorEntry]:
    """Return the tensors of one safetensors file, in file order, checked against the size of the file.

    Args:
        path: The file; symlinks are followed.
        shard: Name that the entries carry, the file's own name by default.

    Raises:
        UsageError: missing, truncated or corrupt; ranges that overlap, leave holes or do not fit dtype and shape.
    """
    where = str(path)
    try:
        status = path.stat()
    except OSError as error:
        raise UsageError(f"missing file: {error.strerror}", where=where, hint=REPAIR) from None
    if not stat.S_ISREG(status.st_mode):
        raise UsageError("not a regular file", where=where)
    size = status.st_size
    if size < 8:
        raise UsageError(f"truncated: {size} bytes cannot hold a header", where=where, hint=REPAIR)
    head = bytes(read_range(path, 0, 8))
    if head == b"version ":
        raise UsageError("a git-lfs pointer, not the weights", where=where, hint="git lfs pull")
    length = int.from_bytes(head, "little")
    if length > MAX_HEADER:
        raise UsageError(f"corrupt: claims a header of {length} bytes", where=where, hint=REPAIR)
    if length > size - 8:
        raise UsageError(f"truncated: a header of {length} bytes in {size} bytes", where=where, hint=REPAIR)
    header = parse_json(bytes(read_range(path, 8, 8 + length)), where)
    if not isinstance(header, dict):
        raise UsageError("corrupt: the header is not a JSON object", where=where, hint=REPAIR)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UsageError("corrupt: metadata is not a mapping of texts", where=where, hint=REPAIR)
    entries = [_entry(name, fields, shard or path.name, 8 + length, where) for name, fields in header.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    _contiguous(entries, 8 + length, size, where)
    return entries


def _entry(name: str, fields: Any, shard: str, base: int, where: str) -> TensorEntry:
    """Check one tensor of a header: known dtype, sane shape, a range of exactly the size that both ask for."""

    def corrupt(reason: str) -> UsageError:
        return UsageError(f"corrupt: tensor {name[:200]!r} {reason}", where=where, hint=REPAIR)

    if not isinstance(fields, dict):
        raise corrupt("is not an object")
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise corrupt(f"has the unknown dtype {str(dtype)[:40]!r}")
    if not _naturals(shape) or len(shape) > MAX_RANK:
        raise corrupt("has no valid shape")
    if not _naturals(offsets) or len(offsets) != 2:
        raise corrupt("has no valid data_offsets")
    bits = math.prod(shape) * BITS[dtype]
    if offsets[1] < offsets[0] or bits != 8 * (offsets[1] - offsets[0]):
        raise corrupt(f"spans {offsets[1] - offsets[0]} bytes where dtype and shape ask for {-(-bits // 8)}")
    return TensorEntry(name, shard, dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _naturals(value: Any) -> TypeGuard[list[int]]:
    """Say whether `value` is a list of whole numbers from 0 to 2⁶³ - 1."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _contiguous(entries: Iterable[TensorEntry], base: int, size: int, where: str) -> None:
    """Check that sorted ranges cover the data exactly: no overlap, no hole, nothing missing, nothing left over."""
    at = base
    for entry in entries:
        if entry.begin != at:
            problem = "overlaps the one before it" if entry.begin < at else "leaves a hole before it"
            raise UsageError(f"corrupt: tensor {entry.name!r} {problem}", where=where, hint=REPAIR)
        at = entry.end
    if at > size:
        raise UsageError(f"truncated: {size} bytes of {at}", where=where, hint=REPAIR)
    if at < size:
        raise UsageError(f"corrupt: {size - at} bytes after the last tensor", where=where, hint=REPAIR)


def read_range(path: Path, begin: int, end: int) -> bytearray:
    """Return bytes `begin` to `end` of a file in a fresh buffer, reading nothing else.

    Raises:
        RunFailed: the file cannot be read or ends early.
    """
    buffer = bytearray(end - begin)
    read_into(path, begin, memoryview(buffer))
    return buffer


def read_into(path: Path, begin: int, view: memoryview) -> None:
    """Fill a writable buffer with the bytes of a file from `begin` on.

    Raises:
        RunFailed: the file cannot be read or ends early.
    """
    end = begin + len(view)
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(begin)
            while view:
                count = file.readinto(view[: 1 << 30])
                if not count:
                    raise RunFailed(f"ends before byte {end}: changed while it was read", where=str(path))
                view = view[count:]
    except OSError as error:
        raise RunFailed(f"cannot be read: {error.strerror}", where=str(path)) from None
