"""`optuna-dashboard` opens what a search leaves."""

from __future__ import annotations

import io
import json

import pytest
import toy

from perpend.searching.study import Ledger, Outcome
from perpend.searching.workers import describe, work

dashboard = pytest.importorskip("optuna_dashboard", reason="not installed: pip install 'perpend[dashboard]'")


@pytest.fixture
def study(tmp_path):
    """A journal of 16 trials, some of which have failed, with what the process that leads a search keeps in it."""
    path = tmp_path / "study.log"
    ledger = Ledger(path, "model-0123")
    ledger.create()
    ledger.keep("plan", describe(toy.PLAN))
    ledger.keep_base({"replies": "{}", "directions:mean:1": "A" * 100_000})

    def evaluate(candidates, rivals):
        return [Outcome(failed="a test"), *(toy.score(c) for c in candidates[1:])]

    with ledger.alive():
        work(ledger, toy.PLAN, evaluate, limit=16, patience=0, stop=lambda: None)
    return path


def get(app, path: str) -> tuple[str, bytes]:
    """What a WSGI application answers to GET."""
    answered = []
    place, _, query = path.partition("?")
    environ = {
        "REQUEST_METHOD": "GET",
        "PATH_INFO": place,
        "QUERY_STRING": query,
        "SERVER_NAME": "127.0.0.1",
        "SERVER_PORT": "80",
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(),
        "wsgi.errors": io.StringIO(),
    }
    body = b"".join(app(environ, lambda status, headers, info=None: answered.append(status)))
    return answered[0], body


def test_the_dashboard_opens_the_study_and_shows_every_trial(study):
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    app = dashboard.wsgi(JournalStorage(JournalFileBackend(str(study))))
    assert get(app, "/")[0].startswith(("200", "302"))
    status, body = get(app, "/api/studies")
    assert status.startswith("200")
    (listed,) = json.loads(body)["study_summaries"]
    assert (listed["study_name"], listed["directions"]) == ("model-0123", ["minimize", "minimize"])
    status, body = get(app, f"/api/studies/{listed['study_id']}?after=0")
    assert status.startswith("200")
    shown, view = json.loads(body), Ledger(study, "model-0123").view(8, 4)
    assert shown["objective_names"] == ["refusal", "drift"]
    trials = {t["trial_id"]: t for t in shown["trials"]}
    assert len(trials) == 16
    for trial in view.slots.values():
        one = trials[trial.id]
        assert one["state"] == ("Fail" if trial.outcome.failed else "Complete")
        assert {p["name"] for p in one["params"]} == set(trial.params)
        if not trial.outcome.failed:
            assert [float(v) for v in one["values"]] == pytest.approx([trial.outcome.refusal, trial.outcome.drift])
        told = {a["key"]: a["value"] for a in one["user_attrs"]}
        assert (told["slot"], told["origin"]) == (str(trial.slot), trial.origin)
    assert {trial["state"] for trial in trials.values()} == {"Complete", "Fail"}
