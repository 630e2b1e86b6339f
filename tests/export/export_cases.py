"""Edits of pico models, and what an exported folder must answer, made without any of the code under test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import pico
from perpend.core.edits import Edit, HookMap, ModuleEdit, edit_bias, edit_weight
from perpend.core.linear import orthonormalise
from perpend.core.quant import simulate
from perpend.models.anatomy import Anatomy

WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
TOKENS = torch.tensor([[2, 40, 41, 42, 200, 77, 5, 13]])


def load(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    config = pico.AutoConfig.from_pretrained(folder)
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=dtype).eval()


def an_edit(anatomy: Anatomy, weight: float = 0.8, mode: str = "plain", rank: int = 1, seed: int = 0) -> Edit:
    """Take one random subspace out of every writer, by factors that differ from layer to layer."""
    generator = torch.Generator().manual_seed(seed)
    directions = orthonormalise(torch.randn(rank, anatomy.hidden_size, generator=generator)).float()
    return Edit({w.name: ModuleEdit(directions, weight - 0.1 * w.layer, mode) for w in anatomy.writers})


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS.to(model.device), use_cache=False).logits.float().cpu()


@contextmanager
def hooked(model: nn.Module, anatomy: Anatomy, edit: Edit) -> Iterator[None]:
    """Put the maps of an edit on single-matrix writers as hooks, and edit fused experts in memory, for this block."""
    handles, kept = [], {}
    for name, part in edit.modules.items():
        writer = anatomy.writer(name)
        module, weight = model.get_submodule(name), writer.weight(model)
        if writer.experts is None:
            own = HookMap.of(writer.matrix(weight), part)
            handles.append(module.register_forward_pre_hook(lambda m, x, own=own: (own.scale(x[0]), *x[1:])))
            handles.append(module.register_forward_hook(lambda m, x, y, own=own: own.apply(y)))
            continue
        bias = writer.bias_of(model)
        kept[weight] = weight.detach().clone()
        kept |= {} if bias is None else {bias: bias.detach().clone()}
        for e in range(writer.experts):
            old = writer.matrix(weight.detach(), e).clone()
            writer.assign(weight, edit_weight(old, part), e)
            if bias is not None:
                bias.data[e] = edit_bias(bias.detach()[e], part, old)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, value in kept.items():
            parameter.data.copy_(value)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def on_lattice(folder: Path, family: str = "llama") -> Path:
    """Write a bfloat16 checkpoint whose writers lie on the q4_0 lattice."""
    model = pico.build(family, **WIDE)
    with torch.no_grad():
        for writer in Anatomy.of(model).writers:
            matrix = writer.matrix(writer.weight(model))
            matrix.copy_(simulate(matrix.contiguous(), "q4_0"))
    model.bfloat16().save_pretrained(folder)
    return folder
