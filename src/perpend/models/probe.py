"""What a model does with four tokens: which modules write to the residual stream, seen by behaviour.

No table of model names, no guess by shape. The decoder layers are the list of modules that run one after the other,
each on the output of the one before. Inside a layer, the output of *every* module that owns a matrix is cut out of the
computation graph and put back as a constant of the same value. What still reaches the layer's output directly is a
writer: nothing but sums, scalars and norms lies between it and the residual stream. One forward and one backward pass
through the layer find all writers at once, and say whether they account for everything that the layer writes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from perpend.errors import UsageError

TOKENS = 4
"""Length of the probe sequence."""
TOLERANCE = 0.05
"""Relative remainder below which a gradient counts as a multiple of the one that was sent in; generous for bfloat16."""
_MARKED = 1
"""Hidden channel marked when an axis is identified."""


@dataclass
class Call:
    """One recorded call of a module: arguments, and where among them the residual stream is."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None
    order: int = 0

    @property
    def output_device(self) -> torch.device:
        """Where the residual that leaves is."""
        out = stream(self.output)
        return torch.device("cpu") if out is None else out.device

    def stream_key(self) -> int | str | None:
        """Position or name of the argument that carries the residual: the first float tensor of the output's shape."""
        out = stream(self.output)
        for key, value in [*enumerate(self.args), *self.kwargs.items()]:
            if _is_float(value) and out is not None and value.shape == out.shape:
                return key
        return None

    def stream_in(self) -> Tensor | None:
        """The residual that enters, `[..., T, d]`, or None when no argument has the shape of the output."""
        key = self.stream_key()
        return None if key is None else (self.args[key] if isinstance(key, int) else self.kwargs[key])

    def run(self, module: nn.Module, entering: Tensor) -> Tensor:
        """Call the module again with another residual and return the residual that leaves it."""
        key = self.stream_key()
        args, kwargs = list(self.args), dict(self.kwargs)
        if isinstance(key, int):
            args[key] = entering
        elif key is not None:
            kwargs[key] = entering
        left = stream(module(*args, **kwargs))
        if left is None:
            raise UsageError("a decoder layer returns no tensor", where=type(module).__name__)
        return left


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


def stream(value: Any) -> Tensor | None:
    """Return the residual in a layer's output: the tensor itself, or the first float tensor of a tuple."""
    if _is_float(value):
        return value
    if isinstance(value, list | tuple):
        return next((v for v in value if _is_float(v)), None)
    return None


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2


# ---------------------------------------------------------------------------------------------- the decoder layers


def probe_tokens(model: nn.Module) -> Tensor:
    """Return `[1, 4]` int64 token ids that are no special tokens of the configuration, on the model's device."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    special: set[int] = set()
    for part in (config, text):
        for name, value in (vars(part) if part is not None else {}).items():
            if "token" in name:
                special |= {v for v in (value if isinstance(value, list) else [value]) if type(v) is int}
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    vocabulary = getattr(text, "vocab_size", None) or getattr(embedding, "num_embeddings", 64)
    ids = [i for i in range(vocabulary // 5, vocabulary) if i not in special] or [0]
    step = max(1, len(ids) // (TOKENS + 1))
    real = [p.device for p in model.parameters() if p.device.type != "meta"]
    device = real[0] if real else torch.device("meta")
    return torch.tensor([[ids[(k * step) % len(ids)] for k in range(TOKENS)]], device=device)


def forward(model: nn.Module) -> None:
    """Run the model once on the probe tokens, without a cache.

    Raises:
        UsageError: the model cannot be run on text alone.
    """
    ids = probe_tokens(model)
    accepted = inspect.signature(model.forward).parameters.values()
    cached = any(p.name == "use_cache" or p.kind is p.VAR_KEYWORD for p in accepted)
    try:
        with torch.no_grad():
            model(ids, **({"use_cache": False} if cached else {}))
    except Exception as error:
        raise UsageError(
            f"a forward pass over {TOKENS} tokens failed ({type(error).__name__}: {error})",
            where=type(model).__name__,
            hint="name layers and writers by hand in [edit.overrides]",
        ) from error


def decoder_layers(model: nn.Module) -> tuple[str, list[Call]]:
    """Find the list of decoder layers by running the model on text.

    Returns:
        The path of the ModuleList, and the recorded call of each of its items in order. A vision or audio tower does
        not run on text and is therefore never found.

    Raises:
        UsageError: no list of modules runs in sequence; names the architecture.
    """
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0}
    calls: dict[int, list[Call]] = {}
    clock = iter(range(1 << 62))

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        held = tuple(a.detach().clone() if _is_float(a) else a for a in args)
        calls.setdefault(id(module), []).append(Call(held, dict(kwargs), order=next(clock)))

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls[id(module)][-1].output = output

    items = {id(item): item for modules in lists.values() for item in modules}
    with hooked() as hold:
        for item in items.values():
            hold(item.register_forward_pre_hook(before, with_kwargs=True))
            hold(item.register_forward_hook(after, with_kwargs=True))
        forward(model)

    sequences = {name: run for name, modules in lists.items() if (run := _sequence(modules, calls))}
    outer = [n for n in sequences if not any(n.startswith(other + ".") for other in sequences if other != n)]
    if not outer:
        raise UsageError(
            "no list of decoder layers that run one after the other was found",
            where=type(model).__name__,
            valid="the path of a ModuleList: " + ", ".join(list(lists)[:8]),
            hint='edit.overrides.layers = "model.layers"',
        )
    best = max(outer, key=lambda name: len(sequences[name]))
    return best, sequences[best]


def _sequence(modules: nn.ModuleList, calls: Mapping[int, list[Call]]) -> list[Call] | None:
    """Return the calls of a list's items when each ran once, in order, on what the one before it returned."""
    run: list[Call] = []
    for module in modules:
        own = calls.get(id(module), [])
        if len(own) != 1 or own[0].stream_key() is None or (run and own[0].order < run[-1].order):
            return None
        run.append(own[0])
    linked = [_same(stream(a.output), b.stream_in()) for a, b in zip(run, run[1:], strict=False)]
    return run if not linked or sum(linked) * 2 > len(linked) else None


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.shape != b.shape:
        return False
    return a.device.type == "meta" or torch.equal(a, b.to(a.device))


@contextmanager
def hooked() -> Iterator[Callable[[Any], None]]:
    """Yield a function that takes hook handles; all of them are removed on leaving."""
    handles: list[Any] = []
    try:
        yield handles.append
    finally:
        for handle in handles:
            handle.remove()


def probe_model(model: nn.Module) -> tuple[str, int, list[LayerReport]]:
    """Find the decoder layers of a model and what writes in each.

    The model is left as it was: nothing is trained, cached, moved or overwritten. A model on the meta device is probed
    layer by layer with random weights of its shapes.

    Returns:
        Path of the layer list, hidden size, and one report per layer.

    Raises:
        UsageError: the model cannot be run on text, or has no layers that run in sequence.
    """
    training = model.training
    model.eval()
    try:
        path, calls = decoder_layers(model)
        layers = list(model.get_submodule(path).children())
        reports: list[LayerReport] = []
        known: dict[Any, LayerReport] = {}
        for layer, call in zip(layers, calls, strict=True):
            if call.output_device.type != "meta":
                reports.append(probe_layer(layer, call))
                continue
            kind = (type(layer), tuple((n, p.shape) for n, p in layer.named_parameters()))
            if kind not in known:
                known[kind] = probe_layer(*_imagined(layer, call))
            reports.append(known[kind])
    finally:
        model.train(training)
    return path, stream(calls[0].output).shape[-1], _agreed(layers, reports)


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


def _imagined(layer: nn.Module, call: Call) -> tuple[nn.Module, Call]:
    """Return a copy of a meta layer with random weights on the CPU, all experts alike, and a call that fits it."""
    generator = torch.Generator().manual_seed(0)

    def real(value: Any, name: str = "") -> Any:
        if isinstance(value, Tensor):
            shape = (1, *value.shape[1:]) if name == "matrix" and value.dim() == 3 else value.shape
            if value.is_floating_point():
                noise = torch.randn(shape, generator=generator) * (0.1 if name else 1) + (name == "vector")
                return noise.to(value.dtype).expand(value.shape)
            if value.dtype is torch.bool:
                return torch.ones(value.shape, dtype=torch.bool).tril()
            return (
                torch.arange(value.shape[-1], dtype=value.dtype).expand(value.shape)
                if value.dim()
                else value.new_zeros((), device="cpu")
            )
        if isinstance(value, tuple | list):
            return type(value)(real(item) for item in value)
        return {k: real(v) for k, v in value.items()} if isinstance(value, dict) else value

    copy = deepcopy(layer)
    for module in copy.modules():
        for store in (module._parameters, module._buffers):
            for name, value in store.items():
                if value is not None:
                    tensor = real(value.detach(), "matrix" if value.dim() >= 2 else "vector")
                    store[name] = nn.Parameter(tensor) if store is module._parameters else tensor
    return copy, Call(real(call.args), real(call.kwargs), real(call.output))


# ------------------------------------------------------------------------------------------------ inside one layer


def _owns_matrix(module: nn.Module) -> bool:
    return any(p.dim() >= 2 for p in module.parameters(recurse=False))


def _owners(layer: nn.Module) -> dict[str, nn.Module]:
    """Modules that own a matrix and have no descendant that does; their outputs are the cut."""
    owning = {name: m for name, m in layer.named_modules() if name and _owns_matrix(m)}
    return {n: m for n, m in owning.items() if not any(other.startswith(n + ".") for other in owning)}


class _Cut:
    """One pass through a layer with the outputs of the given modules replaced by constants of the same value.

    Attributes:
        leaves: Path -> the constants that took the place of the module's float outputs, one or more per call.
        entered, passed: Path -> first input and output of every other childless module, kept in the graph.
        inputs: Path -> first call of the module.
        x, out: Residual that enters and leaves, `[..., T, d]`.
        sent: Cotangent of `out`, random normal.
    """

    def __init__(
        self, layer: nn.Module, call: Call, cut: Mapping[str, nn.Module], watch: Mapping[str, nn.Module]
    ) -> None:
        self.leaves: dict[str, list[Tensor]] = {}
        self.entered: dict[str, Tensor] = {}
        self.passed: dict[str, Tensor] = {}
        self.inputs: dict[str, Call] = {}
        entering = call.stream_in()
        if entering is None:
            raise UsageError("the residual stream was not found among a layer's arguments", where=type(layer).__name__)
        with torch.enable_grad(), hooked() as hold:
            self.x = entering.detach().clone().requires_grad_()
            for path, module in cut.items():
                hold(module.register_forward_hook(self._cutter(path), with_kwargs=True))
            for path, module in watch.items():
                hold(module.register_forward_hook(self._watcher(path), with_kwargs=True))
            self.out = call.run(layer, self.x.clone())
        generator = torch.Generator().manual_seed(0)
        self.sent = torch.randn(self.out.shape, generator=generator).to(self.out)

    def _cutter(self, path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            self.inputs.setdefault(path, Call(_detached(args), _detached(kwargs), output))
            self.leaves.setdefault(path, [])
            return self._replace(path, output)

        return hook

    def _replace(self, path: str, output: Any) -> Any:
        if isinstance(output, tuple | list):
            return type(output)(self._replace(path, item) for item in output)
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        leaf = output.detach().clone().requires_grad_()
        self.leaves[path].append(leaf)
        return leaf.clone()

    def _watcher(self, path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not isinstance(output, Tensor) or not output.is_floating_point():
                return output
            self.inputs.setdefault(path, Call(_detached(args), _detached(kwargs), output.detach()))
            self.passed[path] = output
            if args and _is_float(args[0]):
                self.entered[path] = args[0]
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
        if gradient is None or gradient.device.type == "meta":
            return True
        rows = gradient.detach().reshape(-1, gradient.shape[-1]).double().cpu()
        basis = torch.linalg.qr(self.sent.reshape(-1, self.sent.shape[-1]).double().cpu().T).Q
        remainder = rows - rows @ basis @ basis.T
        return bool(remainder.norm() <= TOLERANCE * rows.norm())


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, tuple | list):
        return type(value)(_detached(item) for item in value)
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
    watch = {n: m for n, m in layer.named_modules() if n and not any(True for _ in m.children()) and n not in owners}
    cut = _Cut(layer, call, owners, watch)
    width = cut.out.shape[-1]
    report = LayerReport()
    norms: dict[str, tuple[str, ...]] = {}  # of every module that reaches the output
    refused: dict[str, str] = {}
    for path, leaves in cut.leaves.items():
        wide = [leaf for leaf in leaves if leaf.shape[-1] == width]
        gradients = cut.gradients(cut.out, wide, cut.sent)
        connected = [(leaf, g) for leaf, g in zip(wide, gradients, strict=True) if g is not None]
        if not connected:
            continue
        norms[path] = _norms_after(cut, connected[0][0], watch)
        last = cut.passed[norms[path][-1]] if norms[path] else connected[0][0]
        if not cut.is_multiple(cut.gradients(cut.out, [last], cut.sent)[0]) and not _joins_normed_stream(
            cut, last, watch
        ):
            refused[path] = "its output is changed channel by channel before it is added to the residual"
    writers = {path: owners[path] for path in norms if path not in refused}
    groups = _expert_lists(layer, cut, writers)
    mixing = _mixing(layer, call, {path: owners[path] for path in norms}, groups)
    grouped = {twin for path, twins in groups.items() for twin in twins if twin != path}
    for path in writers:
        if path in grouped:
            continue
        try:
            parameter, bias, axis = orient(owners[path], cut.inputs[path], width)
        except UsageError as error:
            report.unmatched.append(Unmatched(path, mixing[path], error.what))
            continue
        expert = path in groups or getattr(owners[path], parameter).dim() == 3
        for twin in groups.get(path, [path]):
            report.found.append(Found(twin, mixing[path], parameter, bias, axis, expert, norms[path]))
    report.unmatched += [Unmatched(path, mixing[path], why) for path, why in refused.items()]
    if not _explained(layer, call, cut, owners, watch):
        why = "part of what is written comes from no module that was found"
        report.unmatched.append(Unmatched("", _leaks_tokens(cut), why))
    return report


def _norms_after(cut: _Cut, leaf: Tensor, watch: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Return the norms between a constant and the residual: they see it, reach the output, and do not see the residual."""
    chain = [
        path
        for path, output in cut.passed.items()
        if output.shape[-1] == cut.out.shape[-1]
        and cut.reaches(output, leaf)
        and cut.reaches(cut.out, output)
        and not cut.reaches(output, cut.x)
        and is_norm(watch[path], cut.inputs[path])
    ]
    return tuple(sorted(chain, key=lambda p: sum(cut.reaches(cut.passed[p], cut.passed[q]) for q in chain)))


def _joins_normed_stream(cut: _Cut, value: Tensor, watch: Mapping[str, nn.Module]) -> bool:
    """Whether a value is added to a residual that is normed as a whole afterwards, as post-norm layers do."""
    for path, entered in cut.entered.items():
        if entered.shape == cut.sent.shape and cut.reaches(entered, cut.x) and is_norm(watch[path], cut.inputs[path]):
            gradient = cut.gradients(entered, [value], cut.sent)[0]
            if gradient is not None and cut.is_multiple(gradient):
                return True
    return False


def is_norm(module: nn.Module, call: Call) -> bool:
    """Whether a module's output stays the same when its input is doubled; on the meta device, whether it has a gain."""
    if not call.args or not _is_float(call.args[0]):
        return False
    if call.args[0].device.type == "meta":
        return any(p.dim() == 1 for p in module.parameters()) or "norm" in type(module).__name__.lower()
    with torch.no_grad():
        once = stream(module(*call.args, **call.kwargs))
        twice = stream(module(2 * call.args[0], *call.args[1:], **call.kwargs))
    if once is None or twice is None:
        return False
    scale = once.double().norm()
    return bool(scale > 0 and (twice.double() - once.double()).norm() < TOLERANCE * scale)


def _explained(
    layer: nn.Module, call: Call, cut: _Cut, owners: Mapping[str, nn.Module], watch: Mapping[str, nn.Module]
) -> bool:
    """Whether the layer's output is its input (scaled, or normed as a whole) plus constants, once all writers are cut."""
    gradient = cut.gradients(cut.out, [cut.x], cut.sent)[0]
    if gradient is not None and cut.is_multiple(gradient):
        return True
    norms = {
        path: watch[path]
        for path, output in cut.passed.items()
        if cut.reaches(output, cut.x) and is_norm(watch[path], cut.inputs[path])
    }
    if not norms:
        return False
    again = _Cut(layer, call, {**owners, **norms}, {})
    parts = again.gradients(again.out, [again.x, *(leaf for path in norms for leaf in again.leaves[path])], again.sent)
    return any(part is not None for part in parts) and all(again.is_multiple(part) for part in parts)


def _leaks_tokens(cut: _Cut) -> bool:
    """Whether the input at the first position reaches the output at a later one although all writers are cut."""
    later = cut.sent.clone()
    later[..., 0, :] = 0
    gradient = cut.gradients(cut.out, [cut.x], later)[0]
    return gradient is not None and bool(gradient[..., 0, :].any())


def _expert_lists(layer: nn.Module, cut: _Cut, writers: Iterable[str]) -> dict[str, list[str]]:
    """Group writers that are one and the same module of every item of a list: experts, whether the probe hit them or not.

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
    entering = call.stream_in()
    if entering is None:
        return dict.fromkeys(modules, False)
    changed = entering.clone()
    changed[..., 0, :] = entering[..., 0, :].flip(-1)
    rows = [_rows_written(layer, call, modules, x) for x in (entering, changed)]
    result: dict[str, bool] = {}
    for path in modules:
        group = next((twins for twins in groups.values() if path in twins), [path])
        before, after = (torch.cat([r[p] for p in group if p in r]) for r in rows)
        distance = torch.cdist(after, before).amin(1)
        share = (distance > 5e-3 * after.norm(dim=1)).double().mean()
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


# ----------------------------------------------------------------------------------------------- the axis by role


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
    hits = [
        (name, axis)
        for name, p in parameters.items()
        if p.is_floating_point()
        for axis in range(max(0, p.dim() - 2), p.dim())
        if p.shape[axis] == width and _answers(module, call, name, axis)
    ]
    depth = max((parameters[name].dim() for name, _ in hits), default=0)
    matrices = [(name, axis) for name, axis in hits if parameters[name].dim() == depth >= 2]
    if len(matrices) != 1:
        many = "more than one matrix writes" if matrices else "no matrix found that it applies last"
        raise UsageError(f"{type(module).__name__}: {many}")
    bias = [name for name, _ in hits if parameters[name].dim() == depth - 1]
    return matrices[0][0], bias[0] if bias else None, matrices[0][1]


def _answers(module: nn.Module, call: Call, name: str, axis: int) -> bool:
    """Whether marking one channel of a parameter along `axis` moves that channel of the output and no other."""
    parameter = module.get_parameter(name)
    shape = [1 if parameter.dim() == 3 and k == 0 else n for k, n in enumerate(parameter.shape)]
    mark = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
    mark.select(axis, _MARKED).fill_(1)
    with torch.no_grad():
        none, once, twice = (_written(module, call, name, (mark * k).expand(parameter.shape)) for k in (0, 1, 2))
    move = (once - none).abs().amax(0)
    others = torch.cat([move[:_MARKED], move[_MARKED + 1 :]])
    alone = bool(move[_MARKED] > 0) and bool(others.max() <= 1e-3 * move[_MARKED])
    return alone and bool(((twice - none) - 2 * (once - none)).abs().max() <= TOLERANCE * move[_MARKED])


def _written(module: nn.Module, call: Call, name: str, value: Tensor) -> Tensor:
    output = torch.func.functional_call(module, {name: value}, call.args, call.kwargs)
    return stream(output).double().reshape(-1, output.shape[-1])


def _declared(module: nn.Module) -> tuple[str, str | None, int]:
    """The orientation of a module whose weights are not in memory, as far as its class declares it."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return "weight", "bias", 1
    transposed = getattr(module, "is_transposed", None)
    if transposed is None or not hasattr(module, "down_proj"):
        raise UsageError(f"{type(module).__name__}: weights not in memory and layout not declared")
    return "down_proj", "down_proj_bias" if getattr(module, "has_bias", False) else None, 2 if transposed else 1
