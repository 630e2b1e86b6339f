"""Outputs appear whole or not at all, and what was done before an interruption is kept."""

from __future__ import annotations

import json
import os

import pytest
import torch
from task_cases import MACHINE, a_recipe, names

from perpend.errors import Interrupted, RunFailed, UsageError
from perpend.models.session import Reply
from perpend.progress import Reporter, reporting
from perpend.tasks.evaluate import eval
from perpend.tasks.fit import fit
from perpend.tasks.journal import journal
from perpend.tasks.output import appearing, require_free, require_no_partial, to_text
from perpend.tasks.setup import open_splits

KEY = {"recipe": "a"}


def broken_off(out, work, command="", error=Interrupted):
    """Do `work` on the journal of `out` and stop there, by Ctrl-C or by an error; returns what was raised."""

    def go():
        with journal(out, KEY, command) as kept:
            work(kept)
            raise KeyboardInterrupt if error is Interrupted else error

    with pytest.raises(error) as caught:
        go()
    return caught.value


def test_an_output_appears_when_the_block_ends(tmp_path):
    out = tmp_path / "deep" / "out"
    with appearing(out) as folder:
        (folder / "a.txt").write_text("a")
        assert not out.exists()
    assert (out / "a.txt").read_text() == "a"
    assert names(out.parent) == {"out"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_an_output_that_failed_leaves_nothing(tmp_path, error):
    def fails():
        with appearing(tmp_path / "out") as folder:
            (folder / "a.txt").write_text("a")
            raise error("half-way")

    with pytest.raises(RunFailed if error is OSError else error):
        fails()
    assert names(tmp_path) == set()


def test_a_full_disk_is_one_line(tmp_path):
    with pytest.raises(RunFailed, match=r"out: cannot be written: No space left"), appearing(tmp_path / "out"):
        raise OSError(28, "No space left on device")


def test_an_empty_folder_may_be_the_output(tmp_path):
    (tmp_path / "out").mkdir()
    with appearing(tmp_path / "out") as folder:
        (folder / "a.txt").write_text("a")
    assert names(tmp_path / "out") == {"a.txt"}


def test_outputs_that_are_refused(tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    (tmp_path / "file").touch()
    for out, message in (
        (tmp_path / "full", "already exists and is not empty"),
        (tmp_path / "file", "already exists"),
        (tmp_path / "file" / "out", "is a file"),
    ):
        with pytest.raises(UsageError, match=message):
            require_free(out)
        with pytest.raises(UsageError, match=message), appearing(out):
            pytest.fail("entered")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(UsageError, match="not a folder that can be made"):
        require_free(type(tmp_path)("."))


def test_a_folder_without_permission_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UsageError, match="permission denied"):
        require_free(tmp_path / "out")


def test_an_unfinished_export_is_pointed_out(tmp_path):
    require_no_partial(tmp_path / "out")
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(UsageError, match=rf"rm -r {tmp_path}/out\.partial"):
        require_no_partial(tmp_path / "out")


def test_replies_and_sums_outlive_an_interruption(tmp_path):
    reply = Reply("zwölf", (1, 2, 3), True)

    def work(kept):
        kept.replies("fit")["a"] = reply
        kept.checkpoint("target", {"sum": torch.ones(3), "count": 3})

    caught = broken_off(tmp_path / "out", work, "perpend fit again", Interrupted)
    assert str(tmp_path / "out.resume") in str(caught)
    assert "perpend fit again" in str(caught)
    assert caught.exit_code == 130
    with journal(tmp_path / "out", KEY, "") as kept:
        assert dict(kept.replies("fit")) == {"a": reply}
        state = kept.checkpoint("target", None)
        assert torch.equal(state["sum"], torch.ones(3))
        assert state["count"] == 3
        assert kept.checkpoint("baseline", None) is None
    assert names(tmp_path) == set()


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_last_line_is_dropped(tmp_path, cut):
    first, second = Reply("one", (1,), True), Reply("two", (2,), False)
    broken_off(tmp_path / "out", lambda kept: kept.replies("fit").update({"a": first, "b": second}))
    path = tmp_path / "out.resume" / "fit.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])

    def go_on(kept):
        store = kept.replies("fit")
        assert dict(store) == {"a": first}
        store["b"] = second

    broken_off(tmp_path / "out", go_on)
    with journal(tmp_path / "out", KEY, "") as kept:
        assert dict(kept.replies("fit")) == {"a": first, "b": second}


def test_another_recipe_is_refused_the_partial_results(tmp_path):
    with pytest.raises(Interrupted), journal(tmp_path / "out", KEY, ""):
        raise KeyboardInterrupt
    with pytest.raises(UsageError, match=r"another recipe.*rm -r"), journal(tmp_path / "out", {"recipe": "b"}, ""):
        pytest.fail("entered")
    assert names(tmp_path) == {"out.resume"}


def test_a_failure_keeps_results_and_leaves_nothing_where_there_are_none(tmp_path):
    with pytest.raises(ValueError, match="early"), journal(tmp_path / "out", KEY, ""):
        raise ValueError("early")
    assert names(tmp_path) == set()
    broken_off(tmp_path / "out", lambda kept: kept.replies("fit").update(a=Reply("one", (1,), True)), "", ValueError)
    assert names(tmp_path) == {"out.resume"}


def test_somebody_elses_folder_is_left_alone(tmp_path):
    (tmp_path / "out.resume").mkdir()
    (tmp_path / "out.resume" / "cv.pdf").touch()
    with pytest.raises(UsageError, match="is not what an interrupted task left"), journal(tmp_path / "out", KEY, ""):
        pytest.fail("entered")
    assert names(tmp_path / "out.resume") == {"cv.pdf"}


def test_json_has_null_for_what_is_no_number():
    data = {"a": [float("nan"), 1.5, (float("-inf"),)], "b": {"c": float("inf"), "d": "é", "e": True}}
    assert json.loads(to_text(data)) == {"a": [None, 1.5, [None]], "b": {"c": None, "d": "é", "e": True}}
    assert "é" in to_text(data)


@pytest.mark.parametrize("task", [fit, eval])
def test_an_unfinished_output_is_named_before_anything_is_read(tmp_path, task):
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(UsageError, match=r"out\.partial: an earlier export stopped here"):
        task("./nowhere", output=tmp_path / "out", machine=MACHINE)


@pytest.mark.parametrize(
    ("shipped", "says"),
    [
        ((), []),
        (("target",), ["no target prompts given: using the shipped set (perpend:target)"]),
        (("baseline",), ["no baseline prompts given: using the shipped set (perpend:baseline)"]),
        (("target", "baseline"), ["no prompts given: using the shipped sets (perpend:target, perpend:baseline)"]),
    ],
)
def test_shipped_prompts_are_said_class_by_class(tmp_path, shipped, says):
    told = []

    class Told(Reporter):
        def note(self, message):
            told.append(message)

    with reporting(Told()):
        open_splits(a_recipe(tmp_path, prompts={side: f"perpend:{side}" for side in shipped}))
    assert told == says
