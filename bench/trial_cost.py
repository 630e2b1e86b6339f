"""What a trial of a search costs, against bare forward passes of the same tokens.

    python bench/trial_cost.py ORGANISM [--prompts 16] [--rows 1 2 4 8] [--repeats 3] [--json FILE]

Bare is the untouched model on the same tokens in batches of the same shape, logits of the same tokens included, without
hooks and without scores; `bare_apart` the same in plain padded batches, prompts repeated for each reply. `alone` is an
edit in such batches, as a search without trees and rows would have it. `together` is a batch of candidates over trees
of tokens: first with every layer run for every row, then with the layers below the first edited one taken from the
untouched model. Seconds are the least of the repeats, per candidate, on one thread: processor time, which is the wall
time of a quiet machine and does not count what other programs do on a busy one. Prints JSON and a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from perpend.config import Machine, Recipe, load
from perpend.core.schedule import PerLayer
from perpend.data import load_splits
from perpend.fitting.behaviour import Behaviour, observe
from perpend.fitting.fit import at_position
from perpend.models.load import load_model
from perpend.models.session import Session
from perpend.searching.candidate import Candidate
from perpend.searching.forward import Scorer
from perpend.searching.sheets import Room


def least(repeats: int, work: Callable[[], object]) -> float:
    """Return the least processor time of some runs, in seconds, after one that warms up."""
    work()
    times = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return min(times)


def bare(scorer: Scorer, rows: int) -> None:
    """Run the untouched model over all trees, in batches of `rows` equal rows."""
    for sheet in scorer.sheets.values():
        for _, planted in sheet.trees:
            wide = {k: v.expand(rows, *v.shape[1:]) for k, v in planted.inputs.items()}
            with torch.no_grad():
                replace(planted, inputs=wide).logits(scorer.session)


def apart(scorer: Scorer) -> None:
    """Run the untouched model over all sequences in plain padded batches, every reply with a prompt of its own."""
    logits = scorer.session.under(None)
    for sheet in scorer.sheets.values():
        with torch.no_grad():
            for batch in scorer.session.batches(sheet._prompts, sheet._tails):
                logits(batch)


def candidates(n: int, n_layers: int, first: int = 0) -> list[Candidate]:
    """Return n candidates with every layer from `first` on edited, each along another layer's direction."""
    found = []
    for k in range(n):
        values = tuple(0.3 if layer >= first else 0.0 for layer in range(n_layers))
        place = float(n_layers // 2 + k % max(1, n_layers // 3))
        found.append(Candidate(place, 1, "plain", False, PerLayer(values=values), PerLayer(values=values)))
    return found


def made(
    session: Session, directions: Any, recipe: Recipe, behaviour: Behaviour, prompts: int, rows: int, asked: str | None
) -> Scorer:
    """Return a scorer on so many prompts of each class, with trees for so many rows."""
    search = recipe.search.model_copy(update={"prompts": prompts, "batch": rows})
    return Scorer(session, directions, recipe.model_copy(update={"search": search}), behaviour, asked)


def shared(scorer: Scorer) -> dict[str, int]:
    """Return how many tokens the trees hold, and how many the same sequences have in rows of their own."""
    trees = sum(len(planted.tree) for sheet in scorer.sheets.values() for _, planted in sheet.trees)
    apart = sum(len(s.prompt) + len(s.tail) - 1 for sheet in scorer.sheets.values() for g in sheet._groups for s in g)
    return {"tokens_in_trees": trees, "tokens_apart": apart}


def whole(scorer: Scorer, some: list[Candidate]) -> None:
    """Score candidates with all layers run for every row."""
    room = scorer.room
    assert room is not None
    scorer.room = Room(room.rows, (0,))
    try:
        scorer.score(some)
    finally:
        scorer.room = room


def row(scorer: Scorer, n: int, first: int, repeats: int) -> dict[str, Any]:
    """Measure one setting."""
    some = candidates(n, scorer.session.n_layers, first)
    base = least(repeats, lambda: bare(scorer, n)) / n
    every = least(repeats, lambda: whole(scorer, some)) / n
    reused = least(repeats, lambda: scorer.score(some)) / n
    return {
        "candidates": n,
        "prompts": scorer.prompts,
        "first_layer": first,
        **shared(scorer),
        "bare": round(base, 4),
        "together": round(every, 4),
        "reused": round(reused, 4),
        "ratio": round(every / base, 3),
        "ratio_reused": round(reused / base, 3),
    }


def main() -> None:
    """Measure how the cost of a trial grows, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("organism")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()

    torch.set_num_threads(1)
    session = Session(load_model(given.organism), Machine())
    recipe = load(base={"prompts": {"limit": given.prompts}})
    splits = load_splits(recipe.prompts)
    directions = {("mean", 1): at_position(session, splits.fit, splits.select, recipe, -1, (None, {}))}
    behaviour = observe(session, splits.select)
    n, rows, asked = session.n_layers, [], None
    for count in given.rows:
        scorer = made(session, directions, recipe, behaviour, given.prompts, count, asked)
        asked = scorer.found.to_text()
        rows.append(row(scorer, count, 0, given.repeats))
        print(json.dumps(rows[-1]), flush=True)
    for first in (n // 4, n // 2, 3 * n // 4):
        rows.append(row(scorer, count, first, given.repeats))
        print(json.dumps(rows[-1]), flush=True)
    (one,) = candidates(1, n)
    edit = one.edit(session, directions, recipe)
    plain = {
        "bare_apart": round(least(given.repeats, lambda: apart(scorer)), 4),
        "alone": round(least(given.repeats, lambda: scorer._alone(edit)), 4),
    }
    print(json.dumps(plain), flush=True)
    for prompts in (given.prompts // 4, given.prompts // 2):
        rows.append(row(made(session, directions, recipe, behaviour, prompts, count, None), count, 0, given.repeats))
        print(json.dumps(rows[-1]), flush=True)
    found = {
        "model": Path(given.organism).name,
        "layers": n,
        "processor": platform.processor() or platform.machine(),
        **plain,
        "untouched_refusal": scorer.untouched.refusal,
        "rows": rows,
    }
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"\nplain padded batches: bare {plain['bare_apart']:.2f} s, an edit alone {plain['alone']:.2f} s\n")
    print(
        "| candidates | prompts | first edited layer | tokens | bare, s | together | with reuse | ratio | with reuse |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['candidates']} | {sum(r['prompts'].values())} | {r['first_layer']} | {r['tokens_in_trees']} of "
            f"{r['tokens_apart']} | {r['bare']:.2f} | {r['together']:.2f} | {r['reused']:.2f} | {r['ratio']:.2f} | "
            f"{r['ratio_reused']:.2f} |"
        )


if __name__ == "__main__":
    main()
