"""Every failure is one line on stderr with the right exit code; nothing of it is on stdout unless as JSON."""

from __future__ import annotations

import errno

import pytest
import typer

from perpend.cli.flags import FLAGS
from perpend.cli.main import app
from perpend.errors import Interrupted, RunFailed, UsageError, nearest


class OutOfMemoryError(RuntimeError):
    """As torch names it."""


TYPED = [
    (("fti",), "did you mean 'fit'?"),
    (("run", "org/m", "--moed", "plain"), "did you mean '--mode'?"),
    (("run", "org/m", "-o"), "-o"),
    (("run", "org/m", "-o", "out", "--limit", "many"), "--limit"),
    (("run", "org/m", "-o", "out", "--mode", "colum"), "did you mean 'column'?"),
    (("run", "org/m", "-o", "out", "--layer", "deep"), "a depth such as 53%"),
    (("run", "org/m", "-o", "out", "--limit", "0"), "--limit"),
    (("run", "org/m", "-o", "out", "--batch-size", "0"), "--batch-size"),
    (("run", "org/m", "-o", "out", "--dtype", "float8"), "--dtype"),
    (("run", "org/m", "-o", "out", "--set", "edit.mod=plain"), "did you mean 'edit.mode'?"),
    (("run", "org/m", "-o", "out", "--set", "mode=plain"), "did you mean 'edit.mode'?"),
    (("run", "org/m", "-o", "out", "--config", "none.toml"), "none.toml"),
    (("run", "./nowhere", "-o", "out"), "./nowhere"),
    (("run", "-o", "out"), "no model"),
    (("run", "org/m"), "-o"),
    (("run", "org/m", "-o", "out", "--target", "perpend:targets"), "perpend:target"),
    (("eval", "org/m", "--edit", "gone.safetensors"), "gone.safetensors"),
    (("apply", "-o", "out"), "SOURCE"),
    (("config", "shwo"), "did you mean 'show'?"),
    (("config", "validate", "none.toml"), "none.toml"),
    (("ls", "method"), "did you mean 'methods'?"),
    (("fit", "org/m", "--position", "-1"), "no option '--position'; try: --set fit.position=VALUE"),
    (("eval", "org/m", "--winding", "1"), "no option '--winding'; try: perpend eval --help"),
    (("run", "org/m", "--types", "q4_0"), "takes no option '--types'; quant check does; try: perpend run --help"),
    (("push", "out", "org/r", "--llama-cpp", "."), "takes no option '--llama-cpp'; export gguf does"),
    (("fit", "org/m", "--trials", "3"), "takes no option '--trials'; run and search do; try: perpend fit --help"),
    (("eval", "org/m", "--layer", "3"), "commands do, such as run; try: perpend eval --help"),
    (("help",), "perpend: no command 'help'; try: perpend --help\n"),
    (("help", "fit"), "try: perpend fit --help\n"),
    (("help", "export", "gguf", "x"), "try: perpend export gguf --help\n"),
    (("help", "fti"), "try: perpend --help\n"),
    (("config", "help"), "try: perpend config --help\n"),
    (("dance",), "valid: run, search, "),
]


COMMANDS = list(typer.main.get_command(app).commands)
OPTIONS = sorted({name for flag in FLAGS.values() for name in flag.names} | {"--help"})
MEANT = {
    **{"fti": "fit", "aply": "apply", "evla": "eval", "evaluate": "eval", "serch": "search", "benchmark": "bench"},
    **{"quantize": "quant", "lst": "ls", "insect": "inspect", "dif": "diff", "organsim": "organism", "server": "serve"},
    **{"conf": "config", "FIT": "fit"},
    **{"--moed": "--mode", "--outptu": "--output", "--out": "--output", "--limits": "--limit", "--dtpye": "--dtype"},
    **{
        "--batchsize": "--batch-size",
        "--max_new_tokens": "--max-new-tokens",
        "--quite": "--quiet",
        "--dry": "--dry-run",
    },
    **{"--jsn": "--json", "--layers": "--layer", "--max-tokens": "--max-new-tokens"},
}
NOT_MEANT = (
    *("help", "list", "convert", "undo", "train", "generate", "version", "upload", "xyz", "f", ""),
    *("--position", "--tokens", "--gpu", "--rank", "--strength", "--position-of", "--x", "--"),
)


@pytest.mark.parametrize(("typed", "meant"), MEANT.items())
def test_a_mistyped_name_gets_the_nearest(typed, meant):
    assert nearest(typed, OPTIONS if typed.startswith("-") else COMMANDS) == f"did you mean '{meant}'?"


@pytest.mark.parametrize("typed", NOT_MEANT)
def test_a_name_that_is_like_no_other_gets_none(typed):
    assert nearest(typed, OPTIONS if typed.startswith("-") else COMMANDS) == ""


@pytest.mark.parametrize(("typed", "says"), TYPED, ids=[" ".join(typed) for typed, _ in TYPED])
def test_what_cannot_be_done_as_typed_is_one_line_and_exits_with_2(cli, task, typed, says):
    tasks = [task(name) for name in ("run", "eval", "apply")]
    said = cli(*typed)
    assert said.code == 2
    assert said.out == ""
    assert says in said.err
    assert said.err.startswith("perpend: ")
    assert said.err.count("\n") == 1
    assert not any(tasks), "the task was started"


RAISED = [
    (UsageError("bad", where="--here", valid="good", hint="that"), 2, "perpend: --here: bad; valid: good; try: that\n"),
    (RunFailed("layer 3 is not finite"), 1, "perpend: layer 3 is not finite\n"),
    (Interrupted("12 of 64 are kept", hint="the same"), 130, "perpend: 12 of 64 are kept; try: the same\n"),
    (KeyboardInterrupt(), 130, "perpend: interrupted; try: the same command again\n"),
    (MemoryError(), 1, "perpend: out of memory; try: --batch-size 1, or fewer tokens or prompts\n"),
    (OutOfMemoryError("CUDA"), 1, "perpend: out of memory; try: --batch-size 1, or fewer tokens or prompts\n"),
    (OSError(errno.ENOSPC, "No space", "big.bin"), 1, "perpend: big.bin: no space left on the disk\n"),
    (PermissionError(errno.EACCES, "No", "x"), 2, "perpend: x: permission denied\n"),
    (ValueError("odd\nsecond line"), 1, "perpend: unexpected ValueError: odd; try: run again with --debug\n"),
    (RuntimeError(), 1, "perpend: unexpected RuntimeError: no message; try: run again with --debug\n"),
]


@pytest.mark.parametrize(
    ("error", "code", "line"), RAISED, ids=[type(e).__name__ + str(k) for k, (e, _, _) in enumerate(RAISED)]
)
def test_what_goes_wrong_inside_a_task_is_one_line(cli, task, error, code, line):
    task("inspect", error)
    said = cli("inspect", "org/m")
    assert (said.code, said.out, said.err) == (code, "", line)


def test_json_has_the_error_on_stdout_and_the_line_on_stderr(cli, task):
    task("inspect", UsageError("bad", where="here", valid="good", hint="that"))
    said = cli("inspect", "org/m", "--json")
    assert said.code == 2
    expected = {"type": "UsageError", "what": "bad", "where": "here", "valid": "good", "hint": "that", "exit_code": 2}
    assert said.json == {"error": expected}
    assert said.err.count("\n") == 1


def test_json_has_errors_of_the_command_line_itself_too(cli):
    said = cli("inspect", "org/m", "--jsn", "--json")
    assert said.json["error"]["hint"] == "did you mean '--json'?"


def test_debug_shows_where_it_happened(cli, task):
    task("inspect", ValueError("odd"))
    assert "Traceback" not in cli("inspect", "org/m").err
    said = cli("inspect", "org/m", "--debug")
    assert "Traceback" in said.err
    assert said.err.endswith("perpend: unexpected ValueError: odd; try: run again with --debug\n")


def test_an_error_cannot_steer_the_terminal(cli, task):
    task("inspect", ValueError("\x1b[2Jgone\r\x07"))
    said = cli("inspect", "org/m")
    assert "\x1b" not in said.err
    assert "\\x1b[2Jgone" in said.err
