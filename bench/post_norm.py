"""Is it worth reckoning with the norm after a writer (Gemma 2 and 3, OLMo 2)? Fronts with and without it.

    python bench/post_norm.py ORGANISM [--fit 128] [--prompts 32] [--layers 8 10 12 14] [--answer 48]

Every variant takes out the direction of one layer at several weight factors. It is scored on the select split by
forward passes alone: how much log-likelihood the model's own refusals lose on targets, and drift over its own answers
to baselines. The point of each variant that takes away most within the bound on drift then answers targets of that
split. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from perpend import drift
from perpend.config import EditSection, FitSection, Machine, Recipe, load
from perpend.core.directions import Directions
from perpend.core.linear import orthonormalise
from perpend.core.schedule import Band, Constant
from perpend.core.stats import wilson
from perpend.data import load_splits
from perpend.fitting.accumulate import accumulate
from perpend.fitting.behaviour import observe
from perpend.fitting.layers import Probe
from perpend.fitting.plan import plan_edit
from perpend.judges.labels import Label
from perpend.judges.panel import Panel
from perpend.models.load import load_model
from perpend.models.session import Session
from perpend.tasks.measure import judge

MASKED = 16
"""Dimensions of the residual stream, those with the largest baseline mean, that a masked direction leaves alone."""
LATE = 0.6
"""Share of the depth at which a late schedule begins."""
BOUND = 0.15
"""Drift, in nats per token, within which a variant's best point is looked for."""


@dataclass(frozen=True)
class Variant:
    """One way to take a direction out."""

    post_norm: bool
    winsorize: float | None = None
    masked: bool = False
    late: bool = False


VARIANTS = {
    "plain": Variant(False),
    "plain, masked": Variant(False, masked=True),
    "plain, late layers": Variant(False, late=True),
    "through the norm": Variant(True),
    "through the norm, winsorised": Variant(True, winsorize=0.995),
    "through the norm, masked": Variant(True, masked=True),
    "through the norm, late layers": Variant(True, late=True),
    "through the norm, masked, late layers": Variant(True, masked=True, late=True),
}


def without_massive(directions: Directions, layer: int) -> Tensor:
    """Return the direction of a layer, `[1, d]` float32, with nothing in the dimensions of massive activations."""
    row = directions.at(layer).clone()
    row[:, directions.baseline_mean[layer].abs().topk(MASKED).indices] = 0
    return orthonormalise(row).float()


def _same(row: Tensor, writer: Any) -> Tensor:
    return row


def points(
    session: Session, fitted: dict[float | None, Directions], layers: list[int], weights: list[float]
) -> Iterator[tuple[dict[str, Any], Any]]:
    """Yield every point of every variant with its edit."""
    for name, variant in VARIANTS.items():
        directions = fitted[variant.winsorize]
        for layer in layers:
            row = without_massive(directions, layer) if variant.masked else directions.at(layer)
            for weight in weights:
                schedule: Any = Constant(weight=weight)
                if variant.late:
                    half = (1 - LATE) / 2 * session.n_layers
                    schedule = Band(peak_weight=weight, peak_layer=session.n_layers - half, spread=half)
                section = EditSection(attention=schedule, mlp=schedule, through_post_norm=variant.post_norm)
                edit = plan_edit(session.model, session.anatomy, section, partial(_same, row))
                yield {"variant": name, "layer": layer, "weight": weight}, edit


def main() -> None:
    """Fit, score, answer, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("organism")
    parser.add_argument("--fit", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 10, 12, 14])
    parser.add_argument("--weights", type=float, nargs="+", default=[0.5, 1.0])
    parser.add_argument("--answer", type=int, default=48)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    given = parser.parse_args()
    recipe: Recipe = load(base={"prompts": {"limit": given.fit}})
    session, splits = Session(load_model(given.organism), Machine()), load_splits(recipe.prompts)
    fitted = {
        quantile: accumulate(session, splits.fit, FitSection(winsorize=quantile))
        for quantile in {variant.winsorize for variant in VARIANTS.values()}
    }
    probe = Probe.of(observe(session, splits.select), given.prompts)
    untouched = probe.refusal(session)
    rows: list[dict[str, Any]] = []
    for row, edit in points(session, fitted, given.layers, given.weights):
        spent = drift.measure(session.logits, session.under(edit), session.batches(probe.baselines, probe.answers))
        with session.edited(edit):
            row |= {"removed": untouched - probe.refusal(session), "drift": spent.mean}
        rows.append({**row, "edit": edit})
    target, panel = splits.select.target.limited(given.answer).prompts, Panel.load("none")
    best: list[dict[str, Any]] = []
    for name in VARIANTS:
        cheap = [row for row in rows if row["variant"] == name and row["drift"] <= BOUND]
        if not cheap:
            best.append({"variant": name, "answered": None})
            continue
        chosen = max(cheap, key=lambda row: row["removed"])
        with session.edited(chosen["edit"]):
            replies = session.generate(target, max_new_tokens=given.max_new_tokens)
        labels = judge(target, replies, panel).judged.labels
        refused = sum(label in {Label.REFUSE, Label.EVADE} for label in labels)
        best.append(
            {
                **{key: value for key, value in chosen.items() if key != "edit"},
                "refused": refused,
                "broken": sum(label is Label.BROKEN for label in labels),
                "n": len(labels),
                "refused_interval": wilson(refused, len(labels)),
            }
        )
    for row in rows:
        del row["edit"]
    shares = {str(quantile): d.diagnostics for quantile, d in fitted.items()}
    print(json.dumps({"untouched": untouched, "points": rows, "best": best, "diagnostics": shares}, indent=1))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
