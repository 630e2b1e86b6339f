"""Artefacts on disk: one safetensors file each, whole or not at all, the same bytes for the same content."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from perpend.errors import UsageError
from perpend.whole import write_file

KEY = "perpend"
"""The one metadata key; several would be written in no fixed order."""
VERSION = 1


def canonical(content: Mapping[str, Any]) -> str:
    """Return JSON with sorted keys and no spaces; what JSON has no form for is written as its `str`."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)


def write(
    path: str | Path, kind: str, tensors: Mapping[str, Tensor], content: Mapping[str, Any], *, replace: bool = True
) -> None:
    """Write tensors and JSON content as `path`; until it is complete it is called `path` + `.partial`.

    Raises:
        UsageError: the folder cannot be written to, the file is there and not to be replaced, or another process is
            writing it.
    """
    header = {KEY: canonical({"kind": kind, "version": VERSION, "content": content})}
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, header)
    write_file(Path(path), data, replace=replace)


def read(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors, on the CPU, and the content that `write` stored as `kind`.

    Raises:
        UsageError: no such file, or it holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError("no such file", where=str(path))
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(KEY, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise UsageError(f"not a whole safetensors file: {error}", where=str(path)) from None
    if header.get("kind") != kind or header.get("version") != VERSION:
        found = f"{header['kind']} (format {header.get('version')})" if "kind" in header else "other tensors"
        raise UsageError(f"holds {found}", where=str(path), valid=f"{kind} (format {VERSION}) written by perpend")
    return tensors, dict(header["content"])
