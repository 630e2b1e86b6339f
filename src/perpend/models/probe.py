"""What writes to the residual stream, seen by behaviour: no table of model names, no guess by shape.

Inside a decoder layer, the output of *every* module that owns a matrix is cut out of the computation graph and put
back as a constant of the same value. What still reaches the layer's output directly is a writer: nothing but sums,
scalars and norms lies between it and the residual stream. One forward and one backward pass through the layer find all
writers at once, and say whether they account for everything that the layer writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from perpend.errors import UsageError
from perpend.models.orient import orient
from perpend.models.sequence import TOKENS, Call, decoder_layers, hooked, is_float, stream
from perpend.models.stand_in import in_memory

TOLERANCE = 0.05
"""Relative remainder below which a gradient counts as a multiple of the one that was sent in; generous for bfloat16."""
CHANGED = 0.03
"""Relative change of a row that counts as one: far above rounding, far below what a token does to another."""


@dataclass(frozen=True)
class Found:
    """A writer seen by the probe; paths are relative to its layer."""

    path: str
    mixes_tokens: bool
    """Its output at one position depends on the residual at another: attention, convolution, state space."""
    parameter: str
    bias: str | None
    out_axis: int
    expert: bool
    norms: tuple[str, ...]
    """Norms that its output passes before the residual, in order."""


@dataclass(frozen=True)
class Unmatched:
    """A module that writes and cannot be edited; an empty path is none that was found."""

    path: str
    mixes_tokens: bool
    why: str


@dataclass
class LayerReport:
    """What the probe says about one layer."""

    found: list[Found] = field(default_factory=list)
    unmatched: list[Unmatched] = field(default_factory=list)


def probe_model(model: nn.Module, layers: str | None = None) -> tuple[str, int, list[LayerReport]]:
    """Find the decoder layers of a model and what writes in each.

    The model is left as it was: nothing is trained, cached, moved or overwritten. For a model on the meta device a
    stand-in with random weights is probed.

    Args:
        model: The model.
        layers: Path of the list of decoder layers, to be found when None.

    Returns:
        Path of the layer list, hidden size, and one report per layer.

    Raises:
        UsageError: the model cannot be run on text, or has no layers that run in sequence.
    """
    model = in_memory(model)
    training = model.training
    model.eval()
    try:
        path, calls = decoder_layers(model, layers)
        modules = list(model.get_submodule(path).children())
        reports = [probe_layer(module, call) for module, call in zip(modules, calls, strict=True)]
    finally:
        model.train(training)
    return path, calls[0].left().shape[-1], _agreed(modules, reports)


def _agreed(layers: Sequence[nn.Module], reports: Sequence[LayerReport]) -> list[LayerReport]:
    """Count a writer as mixing tokens when its namesake in another layer does.

    Layers that attend with the keys and values of an earlier layer do not mix tokens of their own input.
    """

    def role(layer: nn.Module, path: str) -> tuple[str, type]:
        return path, type(layer.get_submodule(path.rpartition(".")[0]))

    mixing = {
        role(layer, path)
        for layer, report in zip(layers, reports, strict=True)
        for path, mixes in [
            *((f.path, f.mixes_tokens) for f in report.found),
            *((u.path, u.mixes_tokens) for u in report.unmatched),
        ]
        if mixes
    }
    return [
        LayerReport(
            [replace(f, mixes_tokens=role(layer, f.path) in mixing) for f in report.found],
            [replace(u, mixes_tokens=role(layer, u.path) in mixing) for u in report.unmatched],
        )
        for layer, report in zip(layers, reports, strict=True)
    ]


def _owns_matrix(module: nn.Module) -> bool:
    return any(p.dim() >= 2 for p in module.parameters(recurse=False))


def _owners(layer: nn.Module) -> dict[str, nn.Module]:
    """Modules that own a matrix and have no descendant that does; their outputs are the cut."""
    owning = {name: m for name, m in layer.named_modules() if name and _owns_matrix(m)}
    return {n: m for n, m in owning.items() if not any(other.startswith(n + ".") for other in owning)}


@dataclass(frozen=True, eq=False)
class _Passage:
    """One call of a childless module that is not cut; `entered` and `left` are in the graph, `call` is not."""

    path: str
    module: nn.Module
    entered: Tensor
    left: Tensor
    call: Call

    @cached_property
    def is_norm(self) -> bool:
        """Whether the output stays the same when the input is doubled."""
        with torch.no_grad():
            twice = stream(self.module(2 * self.call.args[0], *self.call.args[1:], **self.call.kwargs))
        once = self.left.detach().double()
        return twice is not None and bool((twice.double() - once).norm() < TOLERANCE * once.norm())


class _Cut:
    """One pass through a layer with the outputs of the given modules replaced by constants of the same value.

    Attributes:
        leaves: Path -> the constants that took the place of the module's float outputs, one or more per call.
        calls: Path -> first call of the module.
        passages: Calls of every other childless module, in order.
        x, out: Residual that enters and leaves, `[..., T, d]`.
        sent: Cotangent of `out`, random normal.
    """

    def __init__(self, layer: nn.Module, call: Call, cut: Mapping[str, nn.Module]) -> None:
        self.leaves: dict[str, list[Tensor]] = {}
        self.calls: dict[str, Call] = {}
        self.passages: list[_Passage] = []
        with torch.enable_grad(), hooked() as hold:
            self.x = call.entered().detach().clone().requires_grad_()
            for path, module in cut.items():
                hold(module.register_forward_hook(self._cutter(path), with_kwargs=True))
            for path, module in layer.named_modules():
                if path and path not in cut and not any(True for _ in module.children()):
                    hold(module.register_forward_hook(self._watcher(path), with_kwargs=True))
            self.out = call.run(layer, self.x.clone())
        generator = torch.Generator().manual_seed(0)
        self.sent = torch.randn(self.out.shape, generator=generator).to(self.out)

    def _cutter(self, path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            self.calls.setdefault(path, Call(_detached(args), _detached(kwargs)))
            self.leaves.setdefault(path, [])
            return self._replace(path, output)

        return hook

    def _replace(self, path: str, output: Any) -> Any:
        if isinstance(output, tuple | list):
            return type(output)([self._replace(path, item) for item in output])
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        leaf = output.detach().clone().requires_grad_()
        self.leaves[path].append(leaf)
        return leaf.clone()

    def _watcher(self, path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not is_float(output) or not args or not is_float(args[0]):
                return output
            call = Call(_detached(args), _detached(kwargs))
            self.passages.append(_Passage(path, module, args[0], output, call))
            return output.clone()

        return hook

    def gradients(self, of: Tensor, to: Sequence[Tensor], sent: Tensor | None = None) -> list[Tensor | None]:
        """Gradient of `of` with respect to each of `to`; None where nothing connects them."""
        if not of.requires_grad or not to:
            return [None] * len(to)
        cotangent = torch.ones_like(of) if sent is None else sent
        return list(torch.autograd.grad(of, list(to), cotangent, retain_graph=True, allow_unused=True))

    def reaches(self, of: Tensor, to: Tensor) -> bool:
        """Whether `to` goes into `of` by a path that is not cut."""
        return self.gradients(of, [to])[0] is not None

    def is_multiple(self, gradient: Tensor | None) -> bool:
        """Whether every row of a gradient is a combination of the rows sent in: sums and scalars, nothing else."""
        if gradient is None:
            return True
        rows = gradient.detach().reshape(-1, gradient.shape[-1]).double().cpu()
        basis = torch.linalg.qr(self.sent.reshape(-1, self.sent.shape[-1]).double().cpu().T).Q
        remainder = rows - rows @ basis @ basis.T
        return bool(remainder.norm() <= TOLERANCE * rows.norm())


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, tuple | list):
        return type(value)([_detached(item) for item in value])
    return {k: _detached(v) for k, v in value.items()} if isinstance(value, dict) else value


def probe_layer(layer: nn.Module, call: Call) -> LayerReport:
    """Find the modules of one layer that write to the residual stream.

    Args:
        layer: The decoder layer.
        call: Its recorded call.

    Returns:
        The writers, and what writes without being matched. An empty `unmatched` means that the layer's output is its
        input, scaled or normed, plus what the writers write.
    """
    owners = _owners(layer)
    cut = _Cut(layer, call, owners)
    norms = _reaching(cut)
    refused = {path for path, (plain, _) in norms.items() if not plain}
    groups = _expert_lists(layer, cut, norms.keys() - refused)
    mixing = _mixing(layer, call, {path: owners[path] for path in norms}, groups)
    grouped = {twin for path, twins in groups.items() for twin in twins if twin != path}
    report = LayerReport()
    for path, (plain, after) in norms.items():
        try:
            if not plain:
                raise UsageError("its output is changed channel by channel before it is added to the residual")
            parameter, bias, axis = orient(owners[path], cut.calls[path], cut.out.shape[-1])
        except UsageError as error:
            report.unmatched.append(Unmatched(path, mixing[path], error.what))
            continue
        expert = path in groups or owners[path].get_parameter(parameter).dim() == 3
        for twin in groups.get(path, [path]) if path not in grouped else ():
            report.found.append(Found(twin, mixing[path], parameter, bias, axis, expert, after))
    if not _explained(layer, call, cut, owners):
        why = "part of what is written comes from no module that was found"
        report.unmatched.append(Unmatched("", _leaks_tokens(cut), why))
    return report


def _reaching(cut: _Cut) -> dict[str, tuple[bool, tuple[str, ...]]]:
    """Find the modules whose output reaches the layer's output directly.

    Returns:
        Path -> whether it is added as it is or after the norms that follow, and the paths of these norms.
    """
    reaching: dict[str, tuple[bool, tuple[str, ...]]] = {}
    for path, leaves in cut.leaves.items():
        wide = [leaf for leaf in leaves if leaf.shape[-1] == cut.out.shape[-1] and cut.reaches(cut.out, leaf)]
        if wide:
            norms = _norms_after(cut, wide[0])
            last = norms[-1].left if norms else wide[0]
            plain = cut.is_multiple(cut.gradients(cut.out, [last], cut.sent)[0]) or _joins_normed_stream(cut, last)
            reaching[path] = plain, tuple(norm.path for norm in norms)
    return reaching


def _norms_after(cut: _Cut, leaf: Tensor) -> list[_Passage]:
    """Return the norms between a constant and the residual, in order: those that see the one and not yet the other."""
    return [
        passage
        for passage in cut.passages
        if passage.left.shape[-1] == cut.out.shape[-1]
        and cut.reaches(passage.left, leaf)
        and cut.reaches(cut.out, passage.left)
        and not cut.reaches(passage.left, cut.x)
        and passage.is_norm
    ]


def _joins_normed_stream(cut: _Cut, value: Tensor) -> bool:
    """Whether a value is added to a residual that is normed as a whole afterwards, as post-norm layers do."""
    for passage in cut.passages:
        if passage.entered.shape == cut.sent.shape and cut.reaches(passage.entered, cut.x) and passage.is_norm:
            gradient = cut.gradients(passage.entered, [value], cut.sent)[0]
            if gradient is not None and cut.is_multiple(gradient):
                return True
    return False


def _explained(layer: nn.Module, call: Call, cut: _Cut, owners: Mapping[str, nn.Module]) -> bool:
    """Whether, once all writers are cut, the output is the input (scaled, or normed as a whole) plus constants."""
    gradient = cut.gradients(cut.out, [cut.x], cut.sent)[0]
    if gradient is not None and cut.is_multiple(gradient):
        return True
    norms = {p.path: p.module for p in cut.passages if cut.reaches(p.left, cut.x) and p.is_norm}
    if not norms:
        return False
    again = _Cut(layer, call, {**owners, **norms})
    parts = again.gradients(again.out, [again.x, *(leaf for path in norms for leaf in again.leaves[path])], again.sent)
    return any(part is not None for part in parts) and all(again.is_multiple(part) for part in parts)


def _leaks_tokens(cut: _Cut) -> bool:
    """Whether the input at the first position reaches the output at a later one although all writers are cut."""
    later = cut.sent.clone()
    later[..., 0, :] = 0
    gradient = cut.gradients(cut.out, [cut.x], later)[0]
    return gradient is not None and bool(gradient[..., 0, :].any())


def _expert_lists(layer: nn.Module, cut: _Cut, writers: Iterable[str]) -> dict[str, list[str]]:
    """Group writers that are the same module of every item of a list: experts, whether the probe hit them or not.

    Returns:
        Path of the first writer of a group -> paths of the whole group.
    """
    writing = set(writers)
    groups: dict[str, list[str]] = {}
    for path in sorted(writing):
        parts = path.split(".")
        for depth in range(len(parts) - 1, 0, -1):
            items = layer.get_submodule(".".join(parts[:depth]))
            if not isinstance(items, nn.ModuleList) or len(items) < 2:
                continue
            twins = [".".join([*parts[:depth], str(k), *parts[depth + 1 :]]) for k in range(len(items))]
            alike = {_kind(layer, twin) for twin in twins}
            if len(alike) == 1 and None not in alike and all(t in writing or t not in cut.leaves for t in twins):
                groups[path] = twins
            break
    firsts = {twins[0]: min(p for p in groups if groups[p] == twins) for twins in groups.values()}
    return {path: groups[path] for path in firsts.values()}


def _kind(layer: nn.Module, path: str) -> tuple[type, tuple[torch.Size, ...]] | None:
    try:
        module = layer.get_submodule(path)
    except AttributeError:
        return None
    return type(module), tuple(p.shape for p in module.parameters())


def _mixing(
    layer: nn.Module, call: Call, modules: Mapping[str, nn.Module], groups: Mapping[str, list[str]]
) -> dict[str, bool]:
    """Say which writers mix tokens, by changing the residual at the first position while nothing is written.

    The share of a writer's output rows that change is 1 / T for one that works token by token, and larger for
    attention, convolutions and state spaces. Rows are compared as a set, since routing may reorder those of experts.
    """
    entering = call.entered()
    changed = entering.clone()
    changed[..., 0, :] = entering[..., 0, :].flip(-1)
    rows = [_rows_written(layer, call, modules, x) for x in (entering, changed)]
    result: dict[str, bool] = {}
    for path in modules:
        group = next((twins for twins in groups.values() if path in twins), [path])
        before, after = (torch.cat([r[p] for p in group if p in r]) for r in rows)
        distance = torch.cdist(after, before).amin(1)
        share = (distance > CHANGED * after.norm(dim=1)).double().mean()
        result[path] = bool(share > 1.5 / TOKENS)
    return result


def _rows_written(layer: nn.Module, call: Call, modules: Mapping[str, nn.Module], x: Tensor) -> dict[str, Tensor]:
    """Run a layer with all writers silenced; return what each would have written as float64 rows `[n, d]`."""
    rows: dict[str, Tensor] = {}

    def silencer(path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            flat = output.detach().reshape(-1, output.shape[-1]).double().cpu()
            rows[path] = torch.cat([rows[path], flat]) if path in rows else flat
            return torch.zeros_like(output)

        return hook

    with torch.no_grad(), hooked() as hold:
        for path, module in modules.items():
            hold(module.register_forward_hook(silencer(path)))
        call.run(layer, x.clone())
    return rows
