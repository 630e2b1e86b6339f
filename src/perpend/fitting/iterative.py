"""Directions measured again after every batch of edited modules, with the edits so far in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from perpend.config import EditSection, FitSection
from perpend.core.directions import Directions
from perpend.core.edits import Edit, ModuleEdit
from perpend.data import PromptPair
from perpend.fitting.accumulate import Checkpoint, class_stats, directions_of
from perpend.fitting.plan import from_layer, plan_edit, weight_factors
from perpend.models.anatomy import Writer
from perpend.models.session import Session

SMALL = 0.05
"""The mean difference, relative to the first pass, below which nothing is left to remove."""


@dataclass(frozen=True)
class Step:
    """One batch of modules."""

    modules: tuple[str, ...]
    """The writers that were edited."""
    difference: float
    """Norm of the mean difference at the measured layer before this batch, relative to the first pass."""


@dataclass(frozen=True)
class Iterated:
    """An edit made in batches."""

    edit: Edit
    first: Directions
    """Directions of the untouched model."""
    steps: tuple[Step, ...]


def groups(writers: Sequence[Writer], per_batch: int) -> list[list[Writer]]:
    """Cut the writers, in the order in which the residual stream meets them, into batches of `per_batch`."""
    return [list(writers[i : i + per_batch]) for i in range(0, len(writers), per_batch)]


def iterate(
    session: Session,
    pair: PromptPair,
    fit: FitSection,
    section: EditSection,
    first: Directions,
    layer: float | None,
    *,
    checkpoint: Checkpoint | None = None,
) -> Iterated:
    """Edit the writers in batches, measuring the directions again before each with the edits so far in place.

    Every module loses what is left of the direction once the earlier modules have lost theirs. It ends early when the
    mean difference at the measured layer falls below 5 % of the first pass.

    Args:
        session: The untouched model.
        pair: Prompts to fit on.
        fit: How directions are measured, and how many modules make a batch.
        section: Schedules and mode.
        first: Directions of the untouched model.
        layer: Layer that every module takes its direction from; None for its own.
        checkpoint: Keeps the sums of every step, so that an interrupted fit goes on in the step where it was.
    """
    factors = weight_factors(session.anatomy, section)
    active = [w for w in session.anatomy.writers if factors[w.component][w.layer] != 0]
    modules: dict[str, ModuleEdit] = {}
    steps: list[Step] = []

    def of_this_step(name: str, state: dict[str, Any] | None) -> dict[str, Any] | None:
        return checkpoint(f"{name}.step{len(steps)}", state) if checkpoint else None

    for batch in groups(active, fit.modules_per_batch):
        place = batch[-1].layer if layer is None else round(layer)
        now, size = first, 1.0
        if modules:
            with session.edited(Edit(modules)):
                target, baseline = stats = class_stats(session, pair, fit, checkpoint=of_this_step)
                size = float((target.mean[place] - baseline.mean[place]).norm() / first.raw_norm[place])
                if size < SMALL:  # before a fit that would find no direction
                    break
                now = directions_of(session, pair, fit, stats)
        names = {w.name for w in batch}
        planned = plan_edit(session.model, session.anatomy, section, from_layer(now, layer))
        modules |= {name: part for name, part in planned.modules.items() if name in names}
        steps.append(Step(tuple(sorted(names)), size))
    return Iterated(Edit(modules), first, tuple(steps))
