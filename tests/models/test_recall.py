"""Logits that are kept are those that would be computed, and are not computed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from session_cases import PROMPTS

from perpend.models.load import load_model
from perpend.models.recall import Recalled
from perpend.models.session import Batch, Session

TAILS = [[7, 8, 9], [10], [11, 12], [13, 14, 15, 16], [17]]


@pytest.fixture
def one(pico_dir: Callable[[str], Path]) -> Session:
    return Session(load_model(pico_dir("llama")))


@pytest.fixture
def passes(one: Session) -> Iterator[list[int]]:
    seen: list[int] = []
    handle = one.model.register_forward_pre_hook(lambda *_: seen.append(1))
    yield seen
    handle.remove()


def batches(one: Session) -> list[Batch]:
    return list(one.batches(PROMPTS, TAILS))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_is_what_the_model_gives(one: Session, passes: list[int], dtype: torch.dtype) -> None:
    one.model.to(dtype)
    one = Session(one.loaded.__class__(**{**one.loaded.__dict__, "dtype": dtype}))
    recalled = Recalled(one)
    expected = [one.logits(batch) for batch in batches(one)]
    del passes[:]
    for _ in range(3):
        for batch, logits in zip(batches(one), expected, strict=True):
            assert torch.equal(recalled(batch), logits)
    assert len(passes) == len(expected)


@torch.no_grad()
def test_what_does_not_fit_is_computed_again(one: Session, passes: list[int]) -> None:
    recalled = Recalled(one, room=0)
    for _ in range(2):
        for batch in batches(one):
            assert torch.equal(recalled(batch), one.logits(batch))
    assert len(passes) == 4 * len(batches(one))
