"""Whether the files of a model are whole: said from names, sizes and headers, before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from perpend.errors import UsageError
from perpend.models import gguf
from perpend.models.headers import UNPICKLE
from perpend.refs import Resolved


def require_config(source: Resolved, where: str) -> None:
    """Refuse a folder without a model's configuration; a GGUF file has its own.

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    if source.gguf_file:
        return
    files = {path.name for path in source.path.iterdir()}
    if "config.json" not in files:
        ggufs = sorted(name for name in files if name.lower().endswith(".gguf"))
        raise UsageError(
            "no config.json: not a model directory", where=where, hint=f"{where}/{ggufs[0]}" if ggufs else ""
        )
    _json(source.path / "config.json")


def check_files(source: Resolved, where: str) -> int:
    """Check that a checkpoint is whole, from names, sizes and headers alone.

    Returns:
        Bytes of its weights.

    Raises:
        UsageError: no configuration, no weights or pickled ones, a shard that is missing, truncated or corrupt.
    """
    if source.gguf_file:
        return 2 * gguf.elements(source.path / source.gguf_file)
    require_config(source, where)
    files = {path.name for path in source.path.iterdir()}
    if "model.safetensors" in files:
        shards: dict[str, set[str]] = {"model.safetensors": set()}
    elif "model.safetensors.index.json" in files:
        shards = _index(source.path / "model.safetensors.index.json")
    elif any(name.endswith((".bin", ".pt", ".pth")) for name in files):
        raise UsageError("only pickled weights, which can run code and are not read", where=where, hint=UNPICKLE)
    else:
        raise UsageError("no weights", where=where, valid="model.safetensors, model.safetensors.index.json")
    return sum(_check_shard(source.path / shard, names) for shard, names in shards.items())


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"not valid JSON: {str(error).splitlines()[0]}", where=str(path)) from None
    if not isinstance(data, dict):
        raise UsageError("not a JSON object", where=str(path))
    return data


def _index(path: Path) -> dict[str, set[str]]:
    """Return the tensors that each shard must hold."""
    mapping = _json(path).get("weight_map")
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(name, str) for name in mapping.values()):
        raise UsageError("has no weight_map", where=str(path), hint="download the checkpoint again")
    shards: dict[str, set[str]] = {}
    for tensor, shard in mapping.items():
        shards.setdefault(shard, set()).add(tensor)
    return shards


def _check_shard(path: Path, names: set[str]) -> int:
    """Check one safetensors file; its library compares header, offsets and size of the file."""
    from safetensors import SafetensorError, safe_open

    again = "download the checkpoint again"
    if not path.is_file():
        raise UsageError("missing file", where=str(path), hint=again)
    try:
        with safe_open(path, framework="pt") as file:
            lost = names.difference(file.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"truncated or corrupt: {str(error).splitlines()[0]}", where=str(path), hint=again) from None
    if lost:
        raise UsageError(f"lacks {len(lost)} tensors of the index, such as {min(lost)}", where=str(path), hint=again)
    return path.stat().st_size
