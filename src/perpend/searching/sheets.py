"""Prompts with what is said after each of them, and how a model under many edits reads them all.

The quick way puts the sequences into trees and the edits into the rows of one batch (`perpend.models.rows`). Whether a
model reads a tree as it reads plain text is not looked up but tried, once, on a few sequences and edits that change
much; where it does not, or where an edit cannot be one row of many, edits are read one after the other under
`session.edited`.

Where memory does not hold what is read together, fewer rows go together, then each alone, in batches that are halved;
trees that it does not hold are made smaller.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

from perpend.core.edits import Edit, ModuleEdit
from perpend.core.linear import orthonormalise
from perpend.data import Prompt
from perpend.errors import RunFailed
from perpend.models.batching import out_of_memory
from perpend.models.memory import reclaim
from perpend.models.recall import Recalled
from perpend.models.rows import Planted, Rows, joints, per_row
from perpend.models.session import Batch, Session
from perpend.models.tree import Said, plant
from perpend.progress import note
from perpend.searching.objectives import Tokens, likelihoods

T = TypeVar("T")

Reduce = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], Tensor]
"""From logits `[R, P, V]` of R edits, or `[R + 1, P, V]` with the untouched model last where it looks at that, and from
the columns and tokens of n sequences, to `[R, n]`."""

Logits = Callable[[Batch], Tensor]
"""From a batch to the logits of its continuations, as `Session.under` gives it."""

LONGEST = 512
"""Most tokens of a tree: beyond, attention to what is not seen costs more than a shared beginning saves."""
LONGEST_GPU = 2048
"""Likewise on a GPU, which is hardly busy with fewer."""
SMALLEST = 64
"""Tokens of a tree, at least, unless a prompt needs more."""
LEAST = 256
"""Padded tokens of a forward pass below which a batch is not halved again."""
EXACT, ROUNDED = 1e-3, 0.1
"""Nats per token by which both ways may differ, in float32 and in a half type, whose logits differ with any batch."""


@dataclass(frozen=True)
class Room:
    """How much one forward pass holds.

    Attributes:
        rows: Edits that go together.
        at: Layers at which rows may join.
    """

    rows: int
    at: tuple[int, ...]

    def tokens(self, session: Session) -> int:
        """Return the tokens of a tree."""
        longest = LONGEST if session.device.type == "cpu" else LONGEST_GPU
        return min(longest, max(SMALLEST, session.budget.forward // self.rows))

    def columns(self, session: Session) -> int:
        """Return the tokens of a tree whose logits are read."""
        return max(1, session.budget.logits // (self.rows + 1))


class Sheet:
    """Sequences in the order of their prompts, in trees that are run under edits again and again.

    Attributes:
        sizes: Sequences of each prompt.
        trees: Which of the sequences, and their tree; empty before `plant`.
    """

    def __init__(self, session: Session, prompts: Sequence[Prompt], tails: Sequence[Sequence[Tokens]]) -> None:
        """Encode the prompts.

        Args:
            session: The untouched model.
            prompts: As many as `tails`.
            tails: What the model is made to say after each prompt, in several ways.
        """
        self.session, self.sizes = session, [len(each) for each in tails]
        self._ends = list(accumulate(self.sizes, initial=0))
        self._prompts = [prompt for prompt, each in zip(prompts, tails, strict=True) for _ in each]
        self._tails = [tail for each in tails for tail in each]
        self._groups = [
            [Said(tuple(ids), tail) for tail in each]
            for ids, each in zip(session.chat.encode(prompts), tails, strict=True)
        ]
        self.trees: list[tuple[range, Planted]] = []
        self._untouched: Recalled | None = None

    def __len__(self) -> int:
        return len(self._tails)

    def plant(self, room: Room) -> bool:
        """Put the sequences into trees, and run the untouched model over them.

        Returns:
            Whether memory holds them, if need be in smaller ones than `room` says; if not, there are none.
        """
        tokens, columns = room.tokens(self.session), room.columns(self.session)
        while not self._planted(tokens, columns, room.at):
            reclaim()
            if tokens <= SMALLEST:
                note("out of memory: edits go one after the other")
                return False
            tokens, columns = max(SMALLEST, tokens // 2), max(1, columns // 2)
            note(f"out of memory: going on with trees of {tokens} tokens")
        return True

    def _planted(self, tokens: int, columns: int, at: Sequence[int]) -> bool:
        ends = self._ends
        try:
            for where, tree in plant(self._groups, tokens, columns):
                planted = Planted.of(self.session, tree)
                planted.read(self.session, at)
                self.trees.append((range(ends[where.start], ends[where.stop]), planted))
        except Exception as error:
            self.trees.clear()
            if not out_of_memory(error):
                raise
            return False
        return True

    def halves(self, of: range) -> list[tuple[range, Planted]]:
        """Return the trees of both halves of some prompts, for rows that join at the first layer.

        Args:
            of: The sequences of a tree, counted over all. Those of a single prompt stay together: there are no halves.
        """
        ends = self._ends
        own = [k for k, first in enumerate(ends[:-1]) if of.start <= first < of.stop]
        middle, found = len(own) // 2, list[tuple[range, Planted]]()
        for half in (own[:middle], own[middle:]) if middle else ():
            ((_, tree),) = plant([self._groups[k] for k in half], sys.maxsize, sys.maxsize)
            planted = Planted.of(self.session, tree)
            planted.read(self.session, (0,))
            found.append((range(ends[half[0]], ends[half[-1] + 1]), planted))
        return found

    def one_by_one(self, edit: Edit | None, reduce: Reduce, base: bool = False) -> Tensor:
        """Return what `reduce` makes of every sequence under one edit, `[n]`, in plain batches.

        Args:
            edit: What is put in place.
            reduce: Gets the sequences of a batch as columns one after the other.
            base: Whether `reduce` looks at the untouched model.

        Raises:
            RunFailed: a batch that is not halved again does not fit into memory.
        """
        return self.part(self.session.under(edit), reduce, range(len(self.sizes)), base)

    def part(self, own: Logits, reduce: Reduce, prompts: range, base: bool = False) -> Tensor:
        """Return what `reduce` makes of the sequences of some prompts, `[n]`, in plain batches.

        Batches that memory does not hold are halved, and stay so for whatever the session reads afterwards. The logits
        of the untouched model are kept from one call to the next, where there is room.

        Args:
            own: What `Session.under` gives for an edit.
            reduce: Gets the sequences of a batch as columns one after the other.
            prompts: Which prompts, by their place.
            base: Whether `reduce` looks at the untouched model.

        Raises:
            RunFailed: a batch that is not halved again does not fit into memory.
        """
        some = range(self._ends[prompts.start], self._ends[prompts.stop])
        while True:
            try:
                return self._alone(own, reduce, some, base)
            except Exception as error:
                if not out_of_memory(error):
                    raise
            self._untouched = None
            _halve(self.session)

    def _alone(self, own: Logits, reduce: Reduce, some: range, base: bool) -> Tensor:
        found, models = torch.zeros(len(some)), [own]
        if base:
            self._untouched = self._untouched or Recalled(self.session)
            models.append(self._untouched)
        sequences = self._prompts[some.start : some.stop], self._tails[some.start : some.stop]
        with torch.no_grad():
            for part in self.session.batches(*sequences):
                batch = replace(part, index=[some[k] for k in part.index])  # as the logits are kept
                rows = [model(batch) for model in models]
                width = batch.tokens.shape[1]
                places = [
                    torch.arange(n) + row * width for row, n in enumerate(len(self._tails[k]) for k in batch.index)
                ]
                tails = [torch.tensor(self._tails[k]) for k in batch.index]
                logits = torch.stack([r.flatten(0, 1) for r in rows])
                found[part.index] = reduce(logits, places, tails)[0].cpu()
        return found

    def some(self) -> Sheet:
        """Return the sheet of two prompts, one of which has the longest sequences."""
        order = sorted(range(len(self._groups)), key=lambda k: -max(len(s.prompt + s.tail) for s in self._groups[k]))
        chosen, ends = [order[0], order[-1]] if len(order) > 1 else order, self._ends
        prompts = [self._prompts[ends[k]] for k in chosen]
        return Sheet(self.session, prompts, [self._tails[ends[k] : ends[k + 1]][:2] for k in chosen])


def _halve(session: Session) -> None:
    """Halve the batches of a session.

    Raises:
        RunFailed: they are as small as they get.
    """
    budget = session.budget
    if budget.rows == 1 or (budget.rows is None and budget.forward <= LEAST):
        raise RunFailed("out of memory with the smallest batch", hint="shorter prompts or a smaller dtype")
    rows = None if budget.rows is None else budget.rows // 2
    smaller = replace(budget, forward=budget.forward // 2, logits=max(1, budget.logits // 2), rows=rows)
    session.budget = smaller
    note(f"out of memory: going on with batches of {rows or smaller.forward} {'rows' if rows else 'tokens'}")
    reclaim()


def together(planted: Planted, rows: Rows, reduce: Reduce, base: bool) -> Tensor:
    """Return what `reduce` makes of the sequences of a tree under all edits: `[R, n]`. Differentiable."""
    return reduce(rows.logits(planted, base), planted.tree.places, planted.tree.tails)


def read(sheet: Sheet, edits: Sequence[Edit], reduce: Reduce, room: Room | None, *, base: bool = False) -> Tensor:
    """Return what `reduce` makes of every sequence under every edit, `[R, n]`, the quick way where there is one.

    Args:
        sheet: The sequences; put into trees when that has not been done.
        edits: Any number.
        reduce: Of each sequence a number.
        room: How edits go together; None when they do not.
        base: Whether `reduce` looks at the untouched model.
    """
    alone = room is None or not all(per_row(sheet.session.anatomy, edit) for edit in edits)
    if room is None or alone or not (sheet.trees or sheet.plant(room)):
        return torch.stack([sheet.one_by_one(edit, reduce, base) for edit in edits])
    found = as_many_as_fit(
        edits,
        room.rows,
        lambda some: list(_in_rows(sheet, some, reduce, room, base)),
        lambda edit: sheet.one_by_one(edit, reduce, base),
    )
    return torch.stack(found)


def as_many_as_fit(
    edits: Sequence[Edit], rows: int, several: Callable[[Sequence[Edit]], Sequence[T]], alone: Callable[[Edit], T]
) -> list[T]:
    """Return something of every edit, in order: of as many together as memory holds.

    Args:
        edits: Any number.
        rows: How many go together, until memory does not hold them: then half, and so on.
        several: Of edits that go together.
        alone: Of one with which `several` runs out of memory.
    """
    found = list[T]()
    while len(found) < len(edits):
        some = edits[len(found) : len(found) + rows]
        try:
            found += several(some)
            continue
        except Exception as error:
            if not out_of_memory(error):
                raise
        reclaim()  # not before: the error holds what was being computed
        if len(some) > 1:
            rows = len(some) // 2
            note(f"out of memory with {len(some)} edits: going on with {rows}")
        else:
            found.append(alone(some[0]))
    return found


def _in_rows(sheet: Sheet, edits: Sequence[Edit], reduce: Reduce, room: Room, base: bool) -> Tensor:
    """Return what `reduce` makes of every sequence in trees under edits that go together, `[R, n]`."""
    rows = Rows.of(sheet.session, edits, room.at)
    with torch.no_grad():
        parts = [together(planted, rows, reduce, base) for _, planted in sheet.trees]
    return torch.cat(parts, dim=1).cpu()


def find_room(sheet: Sheet, rows: int) -> Room | None:
    """Return how edits can go together through this model, or None: then they go one after the other.

    Args:
        sheet: What will be read; two of its prompts are tried.
        rows: Edits that are to go together.
    """
    session = sheet.session
    if session.shelf is not None or session.world.size > 1 or any(p.image is not None for p in sheet._prompts):
        return None
    few = sheet.some()
    edits = [edit for edit in _strong(session) if per_row(session.anatomy, edit)]
    alone = [few.one_by_one(edit, likelihoods) for edit in edits]
    allowed = EXACT if session.loaded.dtype in {torch.float32, torch.float64} else ROUNDED
    for at in dict.fromkeys((joints(session.n_layers), (0,))):
        room = Room(rows, at)
        if edits and _agrees(few, room, edits, torch.stack(alone), allowed):
            return room
    return None


def _agrees(few: Sheet, room: Room, edits: Sequence[Edit], alone: Tensor, allowed: float) -> bool:
    few.trees.clear()
    try:
        if not few.plant(room):
            return False
        found = _in_rows(few, edits, likelihoods, room, False)
    except Exception:  # a tree, or rows that join later, are more than this model's own code takes
        return False
    lengths = torch.tensor([len(tail) for tail in few._tails])
    apart = ((found - alone) / lengths).abs().mean()
    return bool(apart <= allowed)


def _strong(session: Session) -> list[Edit]:
    """Return edits that begin at several depths and change much, so that no mistake is too small to see."""
    generator = torch.Generator().manual_seed(0)
    size, n = session.hidden_size, session.n_layers
    v = orthonormalise(torch.randn(min(8, size // 2), size, generator=generator)).float()
    found = []
    for first in sorted({0, n // 2, n - 1}):
        own = [w for w in session.anatomy.writers if w.layer >= first]
        found.append(Edit({w.name: ModuleEdit(v, 1.0) for w in own}))
    return found
