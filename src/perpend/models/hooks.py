"""Edits in place: hooks on the writers of a running model, and fused experts changed in memory and put back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from perpend.core.edits import Edit, HookMap, ModuleEdit, edit_bias, edit_weight
from perpend.core.linear import working
from perpend.errors import UsageError
from perpend.models.offload import Shelf, device_of, value_of
from perpend.models.writers import Writer

Undo = Callable[[], object]
Install = Callable[[], Undo]


def prepare(model: nn.Module, writers: Sequence[Writer], edit: Edit) -> list[Install]:
    """Work out what lets every writer answer as if its matrix were edited.

    The output of a writer is mapped by a forward hook and, in column mode, its input by a forward pre-hook; both
    compute in float32 and cast back. Fused experts are hooked in plain mode, where the map commutes with the sum over
    experts; in the other modes their tensors are overwritten, and restored bit by bit afterwards.

    Args:
        model: The model, without an edit.
        writers: The writers that `edit` names, in the same order.
        edit: What is taken out.

    Raises:
        UsageError: a mode that needs the matrix of a quantised module.
    """
    steps: list[Install] = []
    for writer, part in zip(writers, edit.modules.values(), strict=True):
        module = model.get_submodule(writer.name)
        if part.weight == 0:
            continue
        if writer.experts is None or part.mode == "plain":
            steps.append(partial(_hook, module, hook_map(module, writer, part)))
        else:
            shelf: Shelf | None = getattr(model, "shelf", None)
            away = shelf is not None and shelf.unit_of(module) is not None  # also when it happens to be in memory now
            steps.append(partial(_overwrite, module, writer, part, shelf if away else None))
    return steps


@contextmanager
def in_place(steps: Iterable[Install]) -> Iterator[None]:
    """Put prepared steps in place inside the block, and undo them in reverse."""
    with ExitStack() as stack:
        for step in steps:
            stack.callback(step())
        yield


def only_hooks(steps: Sequence[Install]) -> bool:
    """Whether putting steps in place and undoing them costs next to nothing, since no tensor is overwritten."""
    return all(isinstance(step, partial) and step.func is _hook for step in steps)


def hook_map(module: nn.Module, writer: Writer, part: ModuleEdit) -> HookMap:
    """Return the map of one module, on its device, in the dtype in which it computes.

    Raises:
        UsageError: a mode that needs the matrix of a quantised module.
    """
    parameter = getattr(module, writer.parameter)
    plain = parameter.is_floating_point()
    if part.mode != "plain" and not plain:
        raise UsageError(f"{part.mode} mode needs plain weights, not quantised ones", where=writer.name)
    matrix = None if part.mode == "plain" else writer.matrix(value_of(module, writer.parameter))
    return HookMap.of(matrix, part).to(
        device_of(module, parameter), working(parameter.dtype) if plain else torch.float32
    )


def _hook(module: nn.Module, made: HookMap) -> Undo:
    def after(module: nn.Module, args: Any, output: Any) -> Any:
        return (made.apply(output[0]), *output[1:]) if isinstance(output, tuple) else made.apply(output)

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (made.scale(args[0]), *args[1:])

    handles = [module.register_forward_hook(after)]
    if made.input_scale is not None:
        handles.append(module.register_forward_pre_hook(before))

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


@torch.no_grad()
def _overwrite(module: nn.Module, writer: Writer, part: ModuleEdit, shelf: Shelf | None) -> Undo:
    """Edit the tensors of fused experts in memory, or each time they are read; returns what puts them back."""
    if shelf is not None:
        return shelf.change(module, lambda: _edit_experts(module, writer, part))
    saved = _edit_experts(module, writer, part)

    @torch.no_grad()
    def restore() -> None:
        for tensor, old in saved:
            tensor.copy_(old)

    return restore


@torch.no_grad()
def _edit_experts(module: nn.Module, writer: Writer, part: ModuleEdit) -> list[tuple[Tensor, Tensor]]:
    """Edit the tensors of fused experts that are in memory; returns them with copies of what they were."""
    weight: Tensor = getattr(module, writer.parameter)
    bias: Tensor | None = getattr(module, writer.bias) if writer.bias else None
    saved = [(tensor, tensor.detach().clone()) for tensor in (weight, bias) if tensor is not None]
    for expert in range(writer.experts or 0):
        matrix = writer.matrix(saved[0][1], expert)
        writer.assign(weight, edit_weight(matrix, part), expert)
        if bias is not None:
            bias[expert].copy_(edit_bias(saved[1][1][expert], part, matrix))
    return saved
