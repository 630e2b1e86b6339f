"""Artefacts on disk: one safetensors file each, whole or not at all, the same bytes for the same content."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from perpend.errors import UsageError
from perpend.whole import write_file

KEY = "perpend"
"""The one metadata key; several would be written in no fixed order."""
VERSION = 1
STUMBLES = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What a reader meets in content that is not what it takes it for; nesting without end is a RuntimeError."""

Artefact = TypeVar("Artefact")


def canonical(content: Mapping[str, Any]) -> str:
    """Return JSON with sorted keys and no spaces; what JSON has no form for is written as its `str`."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)


def packed(kind: str, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> bytes:
    """Return tensors and JSON content as the bytes of a file."""
    header = {KEY: canonical({"kind": kind, "version": VERSION, "content": content})}
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, header)


def write(path: str | Path, kind: str, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
    """Write tensors and JSON content as `path`; until it is complete it is called `path` + `.partial`.

    Raises:
        UsageError: the folder cannot be written to, or another process is writing it.
    """
    write_file(Path(path), packed(kind, tensors, content), replace=True)


def read(path: str | Path, kind: str, build: Callable[[dict[str, Tensor], dict[str, Any]], Artefact]) -> Artefact:
    """Read what `write` stored as `kind`.

    Args:
        path: The file, which anybody may have made.
        kind: What it must hold.
        build: Makes the artefact of the tensors, float32 on the CPU, and the content; what it stumbles over is told
            as an error of the file.

    Raises:
        UsageError: no such file, or it holds something else.
    """
    where = str(path)
    if not os.path.isfile(path):
        raise UsageError("no such file", where=where)
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(KEY, "{}"))
            _require(header, kind, where)
            tensors = {name: _floats(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 (no mapping)
        return build(tensors, dict(header["content"]))
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise UsageError(f"not a whole safetensors file: {_short(error)}", where=where) from None
    except UsageError as error:
        raise error if error.where else UsageError(_short(error), where=where) from None
    except STUMBLES as error:
        raise UsageError(f"holds no whole {kind}: {type(error).__name__} {_short(error)}", where=where) from None


def _require(header: Any, kind: str, where: str) -> None:
    """Refuse what is not of this kind and format."""
    facts = header if isinstance(header, dict) else {}
    if facts.get("kind") == kind and facts.get("version") == VERSION:
        return
    found = f"{facts['kind']} (format {facts.get('version')})"[:200] if "kind" in facts else "other tensors"
    raise UsageError(f"holds {found}", where=where, valid=f"{kind} (format {VERSION}) written by perpend")


def _floats(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        raise TypeError(f"{tensor.dtype} for numbers")
    return tensor.float()


def _short(error: Exception) -> str:
    return str(error)[:200]
