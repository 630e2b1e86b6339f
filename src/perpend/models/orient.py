"""Which axis of a writer's matrix is the residual's, by what the matrix does and never by its shape."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from perpend.errors import UsageError
from perpend.models.sequence import Call, stream

_MARKED = 1
"""Hidden channel that is marked."""
_CLEAN = 0.05
"""Relative departure from proportionality that rounding to bfloat16 may cause."""


def orient(module: nn.Module, call: Call, width: int) -> tuple[str, str | None, int]:
    """Find the last matrix that a module applies, its bias, and the axis of the matrix that is the residual's.

    A `torch.nn.Linear` says so itself. Any other module is called with a marked matrix: zero but for one hidden
    channel. The axis is right when exactly that channel of the output answers, in proportion to the mark.

    Args:
        module: A writer.
        call: A recorded call of it.
        width: Hidden size.

    Returns:
        Name of the matrix, name of the bias or None, and axis.

    Raises:
        UsageError: no matrix, or more than one, behaves so.
    """
    if isinstance(module, nn.Linear):
        return "weight", "bias" if module.bias is not None else None, 0
    parameters = dict(module.named_parameters(recurse=False))
    if any(p.device.type == "meta" for p in parameters.values()):
        return _declared(module)
    floats = {name: p for name, p in parameters.items() if p.is_floating_point()}
    matrices = [
        (name, axis)
        for name, p in floats.items()
        for axis in range(p.dim() - 2, p.dim())
        if p.dim() >= 2
        and p.shape[axis] == width
        and _answers(module, call, name, axis, [other for other, q in floats.items() if q.dim() < p.dim()])
    ]
    depth = max((floats[name].dim() for name, _ in matrices), default=0)
    matrices = [(name, axis) for name, axis in matrices if floats[name].dim() == depth]  # the rest are experts' biases
    if len(matrices) != 1:
        many = "more than one matrix writes" if matrices else "no matrix found that it applies last"
        raise UsageError(f"{type(module).__name__}: {many}")
    matrix, axis = matrices[0]
    shape = floats[matrix].shape
    biases = [
        name
        for name, p in floats.items()
        if p.shape == (*shape[:-2], width) and _answers(module, call, name, p.dim() - 1, [matrix])
    ]
    return matrix, biases[0] if biases else None, axis


def _answers(module: nn.Module, call: Call, name: str, axis: int, silent: Sequence[str]) -> bool:
    """Whether marking one channel of a parameter along `axis` moves that channel of the output and no other.

    The `silent` parameters are zero meanwhile, so that nothing large hides the answer in low precision.
    """
    marked = _one_of(module.get_parameter(name))
    marked.select(axis, _MARKED).fill_(1)
    zeros = {other: _one_of(module.get_parameter(other)) for other in silent}
    with torch.no_grad():
        none, once, twice = (_written(module, call, {**zeros, name: marked * k}) for k in (0, 1, 2))
    move = (once - none).abs().amax(0)
    others = torch.cat([move[:_MARKED], move[_MARKED + 1 :]])
    alone = bool(move[_MARKED] > 0) and bool(others.max() <= 1e-3 * move[_MARKED])
    return alone and bool(((twice - none) - 2 * (once - none)).abs().max() <= _CLEAN * move[_MARKED])


def _one_of(parameter: Tensor) -> Tensor:
    """Return zeros of a parameter's shape, dtype and device, with a single expert that stands for all."""
    return torch.zeros_like(parameter[:1] if parameter.dim() == 3 else parameter, requires_grad=False)


def _written(module: nn.Module, call: Call, parameters: dict[str, Tensor]) -> Tensor:
    """Call a module with other parameters; return float64 rows `[n, d]`."""
    full = {name: value.expand(module.get_parameter(name).shape) for name, value in parameters.items()}
    try:
        output = stream(torch.func.functional_call(module, full, call.args, call.kwargs))
    except RuntimeError:  # a kernel that wants every expert in memory
        full = {name: value.contiguous() for name, value in full.items()}
        output = stream(torch.func.functional_call(module, full, call.args, call.kwargs))
    if output is None:
        raise UsageError(f"{type(module).__name__}: returns no tensor")
    return output.double().reshape(-1, output.shape[-1])


def _declared(module: nn.Module) -> tuple[str, str | None, int]:
    """The orientation of a module whose weights are not in memory, as far as its class declares it."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return "weight", "bias", 1
    transposed = getattr(module, "is_transposed", None)
    if transposed is None or not hasattr(module, "down_proj"):
        raise UsageError(f"{type(module).__name__}: weights not in memory and layout not declared")
    return "down_proj", "down_proj_bias" if getattr(module, "has_bias", False) else None, 2 if transposed else 1
