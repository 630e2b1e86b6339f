"""Three processes on one storage, one of them killed in mid-trial: the study is that of one process left alone."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import toy

import perpend.searching.study as study
from perpend.errors import MissingExtra, UsageError
from perpend.searching.storage import masked, open_storage
from perpend.searching.study import Ledger, Outcome
from perpend.searching.workers import work

LIMIT = 28


def alone(path: Path, limit: int = LIMIT) -> dict:
    ledger = Ledger(path, "alone")
    ledger.create()
    work(ledger, toy.PLAN, toy.evaluator(), limit=limit, patience=0, stop=lambda: None)
    return toy.result(ledger)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict:
    return alone(tmp_path_factory.mktemp("alone") / "study.log")


def start(storage: str, log: Path, *more: str) -> subprocess.Popen:
    arguments = [sys.executable, str(Path(toy.__file__)), storage, "shared", str(LIMIT), str(log), *more]
    return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def disturbed(storage: str, folder: Path) -> tuple[Ledger, Counter]:
    """Two workers and one that is killed while it has a batch; returns the study and how often each process began."""
    log = folder / "began.txt"
    ledger = Ledger(storage, "shared")
    ledger.create()
    victim = start(storage, log, "hang")
    until = time.monotonic() + 60
    while not log.exists() and time.monotonic() < until:
        time.sleep(0.05)
    taken = [t.slot for t in ledger.view(8, 4).slots.values() if t.state == "running"]
    assert taken == [0, 1, 2, 3], "the victim has its batch"
    others = [start(storage, log) for _ in range(2)]
    time.sleep(0.5)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    for process in others:
        assert process.wait(timeout=120) == 0, process.stderr.read()
    return ledger, Counter(line.split()[0] for line in log.read_text().splitlines())


def check(ledger: Ledger, began: Counter, undisturbed: dict) -> None:
    assert toy.result(ledger) == undisturbed
    assert sum(began.values()) == LIMIT // 4 + 1  # every batch once, and that of the victim once more
    trials = ledger.storage.get_all_trials(ledger.study)
    lost = [t.user_attrs["slot"] for t in trials if "is gone" in t.user_attrs.get("lost", "")]
    assert lost == [0]
    ended = Counter(t.user_attrs["slot"] for t in trials if "lost" not in t.user_attrs)
    assert ended == dict.fromkeys(range(LIMIT), 1)
    assert ledger.view(8, 4).slots[0].attempt == 1


def test_a_journal_survives_a_killed_worker(tmp_path, undisturbed):
    check(*disturbed(str(tmp_path / "study.log"), tmp_path), undisturbed)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("locks", [True, False])
def test_a_worker_that_was_killed_while_it_wrote_keeps_nobody_waiting(tmp_path, monkeypatch, locks):
    if not locks:
        monkeypatch.setattr("perpend.whole.fcntl", None)
    monkeypatch.chdir(tmp_path)
    ledger = Ledger("study.log", "shared")
    ledger.create()
    before = Path("study.log").read_bytes()
    child = os.fork()
    if child == 0:
        backend = open_storage("study.log")._backend
        backend._lock.acquire()
        with Path("study.log").open("ab") as file:
            file.write(b'{"op_code":')
        os._exit(0)  # without giving it up
    os.waitpid(child, 0)
    began = time.monotonic()
    if not locks:  # what is left is a link, which is waited for until it is old
        hurried = SimpleNamespace(monotonic=lambda: 100 * time.monotonic(), sleep=time.sleep)
        monkeypatch.setattr("optuna.storages.journal._file.time", hurried)
    storage = open_storage("study.log")
    assert time.monotonic() - began < 10
    storage.set_study_user_attr(ledger.study, "seen", 1)
    lines = Path("study.log").read_bytes()
    assert lines.startswith(before)
    assert b'{"op_code":{' not in lines
    assert open_storage("study.log").get_study_user_attrs(ledger.study)["seen"] == 1


# ------------------------------------------------------------------------------------------------------ PostgreSQL


def test_a_postgresql_server_survives_a_killed_worker(postgres, tmp_path, undisturbed):
    check(*disturbed(postgres, tmp_path), undisturbed)


def test_a_server_that_is_not_there_is_one_line_without_the_password():
    pytest.importorskip("psycopg")
    with pytest.raises(UsageError) as told:
        open_storage("postgresql://me:secret@127.0.0.1:9/none")
    assert "secret" not in str(told.value)
    assert "me:***@127.0.0.1" in str(told.value)
    assert masked("study.log") == "study.log"
    told = masked("postgresql://me@db.example/trials?password=secret&sslmode=require")
    assert "secret" not in told
    assert "sslmode=require" in told


def test_a_missing_driver_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"perpend\[postgres\]"):
        open_storage("postgresql://127.0.0.1/none")


# ------------------------------------------------------------------------------------------------- interruptions


def test_a_stopped_search_goes_on_as_if_it_had_not_been_stopped(tmp_path, undisturbed):
    path = tmp_path / "study.log"
    Ledger(path, "shared").create()
    turns, why = 0, "stopped"
    while why == "stopped":  # a new process, as far as the study can tell, for every batch
        ledger, asked = Ledger(path, "shared"), iter([None, "stopped"])
        why = work(ledger, toy.PLAN, toy.evaluator(), limit=LIMIT, patience=0, stop=lambda asked=asked: next(asked))
        turns += 1
    assert turns > 3
    assert toy.result(ledger) == undisturbed


def test_more_trials_are_the_same_first_ones(tmp_path, undisturbed):
    path = tmp_path / "study.log"
    short = alone(path, 10)
    assert short == {slot: undisturbed[slot] for slot in range(10)}
    ledger = Ledger(path, "alone")
    work(ledger, toy.PLAN, toy.evaluator(), limit=LIMIT, patience=0, stop=lambda: None)
    assert toy.result(ledger) == undisturbed


def test_a_line_cut_off_by_a_crash_is_dropped(tmp_path, undisturbed):
    path = tmp_path / "study.log"
    alone(path, 8)
    with path.open("ab") as file:
        file.write(b'{"op_code":5,"wor')
    ledger = Ledger(path, "alone")
    work(ledger, toy.PLAN, toy.evaluator(), limit=LIMIT, patience=0, stop=lambda: None)
    assert toy.result(ledger) == undisturbed


def test_a_worker_without_a_sign_of_life_loses_its_batch_and_its_late_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "LEASE", 0.0)
    path = tmp_path / "study.log"
    slow, other = Ledger(path, "shared"), Ledger(path, "shared")
    slow.create()
    slow.plan(range(8), toy.SPACE.ask(5, 0, 8, []), slow.view(8, 4), toy.SPACE)
    batch = next(slow.view(8, 4).batches(8))
    assert slow.take(batch)
    assert not other.take(batch)
    assert other.requeue(other.view(8, 4), toy.SPACE) == []  # first seen now
    assert len(other.requeue(other.view(8, 4), toy.SPACE)) == 1
    again = next(other.view(8, 4).batches(8))
    assert other.take(again)
    outcomes = [toy.score(toy.SPACE.candidate(t.params)) for t in batch.trials]
    assert not slow.end(batch, outcomes, 1.0)
    assert other.end(again, outcomes, 1.0)
    assert [t.outcome for t in other.view(8, 4).finished()] == outcomes


def test_the_front_grows_where_low_drift_is_halved(tmp_path):
    ledger = Ledger(tmp_path / "s.log", "s")
    ledger.create()
    outcomes = iter([Outcome(0.0, 0.04)] * 8 + [Outcome(0.0, 0.02)] * 8)
    work(ledger, toy.PLAN, lambda c, f: [next(outcomes) for _ in c], limit=16, patience=0, stop=lambda: None)
    first, then = toy.PLAN.volumes(ledger.view(8, 4), 16)
    assert first == pytest.approx(4.0 * math.log10(0.5 / 0.04))
    assert then == pytest.approx(4.0 * math.log10(0.5 / 0.02))


def test_trials_made_twice_are_run_once(tmp_path):
    one, other = Ledger(tmp_path / "s.log", "s"), Ledger(tmp_path / "s.log", "s")
    one.create()
    empty, proposals = one.view(8, 4), toy.SPACE.ask(5, 0, 8, [])
    for ledger in (one, other):
        ledger.plan(range(8), proposals, empty, toy.SPACE)
    view = other.view(8, 4)
    assert sorted(t.slot for t in view.doubles) == list(range(8))
    other.requeue(view, toy.SPACE)
    work(one, toy.PLAN, toy.evaluator(), limit=8, patience=0, stop=lambda: None)
    states = Counter(t.state.name for t in one.storage.get_all_trials(one.study) if "lost" in t.user_attrs)
    assert states == {"FAIL": 8}
    assert all(t.finished for t in one.view(8, 4).slots.values())
