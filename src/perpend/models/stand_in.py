"""A model without weights, made to run: a stand-in of random weights that costs next to nothing, whatever its size."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn

RANK = 16
"""Rank of a linear map of the stand-in: above the tokens of the probe, so that what differs still differs after it."""


def in_memory(model: nn.Module) -> nn.Module:
    """Return the model itself, or for one on the meta device a float32 stand-in on the CPU with random weights.

    An offloaded model is returned as it is, although its parameters are on the meta device between calls. In the
    stand-in every parameter has its own shape and next to no memory: a linear map multiplies by two thin matrices
    instead of its weight, the rows of a weight or an embedding are windows of one vector, other parameters of one shape
    share their storage, and so do all experts of a tensor.
    """
    parameters = list(model.parameters())
    offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())
    if not parameters or offloaded or any(p.device.type != "meta" for p in parameters):
        return model
    weights = _Weights()
    stand_in = deepcopy(model)
    for module in stand_in.modules():
        windows = isinstance(module, nn.Embedding) or type(module) is nn.Linear
        for name, parameter in module.named_parameters(recurse=False):
            wide = windows and parameter.dim() == 2
            value = weights.windows(parameter) if wide else weights.random(parameter)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.device.type == "meta":
                setattr(module, name, _plain(buffer))
        if type(module) is nn.Linear:
            module.forward = weights.thin(module)  # type: ignore[method-assign,assignment]
    return stand_in


class _Weights:
    """Random float32 weights, those of one shape in one storage."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.made: dict[tuple[int, ...], Tensor] = {}

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def random(self, like: Tensor) -> Tensor:
        """Return weights of a tensor's shape; experts, the first of three axes, are all the same."""
        shape = tuple(like.shape)
        if shape not in self.made:
            noise = self._noise(*(shape[-2:] if len(shape) == 3 else shape))
            self.made[shape] = noise * shape[-1] ** -0.5 if len(shape) >= 2 else 1 + 0.2 * noise
        return self.made[shape].expand(shape)

    def windows(self, like: Tensor) -> Tensor:
        """Return a matrix whose row i is a random vector from its entry i on: `[n, m]` in n + m numbers."""
        rows, columns = like.shape
        vector = self._noise(rows + columns) / math.sqrt(columns)
        return vector.as_strided((rows, columns), (1, 1))

    def thin(self, module: nn.Linear) -> Callable[[Tensor], Tensor]:
        """Return a linear map of the module's shape through `RANK` channels, with the module's bias."""
        down = self._noise(module.in_features, RANK) * module.in_features**-0.5
        up, bias = self._noise(RANK, module.out_features) * RANK**-0.5, module.bias

        def forward(entering: Tensor) -> Tensor:
            found: Tensor = entering @ down.to(entering) @ up.to(entering)
            return found if bias is None else found + bias.to(found)

        return forward


def _plain(like: Tensor) -> Tensor:
    if like.dim() >= 2 and like.shape[-1] == like.shape[-2]:  # a causal mask
        return torch.ones(like.shape, dtype=like.dtype).tril()
    return torch.ones(like.shape, dtype=like.dtype)
