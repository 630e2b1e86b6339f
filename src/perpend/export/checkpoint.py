"""An index of a safetensors checkpoint: which tensor lies where, and whether the files are whole.

Headers are checked as `perpend.models.headers` does it. No tensor is loaded and torch is not needed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from perpend.errors import UsageError
from perpend.models.headers import REPAIR, UNPICKLE, TensorEntry, parse_json, read_header, read_range

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

MAX_INDEX = 256_000_000


class Checkpoint:
    """A safetensors checkpoint, `model.safetensors` or the shards that its index names.

    Attributes:
        path: The folder.
        shards: File names that hold the tensors, in order.
        tensors: Every tensor by name.
        index: The file that names the shards, None for a single file.
    """

    def __init__(self, path: Path | str) -> None:
        """Read and check all headers; cost is that of the headers alone.

        Raises:
            UsageError: no safetensors weights in the folder, or a shard that is missing, truncated or corrupt.
        """
        self.path = Path(path)
        if not self.path.is_dir():
            raise UsageError("no such directory", where=str(path))
        self.index: Path | None = None
        promised: dict[str, str] = {}
        if (self.path / SINGLE).exists() or not (self.path / INDEX).exists():
            if not (self.path / SINGLE).exists():
                raise _no_weights(self.path)
            self.shards: tuple[str, ...] = (SINGLE,)
        else:
            self.index = self.path / INDEX
            promised = _read_index(self.index)
            self.shards = tuple(sorted(set(promised.values())))
        self.tensors: dict[str, TensorEntry] = {}
        for shard in self.shards:
            self._add(shard)
        for name, shard in promised.items():
            if name not in self.tensors or self.tensors[name].shard != shard:
                raise UsageError(f"tensor {name!r} is not in {shard!r}", where=str(self.index), hint=REPAIR)

    def _add(self, shard: str) -> None:
        for entry in read_header(self.path / shard, shard):
            other = self.tensors.setdefault(entry.name, entry)
            if other is not entry:
                raise UsageError(f"tensor {entry.name!r} is also in {other.shard!r}", where=str(self.path / shard))

    def read(self, entry: TensorEntry, begin: int = 0, end: int | None = None) -> bytearray:
        """Return bytes `begin` to `end` of a tensor, counted from its own start; the whole tensor by default.

        Raises:
            RunFailed: the file cannot be read, or has become shorter than its header says.
        """
        first = entry.begin + begin
        last = entry.end if end is None else entry.begin + end
        return read_range(self.path / entry.shard, first, last)

    def config(self) -> dict[str, Any]:
        """Return `config.json` as a mapping, empty when there is none.

        Raises:
            UsageError: the file is not a JSON object.
        """
        path = self.path / "config.json"
        if not path.exists():
            return {}
        config = parse_json(path.read_bytes(), str(path))
        if not isinstance(config, dict):
            raise UsageError("not a JSON object", where=str(path))
        return config

    def quantisation(self) -> str | None:
        """Return the method that the weights are quantised by, from `config.json`; None for plain weights."""
        config = self.config()
        parts = [config, *(value for value in config.values() if isinstance(value, dict))]
        for part in parts:
            settings = part.get("quantization_config") or part.get("compression_config")
            if isinstance(settings, dict):
                return str(settings.get("quant_method") or settings.get("quant_algo") or "an unnamed method")
        return None


def _no_weights(path: Path) -> UsageError:
    names = sorted(p.name for p in path.iterdir())
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        return UsageError("only pickled weights, which can run code and are not read", where=str(path), hint=UNPICKLE)
    if any(name.endswith(".gguf") for name in names):
        return UsageError("only GGUF weights", where=str(path), valid=f"{SINGLE} or {INDEX}")
    return UsageError("no weights", where=str(path), valid=f"{SINGLE} or {INDEX}")


def _read_index(path: Path) -> dict[str, str]:
    """Return tensor name → file name; file names are plain names in the same folder."""
    if path.stat().st_size > MAX_INDEX:
        raise UsageError(f"larger than {MAX_INDEX} bytes", where=str(path))
    data = parse_json(path.read_bytes(), str(path))
    mapping = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(mapping, dict) or not mapping:
        raise UsageError("has no weight_map", where=str(path), hint=REPAIR)
    for name, shard in mapping.items():
        plain = isinstance(shard, str) and shard.endswith(".safetensors") and not set(shard) & {"/", "\\", "\0"}
        if not plain:
            raise UsageError(f"{shard!r} of tensor {name!r} is not the name of a safetensors file", where=str(path))
    return mapping


def files(folder: Path) -> Iterator[Path]:
    """Yield every regular file under `folder`, in order, following symlinks to files as hub snapshots have them.

    Hidden folders (`.git`, the hub's `.cache`) and folders named `__pycache__` hold nothing of the model.

    Raises:
        UsageError: a symlink to a folder or to nowhere, or something that is neither file nor folder.
    """
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        linked = next((name for name in folders if (Path(root) / name).is_symlink()), None)
        if linked:
            raise UsageError("a symlink to a folder", where=str(Path(root) / linked), valid="files, symlinks to files")
        for name in sorted(names):
            path = Path(root) / name
            if not path.exists():
                raise UsageError("missing file: a symlink that leads nowhere", where=str(path), hint=REPAIR)
            if not path.is_file():
                raise UsageError("not a regular file", where=str(path))
            yield path
