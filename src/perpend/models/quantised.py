"""Quantised checkpoints: which can be measured, which cannot be edited, and loading quantised to measure.

Measuring needs the outputs of modules alone; an export needs the original numbers. So weights may be quantised while
directions are fitted and edits tried, and what is written is always made from the original files. Where those are
FP8 or MXFP4 themselves, as DeepSeek V3 and gpt-oss are published, they are widened to bfloat16 first.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from perpend.config import Machine
from perpend.errors import MissingExtra, UsageError
from perpend.models.headers import read_header
from perpend.models.packed import wide_bytes
from perpend.progress import note

WIDTH = {"8bit": 1.06, "4bit": 0.57}
"""Bytes per parameter with scales, before what stays in 16 bits."""
WIDENED = {"fp8": "FP8", "mxfp4": "MXFP4"}
"""Methods whose numbers are exact in float32, so that an export can be made from them, and how they are spelt."""
MEASURED = {**WIDENED, "bitsandbytes": "bitsandbytes"}
"""Methods of checkpoints that are loaded to measure, and how they are spelt."""


def method(config: Mapping[str, Any]) -> str | None:
    """Return how a `config.json` says that the weights are quantised, in lower case; None for plain ones."""
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    for part in parts:
        settings = part.get("quantization_config") or part.get("compression_config")
        if isinstance(settings, dict):
            return str(settings.get("quant_method") or settings.get("quant_algo") or "unnamed").lower()
    return None


def require_usable(folder: Path, where: str, machine: Machine) -> str | None:
    """Refuse a checkpoint that cannot be edited in place, with the way round; say so of one that can only be measured.

    Args:
        folder: Of the checkpoint.
        where: For messages.
        machine: What is asked for.

    Returns:
        The method, None for plain weights.

    Raises:
        UsageError: GPTQ, AWQ and the like; or quantised weights that are to be quantised again.
    """
    config = _config(folder)
    found = method(config)
    if found is None:
        return None
    name = MEASURED.get(found, found.upper() if len(found) <= 5 else found)
    if found not in MEASURED:
        raise UsageError(
            f"its weights are {name}: their integers and scales were fitted to the unedited matrices, and cannot be "
            "edited in place",
            where=where,
            hint=f"perpend fit {_base(folder, config) or 'THE-UNQUANTISED-MODEL'}, apply, then {name} on the result",
        )
    if machine.quantization != "none":
        raise UsageError(f"its weights are {name} already", where=where, valid="--quantization none")
    after = "is made from them in bfloat16" if found in WIDENED else "needs the unquantised checkpoint"
    note(f"{where}: {name} weights, good for measuring; an export {after}")
    return found


def require_exportable(folder: Path, where: str) -> str | None:
    """Refuse a checkpoint that an export cannot be made from, before anything is loaded.

    Args:
        folder: Of the checkpoint.
        where: For messages.

    Returns:
        The method of one that is widened to bfloat16 for the export; None for plain weights.

    Raises:
        UsageError: stored in the numbers of bitsandbytes.
    """
    config = _config(folder)
    found = method(config)
    if found == "bitsandbytes":
        raise UsageError(
            "its weights are bitsandbytes: good for measuring, and an edit of rounded numbers is rounded again",
            where=where,
            valid="float32, bfloat16, float16, FP8 or MXFP4 weights to export from",
            hint=f"perpend run {_base(folder, config) or 'THE-UNQUANTISED-MODEL'} --quantization 4bit",
        )
    return found if found in WIDENED else None


def packed_as(folder: Path) -> str:
    """Return how the weights of a checkpoint that is widened for an export are packed; empty for others."""
    return WIDENED.get(method(_config(folder)) or "", "")


def _config(folder: Path) -> dict[str, Any]:
    return _object(folder / "config.json")


def _object(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty where there is none, which is said when files are checked."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _shards(folder: Path) -> set[str]:
    """Return the names of the files that hold the weights."""
    if (folder / "model.safetensors").exists():
        return {"model.safetensors"}
    names = _object(folder / "model.safetensors.index.json").get("weight_map")
    return {str(name) for name in names.values()} if isinstance(names, dict) else set()


def wide_size(folder: Path, method: str) -> int:
    """Return the bytes of the weights of a packed checkpoint in bfloat16, from the headers of its files."""
    return sum(wide_bytes(read_header(folder / name), method) for name in _shards(folder))


def in_memory(folder: Path, size: int, settings: Any | None) -> int:
    """Return the bytes that weights take in memory.

    Args:
        folder: Of the checkpoint, whose files are whole.
        size: Bytes of its files.
        settings: What it is loaded with; FP8 and MXFP4 that are not computed with are widened.
    """
    if settings is None or not getattr(settings, "dequantize", False):
        return size
    return wide_size(folder, str(settings.quant_method.value))


def _base(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Return the model that a quantised one was made from, as its card or its configuration says."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.exists() else ""
    front = text.split("---", 2)[1] if text.startswith("---") and text.count("---") >= 2 else ""
    found = re.search(r"^base_model:\s*(?:\n\s*-\s*)?[\"']?([\w.-]+/[\w.-]+)", front, re.MULTILINE)
    if found:
        return found[1]
    named = config.get("_name_or_path")
    return named if isinstance(named, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", named) else None


def settings(machine: Machine, stored: str | None, device: torch.device, where: str) -> Any | None:
    """Return the quantisation configuration to load with; None for the checkpoint's own or for none.

    FP8 and MXFP4 weights are widened to bfloat16 where there is no GPU that computes with them.

    Raises:
        MissingExtra: bitsandbytes is not installed.
    """
    import transformers

    hf: Any = transformers
    needed = machine.quantization != "none" or stored == "bitsandbytes"
    if needed and importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtra("bitsandbytes", "bnb", f"loading {where} quantised")
    if machine.quantization == "8bit":
        return hf.BitsAndBytesConfig(load_in_8bit=True)
    if machine.quantization == "4bit":
        return hf.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    if device.type != "cuda" and stored == "fp8":
        return hf.FineGrainedFP8Config(dequantize=True)
    if device.type != "cuda" and stored == "mxfp4":
        return hf.Mxfp4Config(dequantize=True)
    return None
