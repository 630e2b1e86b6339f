"""Adapters on disk: saved small, merged into a checkpoint of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from perpend.errors import MissingExtra, UsageError
from perpend.models.load import Loaded
from perpend.models.quiet import silenced

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def rounded(wrapped: nn.Module) -> None:
    """Round the adapter of a PEFT model to bfloat16 in place, so that what is measured is what `save` keeps."""
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16().to(parameter.dtype)


def save(wrapped: Any, folder: Path, base: str) -> None:
    """Write the adapter in bfloat16, with a configuration that names `base` and no path of this machine."""
    with silenced():
        wrapped.peft_config["default"].base_model_name_or_path = base
        wrapped.save_pretrained(folder)
    path = folder / WEIGHTS
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).bfloat16() for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config["target_modules"] = sorted(config["target_modules"])
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "README.md").unlink(missing_ok=True)


def merge(loaded: Loaded, adapter: Path) -> nn.Module:
    """Return the loaded model with an adapter merged into its weights; `loaded` is used up.

    Raises:
        MissingExtra: PEFT is not installed.
        UsageError: the folder holds no adapter of this model.
    """
    try:
        from peft import PeftModel
    except ImportError:
        raise MissingExtra("peft", "organism", "merging an adapter") from None
    if not (adapter / CONFIG).is_file():
        raise UsageError(f"no {CONFIG}", where=str(adapter), hint="perpend organism BASE -o OUT makes an adapter")
    try:
        with silenced(), torch.no_grad():
            device = str(loaded.model.device)  # PEFT would take a GPU where there is one
            wrapped: Any = PeftModel.from_pretrained(loaded.model, str(adapter), torch_device=device)
            merged: nn.Module = wrapped.merge_and_unload()
    except (ValueError, KeyError, RuntimeError) as error:
        raise UsageError(f"not an adapter of this model: {error}", where=str(adapter)) from None
    return merged.eval().requires_grad_(False)


def save_model(model: Any, loaded: Loaded, out: Path) -> None:
    """Write a model with its tokenizer, processor and chat template as a safetensors directory, in its own dtype."""
    if getattr(model.config, "quantization_config", None) is not None:  # of a GGUF file, dequantised by now
        del model.config.quantization_config
    with silenced():
        model.save_pretrained(out)
        (loaded.processor or loaded.tokenizer).save_pretrained(out)
