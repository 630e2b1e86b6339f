"""Pico checkpoints whose matrices are packed: MXFP4 as gpt-oss is published, FP8 as DeepSeek V3 is.

Both are made from a model's own numbers and give back, besides the folder, the plain numbers that they stand for,
computed here from their definitions and not by the code under test.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import pico

WEIGHTS = "model.safetensors"
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
"""Sizes of an FP4 number (E2M1) by its three low bits; the fourth is the sign."""
SIZES: dict[str, dict[str, Any]] = {"gpt_oss": {"intermediate_size": 32}}
"""Blocks of MXFP4 hold 32 numbers."""


def save_mxfp4(folder: Path, family: str = "gpt_oss") -> tuple[Path, dict[str, Tensor]]:
    """Write gpt-oss with its experts as blocks `[E, out, in / 32, 16]` and scales `[E, out, in / 32]`."""
    plain, kept = _plain(folder, family), {}
    packed = dict(plain)
    for name in [name for name in plain if name.endswith(("gate_up_proj", "down_proj"))]:
        groups = packed.pop(name).float().transpose(1, 2).unflatten(-1, (-1, 32))  # [E, out, in / 32, 32]
        powers = (groups.abs().amax(-1) / 6).log2().ceil()
        sizes = groups / powers.exp2()[..., None]
        codes = (sizes.abs()[..., None] - FP4).abs().argmin(-1)
        kept[name] = (FP4[codes] * sizes.sign() * powers.exp2()[..., None]).flatten(-2).transpose(1, 2)
        codes = (codes + 8 * (sizes < 0)).to(torch.uint8)
        packed[f"{name}_blocks"] = codes[..., 0::2] | codes[..., 1::2] << 4
        packed[f"{name}_scales"] = (powers + 127).to(torch.uint8)
    return _write(folder, packed, {"quant_method": "mxfp4"}), {**plain, **kept}


def save_fp8(
    folder: Path, family: str = "deepseek_v3", *, block: tuple[int, int] = (16, 16)
) -> tuple[Path, dict[str, Tensor]]:
    """Write the linear maps of a model as FP8 (E4M3) with a float32 factor for every block, the last ones cut short."""
    plain, kept = _plain(folder, family), {}
    packed = dict(plain)
    for name, tensor in plain.items():
        if tensor.ndim != 2 or ".layers." not in name or "gate.weight" in name:
            continue
        scales = torch.empty([-(-n // b) for n, b in zip(tensor.shape, block, strict=True)])
        wide, codes = torch.empty_like(tensor.float()), torch.empty(tensor.shape, dtype=torch.float8_e4m3fn)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                at = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
                scales[i, j] = tensor[at].float().abs().max() / 448
                codes[at] = (tensor[at].float() / scales[i, j]).to(torch.float8_e4m3fn)
                wide[at] = codes[at].float() * scales[i, j]
        kept[name] = wide
        packed |= {name: codes, f"{name}_scale_inv": scales}
    method = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block), "activation_scheme": "dynamic"}
    return _write(folder, packed, method), {**plain, **kept}


def _plain(folder: Path, family: str) -> dict[str, Tensor]:
    """Save a model in bfloat16 with its tokenizer, and return its tensors."""
    pico.build(family, **SIZES.get(family, {})).bfloat16().save_pretrained(folder)
    pico.tokenizer().save_pretrained(folder)
    return load_file(folder / WEIGHTS)


def _write(folder: Path, tensors: dict[str, Tensor], method: dict[str, Any]) -> Path:
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": method}))
    return folder
