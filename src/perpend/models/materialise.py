"""A GGUF file written out as a safetensors checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from perpend.config import Machine
from perpend.errors import UsageError
from perpend.models import gguf
from perpend.models.load import Loaded, load_model
from perpend.models.quiet import silenced
from perpend.refs import ModelRef


def materialise_gguf(
    ref: ModelRef | str | Path, out: Path | str, *, dtype: torch.dtype = torch.bfloat16, machine: Machine | None = None
) -> Path:
    """Write a GGUF file as a safetensors directory, with configuration, tokenizer, chat template and licence.

    Args:
        ref: The GGUF file.
        out: A directory that does not exist yet; until it is complete it is called `out` + `.partial`.
        dtype: Of the weights. q4_0 and q8_0 values are exact in float32 and rounded in bfloat16.
        machine: Whose device is used; the CPU by default.

    Returns:
        `out`.

    Raises:
        UsageError: not a GGUF file, or `out` exists.
    """
    out, ref = Path(out), ref if isinstance(ref, ModelRef) else ModelRef.parse(str(ref))
    if ref.kind != "gguf":
        raise UsageError("not a GGUF file", where=str(ref))
    if out.exists():
        raise UsageError("exists already", where=str(out))
    device = machine.device if machine else "cpu"
    machine = Machine.model_validate({"device": device, "dtype": str(dtype).removeprefix("torch.")})
    return save_gguf(load_model(ref, machine), out)


def save_gguf(loaded: Loaded, out: Path) -> Path:
    """Write a model that was read from a GGUF file; see `materialise_gguf`."""
    partial = out.with_name(out.name + ".partial")
    model: Any = loaded.model
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    with silenced():
        model.save_pretrained(partial)
        loaded.tokenizer.save_pretrained(partial)
    about = gguf.front_matter(gguf.metadata(loaded.source.path / str(loaded.source.gguf_file)))
    if about:
        (partial / "README.md").write_text(about, encoding="utf-8")
    return partial.rename(out)
