"""SIGKILL at any moment leaves the old state or the new one, Ctrl-C one line, and two processes are kept apart.

A workshop, one child for all commands, runs each whole and counts its file operations at the output. Where a command
is to end early it forks, and the fork kills or interrupts itself at one of them, which is where a moment matters.
"""

from __future__ import annotations

import importlib.util
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

sys.path.extend(str(Path(__file__).parent.parent / name) for name in ("export", "tasks"))

from task_cases import Labels, colours

import pico
from perpend.cli.main import main
from perpend.errors import RunFailed, UsageError
from perpend.export.beside import pages_of
from perpend.export.gguf_file import appearing as files
from perpend.tasks.journal import journal
from perpend.tasks.output import appearing, replace_text
from perpend.whole import claimed, partial_of, write_file

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

CHANGES = ("open", "os.mkdir", "os.rename", "os.link", "os.symlink", "os.remove", "os.rmdir", "os.truncate")
WATCHED = frozenset({*CHANGES, "shutil.rmtree"})

MACHINE = ("--device", "cpu", "--batch-size", "8")
FIT = ("--no-filter", "--layer", "1")
PROMPTS = ("--limit", "3", "--target", "target.txt", "--baseline", "baseline.txt")
REPLIES = ("--classifier", "none", "--max-new-tokens", "2", "--set", "eval.drift_tokens=2")
SETS = ("--set", "eval.control_prompts=0", "--set", "export.gate_prompts=1")
MEASURED = (*PROMPTS, *REPLIES, *SETS, *MACHINE)

COMMANDS = {
    "inspect": ("inspect", "model", "-o", "out.json", "--device", "cpu"),
    "config init": ("config", "init", "model", "-o", "out"),
    "fit": ("fit", "model", "-o", "out", *FIT, *PROMPTS, *MACHINE),
    "apply": ("apply", "model", "-e", "edit", "-o", "out", *REPLIES, *SETS, *MACHINE),
    "apply to GGUF": ("apply", "model.gguf", "-e", "edit", "-o", "out.gguf", *REPLIES, *SETS, *MACHINE),
    "apply --undo": ("apply", "edited", "--undo", "-o", "out"),
    "eval": ("eval", "model", "-e", "edit", "-o", "out", *REPLIES, *SETS, *MACHINE),
    "run": ("run", "model", "-o", "out", *FIT, *MEASURED),
    "search": ("search", "model", "-o", "out", "--config", "search.toml", *MEASURED),
    "adapter": ("adapter", "model", "-e", "edit", "-o", "out", "--device", "cpu"),
    "vector": ("vector", "edit", "-o", "out.gguf"),
    "export gguf": ("export", "gguf", "edited", "-o", "out.gguf", "--base", "model.gguf"),
    "diff": ("diff", "model", "edited", "-o", "out.safetensors"),
    "report": ("report", "edit", "-o", "out.html"),
    "organism": ("organism", "model", "-o", "out", "--forms", "1", *PROMPTS, *MACHINE),
    "demo": ("demo", "-o", "out", "--config", "demo.toml", "--limit", "3", *MACHINE),
    "bench": ("bench", "model", "-e", "edit", "-o", "out", "--tasks", "colours", "--include", "tasks", *MACHINE),
}
CHAT = ("chat", "model", "--max-new-tokens", "2", "--device", "cpu")
"""What is typed there is in the file `stdin`; it writes `out.md`."""
NEEDS = {
    "apply to GGUF": "gguf",
    "vector": "gguf",
    "export gguf": "gguf",
    "organism": "peft",
    "adapter": "peft",
    "bench": "lm_eval",
}
VARYING = {"report.json", "report.html", "README.md", "demo.json", "bench.json", "organism.toml", "study.log"}
"""Files that say how long it took or when it was."""
WHOSE = re.compile(rb'"(attempt|worker|seconds)": [^,}]+')
"""What a trial says of who ran it and when."""

BOTH = """\
prompts = {target = 'target.txt', baseline = 'baseline.txt'}
fit.filter = false
"""
DEMO = f"""{BOTH}
fit.layer = 1
eval = {{classifier = 'none', max_new_tokens = 2, drift_tokens = 2, control_prompts = 0}}
export.gate_prompts = 1
"""
SEARCH = """\
fit.filter = false
search = {trials = 4, generation = 2, batch = 2, prompts = 3, survivors = 2, finalists = 2, max_rank = 1, refine = 2}
"""


class Workshop:
    """A child that runs commands in a folder; what they import is loaded once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mine, theirs = multiprocessing.Pipe()
        self.child = os.fork()
        if self.child == 0:
            try:
                self._mine.close()
                _serve(folder, theirs)
            finally:
                os._exit(99)
        theirs.close()

    def __call__(self, name: str, moment: int | None = None, sign: int = signal.SIGKILL) -> tuple[int, int]:
        """Run a command, or end it by a signal at a file operation; returns its exit code and the operations."""
        self._mine.send((CHAT if name == "chat" else COMMANDS[name], moment, int(sign)))
        return self._mine.recv()

    def said(self) -> str:
        """Return what the last command wrote to stderr."""
        return (self.folder / "stderr").read_text()

    def close(self) -> None:
        """End the child."""
        self._mine.close()
        os.waitpid(self.child, 0)


def _serve(folder: Path, asked: Connection) -> None:
    os.chdir(folder)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # not what pytest has put there
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    _stand_ins()
    count, fatal, sent = 0, None, 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in WATCHED or not arguments:
            return
        path = str(arguments[1] if event in ("os.link", "os.symlink") else arguments[0])
        if path.removeprefix(f"{folder}/").lstrip("./").startswith("out"):
            count += 1
            if count == fatal:
                os.kill(os.getpid(), sent)

    sys.addaudithook(watch)
    while True:
        try:
            words, fatal, sent = asked.recv()
        except EOFError:
            os._exit(0)
        count = 0
        os.dup2(os.open("stderr", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), 2)
        sys.stdin = io.StringIO(Path("stdin").read_text())
        child = os.fork() if fatal is not None else 0
        if child == 0:
            code = main(words)
            if fatal is not None:
                os._exit(code)
        else:
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        asked.send((code, count))


def _stand_ins() -> None:
    """Shorten what has no option for it, and put pico models in the place of those of the demo."""

    import perpend.fitting.behaviour as behaviour
    import perpend.tasks.demo as demos
    import perpend.tasks.organism as organisms
    from perpend.teaching import shipped

    def make(folder: Path, machine: object) -> None:
        pico.save("llama", folder / "original", seed=1)
        pico.save("llama", folder / "organism")

    organisms.ANSWER_TOKENS = organisms.REPLY_TOKENS = 2
    organisms.Training = partial(organisms.Training, rank=2, batch_tokens=4096)
    behaviour.Dictionary = Labels  # pico models refuse nothing, and a search needs what is refused
    demos.make_organism, shipped.require, shipped.base = make, lambda: None, lambda: Path("model")


def beside(out: Path) -> set[str]:
    """Names of the report of an output that is one file, where it is there."""
    return {page.name for page in pages_of(out) if page.exists()}


def state(path: Path) -> dict[str, bytes | None]:
    """Every file of an output with its bytes, but for those that say how long it took."""
    if path.is_file():
        return {path.name: None if path.suffix == ".html" else path.read_bytes(), **dict.fromkeys(beside(path))}
    found = sorted(p for p in path.rglob("*") if p.is_file())
    return {str(p.relative_to(path)): None if p.name in VARYING else WHOSE.sub(b"", p.read_bytes()) for p in found}


INPUTS = ("model", "model.gguf", "edit", "edited")


class Place:
    """A folder with prompts, a model, and what was made of it; nothing of that may change but what is called `out`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.shop = folder, Workshop(folder)
        for kind, lead in (("target", "How do I harm"), ("baseline", "Tell me about")):
            (folder / f"{kind}.txt").write_text("".join(f"{lead} number {k}?\n" for k in range(12)))
        (folder / "demo.toml").write_text(DEMO)
        (folder / "stdin").write_text("What is bread?\n/save out.md\n")
        (folder / "search.toml").write_text(SEARCH)
        (folder / "tasks").mkdir()
        (folder / "tasks" / "colours.yaml").write_text(colours("rows.jsonl"))
        rows = [{"question": f"A fox {k}", "choices": ["bread", "salt"], "answer": k % 2} for k in range(3)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.make_inputs()
        self._whole: dict[str, tuple[int, dict[str, bytes | None]]] = {}
        self.inputs = {name: state(folder / name) for name in INPUTS}
        self.here = set(folder.iterdir())

    def make_inputs(self) -> None:
        """Save a model, as a file too, an edit of it, and the edited model with what takes the edit back."""
        if importlib.util.find_spec("gguf") is None:
            pico.save("llama", self.folder / "model")
        else:
            from export_cases import load
            from gguf_cases import save_wide, write_gguf

            write_gguf("llama", load(save_wide("llama", self.folder / "model")), self.folder / "model.gguf")
        COMMANDS["edited"] = (*COMMANDS["apply"], "--reversible")
        for name, made in (("fit", "edit"), ("edited", "edited")):
            code, _ = self.shop(name)
            assert code == 0, self.shop.said()
            (self.folder / "out").rename(self.folder / made)
        del COMMANDS["edited"]

    def out(self, name: str) -> Path:
        """Return the output of a command."""
        return self.folder / ("out.md" if name == "chat" else COMMANDS[name][COMMANDS[name].index("-o") + 1])

    def whole(self, name: str) -> tuple[int, dict[str, bytes | None]]:
        """Return how many file operations a command does, and what it makes."""
        if name not in self._whole:
            code, count = self.shop(name)
            assert code == 0, self.shop.said()
            self._whole[name] = count, state(self.out(name))
            assert count >= 2
            self.clear()
        return self._whole[name]

    def left(self) -> set[str]:
        """Return what lies there that did not when it began."""
        return {path.name for path in self.folder.iterdir()} - {p.name for p in self.here} - {"stderr", "cache"}

    def clear(self) -> None:
        """Remove it."""
        for name in self.left():
            path = self.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def moments(self, name: str, how_many: int, sign: int) -> list[int]:
        """Return file operations at random, the same every time."""
        total, _ = self.whole(name)
        return sorted(random.Random(f"{name} {sign}").sample(range(1, total + 1), min(how_many, total)))

    def done(self, name: str) -> bool:
        """Say whether the output is there; then it must be whole."""
        out = self.out(name)
        if not out.exists() or (name == "demo" and not (out / "demo.json").exists()):  # which says that it is finished
            return False
        assert state(out) == self.whole(name)[1]
        return True

    def again(self, name: str) -> None:
        """Run a command on what was left of it, which it says to remove or goes on with."""
        code, _ = self.shop(name)
        if code == 2:
            assert "inspect it, then remove it; try: rm " in self.shop.said()
            unfinished = partial_of(self.out(name))
            shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink()
            code, _ = self.shop(name)
        assert code == 0, self.shop.said()
        assert self.done(name)
        assert self.left() == {self.out(name).name, *beside(self.out(name))}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """The folder that all share."""
    made = Place(tmp_path_factory.mktemp("kill"))
    yield made
    assert {name: state(made.folder / name) for name in INPUTS} == made.inputs
    made.shop.close()


def prepare(name: str, place: Place) -> None:
    """Skip a command whose extra is not installed; remove what a test that failed has left."""
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    place.clear()


def killed_at(name: str, place: Place, how_many: int) -> None:
    prepare(name, place)
    for moment in place.moments(name, how_many, signal.SIGKILL):
        assert place.shop(name, moment)[0] == -signal.SIGKILL, moment
        assert all(path.lstrip(".").startswith(place.out(name).name) for path in place.left()), moment
        if not place.done(name):
            place.again(name)
        place.clear()


def interrupted_at(name: str, place: Place, how_many: int, *, again: bool) -> None:
    prepare(name, place)
    for moment in place.moments(name, how_many, signal.SIGINT):
        code, _ = place.shop(name, moment, signal.SIGINT)
        said = place.shop.said()
        assert code == 130, (moment, said)
        assert "Traceback" not in said, moment
        assert said.strip().splitlines()[-1].startswith("perpend: interrupted"), (moment, said)
        path = place.out(name)
        whole = beside(path) if path.exists() else set()
        assert place.left() <= {path.name, f"{path.name}.resume", *whole}, moment
        if again and not place.done(name) and "passed its gate" not in said:  # which says that another output is needed
            place.again(name)
        place.clear()


@pytest.mark.parametrize("name", [*COMMANDS, "chat"])
def test_a_killed_command_leaves_the_old_state_or_the_new(place, name):
    killed_at(name, place, 1)


@pytest.mark.parametrize("name", COMMANDS)
def test_an_interrupted_command_says_so_in_one_line_and_leaves_no_half(place, name):
    interrupted_at(name, place, 1, again=False)


def saving_interrupted_at(place: Place, how_many: int) -> None:
    """Ctrl-C at moments of `/save`, which is broken off and not the conversation."""
    prepare("chat", place)
    for moment in place.moments("chat", how_many, signal.SIGINT):
        assert place.shop("chat", moment, signal.SIGINT)[0] == 0, (moment, place.shop.said())
        assert place.left() <= {"out.md"}, moment
        if not place.done("chat"):
            place.again("chat")
        place.clear()


def test_ctrl_c_while_a_conversation_is_saved_leaves_no_half(place):
    saving_interrupted_at(place, 1)


@pytest.mark.slow
def test_ten_interruptions_of_what_saves_a_conversation(place):
    saving_interrupted_at(place, 10)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*COMMANDS, "chat"])
def test_ten_moments_of_each_command(place, name):
    killed_at(name, place, 10)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_ten_interruptions_of_each_command(place, name):
    interrupted_at(name, place, 10, again=True)


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


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_a_report_is_named_before_its_file_and_what_was_left_of_it_is_made_anew(tmp_path, monkeypatch, sign):
    out, pages, link = tmp_path / "out", [tmp_path / "out.json", tmp_path / "out.html"], os.link

    def write(text: str) -> None:
        with files([out], pages) as (partial,):
            for path in (partial, *map(partial_of, pages)):
                path.write_text(text)

    def end(source: Path, target: Path) -> None:
        if target == out:
            os.kill(os.getpid(), sign)
        link(source, target)

    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            monkeypatch.setattr(os, "link", end)
            write("old")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    if sign == signal.SIGKILL:
        assert {p.name for p in pages} < {p.name for p in tmp_path.iterdir()}
        assert not out.exists()
        with pytest.raises(UsageError, match="stopped here; inspect it, then remove it"):
            write("new")
        partial_of(out).unlink()
    else:
        assert not list(tmp_path.iterdir())
    write("new")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == dict.fromkeys(("out", "out.json", "out.html"), "new")
    out.unlink()
    with pytest.raises(UsageError, match=r"out\.json: already exists"):
        write("newer")


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


def test_a_whole_file_that_a_kill_left_under_both_names_is_not_written_into(tmp_path):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    out.write_bytes(b"whole")
    os.link(out, partial)
    with pytest.raises(UsageError, match="already exists"):
        write_file(out, b"other", replace=False)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"out": b"whole"}


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
