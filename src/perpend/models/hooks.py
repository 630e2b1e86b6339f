"""Edits in place: hooks on the writers of a running model, and fused experts changed in memory and put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from perpend.core.edits import Edit, HookMap, ModuleEdit, edit_bias, edit_weight
from perpend.core.linear import working
from perpend.errors import UsageError
from perpend.models.writers import Writer


@contextmanager
def in_place(model: nn.Module, writers: list[Writer], edit: Edit) -> Iterator[None]:
    """Let every writer answer as if its matrix were edited, inside the block.

    The output of a writer is mapped by a forward hook and, in column mode, its input by a forward pre-hook; both
    compute in float32 and cast back. Fused experts are hooked in plain mode, where the map commutes with the sum over
    experts; in the other modes their tensors are overwritten, and restored bit by bit on leaving.

    Args:
        model: The model.
        writers: The writers that `edit` names, in the same order.
        edit: What is taken out.
    """
    with ExitStack() as stack:
        for writer, part in zip(writers, edit.modules.values(), strict=True):
            if part.weight == 0:
                continue
            module = model.get_submodule(writer.name)
            if writer.experts is None or part.mode == "plain":
                for handle in _hook(module, writer, part):
                    stack.callback(handle.remove)
            else:
                stack.callback(_overwrite(module, writer, part))
        yield


def _hook(module: nn.Module, writer: Writer, part: ModuleEdit) -> list[Any]:
    """Hook one module; returns the handles."""
    parameter = getattr(module, writer.parameter)
    matrix = None
    if part.mode != "plain":
        if not parameter.is_floating_point():
            raise UsageError(f"{part.mode} mode needs plain weights, not quantised ones", where=writer.name)
        matrix = writer.matrix(parameter.detach())
    made = HookMap.of(matrix, part)
    kind = parameter.dtype if parameter.is_floating_point() else torch.bfloat16
    made = made.to(parameter.device, working(kind))

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        return (made.apply(output[0]), *output[1:]) if isinstance(output, tuple) else made.apply(output)

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (made.scale(args[0]), *args[1:])

    handles = [module.register_forward_hook(after)]
    if made.input_scale is not None:
        handles.append(module.register_forward_pre_hook(before))
    return handles


@torch.no_grad()
def _overwrite(module: nn.Module, writer: Writer, part: ModuleEdit) -> Callable[[], None]:
    """Edit the tensors of fused experts in memory; returns what puts them back."""
    weight: Tensor = getattr(module, writer.parameter)
    bias: Tensor | None = getattr(module, writer.bias) if writer.bias else None
    saved = [(tensor, tensor.detach().clone()) for tensor in (weight, bias) if tensor is not None]
    for expert in range(writer.experts or 0):
        matrix = writer.matrix(saved[0][1], expert)
        writer.assign(weight, edit_weight(matrix, part), expert)
        if bias is not None:
            bias[expert].copy_(edit_bias(saved[1][1][expert], part, matrix))

    @torch.no_grad()
    def restore() -> None:
        for tensor, old in saved:
            tensor.copy_(old)

    return restore
