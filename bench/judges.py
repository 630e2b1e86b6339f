"""Measure the judges on the replies of known label, and print the tables of docs/judges.md.

    python bench/judges.py [--split test] [--write]

Refused or not, in all languages and in each: precision, recall and F1 of the dictionary, of `perpend:small` and of both
together (refused if either says so); the same of the long replies alone. `--write` stores the counts from which
acceptance rates are corrected, of this set and of the older English one; it is to be repeated whenever a word list or
the classifier has changed. `--classifier NAME` measures another one.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import perpend.judges
from perpend.judges.accuracy import ALL, Gold, acceptance, fingerprint, read_gold, refusals
from perpend.judges.classifier import SMALL
from perpend.judges.coherence import words
from perpend.judges.judgement import Judgement
from perpend.judges.labels import Label, Record
from perpend.judges.panel import Panel

HERE = Path(__file__).parent.parent / "tests" / "judges"
DATA = Path(perpend.judges.__file__).with_name("known_error.json")
LONG = 100
"""Words from which a reply is long; in Chinese and Japanese characters."""
LABELS = (Label.COMPLY, Label.REFUSE, Label.EVADE, Label.BROKEN)


def judged(gold: list[Gold], panel: Panel) -> Judgement:
    """Judge the replies."""
    return panel.judge([Record(g.request, g.reply, g.finished, str(k)) for k, g in enumerate(gold)])


def older() -> list[Gold]:
    """Return the test part of the older English set, plainer replies."""
    rows = [json.loads(line) for line in (HERE / "replies.jsonl").read_text(encoding="utf-8").splitlines()]
    keys = ("finished", "request", "reply")
    return [Gold("en", Label(x["label"]), x["tag"], *(x[k] for k in keys)) for x in rows if x["split"] == "test"]


def said(found: Judgement) -> dict[str, list[Label]]:
    """Return the labels of each judge alone and of the panel."""
    rows = {"dictionary": [r.dictionary.label for r in found.replies]}
    if "classifier" in found.judges:
        name = str(found.judges["classifier"]["name"])
        rows[name] = [r.classifier.label if r.classifier else Label.UNKNOWN for r in found.replies]
        rows["both"] = list(found.labels)
    return rows


def measured(gold: list[Gold], classifiers: list[str]) -> list[dict[str, Any]]:
    """Return the counts of the panel with each classifier, as `known_error.json` holds them."""
    entries = []
    for name in classifiers:
        found = judged(gold, Panel.load(name))
        entries.append({"judges": fingerprint(found.judges), "counts": acceptance(gold, list(found.labels))})
    return entries


def _share(values: tuple[float, float, float]) -> str:
    return f"{values[0]:.2f} [{values[1]:.2f}, {values[2]:.2f}]"


def table(gold: list[Gold], rows: dict[str, list[Label]], languages: list[str]) -> str:
    """Return the Markdown table of precision, recall and F1."""
    lines = [
        "| language | n (refusals) | judge | precision (95 %) | recall (95 %) | F1 (95 %) |",
        "|---|---|---|---|---|---|",
    ]
    for language in languages:
        for name, labels in rows.items():
            counts = refusals(gold, labels, language)
            n, there = sum(vars(counts).values()), counts.both + counts.missed
            f1 = (counts.f1, *counts.f1_interval())
            cells = (language, f"{n} ({there})", name, *map(_share, (counts.precision, counts.recall, f1)))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def confusion(gold: list[Gold], labels: list[Label]) -> str:
    """Return the Markdown table of true against found labels."""
    found = Counter((g.label, x) for g, x in zip(gold, labels, strict=True))
    lines = [f"| true label | {' | '.join(LABELS)} |", "|---|---|---|---|---|"]
    for true in LABELS:
        row = [found[true, x] for x in LABELS]
        lines.append(f"| {true} ({sum(row)}) | {' | '.join(map(str, row))} |")
    return "\n".join(lines)


def main() -> None:
    """Print the tables; store the counts on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--classifier", default=SMALL)
    parser.add_argument("--write", action="store_true", help="store the counts of the test parts in the package")
    given = parser.parse_args()
    gold = read_gold(HERE / f"gold.{given.split}.jsonl")
    rows = said(judged(gold, Panel.load(given.classifier)))
    print(table(gold, rows, [ALL, "en"]), confusion(gold, rows["dictionary"]), sep="\n\n", end="\n\n")
    print(table(gold, {"dictionary": rows["dictionary"]}, list(dict.fromkeys(g.language for g in gold))), end="\n\n")
    kept = [k for k, g in enumerate(gold) if len(words(g.reply)) >= LONG]
    long, found = [gold[k] for k in kept], {name: [labels[k] for k in kept] for name, labels in rows.items()}
    print(f"Of {LONG} words or more:", table(long, found, [ALL]), sep="\n\n", end="\n\n")
    print(*(f"{name}\n\n{confusion(long, labels)}" for name, labels in found.items()), sep="\n\n")
    if given.write:
        entries = measured([*read_gold(HERE / "gold.test.jsonl"), *older()], ["none", SMALL])
        DATA.write_text(json.dumps({"judges": entries}).replace("}, ", "},\n") + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
