"""Strategies and modes on a model organism, compared at equal drift.

    python bench/equal_drift.py ORGANISM ORIGINAL [--drift 0.05] [--prompts 96] [--layer 16]

Every variant is fitted on the fit split, its weight factors are scaled until its drift on baseline prompts of the
select split is the asked one, and then it answers target prompts of that split. Prints JSON and a Markdown table:
labels by dictionary and `perpend:small`, and drift to the never-refusing original on the original's own answers.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from perpend import drift
from perpend.config import Machine, Recipe, load
from perpend.core.edits import Edit
from perpend.core.stats import wilson
from perpend.data import Prompt, load_splits
from perpend.fitting.behaviour import observe
from perpend.fitting.fit import fit_edit
from perpend.judges.panel import Panel
from perpend.models.load import load_model
from perpend.models.session import Reply, Session
from perpend.tasks.measure import judge

VARIANTS = {
    "accumulate, plain": [],
    "accumulate, column": ["edit.mode=column"],
    "accumulate, row": ["edit.mode=row"],
    "accumulate, each layer its own direction": ["fit.layer=each"],
    "iterative, 12 modules": ["fit.strategy=iterative", "fit.modules_per_batch=12"],
    "iterative, 12 modules, own layer": ["fit.strategy=iterative", "fit.modules_per_batch=12", "fit.layer=each"],
}
TOKENS = 24
"""Tokens over which drift is measured."""


def mean_drift(
    session: Session, edit: Edit | None, asked: list[tuple[Prompt, Reply]], other: Session | None = None
) -> float:
    """Return the mean KL per token from `other` (or the untouched model) over given answers."""
    batches = session.batches([p for p, _ in asked], [r.tokens for _, r in asked], max_tokens=TOKENS)
    return drift.measure((other or session).under(None), session.under(edit), batches).mean


def at_drift(session: Session, edit: Edit, wanted: float, asked: list[tuple[Prompt, Reply]]) -> tuple[float, float]:
    """Return the factor of all weight factors at which the drift is as wanted, and the drift there."""
    low, high = 0.0, 1.0
    while high < 8 and mean_drift(session, edit.scaled(high), asked) < wanted:
        low, high = high, 2 * high
    for _ in range(6):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_drift(session, edit.scaled(middle), asked) < wanted else (low, middle)
    return high, mean_drift(session, edit.scaled(high), asked)


def main() -> None:
    """Fit, scale, answer, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("organism")
    parser.add_argument("original")
    parser.add_argument("--drift", type=float, default=0.05)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--fit", type=int, default=192, help="prompts of each class to fit on")
    parser.add_argument("--layer", default="16")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--set", dest="assignments", action="append", default=[])
    given = parser.parse_args()

    organism = Session(load_model(given.organism), Machine())
    original, panel = Session(load_model(given.original), Machine()), Panel.load("perpend:small")
    base: dict[str, Any] = {"prompts": {"limit": given.fit}, "fit": {"layer": given.layer}}
    splits = load_splits(load(base=base).prompts)
    answered = observe(organism, splits.select).answered[: given.prompts // 2]
    target = splits.select.target.limited(given.prompts).prompts
    true = list(zip(target, original.generate(target, max_new_tokens=TOKENS), strict=True))
    replies: dict[str, dict[str, Reply]] = {}
    rows = []
    for name, assignments in {"untouched": None, **VARIANTS}.items():
        factor, edit, cost, took = 0.0, None, 0.0, 0.0
        if assignments is not None:
            recipe: Recipe = load(None, [*given.assignments, *assignments], base)
            began = time.perf_counter()
            fitted = fit_edit(organism, splits, recipe, replies=lambda key: replies.setdefault(key, {}))
            took = time.perf_counter() - began
            factor, cost = at_drift(organism, fitted.edit, given.drift, answered)
            edit = fitted.edit.scaled(factor)
        with organism.edited(edit):
            side = judge(target, organism.generate(target, max_new_tokens=given.max_new_tokens), panel)
        low, high = wilson(side.judged.accepted, side.judged.n)
        row = {
            "variant": name,
            "factor": round(factor, 3),
            "drift": round(cost, 4),
            "n": side.judged.n,
            "accepted": side.judged.accepted,
            "interval": [round(low, 3), round(high, 3)],
            "refused": side.judged.refused,
            "evaded": side.judged.evaded,
            "broken": side.judged.broken,
            "to_original": round(mean_drift(organism, edit, true, original), 3),
            "fit_seconds": round(took, 1),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    print("\n| variant | λ scaled by | drift | accepted (95 %) | refused | evaded | broken | KL to original |")
    print("|---|---|---|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['variant']} | {r['factor']} | {r['drift']} | {r['accepted']}/{r['n']} [{r['interval'][0]}, "
            f"{r['interval'][1]}] | {r['refused']} | {r['evaded']} | {r['broken']} | {r['to_original']} |"
        )


if __name__ == "__main__":
    main()
