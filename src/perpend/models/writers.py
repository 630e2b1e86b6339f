"""A writer: a linear map whose output is added to the residual stream, and how its matrix lies in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from perpend.models.probe import Found

Component = Literal["attention", "mlp"]
Role = Literal["attention_out", "mlp_down", "expert_down", "shared_expert_down", "mixer_out"]


@dataclass(frozen=True)
class Writer:
    """A linear map whose output is added to the residual stream.

    Attributes:
        name: Module path, such as `model.layers.3.self_attn.o_proj`; for fused experts the module that owns their
            tensor. This is what is hooked and edited.
        layer: Index of the decoder layer, from 0.
        component: `attention` when its output mixes tokens (attention, convolution, state space, linear attention),
            `mlp` when it works token by token.
        role: The part it plays.
        parameter: Name of the matrix in the module.
        bias: Name of its bias, `[d_out]` or `[E, d_out]`, or None.
        out_axis: Axis of the matrix that is the residual's: 0 in `[out, in]`, 1 in `[in, out]` or `[E, out, in]`,
            2 in `[E, in, out]`.
        experts: Number of experts in the tensor, or None for a single matrix.
        post_norm: Path of the norm between the module's output and the residual (Gemma 2 to 4, OLMo 2), or None.
        shape: Shape of the matrix as stored.
        parameters: Number of elements of the matrix.
        further_norms: Norms that follow `post_norm` before the residual (mixture-of-experts layers of Gemma 4).
    """

    name: str
    layer: int
    component: Component
    role: Role
    parameter: str
    bias: str | None
    out_axis: int
    experts: int | None
    post_norm: str | None
    shape: tuple[int, ...]
    parameters: int
    further_norms: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Path of the matrix among the model's parameters, such as `model.layers.3.self_attn.o_proj.weight`."""
        return f"{self.name}.{self.parameter}"

    @property
    def bias_key(self) -> str | None:
        """Path of the bias among the model's parameters."""
        return f"{self.name}.{self.bias}" if self.bias else None

    @property
    def d_out(self) -> int:
        """Hidden size."""
        return self.shape[self.out_axis]

    def matrix(self, tensor: Tensor, expert: int | None = None) -> Tensor:
        """Return a view of the stored tensor in canonical orientation.

        Args:
            tensor: The matrix as stored, of `shape`.
            expert: Which expert; None gives all of them.

        Returns:
            `[d_out, d_in]`, or `[E, d_out, d_in]` for fused experts when `expert` is None. Shares memory with `tensor`.
        """
        tensor = tensor if expert is None or self.experts is None else tensor[expert]
        first = self.out_axis - (1 if self.experts is not None else 0)
        return tensor if first == 0 else tensor.transpose(-1, -2)

    def assign(self, tensor: Tensor, value: Tensor, expert: int | None = None) -> None:
        """Write a canonical matrix into the stored tensor, in place, rounding once to its dtype.

        Args:
            tensor: The matrix as stored, of `shape`; changed.
            value: `[d_out, d_in]`, or `[E, d_out, d_in]` when `expert` is None and there are experts.
            expert: Which expert.
        """
        with torch.no_grad():
            self.matrix(tensor, expert).copy_(value)

    def weight(self, model: nn.Module) -> nn.Parameter:
        """Return the matrix as stored in `model`, of `shape`."""
        return model.get_submodule(self.name).get_parameter(self.parameter)

    def bias_of(self, model: nn.Module) -> nn.Parameter | None:
        """Return the bias in `model`, `[d_out]` or `[E, d_out]`, or None."""
        return model.get_submodule(self.name).get_parameter(self.bias) if self.bias else None


def from_probe(model: nn.Module, prefix: str, layer: int, found: Found, routed: bool) -> Writer:
    """Describe a writer that the probe found.

    Args:
        model: The probed model.
        prefix: Path of the layer, with a dot at the end.
        layer: Its index.
        found: What the probe says.
        routed: Whether the layer has routed experts, so that what is dense beside them is shared.
    """
    module = model.get_submodule(prefix + found.path)
    parameter = module.get_parameter(found.parameter)
    shape = tuple(parameter.shape)
    if isinstance(module, nn.Linear):  # whose weight may be packed
        shape = (module.out_features, module.in_features)
    norms = tuple(prefix + norm for norm in found.norms)
    return Writer(
        name=prefix + found.path,
        layer=layer,
        component="attention" if found.mixes_tokens else "mlp",
        role=_role(model, prefix, found, routed),
        parameter=found.parameter,
        bias=found.bias,
        out_axis=found.out_axis,
        experts=shape[0] if len(shape) == 3 else None,
        post_norm=norms[0] if norms else None,
        shape=shape,
        parameters=math.prod(shape),
        further_norms=norms[1:],
    )


def _role(model: nn.Module, prefix: str, found: Found, routed: bool) -> Role:
    if not found.mixes_tokens:
        return "expert_down" if found.expert else "shared_expert_down" if routed else "mlp_down"
    block, dot, _ = found.path.rpartition(".")
    return "mixer_out" if dot and _has_state(model.get_submodule(prefix + block)) else "attention_out"


def _has_state(block: nn.Module) -> bool:
    """Whether a token mixer convolves, as state spaces and linear attention do and softmax attention does not."""
    return any(isinstance(m, nn.Conv1d) for m in block.modules())
