"""The anatomy of a model: its decoder layers and every module that writes to the residual stream.

`Anatomy.of(model)` finds them by behaviour (see `perpend.models.probe`): a writer is a module whose output reaches the
residual stream through sums, scalars and norms alone. The axis of its matrix that is the residual's follows from the
part that the matrix plays, never from its shape. What writes and cannot be edited is a gap, and a gap is an error
unless the user says otherwise. Writers can be named by hand; `Anatomy.to_toml` prints the form.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from perpend.errors import UsageError, nearest
from perpend.models.probe import Found, LayerReport, probe_model

Component = Literal["attention", "mlp"]
Role = Literal["attention_out", "mlp_down", "expert_down", "shared_expert_down", "mixer_out"]

_DEFAULT_ROLE: dict[str, Role] = {"attention": "attention_out", "mlp": "mlp_down"}
_OVERRIDE_KEYS = ("component", "out_axis", "role", "parameter", "bias", "post_norm", "further_norms")


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


class Gap(str):
    """A part of a layer that writes and cannot be edited, as text; `layer` and `component` say where."""

    layer: int
    component: Component

    def __new__(cls, layer: int, component: Component, why: str) -> Gap:
        self = super().__new__(cls, f"layer {layer} {component}: {why}")
        self.layer, self.component = layer, component
        return self


@dataclass(frozen=True)
class CoverageRow:
    """How much of a component of a layer can be edited.

    Attributes:
        layer: Index of the layer.
        component: attention or mlp.
        matched: Writers that can be edited.
        total: Writers, with those that cannot.
        parameters: Elements of the matched matrices.
    """

    layer: int
    component: Component
    matched: int
    total: int
    parameters: int


@dataclass(frozen=True)
class Anatomy:
    """Decoder layers and writers of a model.

    Attributes:
        layers: Path of the list of decoder layers; of the text tower where there are several.
        n_layers: Length of that list.
        hidden_size: Width of the residual stream (d).
        writers: By layer, then in the order in which the layer holds them.
        gaps: What writes and cannot be edited; empty when all is accounted for.
        architecture: Class of the model, for messages.
    """

    layers: str
    n_layers: int
    hidden_size: int
    writers: tuple[Writer, ...]
    gaps: tuple[str, ...] = ()
    architecture: str = ""

    @classmethod
    def of(cls, model: nn.Module, overrides: Mapping[str, Any] | None = None) -> Anatomy:
        """Find the anatomy of a model.

        One forward pass over four tokens shows the layers, and a few passes through each layer show its writers. No
        weight is changed. With `layers` among the overrides nothing is probed: the model is taken as described.

        Args:
            model: A causal language model, with or without a vision tower, in any dtype, on any device, meta included.
            overrides: The `[edit.overrides]` table that `to_toml` prints: `layers`, a path, and `writers`, patterns
                with `{layer}` to tables with `component`, `out_axis` and, where needed, `role`, `parameter`, `bias`,
                `post_norm`, `further_norms`. An override replaces the found writer of its name.

        Raises:
            UsageError: the model cannot be run on text, no layers were found, or an override matches nothing.
        """
        given = _checked(overrides or {})
        name = type(model).__name__
        if "layers" in given:
            path = given["layers"]
            items = _module(model, path, "edit.overrides.layers")
            n_layers, found, gaps = len(list(items.children())), [], []
            size = _text_hidden_size(model)
        else:
            path, size, reports = probe_model(model)
            n_layers = len(reports)
            found, gaps = _collect(model, path, reports)
        named = _by_hand(model, given.get("writers", {}), path, n_layers, size)
        names = {writer.name for writer in named}
        writers = sorted([*(w for w in found if w.name not in names), *named], key=lambda w: w.layer)
        healed = {(w.layer, w.component) for w in named}
        gaps = [gap for gap in gaps if (gap.layer, gap.component) not in healed]
        bare = sorted(set(range(n_layers)) - {w.layer for w in writers} - {gap.layer for gap in gaps})
        gaps += [Gap(layer, part, "no module that writes was found") for layer in bare for part in get_args(Component)]
        return cls(path, n_layers, size, tuple(writers), tuple(gaps), name)

    def layer_modules(self, model: nn.Module) -> list[nn.Module]:
        """Return the decoder layers in order; the output of item l is the residual after layer l."""
        return list(model.get_submodule(self.layers).children())

    def writer(self, name: str) -> Writer:
        """Return the writer of that name.

        Raises:
            UsageError: there is none; names the nearest.
        """
        for writer in self.writers:
            if writer.name == name:
                return writer
        raise UsageError(
            f"no writer '{name}'", where=self.architecture, hint=nearest(name, [w.name for w in self.writers])
        )

    def coverage(self) -> list[CoverageRow]:
        """Return a row for every layer and component that writes, by layer, attention first."""
        rows: list[CoverageRow] = []
        for layer in range(self.n_layers):
            for component in get_args(Component):
                own = [w for w in self.writers if (w.layer, w.component) == (layer, component)]
                missing = sum(isinstance(g, Gap) and (g.layer, g.component) == (layer, component) for g in self.gaps)
                if own or missing:
                    size = sum(w.parameters for w in own)
                    rows.append(CoverageRow(layer, component, len(own), len(own) + missing, size))
        return rows

    def require_complete(self, allow_partial: bool = False) -> None:
        """Refuse a model of which some layer cannot be edited whole.

        Args:
            allow_partial: Go on all the same.

        Raises:
            UsageError: names the gaps and the override to paste into a recipe.
        """
        if not self.gaps or allow_partial:
            return
        shown = "; ".join(self.gaps[:4]) + (f"; and {len(self.gaps) - 4} more" if len(self.gaps) > 4 else "")
        raise UsageError(
            f"not every writer can be edited: {shown}",
            where=self.architecture,
            hint="--allow-partial, or name the module in the recipe: " + self._example(),
        )

    def _example(self) -> str:
        component = next((gap.component for gap in self.gaps if isinstance(gap, Gap)), "mlp")
        module = {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"}[component]
        pattern = f"{self.layers}.{{layer}}.{module}"
        return f'edit.overrides.writers.{json.dumps(pattern)} = {{component = "{component}", out_axis = 0}}'

    def to_toml(self) -> str:
        """Return the writers as the `[edit.overrides]` table of a recipe; `of` reads it back to the same writers."""
        lines = ["[edit.overrides]", f"layers = {json.dumps(self.layers)}", "", "[edit.overrides.writers]"]
        tables: dict[str, dict[str, dict[str, Any]]] = {}
        for writer in self.writers:
            at = f"{self.layers}.{writer.layer}."
            pattern = writer.name.replace(at, f"{self.layers}.{{layer}}.", 1)
            tables.setdefault(pattern, {})[writer.name] = _as_override(writer, at, self.layers)
        for pattern, by_name in tables.items():
            values = list(by_name.values())
            alike = all(value == values[0] for value in values)
            for name, value in ({pattern: values[0]} if alike else by_name).items():
                body = ", ".join(f"{key} = {json.dumps(item)}" for key, item in value.items())
                lines.append(f"{json.dumps(name)} = {{{body}}}")
        return "\n".join(lines) + "\n"

    def post_norm_gain(self, model: nn.Module, writer: Writer) -> Tensor | None:
        """Measure the gain of the norms between a writer and the residual by pushing a probe through them.

        A vector of balanced signs has mean zero and unit mean square, so a norm returns it times its gain (plus its
        bias, which the opposite vector cancels), be the gain γ or 1 + γ.

        Args:
            model: The model of which this is the anatomy.
            writer: One of `writers`.

        Returns:
            `[d]` float32 on the CPU, the diagonal of D in `residual += D · norm(W x)`, or None without a post-norm.
        """
        if writer.post_norm is None:
            return None
        gain = torch.ones(self.hidden_size)
        for path in (writer.post_norm, *writer.further_norms):
            gain = gain * _gain(model.get_submodule(path), self.hidden_size)
        return gain


def _gain(norm: nn.Module, size: int) -> Tensor:
    tensors = {**dict(norm.named_parameters()), **dict(norm.named_buffers())}
    real = all(t.device.type != "meta" for t in tensors.values())
    like = next(iter(tensors.values()), torch.zeros(()))
    signs = torch.where(torch.arange(size) % 2 == 0, 1.0, -1.0)
    signs = signs[torch.randperm(size, generator=torch.Generator().manual_seed(0))]
    single = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()} if real else {}
    dtype = torch.float32 if real else like.dtype

    def push(scale: float) -> Tensor:
        probe = (signs * scale).to(dtype=dtype, device=like.device if real else "cpu").reshape(1, 1, size)
        return torch.func.functional_call(norm, single, (probe,)).float().cpu().reshape(size)

    with torch.no_grad():
        near, far = ((push(k) - push(-k)) / 2 * signs for k in (1.0, 64.0))
    return near if far.norm() > 8 * near.norm() else far  # a mere scale grows with its input, a norm does not


# ------------------------------------------------------------------------------------------- from the probe's report


def _collect(model: nn.Module, path: str, reports: Sequence[LayerReport]) -> tuple[list[Writer], list[Gap]]:
    """Turn the probe's reports into writers and gaps; a module shared by several layers counts in the first."""
    writers: list[Writer] = []
    gaps: list[Gap] = []
    seen: set[int] = set()
    for layer, report in enumerate(reports):
        routed = any(found.expert and not found.mixes_tokens for found in report.found)
        for found in report.found:
            module = model.get_submodule(f"{path}.{layer}.{found.path}")
            if id(module) not in seen:
                seen.add(id(module))
                writers.append(_writer(model, f"{path}.{layer}.", layer, found, routed))
        for miss in report.unmatched:
            gaps.append(Gap(layer, "attention" if miss.mixes_tokens else "mlp", f"{miss.path} {miss.why}".strip()))
    return writers, gaps


def _writer(model: nn.Module, prefix: str, layer: int, found: Found, routed: bool) -> Writer:
    module = model.get_submodule(prefix + found.path)
    parameter = module.get_parameter(found.parameter)
    linear = isinstance(module, nn.Linear)
    shape = (module.out_features, module.in_features) if linear else tuple(parameter.shape)
    if found.mixes_tokens:
        role: Role = (
            "mixer_out" if _has_state(model.get_submodule(prefix + found.path.rpartition(".")[0])) else "attention_out"
        )
    else:
        role = "expert_down" if found.expert else "shared_expert_down" if routed else "mlp_down"
    norms = tuple(prefix + norm for norm in found.norms)
    return Writer(
        name=prefix + found.path,
        layer=layer,
        component="attention" if found.mixes_tokens else "mlp",
        role=role,
        parameter=found.parameter,
        bias=found.bias,
        out_axis=found.out_axis,
        experts=shape[0] if len(shape) == 3 else None,
        post_norm=norms[0] if norms else None,
        shape=shape,
        parameters=math.prod(shape),
        further_norms=norms[1:],
    )


def _has_state(block: nn.Module) -> bool:
    """Whether a token mixer convolves or carries a state of its own: not softmax attention."""
    return any(isinstance(m, nn.Conv1d) for m in block.modules()) or any(
        p.dim() == 3 for p in block.parameters(recurse=False)
    )


# ------------------------------------------------------------------------------------------------------ overrides


def _checked(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Check the form of the overrides table."""
    where = "edit.overrides"
    for key in overrides:
        if key not in ("layers", "writers"):
            raise UsageError(
                f"unknown key '{key}'", where=where, valid="layers, writers", hint=nearest(key, ["layers", "writers"])
            )
    for pattern, table in overrides.get("writers", {}).items():
        at = f'{where}.writers."{pattern}"'
        if not isinstance(table, Mapping):
            raise UsageError("is no table", where=at, valid='{component = "mlp", out_axis = 0}')
        for key in table:
            if key not in _OVERRIDE_KEYS:
                raise UsageError(
                    f"unknown key '{key}'", where=at, valid=", ".join(_OVERRIDE_KEYS), hint=nearest(key, _OVERRIDE_KEYS)
                )
        for key, valid in (("component", get_args(Component)), ("role", get_args(Role))):
            if (key == "component" or key in table) and table.get(key) not in valid:
                raise UsageError(f"{key} is {table.get(key)!r}", where=at, valid=", ".join(valid))
        if table.get("out_axis") not in (0, 1, 2):
            raise UsageError(f"out_axis is {table.get('out_axis')!r}", where=at, valid="0, 1, 2")
    return dict(overrides)


def _by_hand(
    model: nn.Module, tables: Mapping[str, Mapping[str, Any]], path: str, n_layers: int, size: int
) -> list[Writer]:
    """Build the writers that overrides name."""
    writers: list[Writer] = []
    modules = dict(model.named_modules())
    for pattern, table in tables.items():
        names = [(k, pattern.replace("{layer}", str(k))) for k in range(n_layers)]
        if "{layer}" not in pattern:
            names = [(k, name) for k, name in names if name.startswith(f"{path}.{k}.")]
        found = [(k, name) for k, name in names if name in modules]
        if not found:
            raise UsageError(
                f"'{pattern}' matches no module of {type(model).__name__}",
                where="edit.overrides.writers",
                hint=_nearest_pattern(pattern, modules, path),
            )
        for layer, name in found:
            writers.append(_named(modules[name], name, layer, table, size))
    return writers


def _nearest_pattern(pattern: str, modules: Iterable[str], path: str) -> str:
    patterns = {
        name.replace(f"{path}.0.", f"{path}.{{layer}}.", 1) for name in modules if name.startswith(f"{path}.0.")
    }
    close = difflib.get_close_matches(pattern, sorted(patterns), n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else ""


def _named(module: nn.Module, name: str, layer: int, table: Mapping[str, Any], size: int) -> Writer:
    where = f'edit.overrides.writers."{name}"'
    parameters = dict(module.named_parameters(recurse=False))
    parameter = table.get("parameter", "weight")
    if parameter not in parameters:
        raise UsageError(f"has no parameter '{parameter}'", where=where, valid=", ".join(parameters) or "none")
    shape, axis = tuple(parameters[parameter].shape), table["out_axis"]
    if not (2 <= len(shape) <= 3 and len(shape) - 2 <= axis < len(shape)) or shape[axis] != size:
        raise UsageError(f"axis {axis} of {parameter} {list(shape)} is not the hidden size {size}", where=where)
    component: Component = table["component"]
    experts = shape[0] if len(shape) == 3 else None
    role = "expert_down" if experts and component == "mlp" else _DEFAULT_ROLE[component]
    placed = {key: _placed(table.get(key), layer) for key in ("post_norm", "further_norms")}
    return Writer(
        name=name,
        layer=layer,
        component=component,
        role=table.get("role", role),
        parameter=parameter,
        bias=table.get("bias", "bias" if "bias" in parameters else None),
        out_axis=axis,
        experts=experts,
        post_norm=placed["post_norm"],
        shape=shape,
        parameters=math.prod(shape),
        further_norms=tuple(placed["further_norms"] or ()),
    )


def _placed(value: Any, layer: int) -> Any:
    if isinstance(value, list):
        return [_placed(item, layer) for item in value]
    return value.replace("{layer}", str(layer)) if isinstance(value, str) else value


def _as_override(writer: Writer, at: str, layers: str) -> dict[str, Any]:
    def pattern(path: str) -> str:
        return path.replace(at, f"{layers}.{{layer}}.", 1)

    usual = "expert_down" if writer.experts and writer.component == "mlp" else _DEFAULT_ROLE[writer.component]
    table: dict[str, Any] = {"component": writer.component, "out_axis": writer.out_axis}
    table |= {"role": writer.role} if writer.role != usual else {}
    table |= {"parameter": writer.parameter} if writer.parameter != "weight" else {}
    table |= {"bias": writer.bias} if writer.bias not in (None, "bias") else {}
    table |= {"post_norm": pattern(writer.post_norm)} if writer.post_norm else {}
    table |= {"further_norms": [pattern(norm) for norm in writer.further_norms]} if writer.further_norms else {}
    return table


def _module(model: nn.Module, path: str, where: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        lists = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
        raise UsageError(
            f"no module '{path}'", where=where, valid=", ".join(lists[:8]), hint=nearest(path, lists)
        ) from None


def _text_hidden_size(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "hidden_size", None)
    if size is None and hasattr(model, "get_input_embeddings"):
        size = model.get_input_embeddings().weight.shape[-1]
    return int(size)
