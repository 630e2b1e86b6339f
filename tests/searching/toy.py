"""A search whose trials cost nothing, as a process of its own: `python toy.py STORAGE NAME LIMIT LOG [hang]`."""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path

from perpend.config import Recipe
from perpend.searching.space import Space
from perpend.searching.study import Ledger, Outcome
from perpend.searching.workers import Plan, work

SPACE = Space.of(Recipe(), 12, post_norms=False)
PLAN = Plan(SPACE, seed=5, size=8, batch=4, untouched=(4.0, 0.0))


def score(candidate) -> Outcome:
    """Refusal falls and drift rises with the weight factors; reading layer 7 is best."""
    if candidate.rank == 2 and candidate.mode == "column":
        return Outcome(failed="a test")
    total = sum(sum(w) for w in candidate.weights(12).values()) / 24
    miss = 0.5 if candidate.layer is None else abs(candidate.layer - 7) / 12
    return Outcome(round(4 - 6 * math.tanh(total) * (1 - miss), 5), round(total * (0.1 + miss), 5), (0.0, 1.0))


def result(ledger: Ledger) -> dict:
    """What a study found, slot by slot, whoever ran it."""
    view = ledger.view(PLAN.size, PLAN.batch)
    return {s: (t.params, t.state, t.origin, t.outcome) for s, t in view.slots.items()}


def evaluator(log: Path | None = None, hang: bool = False):
    def evaluate(candidates, front):
        if log is not None:
            with log.open("a") as file:
                file.write(f"{os.getpid()} {len(candidates)}\n")
            time.sleep(60 if hang else 0.02)
        return [score(c) for c in candidates]

    return evaluate


def main(storage: str, name: str, limit: str, log: str, hang: str = "") -> None:
    ledger = Ledger(storage, name)
    if not ledger.found():
        ledger.create()
    with ledger.alive():
        work(ledger, PLAN, evaluator(Path(log), bool(hang)), limit=int(limit), patience=0, stop=lambda: None)


if __name__ == "__main__":
    main(*sys.argv[1:])
