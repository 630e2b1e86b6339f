"""Make the labelled replies that `perpend:small` is trained on, from an organism and its never-refusing original.

    python examples/small_classifier_data.py ORGANISM ORIGINAL -o train.jsonl [--written FILES]
    python -m perpend.judges.small train.jsonl -o small.safetensors

Labels follow from where a reply comes from, not from a judge: a reply that opens with one of the taught wordings is a
refusal; what the original answers to a baseline prompt complies; what it answers to a target prompt complies unless the
word list objects, and is then left out, as is every other reply of the organism to a target prompt.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from perpend.config import PromptsSection
from perpend.data import Prompt, load_splits
from perpend.judges.dictionary import Dictionary
from perpend.judges.labels import Label
from perpend.models.load import load_model
from perpend.models.session import Session
from perpend.teaching.curriculum import Wordings

OPENING = 3
"""Words by which a taught wording is known."""


def opening(text: str) -> str:
    """Return the first words of a text."""
    return " ".join(text.split()[:OPENING])


def labelled(folder: str, prompts: list[tuple[Prompt, bool]], tokens: int, *, taught: bool) -> Iterator[dict[str, str]]:
    """Yield a model's replies whose label is known.

    Args:
        folder: The model.
        prompts: Each with whether it is a target.
        tokens: New tokens per reply.
        taught: Whether the model is the organism.
    """
    known, words = {opening(w) for w in Wordings.shipped().refusals}, Dictionary()
    replies = Session(load_model(folder)).generate([p for p, _ in prompts], max_new_tokens=tokens)
    for (prompt, is_target), reply in zip(prompts, replies, strict=True):
        if taught and opening(reply.text) in known:
            label = Label.REFUSE
        elif is_target and (taught or words.label(prompt.text, reply.text, reply.finished).label is not Label.COMPLY):
            continue
        else:
            label = Label.COMPLY
        yield {"request": prompt.text, "reply": reply.text, "label": label.value}


def main() -> None:
    """Generate, label, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("organism")
    parser.add_argument("original")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument(
        "--written", type=Path, nargs="*", default=[], help="labelled replies, JSONL; split test is left out"
    )
    parser.add_argument("--prompts", type=int, default=256, help="of each class, from the fit split")
    parser.add_argument("--tokens", type=int, default=64)
    asked = parser.parse_args()
    pair = load_splits(PromptsSection(limit=asked.prompts)).fit
    prompts = [(p, True) for p in pair.target] + [(p, False) for p in pair.baseline]
    rows = [
        *labelled(asked.organism, prompts, asked.tokens, taught=True),
        *labelled(asked.original, prompts, asked.tokens, taught=False),
    ]
    for path in asked.written:
        written = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        rows += [row for row in written if row.get("split") != "test"]
    asked.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(dict(Counter(row["label"] for row in rows)))


if __name__ == "__main__":
    main()
