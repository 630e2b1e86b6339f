"""An FP8 or MXFP4 checkpoint written out in bfloat16, from which an export can be made.

One matrix, or one expert of a fused one, is in memory at a time. Tensors that are not packed keep their bytes, names
and files; a packed one becomes bfloat16 under the name that its model knows, in the file of its codes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO

import torch

from perpend.errors import RunFailed
from perpend.export.checkpoint import INDEX, Checkpoint, files
from perpend.export.shards import OTHER_WEIGHTS
from perpend.models.headers import BITS, TensorEntry, read_range
from perpend.models.packed import Packed, block_of, find
from perpend.progress import track

CHUNK = 64 << 20
LEFT_OUT = "a second copy of the weights, or weights in another format"


@dataclass(frozen=True)
class Widened:
    """A checkpoint in bfloat16.

    Attributes:
        path: Its folder.
        tensors: Names of the tensors that were packed.
        left_out: Files of the source that it lacks, with the reason.
    """

    path: Path
    tensors: tuple[str, ...]
    left_out: dict[str, str]


@torch.no_grad()
def widen(source: Path, out: Path, method: str) -> Widened:
    """Write a packed checkpoint in bfloat16; its other files are linked to.

    Args:
        source: Folder of an FP8 or MXFP4 checkpoint.
        out: Folder to make.
        method: fp8 or mxfp4.

    Raises:
        UsageError: a tensor that is packed in a form that is not known.
        RunFailed: a number is not finite in bfloat16, or a file cannot be written.
    """
    checkpoint = Checkpoint(source)
    config = checkpoint.config()
    packed = find(checkpoint.tensors, method, block_of(_settings(config)), str(source))
    out.mkdir(parents=True)
    left_out = {}
    for path in files(source):
        name = path.relative_to(source)
        if str(name) in (*checkpoint.shards, INDEX, "config.json"):
            continue
        if path.suffix == ".safetensors" or any(fnmatch(path.name, pattern) for pattern in OTHER_WEIGHTS):
            left_out[str(name)] = LEFT_OUT
            continue
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).symlink_to(path.resolve())
    try:
        shards = {shard: _shard(checkpoint, packed, shard, out) for shard in track(checkpoint.shards, "widen")}
        (out / "config.json").write_text(json.dumps(_plain(config), indent=2) + "\n", encoding="utf-8")
        if checkpoint.index is not None:
            names = {name: shard for shard, held in shards.items() for name in held}
            size = sum(sum(held.values()) for held in shards.values())
            told = {"metadata": {"total_size": size}, "weight_map": names}
            (out / INDEX).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunFailed(f"cannot be written: {error.strerror}", where=str(out)) from error
    return Widened(out, tuple(sorted(part.name for part in packed.values() if part)), left_out)


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    return next((part["quantization_config"] for part in parts if part.get("quantization_config")), {})


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration that says nothing of quantisation, and bfloat16."""
    kept = {k: _plain(v) if isinstance(v, dict) else v for k, v in config.items() if k != "quantization_config"}
    return kept | {key: "bfloat16" for key in ("dtype", "torch_dtype") if key in kept}


def _shard(checkpoint: Checkpoint, packed: Mapping[str, Packed | None], shard: str, out: Path) -> dict[str, int]:
    """Write one file, wide dtypes first so that every tensor is aligned; return its tensors with their bytes."""
    own = [entry for entry in checkpoint.tensors.values() if entry.shard == shard]
    own.sort(key=lambda entry: (-16 if packed.get(entry.name) else -BITS[entry.dtype], entry.begin))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    kept: list[tuple[TensorEntry, Packed | None]] = []
    at, sizes = 0, dict[str, int]()
    for entry in own:
        part = packed.get(entry.name)
        if part is None and entry.name in packed:
            continue
        kept.append((entry, part))
        name, shape = (part.name, part.shape) if part else (entry.name, entry.shape)
        size = 2 * math.prod(shape) if part else entry.nbytes
        kind = "BF16" if part else entry.dtype
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, at + size]}
        at, sizes[name] = at + size, size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with (out / shard).open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry, part in kept:
            _write(checkpoint, entry, part, file)
    return sizes


def _write(checkpoint: Checkpoint, entry: TensorEntry, part: Packed | None, file: BinaryIO) -> None:
    if part is None:
        path = checkpoint.path / entry.shard
        for begin in range(entry.begin, entry.end, CHUNK):
            file.write(read_range(path, begin, min(begin + CHUNK, entry.end)))
        return
    for numbers in part.parts(checkpoint.path):
        wide = numbers.to(torch.bfloat16)
        if not bool(wide.isfinite().all()):
            raise RunFailed(f"tensor {part.name!r} is not finite in bfloat16", where=str(checkpoint.path))
        file.write(wide.contiguous().view(torch.uint8).numpy().tobytes())
