"""From prompts to an edit, in the order of a recipe."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import asdict, dataclass
from typing import Any

from perpend.config import Recipe
from perpend.core.directions import Directions
from perpend.core.edits import Edit
from perpend.core.schedule import layers as length
from perpend.data import PromptPair, Splits
from perpend.errors import UsageError
from perpend.fitting.accumulate import Checkpoint, accumulate
from perpend.fitting.behaviour import consistent, observe
from perpend.fitting.iterative import Step, iterate
from perpend.fitting.layers import Choice, Probe, choose_layer
from perpend.fitting.plan import from_layer, plan_edit, weight_factors
from perpend.models.session import Reply, Session

PROBE_PROMPTS = 24
"""Prompts of each class on which candidate layers are tried."""


@dataclass(frozen=True)
class Fitted:
    """What the fit found."""

    directions: Directions
    edit: Edit
    layer: float | None
    """Layer that every module takes its direction from; None for its own."""
    choice: Choice | None
    """The layers that were tried, when the layer was chosen here."""
    counts: dict[str, int]
    """Prompts of the fit split, and those on which the model does what their class says."""
    steps: tuple[Step, ...] = ()
    """Batches of the iterative strategy."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "layer": self.layer,
            "counts": self.counts,
            "diagnostics": dict(self.directions.diagnostics),
            "raw_norm": self.directions.raw_norm.tolist(),
            "choice": None if self.choice is None else asdict(self.choice),
            "steps": [asdict(step) for step in self.steps],
            "modules": len(self.edit),
        }


def fit_edit(
    session: Session,
    splits: Splits,
    recipe: Recipe,
    *,
    replies: Callable[[str], MutableMapping[str, Reply]] | None = None,
    checkpoint: Checkpoint | None = None,
) -> Fitted:
    """Measure directions on the fit split, choose a layer on the select split, plan the edit.

    Args:
        session: The untouched model.
        splits: Prompts; the report split is not looked at.
        recipe: What to do.
        replies: Gives a store of replies by name, so that an interrupted fit goes on where it was.
        checkpoint: Keeps sums, likewise.

    Raises:
        RunFailed: too few prompts on which the model does what their class says; a layer without separation.
        UsageError: a layer out of range, or a list of weight factors of another length; before the model runs.
    """
    session.anatomy.require_complete(recipe.edit.allow_partial)
    weight_factors(session.anatomy, recipe.edit)
    layer, choice = fixed_layer(recipe, session.n_layers), None
    pair, counts = splits.fit, {"targets": len(splits.fit.target), "baselines": len(splits.fit.baseline)}
    if recipe.fit.filter:
        behaviour = observe(session, pair, store=replies("fit") if replies else None)
        pair, counts = consistent(behaviour), behaviour.counts()
    provenance = {"recipe": recipe.hash(), "model": str(session.loaded.ref), "fit": fingerprints(pair)}
    directions = accumulate(
        session, pair, recipe.fit, held_out=splits.select, checkpoint=checkpoint, provenance=provenance
    )
    if recipe.fit.layer == "auto":
        seen = observe(session, splits.select, store=replies("select") if replies else None)
        choice = choose_layer(session, directions, recipe.edit, Probe.of(seen, PROBE_PROMPTS))
        layer = float(choice.layer)
    steps: tuple[Step, ...] = ()
    if recipe.fit.strategy == "iterative":
        made = iterate(session, pair, recipe.fit, recipe.edit, directions, layer)
        edit, steps = Edit(made.edit.modules, provenance), made.steps
    else:
        source = from_layer(directions, layer)
        edit = plan_edit(session.model, session.anatomy, recipe.edit, source, provenance=provenance)
    return Fitted(directions, edit, layer, choice, counts, steps)


def fixed_layer(recipe: Recipe, n_layers: int) -> float | None:
    """Return the layer that a recipe names, as a number; None when each has its own or it is chosen later.

    Raises:
        UsageError: outside the model.
    """
    if recipe.fit.layer in {"auto", "each"}:
        return None
    layer = length(recipe.fit.layer, n_layers)
    if not 0 <= layer <= n_layers - 1:
        raise UsageError(f"layer {layer:g}", where="fit.layer", valid=f"0 to {n_layers - 1}")
    return layer


def fingerprints(pair: PromptPair) -> dict[str, str]:
    """Return the fingerprints of both classes."""
    return {"target": pair.target.fingerprint, "baseline": pair.baseline.fingerprint}
