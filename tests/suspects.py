"""Checkpoints of known history: a base of random weights and what is made of it, without any model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from perpend.core.edits import ModuleEdit, edit_weight

HIDDEN, INNER, LAYERS = 64, 96, 10
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
READERS = ("self_attn.q_proj", "mlp.up_proj")
Tensors = dict[str, Tensor]


def base(dtype: torch.dtype = torch.bfloat16, seed: int = 0, prefix: str = "model.") -> Tensors:
    """Random weights with uneven rows; `o_proj` and `q_proj` are square."""
    g = torch.Generator().manual_seed(seed)

    def matrix(m: int, n: int) -> Tensor:
        return torch.randn(m, n, generator=g) * 0.05 * (0.4 * torch.randn(m, 1, generator=g)).exp()

    made = {f"{prefix}embed_tokens.weight": matrix(256, HIDDEN), f"{prefix}norm.weight": torch.ones(HIDDEN)}
    for layer in range(LAYERS):
        at = f"{prefix}layers.{layer}."
        made[f"{at}self_attn.o_proj.weight"] = matrix(HIDDEN, HIDDEN)
        made[f"{at}self_attn.q_proj.weight"] = matrix(HIDDEN, HIDDEN)
        made[f"{at}mlp.down_proj.weight"] = matrix(HIDDEN, INNER)
        made[f"{at}mlp.up_proj.weight"] = matrix(INNER, HIDDEN)
        made[f"{at}input_layernorm.weight"] = torch.ones(HIDDEN)
    return {name: tensor.to(dtype) for name, tensor in made.items()}


def write(folder: Path, tensors: Tensors) -> Path:
    """Write a checkpoint."""
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"hidden_size": HIDDEN}))
    return folder


def directions(k: int = 1, seed: int = 1) -> Tensor:
    """Orthonormal rows."""
    rows = torch.randn(HIDDEN, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(rows).Q.mT.float()


def changed(tensors: Tensors, kinds: tuple[str, ...], change: Callable[[int, str, Tensor], Tensor]) -> Tensors:
    """Change the matrices of some kinds, `change(layer, kind, W)` in float32, rounded once."""
    made = dict(tensors)
    for layer in range(LAYERS):
        for kind in kinds:
            name = f"model.layers.{layer}.{kind}.weight"
            made[name] = change(layer, kind, tensors[name].float()).to(tensors[name].dtype)
    return made


def ablated(
    tensors: Tensors, weights: list[float], mode: str = "plain", v: Tensor | None = None, per_layer: bool = False
) -> Tensors:
    """Take a direction out of the writers."""
    v = directions() if v is None else v

    def take(layer: int, kind: str, w: Tensor) -> Tensor:
        own = directions(seed=10 + layer) if per_layer else v
        return edit_weight(w, ModuleEdit(own, weights[layer], mode))  # type: ignore[arg-type]

    return changed(tensors, WRITERS, take)


def adapted(
    tensors: Tensors, rank: int, kinds: tuple[str, ...] = WRITERS + READERS, left: Tensor | None = None
) -> Tensors:
    """Add a low-rank matrix that knows nothing of the weights; with `left` its left vectors are shared."""
    g = torch.Generator().manual_seed(5)

    def add(layer: int, kind: str, w: Tensor) -> Tensor:
        b = torch.randn(w.shape[0], rank, generator=g) if left is None else left.mT
        return w + 0.003 * b @ torch.randn(rank, w.shape[1], generator=g)

    return changed(tensors, kinds, add)


def trained(tensors: Tensors, size: float = 0.1) -> Tensors:
    """Add a full-rank matrix with a few large singular values to every matrix, as training does."""
    g = torch.Generator().manual_seed(6)

    def add(layer: int, kind: str, w: Tensor) -> Tensor:
        m, n = w.shape
        u, v = (torch.linalg.qr(torch.randn(size, min(m, n), generator=g)).Q for size in (m, n))
        return w + size * (u * torch.arange(1, min(m, n) + 1) ** -0.5) @ v.mT

    return changed(tensors, WRITERS + READERS, add)


def noisy(tensors: Tensors) -> Tensors:
    """Add white noise to every matrix."""
    g = torch.Generator().manual_seed(7)
    return changed(tensors, WRITERS + READERS, lambda layer, kind, w: w + 0.002 * torch.randn(w.shape, generator=g))
