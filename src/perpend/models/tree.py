"""Many sequences in one row: what they begin with in common is there once, and nothing is padded.

A row holds a tree of tokens. A token sees those on its way to the root and no other, and its position is its depth, so
that every sequence reads as if it were alone: prompts share the head of their template, and several continuations
share their prompt. A continuation's last token is left out, since nothing is predicted from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Said:
    """A prompt as token ids, and what a model is made to say after it."""

    prompt: tuple[int, ...]
    tail: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Tree:
    """Sequences in one row of T tokens; all tensors on the CPU.

    Attributes:
        tokens: `[T]` int64 token ids; a token comes after the one before it in its sequence.
        depths: `[T]` int64 positions, counted from 0.
        sees: `[T, T]` bool, whether token i sees token j.
        columns: `[P]` int64 the tokens whose logits are needed, in order.
        places: For each sequence, `[n]` int64 places in `columns`: the j-th predicts token j of its tail.
        tails: For each sequence, `[n]` int64 tokens of its tail.
    """

    tokens: Tensor
    depths: Tensor
    sees: Tensor
    columns: Tensor
    places: tuple[Tensor, ...]
    tails: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.tokens)


class _Growing:
    """A tree that sequences are put into."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.children: dict[tuple[int, int], int] = {}
        self.said: list[tuple[list[int], Said]] = []
        self.predicting: set[int] = set()

    def missing(self, said: Said) -> tuple[int, int]:
        """Return how many tokens and how many columns a sequence would add."""
        at, ids = -1, said.prompt + said.tail[:-1]
        for known, token in enumerate(ids):
            if (at, token) not in self.children:
                new = len(ids) - known
                return new, min(new + 1, len(said.tail))
            at = self.children[at, token]
        return 0, len(said.tail)

    def put(self, said: Said) -> None:
        way, at = list[int](), -1
        for token in said.prompt + said.tail[:-1]:
            if (at, token) not in self.children:
                self.children[at, token] = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(at)
            at = self.children[at, token]
            way.append(at)
        self.said.append((way[len(said.prompt) - 1 :], said))
        self.predicting.update(self.said[-1][0])

    def tree(self) -> Tree:
        sees = torch.eye(len(self.tokens), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                sees[node] |= sees[parent]
        columns = sorted(self.predicting)
        place = {column: k for k, column in enumerate(columns)}
        return Tree(
            torch.tensor(self.tokens),
            sees.sum(1) - 1,
            sees,
            torch.tensor(columns),
            tuple(torch.tensor([place[column] for column in way]) for way, _ in self.said),
            tuple(torch.tensor(said.tail) for _, said in self.said),
        )


def plant(groups: Sequence[Sequence[Said]], tokens: int, columns: int) -> Iterator[tuple[range, Tree]]:
    """Put sequences into as few rows as fit.

    Args:
        groups: Sequences that stay together, such as all continuations of a prompt; each with a tail of a token.
        tokens: A row has at most so many, or a single group.
        columns: The same for the tokens whose logits are needed.

    Yields:
        Which of the groups, and their row with the sequences of all of them in order.
    """
    first, growing = 0, _Growing()
    for k, group in enumerate(groups):
        added = [growing.missing(said) for said in group]
        more, wanted = (sum(x) for x in zip(*added, strict=True))
        full = len(growing.tokens) + more > tokens or len(growing.predicting) + wanted > columns
        if growing.said and full:
            yield range(first, k), growing.tree()
            first, growing = k, _Growing()
        for said in group:
            growing.put(said)
    if growing.said:
        yield range(first, len(groups)), growing.tree()
