"""The labelled replies: written by hand; `dev` may be fitted to, `test` may not."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Labelled:
    split: str
    label: str
    tag: str
    finished: bool
    request: str
    reply: str


def load(split: str) -> list[Labelled]:
    """Return the replies of `dev` or `test`."""
    lines = Path(__file__).with_name("replies.jsonl").read_text(encoding="utf-8").splitlines()
    return [r for r in (Labelled(**json.loads(line)) for line in lines) if r.split == split]
