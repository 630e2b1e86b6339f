"""From prompts to an edit, in the order of a recipe."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from perpend.config import Recipe
from perpend.core.directions import Directions
from perpend.core.edits import Edit
from perpend.core.kinds import Basis
from perpend.core.reliability import cosines, expected_cosine
from perpend.core.schedule import layers as length
from perpend.data import Prompt, PromptPair, Splits
from perpend.errors import UsageError
from perpend.fitting.accumulate import Checkpoint, families, fixed_position, require_measured
from perpend.fitting.behaviour import observe, usable
from perpend.fitting.iterative import Step, iterate
from perpend.fitting.layers import Candidate, Choice, Probe, best, choose_layer
from perpend.fitting.plan import from_layer, plan_edit, weight_factors
from perpend.models.session import Reply, Session

PROBE_PROMPTS = 16
"""Prompts of each class on which candidate layers are tried."""
POSITIONS = 5
"""Most positions that are tried."""


@dataclass(frozen=True)
class Fitted:
    """What the fit found."""

    directions: Directions
    edit: Edit
    layer: float | None
    """Layer that every module takes its direction from; None for its own."""
    position: int
    """Token that was read, counted from the end."""
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
            "position": self.position,
            "counts": self.counts,
            "diagnostics": dict(self.directions.diagnostics),
            "raw_norm": self.directions.raw_norm.tolist(),
            "expected_cosine": [expected_cosine(c) for c in self.directions.diagnostics.get("split_half_cosine", ())],
            "cosines": cosines(self.directions.vectors),
            "choice": None if self.choice is None else {**asdict(self.choice), "layer": self.choice.layer},
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
        checkpoint: Keeps sums and candidates, likewise.

    Raises:
        RunFailed: too few prompts on which the model does what their class says; a layer without separation.
        UsageError: a layer out of range, a list of weight factors of another length, or a direction that a search has
            refined; before the model runs.
    """
    require_measured(recipe.fit)
    session.anatomy.require_complete(recipe.edit.allow_partial)
    weight_factors(session.anatomy, recipe.edit)
    layer, choice = fixed_layer(recipe, session.n_layers), None
    store = replies("fit") if replies and recipe.fit.filter else None
    pair, counts = usable(session, splits.fit, filtered=recipe.fit.filter, store=store)
    provenance = {"recipe": recipe.hash(), "model": session.loaded.ref.portable, "fit": fingerprints(pair)}
    kept = (checkpoint, provenance)
    if recipe.fit.layer == "auto":
        seen = observe(session, splits.select, store=replies("select") if replies else None)
        position, directions, choice = choose(session, pair, splits.select, recipe, Probe.of(seen, PROBE_PROMPTS), kept)
        layer = float(choice.layer)
    else:
        position = fixed_position(recipe.fit)
        directions = at_position(session, pair, splits.select, recipe, position, kept)
    section = recipe.fit.model_copy(update={"position": position})
    steps: tuple[Step, ...] = ()
    if recipe.fit.strategy == "iterative":
        made = iterate(session, pair, section, recipe.edit, directions, layer, checkpoint=checkpoint)
        edit, steps = Edit(made.edit.modules, provenance), made.steps
    else:
        source = from_layer(directions, layer)
        edit = plan_edit(session.model, session.anatomy, recipe.edit, source, provenance=provenance)
    return Fitted(directions, edit, layer, position, choice, counts, steps)


Kept = tuple[Checkpoint | None, dict[str, Any]]
"""Where sums are kept, and what the directions remember."""


def at_position(
    session: Session, pair: PromptPair, held_out: PromptPair | None, recipe: Recipe, position: int, kept: Kept
) -> Directions:
    """Return the directions of all layers at one position; with `held_out`, also how well they separate it."""
    basis = (recipe.fit.method, recipe.fit.rank)
    return all_at(session, pair, held_out, recipe, position, [basis], kept)[basis]


def all_at(
    session: Session,
    pair: PromptPair,
    held_out: PromptPair | None,
    recipe: Recipe,
    position: int,
    bases: Sequence[Basis],
    kept: Kept,
) -> dict[Basis, Directions]:
    """Return the directions of each method and k at one position, all from the same passes over the prompts.

    With `held_out` those of the first also say how well they separate it.
    """
    checkpoint, provenance = kept
    return families(
        session,
        pair,
        recipe.fit.model_copy(update={"position": position}),
        bases,
        held_out=held_out,
        checkpoint=at(checkpoint, position),
        provenance={**provenance, "position": position},
    )


def at(checkpoint: Checkpoint | None, position: int) -> Checkpoint | None:
    """Return a checkpoint that keeps what belongs to one position."""
    return (lambda name, state: checkpoint(f"{name}{position}", state)) if checkpoint else None


def choose(
    session: Session, pair: PromptPair, held_out: PromptPair, recipe: Recipe, probe: Probe, kept: Kept
) -> tuple[int, Directions, Choice]:
    """Try the layers of every position that the recipe allows; returns position, directions and choice."""
    positions = [recipe.fit.position] if isinstance(recipe.fit.position, int) else after_request(session)
    tried: dict[Candidate, tuple[int, Directions, Choice]] = {}
    for position in positions:
        directions = at_position(session, pair, held_out, recipe, position, kept)
        named = at(kept[0], position)
        choice = choose_layer(session, directions, recipe.edit, probe, rule=recipe.fit.choice, checkpoint=named)
        tried[choice.best] = (position, directions, choice)
    untouched = next(iter(tried.values()))[2].untouched
    return tried[best(tried, untouched, recipe.fit.choice)]


def after_request(session: Session) -> list[int]:
    """Return the positions of the template's tokens after the request, the last first, at most `POSITIONS`."""
    one, other = session.chat.encode([Prompt("a"), Prompt("How long is a piece of string?")])
    shared = 0
    while shared < min(len(one), len(other)) - 2 and one[-1 - shared] == other[-1 - shared]:
        shared += 1
    return [-1 - k for k in range(max(1, min(shared, POSITIONS)))]


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
