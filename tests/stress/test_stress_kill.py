"""SIGKILL at any moment leaves the old state or the new one, and two processes on one output are kept apart.

A command runs in a forked child that counts its file operations below the folder and kills itself at one of them, which
is where a moment matters; the count comes from a run that nobody kills.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from perpend.cli.main import main
from perpend.errors import RunFailed, UsageError
from perpend.export.gguf_file import appearing as files
from perpend.tasks.journal import journal
from perpend.tasks.output import appearing, replace_text
from perpend.whole import claimed, partial_of, write_file

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

CHANGES = ("open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")
WATCHED = frozenset(CHANGES)
BRIEF = ("--no-filter", "--layer", "1", "--limit", "3", "--device", "cpu", "--target", "target.txt")
REPLIES = ("--classifier", "none", "--max-new-tokens", "2", "--set", "eval.drift_tokens=2")
SETS = ("--set", "eval.control_prompts=0", "--set", "export.gate_prompts=1")

COMMANDS = {
    "fit": ("fit", "MODEL", "-o", "out", *BRIEF, "--baseline", "baseline.txt"),
    "apply": ("apply", "MODEL", "-e", "edit", "-o", "out", *REPLIES, *SETS),
    "eval": ("eval", "MODEL", "-e", "edit", "-o", "out", *REPLIES, *SETS),
    "run": ("run", "MODEL", "-o", "out", *BRIEF, "--baseline", "baseline.txt", *REPLIES, *SETS),
    "config init": ("config", "init", "MODEL", "-o", "out"),
}
VARYING = {"report.json", "report.html", "README.md"}
"""Files that say how long it took."""


def forked(act: Callable[[], int]) -> int:
    """Run `act` in a child that says nothing; return its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            nowhere = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(nowhere, stream)
            os._exit(act())
        except BaseException:
            os._exit(99)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def command(name: str, model: str, folder: Path, *, fatal: int | None = None) -> int:
    """Run a command in `folder`; it kills itself at the file operation number `fatal`, or notes how many there were."""

    def act() -> int:
        os.chdir(folder)
        sys.stdout = sys.stderr = sys.__stderr__  # not what pytest has put there
        count = 0

        def watch(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal count
            if event in WATCHED and arguments and str(arguments[0]).lstrip(".").startswith((str(folder), "out")):
                count += 1
                if count == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        code = main([model if word == "MODEL" else word for word in COMMANDS[name]])
        if fatal is None:
            os.write(os.open("count", os.O_CREAT | os.O_WRONLY), str(count).encode())
        return code

    return forked(act)


def state(path: Path) -> dict[str, bytes | None]:
    """Every file of an output with its bytes, but for those that say how long it took."""
    if path.is_file():
        return {path.name: path.read_bytes()}
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return {str(p.relative_to(path)): None if p.name in VARYING else p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def place(pico_dir, tmp_path_factory):
    """A folder with prompts and an edit, and the model; nothing in either may change but what is called `out`."""
    folder = tmp_path_factory.mktemp("kill")
    for kind, lead in (("target", "How do I harm"), ("baseline", "Tell me about")):
        (folder / f"{kind}.txt").write_text("".join(f"{lead} number {k}?\n" for k in range(12)))
    model = str(pico_dir("llama"))
    assert command("fit", model, folder) == 0
    (folder / "out").rename(folder / "edit")
    (folder / "count").unlink()
    return folder, model


def moments(name: str, folder: Path, how_many: int) -> list[int]:
    total = int((folder / "count").read_text())
    (folder / "count").unlink()
    assert total >= 2
    return sorted(random.Random(name).sample(range(1, total + 1), min(how_many, total)))


def killed_at(name: str, place: tuple[Path, str], how_many: int) -> None:
    folder, model = place
    assert command(name, model, folder) == 0
    whole, inputs = state(folder / "out"), {**state(folder / "edit"), **state(Path(model))}
    remove(folder)
    for moment in moments(name, folder, how_many):
        assert command(name, model, folder, fatal=moment) == -signal.SIGKILL, moment
        if (folder / "out").exists():
            assert state(folder / "out") == whole, moment
        left = {p.name for p in folder.iterdir()} - {"edit", "target.txt", "baseline.txt"}
        assert left <= {"out", "out.partial", "out.resume"}, moment
        assert {**state(folder / "edit"), **state(Path(model))} == inputs
        if not (folder / "out").exists():
            shutil.rmtree(folder / "out.partial", ignore_errors=True)  # as the message says; the rest is gone on with
            assert command(name, model, folder) == 0, moment
            (folder / "count").unlink()
            assert state(folder / "out") == whole, moment
            assert not (folder / "out.resume").exists()
        remove(folder)


def remove(folder: Path) -> None:
    for path in folder.glob("out*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("name", ["fit", "apply", "config init"])
def test_a_killed_command_leaves_the_old_state_or_the_new(place, name):
    killed_at(name, place, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_ten_moments_of_each_command(place, name):
    killed_at(name, place, 10)


def held(act: Callable[[], None], ready: Path) -> int:
    """Fork a child that does `act`, which waits inside an output; return its number when it is there."""
    child = os.fork()
    if child == 0:
        try:
            act()
        finally:
            os._exit(0)
    deadline = time.monotonic() + 60
    while not ready.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return child


KINDS = {
    "folder": appearing,
    "journal": lambda out: journal(out, {"a": 1}, "again"),
    "gguf": lambda out: files([out.with_name("out-1.gguf"), out]),
    "text": lambda out: claimed(partial_of(out), anew=False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_process_on_one_output_is_told_so(tmp_path, kind):
    out, ready = tmp_path / "out", tmp_path / "ready"

    def wait() -> None:
        with KINDS[kind](out):
            ready.touch()
            time.sleep(60)

    def second() -> None:
        if kind == "text":
            replace_text(out, "second")
        else:
            with KINDS[kind](out):
                pass

    child = held(wait, ready)
    before = sorted(tmp_path.rglob("*"))
    try:
        with pytest.raises(UsageError, match="another process is writing this output"):
            second()
        assert sorted(tmp_path.rglob("*")) == before  # nothing of the first was removed
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if kind == "journal":  # what a killed process left is gone on with
        with KINDS[kind](out) as kept:
            assert json.loads((kept.folder / "key.json").read_text()) == {"a": 1}
    elif kind == "text":  # or taken over
        second()
        assert out.read_text() == "second"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "ready"]
    else:  # or inspected
        with pytest.raises(UsageError, match=r"stopped here; inspect it, then remove it; try: rm .*partial"):
            second()


def test_a_file_that_appeared_meanwhile_stays_as_it_is(tmp_path):
    first, last = tmp_path / "out-1", tmp_path / "out-2"

    def late() -> None:
        with files([first, last]) as partial:
            for path in partial:
                path.write_text("ours")
            last.write_text("theirs")

    with pytest.raises(RunFailed, match=r"out-2\.partial: cannot be renamed to out-2, which appeared meanwhile"):
        late()
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "out-1.partial": "ours",
        "out-2.partial": "ours",
        "out-2": "theirs",
    }
    with pytest.raises(UsageError, match="out-2: already exists"):
        write_file(last, b"ours", replace=False)
    assert last.read_text() == "theirs"


def test_files_appear_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    write_file(tmp_path / "a", b"1", replace=False)
    with pytest.raises(UsageError, match="already exists"):
        write_file(tmp_path / "a", b"2", replace=False)
    with pytest.raises(RunFailed, match="appeared meanwhile"), files([tmp_path / "b", tmp_path / "c"]):
        (tmp_path / "c").touch()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b.partial", "c", "c.partial"]
    assert (tmp_path / "a").read_bytes() == b"1"


def test_many_processes_on_one_file_leave_the_work_of_one_whole(tmp_path):
    children = []
    for k in range(8):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                write_file(tmp_path / "out", bytes([65 + k]) * 300_000, replace=False)
                code = 0
            except UsageError:
                pass
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes.count(0) == 1
    assert (tmp_path / "out").read_bytes() == bytes([65 + codes.index(0)]) * 300_000
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
