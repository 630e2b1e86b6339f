"""What every worker of a search begins with, measured once and kept in the study as text."""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import asdict, dataclass
from pathlib import Path

from perpend.config import Recipe
from perpend.core.directions import Directions
from perpend.data import Splits
from perpend.fitting.accumulate import Checkpoint, fixed_position
from perpend.fitting.behaviour import Behaviour, observe, usable
from perpend.fitting.fit import at_position, fingerprints
from perpend.models.session import Reply, Session

Stores = Callable[[str], MutableMapping[str, Reply]]


@dataclass(frozen=True)
class Base:
    """Directions and replies of the untouched model."""

    directions: Mapping[int, Directions]
    """By k."""
    replies: Mapping[str, Reply]
    """Of the select split and whatever else the score is made of, by prompt id."""
    counts: Mapping[str, int]
    """Prompts of the fit split, and those on which the model does what their class says."""

    def behaviour(self, session: Session, splits: Splits) -> Behaviour:
        """Return what the untouched model does on the select split; nothing that was kept is generated again."""
        return observe(session, splits.select, store=dict(self.replies))

    def to_texts(self) -> dict[str, str]:
        """Return everything as text, by name; the same base gives the same text."""
        found = {f"directions:{rank}": _packed(own) for rank, own in sorted(self.directions.items())}
        replies = {name: asdict(reply) for name, reply in sorted(self.replies.items())}
        return {**found, "replies": json.dumps(replies), "counts": json.dumps(dict(self.counts))}

    @classmethod
    def from_texts(cls, texts: Mapping[str, str]) -> Base:
        """Read what `to_texts` gave."""
        kept = json.loads(texts["replies"])
        replies = {n: Reply(r["text"], tuple(r["tokens"]), r["finished"]) for n, r in kept.items()}
        named = {name.partition(":"): text for name, text in texts.items()}
        found = {int(rank): _unpacked(text) for (kind, _, rank), text in named.items() if kind == "directions"}
        return cls(found, replies, json.loads(texts["counts"]))


def measure_base(
    session: Session, splits: Splits, recipe: Recipe, ranks: tuple[int, ...], stores: Stores, checkpoint: Checkpoint
) -> Base:
    """Fit the directions of each k on the fit split and let the model reply to the select split.

    Args:
        session: The untouched model.
        splits: Prompts; the report split is not looked at.
        recipe: How directions are measured.
        ranks: Each k.
        stores: Gives a store of replies by name, so that an interrupted search goes on where it was.
        checkpoint: Keeps sums, likewise; with it the prompts are read once for all k.

    Raises:
        RunFailed: too few prompts on which the model does what their class says.
        UsageError: a position that needs layers to be tried.
    """
    session.anatomy.require_complete(recipe.edit.allow_partial)
    position = fixed_position(recipe.fit)
    store = stores("fit") if recipe.fit.filter else None
    pair, counts = usable(session, splits.fit, filtered=recipe.fit.filter, store=store)
    replies = stores("select")
    observe(session, splits.select, store=replies)
    kept = (checkpoint, {"model": session.loaded.ref.portable, "fit": fingerprints(pair)})
    found = {}
    for rank in ranks:
        own = recipe.model_copy(update={"fit": recipe.fit.model_copy(update={"rank": rank})})
        held_out = splits.select if rank == ranks[0] else None
        found[rank] = at_position(session, pair, held_out, own, position, kept)
    return Base(found, dict(replies), counts)


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
