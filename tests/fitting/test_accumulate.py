"""Directions from one streaming pass, which can be broken off and gone on with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fitting_cases import mean_difference, pair, residuals, session_on

from perpend.config import FitSection
from perpend.core.directions import auc
from perpend.core.residuals import ResidualFitter
from perpend.fitting.accumulate import accumulate
from perpend.models import session as sessions


class Kept:
    """A checkpoint in memory."""

    def __init__(self) -> None:
        self.states: dict[str, Any] = {}

    def __call__(self, name: str, state: dict[str, Any] | None) -> dict[str, Any] | None:
        if state is None:
            return self.states.get(name)
        self.states[name] = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}
        return None


def test_directions_are_the_mean_difference_of_each_layer(pico_dir):
    session = session_on(pico_dir("llama"))
    found = accumulate(session, pair(6), FitSection())
    assert torch.allclose(found.vectors[:, 0].double(), mean_difference(session, pair(6)), atol=1e-5)


def test_the_held_out_prompts_say_how_well_each_layer_separates(pico_dir):
    session, held_out = session_on(pico_dir("llama")), pair(5, 100)
    found = accumulate(session, pair(6), FitSection(), held_out=held_out)
    places = [
        torch.einsum("nld,ld->nl", residuals(session, side), found.vectors[:, 0].double())
        for side in (held_out.target, held_out.baseline)
    ]
    by_hand = [auc(places[0][:, layer], places[1][:, layer]) for layer in range(session.n_layers)]
    assert found.diagnostics["auc"] == pytest.approx(by_hand)


@pytest.mark.parametrize("broken_at", [1, 2, 5])
def test_a_pass_that_was_broken_off_gives_the_same_bits(pico_dir, monkeypatch, broken_at):
    monkeypatch.setattr(sessions, "WINDOW", 3)
    session, kept, calls = session_on(pico_dir("llama")), Kept(), []
    whole = accumulate(session, pair(8), FitSection())
    update = ResidualFitter.update

    def stops(self, rows):
        if len(calls) == broken_at:
            raise KeyboardInterrupt
        calls.append(len(rows))
        update(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(ResidualFitter, "update", stops)
        with pytest.raises(KeyboardInterrupt):
            accumulate(session, pair(8), FitSection(), checkpoint=kept)
    read: list[int] = []
    monkeypatch.setattr(ResidualFitter, "update", lambda self, rows: (read.append(len(rows)), update(self, rows)))
    again = accumulate(session, pair(8), FitSection(), checkpoint=kept)
    assert sum(read) == 16 - sum(calls)
    for name in ("vectors", "raw_norm", "target_mean", "baseline_mean"):
        assert torch.equal(getattr(again, name), getattr(whole, name))
    assert again.diagnostics == whole.diagnostics


def test_two_directions_hold_the_mean_difference_in_their_span(pico_dir):
    session = session_on(pico_dir("llama"))
    found = accumulate(session, pair(8), FitSection(rank=2))
    assert found.vectors.shape == (3, 2, 32)
    mean = mean_difference(session, pair(8))
    inside = torch.einsum("lkd,ld->lk", found.vectors.double(), mean).norm(dim=-1)
    assert torch.allclose(inside, torch.ones(3).double(), atol=1e-5)
