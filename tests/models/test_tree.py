"""Sequences that share their beginnings: in one row each of them reads as if it were alone."""

from __future__ import annotations

import torch

from perpend.models.tree import Said, plant

HEAD = (3, 4, 5)
GROUPS = [
    [Said((*HEAD, 6), (7, 8, 9)), Said((*HEAD, 6), (7, 8, 2)), Said((*HEAD, 6), (1,))],
    [Said((*HEAD, 9, 9), (4, 4))],
    [Said((*HEAD, 2), (5, 6))],
]


def read(tree, k):
    """The tokens on the way to each predicting token of sequence k, as the tree has them."""
    for place, token in zip(tree.places[k], tree.tails[k], strict=True):
        node = tree.columns[place]
        yield [int(t) for t in tree.tokens[tree.sees[node]]], int(tree.depths[node]), int(token)


def test_every_token_sees_its_own_sequence_and_nothing_else():
    ((where, tree),) = plant(GROUPS, 100, 100)
    assert list(where) == [0, 1, 2]
    for k, said in enumerate(said for group in GROUPS for said in group):
        whole = said.prompt + said.tail
        for n, (seen, depth, token) in enumerate(read(tree, k)):
            assert seen == list(whole[: len(said.prompt) + n])
            assert depth == len(seen) - 1
            assert token == said.tail[n]


def test_what_is_shared_is_there_once_and_last_tokens_are_not_there():
    ((_, tree),) = plant(GROUPS, 100, 100)
    assert len(tree) == len(HEAD) + (1 + 2) + (2 + 1) + (1 + 1)
    assert len(tree.columns) == 3 + 2 + 2
    assert bool((torch.triu(tree.sees, 1) == 0).all())


def test_rows_are_as_full_as_they_may_be_and_groups_stay_together():
    rows = list(plant(GROUPS, 9, 100))
    assert [list(where) for where, _ in rows] == [[0, 1], [2]]
    assert [len(tree) for _, tree in rows] == [9, 5]
    assert [list(where) for where, _ in plant(GROUPS, 100, 4)] == [[0], [1, 2]]
    assert [list(where) for where, _ in plant(GROUPS, 1, 1)] == [[0], [1], [2]]
