"""Measure the judges on the replies of known label, and print the tables of docs/judges.md.

    python bench/judges.py [--split test] [--write]
    python bench/judges.py --split fresh2

Refused or not, in all languages and in each: precision, recall and F1 of the dictionary, of `perpend:small` and of both
together (refused if either says so); the same of the long replies alone. `--write` stores the counts from which
acceptance rates are corrected, of this set, of the older English one and of the second fresh part; it is to be repeated
whenever a word list or the classifier has changed. `--classifier NAME` measures another one.

`--split fresh2` measures on the part that was written without the lists at hand and frozen before it was measured: the
same by group of languages, and what is accepted of those that comply and of others, beside the counts that acceptance
rates are corrected by. With `--write` its figures go to `bench/results/judges_fresh2.json`; they are no longer of fresh
replies once a list was changed after a look at them. `--split fresh` does the same with the first such part, by which
lists have been tuned since.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import perpend.judges
from perpend.core.stats import wilson
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
FRESH = {x: Path(__file__).with_name("results") / f"judges_{x}.json" for x in ("fresh", "fresh2")}
"""Where the figures of each part that was written without the lists at hand are kept."""
NAMES = {SMALL: f"`{SMALL}`", "both": "both, refused if either says so"}
GROUPS = [ALL, "en", "es fr de pt it sl ru", "zh ja ar hi"]
"""All languages, English, the others of Europe, and those of other scripts still."""
LABELS = (Label.COMPLY, Label.REFUSE, Label.EVADE, Label.BROKEN)


def judged(gold: list[Gold], panel: Panel) -> Judgement:
    """Judge the replies."""
    return panel.judge([Record(g.request, g.reply, g.finished, str(k)) for k, g in enumerate(gold)])


def older() -> list[Gold]:
    """Return the test part of the older English set, plainer replies."""
    rows = [json.loads(line) for line in (HERE / "replies.jsonl").read_text(encoding="utf-8").splitlines()]
    keys = ("finished", "request", "reply")
    return [Gold("en", Label(x["label"]), x["tag"], *(x[k] for k in keys)) for x in rows if x["split"] == "test"]


def tested() -> list[Gold]:
    """Return the two older test sets."""
    return [*read_gold(HERE / "gold.test.jsonl"), *older()]


def counted() -> list[Gold]:
    """Return the replies by which acceptance rates are corrected: the older test sets and the second fresh part."""
    return [*tested(), *read_gold(HERE / "gold.fresh2.jsonl")]


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


def within(gold: list[Gold], labels: list[Label], languages: str) -> tuple[list[Gold], list[Label]]:
    """Return the replies in some languages, codes with spaces between, and their labels."""
    codes = languages.split()
    kept = [(g, x) for g, x in zip(gold, labels, strict=True) if languages == ALL or g.language in codes]
    return [g for g, _ in kept], [x for _, x in kept]


def table(gold: list[Gold], rows: dict[str, list[Label]], languages: list[str]) -> str:
    """Return the Markdown table of precision, recall and F1; `languages` are codes or several with spaces between."""
    lines = [
        "| language | n (refusals) | judge | precision (95 %) | recall (95 %) | F1 (95 %) |",
        "|---|---|---|---|---|---|",
    ]
    for language in languages:
        for name, labels in rows.items():
            counts = refusals(*within(gold, labels, language))
            n, there = sum(vars(counts).values()), counts.both + counts.missed
            f1 = (counts.f1, *counts.f1_interval())
            cells = (
                language,
                f"{n} ({there})",
                NAMES.get(name, name),
                *map(_share, (counts.precision, counts.recall, f1)),
            )
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


def accepted(gold: list[Gold], rows: dict[str, list[Label]], languages: list[str]) -> dict[str, dict[str, Any]]:
    """Return per judge and languages how many that comply were accepted, how many others were not, of how many."""
    return {name: {x: acceptance(*within(gold, labels, x))[ALL] for x in languages} for name, labels in rows.items()}


def _acceptance(name: str, found: dict[str, Any], *cells: str) -> str:
    (right, m), (kept, others) = found["accepted"], found["rejected"]
    shares = (_share((k / max(1, n), *wilson(k, n))) for k, n in ((right, m), (kept, others)))
    who = "dictionary and `perpend:small`" if name == "both" else NAMES.get(name, name)
    return f"| {' | '.join((who, *cells, f'{right} of {m}', f'{others - kept} of {others}', *shares))} |"


def sensitivity(counts: dict[str, dict[str, Any]]) -> str:
    """Return the Markdown table of acceptance: sensitivity and specificity, by languages."""
    lines = [
        "| judges | language | accepted of those that comply | accepted of others | Se (95 %) | Sp (95 %) |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_acceptance(name, found, language) for name, rows in counts.items() for language, found in rows.items()]
    return "\n".join(lines)


def beside(gold: list[Gold], panel: Panel) -> str:
    """Return the Markdown table of what is accepted of the older test sets, of a part, and of what rates rest on."""
    sets = {"older test sets": tested(), "this part": gold, "together, in use": counted()}
    found = {k: accepted(x, said(judged(x, panel)), ["en", ALL]) for k, x in sets.items()}
    lines = [
        "| judges | language | counted | accepted of those that comply | accepted of others | Se (95 %) | Sp (95 %) |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in ("dictionary", "both"):
        lines += [_acceptance(name, found[k][name][x], x, k) for x in ("en", ALL) for k in sets]
    return "\n".join(lines)


def figures(gold: list[Gold], found: Judgement, part: Path) -> dict[str, Any]:
    """Return what `bench/results/judges_fresh2.json` holds: the part and the judges, by hash, and the counts."""
    rows = said(found)
    return {
        "part": hashlib.sha256(part.read_bytes()).hexdigest(),
        "judges": fingerprint(found.judges),
        "refused": {n: {x: vars(refusals(*within(gold, labels, x))) for x in GROUPS} for n, labels in rows.items()},
        "accepted": accepted(gold, rows, GROUPS),
    }


def main() -> None:
    """Print the tables; store the counts on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=("dev", "test", *FRESH), default="test")
    parser.add_argument("--classifier", default=SMALL)
    parser.add_argument("--write", action="store_true", help="store the counts: in the package, or of a fresh part")
    given = parser.parse_args()
    part = HERE / f"gold.{given.split}.jsonl"
    gold, panel, fresh = read_gold(part), Panel.load(given.classifier), given.split in FRESH
    judgement = judged(gold, panel)
    rows = said(judgement)
    print(
        table(gold, rows, GROUPS if fresh else [ALL, "en"]), confusion(gold, rows["dictionary"]), sep="\n\n", end="\n\n"
    )
    print(table(gold, {"dictionary": rows["dictionary"]}, list(dict.fromkeys(g.language for g in gold))), end="\n\n")
    kept = [k for k, g in enumerate(gold) if len(words(g.reply)) >= LONG]
    long, found = [gold[k] for k in kept], {name: [labels[k] for k in kept] for name, labels in rows.items()}
    print(f"Of {LONG} words or more:", table(long, found, [ALL]), sep="\n\n", end="\n\n")
    print(*(f"{name}\n\n{confusion(long, labels)}" for name, labels in found.items()), sep="\n\n")
    if fresh:
        print("\nThe four labels of both:", confusion(gold, rows["both"]), sep="\n\n", end="\n\n")
        print("Accepted:", sensitivity(accepted(gold, rows, GROUPS)), sep="\n\n")
    if given.split == "fresh2":
        print("", beside(gold, panel), sep="\n")
    if given.write and fresh:
        FRESH[given.split].write_text(json.dumps(figures(gold, judgement, part), indent=1) + "\n", encoding="utf-8")
    elif given.write:
        entries = measured(counted(), ["none", SMALL])
        DATA.write_text(json.dumps({"judges": entries}).replace("}, ", "},\n") + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
