"""What memory does not hold is read in smaller pieces, and reads the same."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from scorer_cases import behaviour, directions

from perpend.config import Machine, Recipe
from perpend.core.schedule import Constant
from perpend.errors import RunFailed
from perpend.fitting.layers import Probe
from perpend.models.load import load_model
from perpend.models.rows import Planted
from perpend.models.session import Session
from perpend.searching import forward, sheets
from perpend.searching.candidate import Candidate
from perpend.searching.forward import Scorer
from perpend.searching.objectives import divergence, likelihoods
from perpend.searching.sheets import Room, Sheet, read

FULL = torch.OutOfMemoryError("out of memory")


@pytest.fixture
def session(pico_dir) -> Session:
    return Session(load_model(pico_dir("llama")), Machine(device="cpu"))


def sheet(session: Session) -> Sheet:
    probe = Probe.of(behaviour(session), 48)
    return Sheet(session, probe.baselines, [[answer, answer[:4]] for answer in probe.answers])


def edits(session: Session):
    some = [Candidate(1.0, 1, "plain", False, Constant(weight=w), Constant(weight=w)) for w in (0.1, 0.2, 0.3)]
    return [c.edit(session, directions(session), Recipe()) for c in some]


def test_fewer_edits_go_together_and_in_the_end_each_alone(session, monkeypatch):
    some, room, together, went, most = edits(session), Room(3, (0,)), sheets.together, [], 1
    true = read(sheet(session), some, divergence, room, base=True)

    def short(planted, rows, *given):
        went.append(rows.n)
        if rows.n > most:
            raise FULL
        return together(planted, rows, *given)

    monkeypatch.setattr(sheets, "together", short)
    for limit in (1, 0):
        most = limit
        went.clear()
        torch.testing.assert_close(read(sheet(session), some, divergence, room, base=True), true, rtol=1e-3, atol=1e-5)
        assert went[:2] == [3, 1]


def test_trees_are_made_smaller_as_long_as_memory_does_not_hold_them(session, monkeypatch):
    own, room, before = sheet(session), Room(1, (0,)), Planted.read
    assert own.plant(room)
    largest = max(len(tree.tree) for _, tree in own.trees)
    most = largest // 2

    def short(self, *given):
        if len(self.tree) > most:
            raise FULL
        return before(self, *given)

    monkeypatch.setattr(Planted, "read", short)
    other = sheet(session)
    assert other.plant(room)
    assert [of.stop for of, _ in other.trees][-1] == len(other)
    assert max(len(tree.tree) for _, tree in other.trees) <= most
    args = (edits(session), likelihoods, room)
    torch.testing.assert_close(read(other, *args), read(own, *args), rtol=1e-4, atol=1e-4)


def test_without_memory_for_any_tree_candidates_are_scored_alone(session, monkeypatch):
    some = [Candidate(1.0, 1, "plain", False, Constant(weight=0.2), Constant(weight=0.2))]
    given = (session, directions(session), Recipe(), behaviour(session))
    whole = Scorer(*given)
    (true,), own, args = whole.score(some), sheet(session), (edits(session), likelihoods, whole.room)
    table = read(own, *args)
    assert own.trees
    monkeypatch.setattr(forward, "find_room", lambda sheet, rows: whole.room)

    def short(self, *given):
        raise FULL

    monkeypatch.setattr(Planted, "read", short)
    other = sheet(session)
    torch.testing.assert_close(read(other, *args), table, rtol=1e-4, atol=1e-4)
    assert not other.trees
    alone = Scorer(*given, whole.found.to_text())
    assert alone.room is None
    (found,) = alone.score(some)
    assert (found.refusal, found.drift) == pytest.approx((true.refusal, true.drift), abs=1e-4)


def test_batches_are_halved_down_to_a_row_and_then_it_is_said(session, monkeypatch):
    session.budget, own, logits = replace(session.budget, rows=5), sheet(session), Session.logits
    (edit, *_), most = edits(session), 2
    true = own.one_by_one(edit, divergence, base=True)

    def short(self, batch):
        if len(batch) > most:
            raise FULL
        return logits(self, batch)

    monkeypatch.setattr(Session, "logits", short)
    torch.testing.assert_close(own.one_by_one(edit, divergence, base=True), true, rtol=1e-4, atol=1e-6)
    assert session.budget.rows == 2
    most = 0
    with pytest.raises(RunFailed, match="out of memory with the smallest batch"):
        own.one_by_one(edit, divergence, base=True)
    assert session.budget.rows == 1


def test_what_did_not_fit_is_gone_before_memory_is_given_back(monkeypatch):
    class Activations(list):
        """Something that can be looked for."""

    held, alive, tried = [], [], []
    monkeypatch.setattr(sheets, "reclaim", lambda: alive.append(held[-1]() is not None))

    def several(some):
        activations = Activations(some)
        held.append(weakref.ref(activations))
        tried.append(len(some))
        if len(some) > 1 or some == ["d"]:
            raise torch.OutOfMemoryError("out of memory")
        return [edit.upper() for edit in activations]

    found = sheets.as_many_as_fit(list("abcde"), 4, several, lambda edit: f"{edit} alone")
    assert found == ["A", "B", "C", "d alone", "E"]
    assert tried == [4, 2, 1, 1, 1, 1, 1]
    assert alive == [False] * 3
