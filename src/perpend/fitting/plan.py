"""The edit that directions and schedules ask for, writer by writer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor, nn

from perpend.config import EditSection
from perpend.core.directions import Directions
from perpend.core.edits import Edit, ModuleEdit, through_post_norm
from perpend.errors import UsageError
from perpend.models.anatomy import Anatomy, Writer

Source = Callable[[Writer], Tensor]
"""Gives a writer its directions, `[k, d]` float32 orthonormal rows."""


def weight_factors(anatomy: Anatomy, section: EditSection) -> dict[str, list[float]]:
    """Return the weight factor of every layer, per component.

    Raises:
        UsageError: a list schedule of another length than the model has layers.
    """
    found: dict[str, list[float]] = {}
    for component, schedule in (("attention", section.attention), ("mlp", section.mlp)):
        try:
            found[component] = schedule.weights(anatomy.n_layers)
        except ValueError as error:
            raise UsageError(str(error), where=f"edit.{component}") from None
    return found


def from_layer(directions: Directions, layer: float | None) -> Source:
    """Give every writer the directions of one layer, or with None those of its own layer."""
    written = cache(directions.written)  # between layers they take time, and a layer has several writers
    return lambda writer: written(writer.layer if layer is None else layer, writer.layer)


def plan_edit(
    model: nn.Module,
    anatomy: Anatomy,
    section: EditSection,
    source: Source,
    *,
    provenance: dict[str, Any] | None = None,
) -> Edit:
    """Give every writer its directions, weight factor and mode; writers with weight factor 0 are left out.

    Args:
        model: Holds the post-norms, read only with `section.through_post_norm`.
        anatomy: The writers.
        section: Schedules and mode.
        source: Directions per writer.
        provenance: What the edit remembers.
    """
    factors = weight_factors(anatomy, section)
    modules: dict[str, ModuleEdit] = {}
    for writer in anatomy.writers:
        factor = factors[writer.component][writer.layer]
        if factor == 0:
            continue
        directions = source(writer)
        if section.through_post_norm and writer.post_norm is not None:
            gain = anatomy.post_norm_gain(model, writer)
            directions = directions if gain is None else through_post_norm(directions, gain)
        modules[writer.name] = ModuleEdit(directions, factor, section.mode)
    return Edit(modules, provenance or {})
