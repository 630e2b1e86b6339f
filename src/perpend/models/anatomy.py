"""The anatomy of a model: its decoder layers and every module that writes to the residual stream.

`Anatomy.of(model)` finds them by behaviour (see `perpend.models.probe`): a writer is a module whose output reaches the
residual stream through sums, scalars and norms alone. The axis of its matrix that is the residual's follows from the
part that the matrix plays, never from its shape. What writes and cannot be edited is a gap, and a gap is an error
unless the user says otherwise. Writers can be named by hand; `Anatomy.to_toml` prints the form.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from perpend.errors import UsageError, nearest
from perpend.models import overrides as by_hand
from perpend.models.probe import LayerReport, probe_model
from perpend.models.sequence import hidden_size
from perpend.models.writers import Component, Role, Writer, from_probe

__all__ = ["Anatomy", "Component", "CoverageRow", "Gap", "Role", "Writer"]


class Gap(str):
    """A part of a layer that writes and cannot be edited, as text.

    Attributes:
        layer: Index of the layer.
        component: attention or mlp.
        module: Path of the module, or empty when none was found.
    """

    layer: int
    component: Component
    module: str

    @classmethod
    def at(cls, layer: int, component: Component, why: str, module: str = "") -> Gap:
        """Make a gap; its text is made of the arguments."""
        gap = cls(f"layer {layer} {component}: {module} {why}".replace(":  ", ": "))
        gap.layer, gap.component, gap.module = layer, component, module
        return gap


@dataclass(frozen=True)
class CoverageRow:
    """How much of a component of a layer can be edited.

    Attributes:
        layer: Index of the layer.
        component: attention or mlp.
        matched: Writers that can be edited.
        total: Writers, with those that cannot.
        parameters: Elements of the matched matrices.
        tensors: Matched matrices and biases, every expert's counted alone.
    """

    layer: int
    component: Component
    matched: int
    total: int
    parameters: int
    tensors: int


@dataclass(frozen=True)
class Anatomy:
    """Decoder layers and writers of a model.

    Attributes:
        layers: Path of the list of decoder layers; of the text tower where there are several.
        n_layers: Length of that list.
        hidden_size: Width of the residual stream (d).
        writers: By layer, then in the order in which they run.
        gaps: What writes and cannot be edited; empty when all is accounted for.
        architecture: Class of the model, for messages.
    """

    layers: str
    n_layers: int
    hidden_size: int
    writers: tuple[Writer, ...]
    gaps: tuple[Gap, ...] = ()
    architecture: str = ""

    @classmethod
    def of(cls, model: nn.Module, overrides: Mapping[str, Any] | None = None) -> Anatomy:
        """Find the anatomy of a model.

        One forward pass over four tokens shows the layers, and a few passes through each layer show its writers. No
        weight is changed.

        Args:
            model: A causal language model, with or without a vision tower, in any dtype, on any device, meta included.
            overrides: The `[edit.overrides]` table that `to_toml` prints. `layers`: path of the list of decoder layers.
                `writers`: module paths, with `{layer}` for the index, to tables with `component`, `out_axis` and, where
                needed, `role`, `parameter`, `bias`, `post_norm`, `further_norms`; each replaces what was found under
                its name. A model that cannot be probed is taken as described when both are given.

        Raises:
            UsageError: the model cannot be run on text, no layers were found, or an override matches nothing.
        """
        given = by_hand.checked(overrides or {})
        try:
            path, size, reports = probe_model(model, given.get("layers"))
        except UsageError:
            if not ("layers" in given and given.get("writers")):
                raise
            path, size = given["layers"], hidden_size(model)
            reports = [LayerReport() for _ in model.get_submodule(path).children()]
        found, gaps = _collect(model, path, reports)
        named = by_hand.writers(model, given.get("writers", {}), path, len(reports), size)
        names = {writer.name: writer for writer in named}
        merged = [names.pop(writer.name, writer) for writer in found] + list(names.values())
        healed = {(writer.layer, writer.component) for writer in named}
        gaps = [gap for gap in gaps if (gap.layer, gap.component) not in healed]
        bare = sorted(set(range(len(reports))) - {w.layer for w in merged} - {gap.layer for gap in gaps})
        gaps += [
            Gap.at(layer, part, "no module that writes was found") for layer in bare for part in get_args(Component)
        ]
        ordered = tuple(sorted(merged, key=lambda writer: writer.layer))
        return cls(path, len(reports), size, ordered, tuple(gaps), type(model).__name__)

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
                missing = sum((g.layer, g.component) == (layer, component) for g in self.gaps)
                if own or missing:
                    size = sum(w.parameters for w in own)
                    tensors = sum((w.experts or 1) * (2 if w.bias else 1) for w in own)
                    rows.append(CoverageRow(layer, component, len(own), len(own) + missing, size, tensors))
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
        return f"edit.overrides.writers.{self._line(self.gaps[0])}"

    def _line(self, gap: Gap) -> str:
        """The entry that names the module of a gap, or a usual name where none was found."""
        name = gap.module or {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"}[gap.component]
        pattern = json.dumps(f"{self.layers}.{{layer}}.{name}")
        return f'{pattern} = {{component = "{gap.component}", out_axis = 0}}'

    def to_toml(self) -> str:
        """Return the writers as the `[edit.overrides]` table of a recipe; `of` reads it back to the same writers.

        Gaps follow as comments: the entry that would name the module, and why it was not taken for a writer.
        """
        told: dict[str, Gap] = {}
        for gap in self.gaps:
            told.setdefault(self._line(gap), gap)
        gaps = [f"# {line}  # {gap}\n" for line, gap in told.items()]
        apart = {f"{self.layers}.{gap.layer}.{gap.module}" for gap in self.gaps}
        return by_hand.to_toml(self.writers, self.layers, apart) + "".join(gaps)

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
    away = any(t.device.type == "meta" for t in tensors.values())
    if away and not hasattr(norm, "_hf_hook"):
        raise UsageError("the gain of a norm needs its weights in memory", where=type(norm).__name__)
    device = next((t.device for t in tensors.values() if not away), torch.device("cpu"))
    single = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    signs = torch.where(order % 2 == 0, 1.0, -1.0).to(device)

    def push(scale: float) -> Tensor:
        probe = (signs * scale).reshape(1, 1, size)
        if away:  # offloaded: called as it is, in its own dtype
            pushed = norm(probe.to(next(iter(tensors.values())).dtype))
        else:
            pushed = torch.func.functional_call(norm, single, (probe,))
        return torch.as_tensor(pushed).float().to(device).reshape(size)

    with torch.no_grad():
        near, far = ((push(k) - push(-k)) / 2 * signs for k in (1.0, 64.0))
    gain = near if far.norm() > 8 * near.norm() else far  # a mere scale grows with its input, a norm does not
    return gain.cpu()


def _collect(model: nn.Module, path: str, reports: Sequence[LayerReport]) -> tuple[list[Writer], list[Gap]]:
    """Turn the probe's reports into writers and gaps; a module shared by several layers counts in the first."""
    writers: list[Writer] = []
    gaps: list[Gap] = []
    seen: set[int] = set()
    for layer, report in enumerate(reports):
        prefix = f"{path}.{layer}."
        routed = any(found.expert and not found.mixes_tokens for found in report.found)
        for found in report.found:
            module = model.get_submodule(prefix + found.path)
            if id(module) not in seen:
                seen.add(id(module))
                writers.append(from_probe(model, prefix, layer, found, routed))
        for miss in report.unmatched:
            gaps.append(Gap.at(layer, "attention" if miss.mixes_tokens else "mlp", miss.why, miss.path))
    return writers, gaps
