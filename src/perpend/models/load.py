"""Loading: the one place that calls what changes between versions of transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perpend.config import Machine
from perpend.errors import UsageError
from perpend.refs import ModelRef, Resolved


@dataclass(frozen=True)
class Loaded:
    """A model ready to run, in evaluation mode, without gradients.

    Attributes:
        model: The model with its LM head.
        tokenizer: Its tokenizer.
        processor: Its processor where it takes images, else None.
        source: The files it came from.
        dtype: Floating type of its parameters.
    """

    model: nn.Module
    tokenizer: Any
    processor: Any | None
    source: Resolved
    dtype: torch.dtype


@contextmanager
def silenced() -> Iterator[None]:
    """Keep progress bars, warnings and log lines of the Hugging Face libraries off the terminal inside the block."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def pick_device(name: str) -> torch.device:
    """Return the device that `name` stands for; `auto` takes a GPU where there is one.

    Raises:
        UsageError: no such device on this machine.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device '{name}' cannot be used: {reason}", valid="auto, cpu, cuda, cuda:N, mps") from None
    return device


def load_model(
    ref: ModelRef | str | Path, machine: Machine | None = None, *, trust_remote_code: bool = False
) -> Loaded:
    """Load a model with its tokenizer.

    Args:
        ref: Hub id, directory or GGUF file.
        machine: Device and dtype.
        trust_remote_code: Run Python code that comes with the model.
    """
    import transformers as hf

    machine = machine or Machine()
    source = (ref if isinstance(ref, ModelRef) else ModelRef.parse(str(ref))).resolve()
    device = pick_device(machine.device)
    common: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if source.gguf_file:
        common["gguf_file"] = source.gguf_file
    with silenced():
        config = hf.AutoConfig.from_pretrained(source.path, **common)
        tokenizer = hf.AutoTokenizer.from_pretrained(source.path, padding_side="left", **common)
        sees = getattr(config, "vision_config", None) is not None
        processor = hf.AutoProcessor.from_pretrained(source.path, **common) if sees else None
        kind = hf.AutoModelForImageTextToText if sees else hf.AutoModelForCausalLM
        if source.gguf_file:
            common["quantization_config"] = hf.GgufConfig(dequantize=True)
        dtype = machine.dtype if machine.dtype == "auto" else getattr(torch, machine.dtype)
        model = kind.from_pretrained(source.path, dtype=dtype, device_map={"": device}, **common)
    model.eval().requires_grad_(False)
    return Loaded(model, tokenizer, processor, source, model.dtype)


def position_ids(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `{"position_ids": [B, T] int64}` counted over unpadded tokens, or `{}` where the model takes none."""
    mask = inputs["attention_mask"].long()
    return {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
