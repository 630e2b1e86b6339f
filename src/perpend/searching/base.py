"""What every worker of a search begins with, measured once and kept in the study as text."""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from perpend.config import Recipe
from perpend.core.directions import Directions
from perpend.core.kinds import Basis, Method
from perpend.data import Splits
from perpend.fitting.accumulate import Checkpoint, fixed_position, require_measured
from perpend.fitting.behaviour import Behaviour, observe, usable
from perpend.fitting.fit import all_at, fingerprints
from perpend.models.session import Reply, Session

Stores = Callable[[str], MutableMapping[str, Reply]]


@dataclass(frozen=True)
class Base:
    """Directions and replies of the untouched model."""

    directions: Mapping[Basis, Directions]
    """By method and k."""
    replies: Mapping[str, Reply]
    """Of the select split and whatever else the score is made of, by prompt id."""
    counts: Mapping[str, int]
    """Prompts of the fit split, and those on which the model does what their class says."""

    def behaviour(self, session: Session, splits: Splits) -> Behaviour:
        """Return what the untouched model does on the select split; nothing that was kept is generated again."""
        return observe(session, splits.select, store=dict(self.replies))

    def to_texts(self) -> dict[str, str]:
        """Return everything as text, by name; the same base gives the same text."""
        found = {f"directions:{method}:{rank}": _packed(own) for (method, rank), own in self.directions.items()}
        replies = {name: asdict(reply) for name, reply in sorted(self.replies.items())}
        return {**found, "replies": json.dumps(replies), "counts": json.dumps(dict(self.counts))}

    @classmethod
    def from_texts(cls, texts: Mapping[str, str]) -> Base:
        """Read what `to_texts` gave."""
        kept = json.loads(texts["replies"])
        replies = {n: Reply(r["text"], tuple(r["tokens"]), r["finished"]) for n, r in kept.items()}
        packed = [(name.split(":")[1:], text) for name, text in texts.items() if name.startswith("directions:")]
        found = {(cast(Method, method), int(rank)): _unpacked(text) for (method, rank), text in packed}
        found = dict(sorted(found.items(), key=lambda item: item[0][1]))
        return cls(found, replies, json.loads(texts["counts"]))


def measure_base(
    session: Session, splits: Splits, recipe: Recipe, bases: tuple[Basis, ...], stores: Stores, checkpoint: Checkpoint
) -> Base:
    """Fit the directions of each method and k on the fit split and let the model reply to the select split.

    Args:
        session: The untouched model.
        splits: Prompts; the report split is not looked at.
        recipe: How directions are measured.
        bases: Each method and k.
        stores: Gives a store of replies by name, so that an interrupted search goes on where it was.
        checkpoint: Keeps sums, likewise.

    Raises:
        RunFailed: too few prompts on which the model does what their class says.
        UsageError: a position that needs layers to be tried, or a direction that a search has refined.
    """
    require_measured(recipe.fit)
    session.anatomy.require_complete(recipe.edit.allow_partial)
    position = fixed_position(recipe.fit)
    store = stores("fit") if recipe.fit.filter else None
    pair, counts = usable(session, splits.fit, filtered=recipe.fit.filter, store=store)
    replies = stores("select")
    observe(session, splits.select, store=replies)
    kept = (checkpoint, {"model": session.loaded.ref.portable, "fit": fingerprints(pair)})
    return Base(all_at(session, pair, splits.select, recipe, position, bases, kept), dict(replies), counts)


def _packed(directions: Directions) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "directions.safetensors"
        directions.save(path)
        return base64.b64encode(path.read_bytes()).decode()


def _unpacked(text: str) -> Directions:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "directions.safetensors"
        path.write_bytes(base64.b64decode(text))
        return Directions.load(path)
