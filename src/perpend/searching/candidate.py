"""One candidate of a search: an ordinary recipe of fit and edit, and the edit that it stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from perpend.config import Recipe
from perpend.core.kinds import Basis, Method, Mode
from perpend.core.schedule import Constant, NormalKernel, PerLayer, Schedule, layers

if TYPE_CHECKING:  # a worker that only keeps the books needs no tensors
    from perpend.core.directions import Directions
    from perpend.core.edits import Edit
    from perpend.models.session import Session


@dataclass(frozen=True)
class Candidate:
    """Where the direction is read, how many, in which mode and with which weight factors they are taken out."""

    layer: float | None
    """Layer that every module takes its direction from, whole or not, counted from 0; None for its own."""
    rank: int
    """Directions per module, k."""
    mode: Mode
    through_post_norm: bool
    attention: Schedule
    mlp: Schedule
    method: Method = "mean"

    @property
    def basis(self) -> Basis:
        """Which directions it needs."""
        return self.method, self.rank

    def recipe(self, base: Recipe) -> Recipe:
        """Return `base` with this fit and edit; a `fit` or `run` of it makes the same edit again."""
        layer = "each" if self.layer is None else self.layer
        fit = {"layer": layer, "rank": self.rank, "method": self.method, "strategy": "accumulate"}
        edit = {
            "mode": self.mode,
            "through_post_norm": self.through_post_norm,
            "attention": self.attention,
            "mlp": self.mlp,
        }
        sections = {"fit": base.fit.model_copy(update=fit), "edit": base.edit.model_copy(update=edit)}
        return base.model_copy(update=sections)

    def edit(self, session: Session, directions: Mapping[Basis, Directions], base: Recipe) -> Edit:
        """Return the edit.

        Args:
            session: The untouched model.
            directions: The directions of each method and k.
            base: What is not searched.
        """
        from perpend.fitting.plan import from_layer, plan_edit

        recipe = self.recipe(base)
        source = from_layer(directions[self.basis], self.layer)
        return plan_edit(session.model, session.anatomy, recipe.edit, source, provenance={"recipe": recipe.hash()})

    def words(self, n_layers: int) -> str:
        """Say in one line what the edit does."""
        where = "each layer its own" if self.layer is None else f"layer {self.layer:g} of {n_layers}"
        count = "direction" if self.rank == 1 else f"{self.rank} directions"
        count = count if self.method == "mean" else f"{self.method} {count}"
        how = "through the post-norm" if self.through_post_norm else self.mode
        parts = [f"{name} {_shape(schedule, n_layers)}" for name, schedule in self._components().items()]
        return f"{count} of {where}, {how}; {'; '.join(parts)}"

    def weights(self, n_layers: int) -> dict[str, list[float]]:
        """Return the weight factor of every layer, per component."""
        return {name: schedule.weights(n_layers) for name, schedule in self._components().items()}

    def _components(self) -> dict[str, Schedule]:
        return {"attention": self.attention, "mlp": self.mlp}

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, in the words of a recipe."""
        return {
            "layer": "each" if self.layer is None else self.layer,
            "rank": self.rank,
            "method": self.method,
            "mode": self.mode,
            "through_post_norm": self.through_post_norm,
            **{name: schedule.model_dump(mode="json") for name, schedule in self._components().items()},
        }


def _shape(schedule: Schedule, n_layers: int) -> str:
    found = schedule.weights(n_layers)
    if not any(found):
        return "left alone"
    if isinstance(schedule, NormalKernel):
        peak, spread = layers(schedule.peak_layer, n_layers), layers(schedule.spread, n_layers)
        edited = [layer for layer, weight in enumerate(found) if weight]
        edges = schedule.first is not None or schedule.last is not None
        within = f", in layers {edited[0]} to {edited[-1]}" if edges else ""
        return f"λ {schedule.peak_weight:g} around layer {peak:.1f}, spread {spread:.1f}{within}"
    if isinstance(schedule, Constant):
        return f"λ {schedule.weight:g} in every layer"
    if isinstance(schedule, PerLayer):
        return f"λ {min(found):.2f} to {max(found):.2f}, layer by layer"
    return f"λ up to {max(found, key=abs):.2f} ({schedule.kind})"
