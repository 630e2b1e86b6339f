"""Flags become the recipe and the machine: file < flags < --set, and nothing is loaded for what is refused."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import typer

from perpend.cli.flags import FLAGS, completions
from perpend.cli.main import COMMANDS, app
from perpend.cli.options import flowing
from perpend.config import Machine, Recipe, keys, load
from perpend.options.commands import RunOptions, SearchOptions, options_of
from perpend.options.table import StudyOptions


def _value(recipe, key):
    for part in key.split("."):
        recipe = getattr(recipe, part)
    return recipe


@pytest.mark.parametrize("name", [name for name, flag in FLAGS.items() if flag.key])
def test_a_flag_sets_a_key_that_exists_and_shows_the_default_of_the_recipe(name):
    flag = FLAGS[name]
    assert flag.key in keys(Recipe)
    if flag.default:
        assert flag.default == str(_value(Recipe(), flag.key))
    elif flag.kind is bool:
        assert _value(Recipe(), flag.key) is not flag.value
    else:
        assert _value(Recipe(), flag.key) is None


@pytest.mark.parametrize("name", [name for name, flag in FLAGS.items() if flag.machine])
def test_a_machine_flag_shows_the_default_of_the_machine(name):
    default = getattr(Machine(), FLAGS[name].machine)
    assert FLAGS[name].default == ("" if default == () else str(default))


def test_every_flag_is_used_and_every_name_typed_once():
    root = typer.main.get_command(app)
    used: set[str] = set()
    for command in [*root.commands.values(), *root.commands["config"].commands.values()]:
        typed = [name for p in command.params for name in p.opts]
        assert len(typed) == len(set(typed))
        used |= {p.name for p in command.params}
    assert set(FLAGS) <= used


VALUES = {
    "seed": ("7", 7),
    "target": ("perpend:baseline", "perpend:baseline"),
    "baseline": ("perpend:target", "perpend:target"),
    "system": ("Be brief.", "Be brief."),
    "chat_template": ("chat.jinja", "chat.jinja"),
    "limit": ("5", 5),
    "method": ("projected", "projected"),
    "layer": ("18", 18.0),
    "strategy": ("iterative", "iterative"),
    "modules_per_batch": ("4", 4),
    "rounding": ("q4_0", "q4_0"),
    "mode": ("column", "column"),
    "max_new_tokens": ("32", 32),
    "classifier": ("none", "none"),
    "trials": ("7", 7),
    "minutes": ("1.5", 1.5),
    "max_drift": ("0.1", 0.1),
    "min_acceptance": ("0.9", 0.9),
    "refine": ("3", 3),
}


@pytest.mark.parametrize(
    ("command", "takes"),
    [("run", options_of(RunOptions).keys() - options_of(StudyOptions)), ("search", options_of(SearchOptions).keys())],
    ids=["run", "search"],
)
def test_every_flag_of_the_recipe_reaches_it(cli, task, command, takes):
    calls = task(command)
    typed, expected = [], {}
    for name, flag in FLAGS.items():
        if flag.key and name in takes:
            text, value = (None, flag.value) if flag.kind is bool else VALUES[name]
            typed += [flag.names[0], *([text] if text else [])]
            expected[flag.key] = value
    assert cli(command, "org/m", "-o", "out", *typed).code == 0
    (args, kwargs) = calls[0]
    assert args == ("org/m",)
    assert kwargs["output"] == Path("out")
    assert {key: _value(kwargs["recipe"], key) for key in expected} == expected
    assert kwargs["recipe"].model.id == "org/m"
    assert kwargs["machine"] == Machine()


def test_without_flags_the_recipe_is_the_default_one(cli, task):
    calls = task("run")
    cli("run", "org/m", "-o", "out")
    assert calls[0][1]["recipe"] == load(base={"model": {"id": "org/m"}})


def test_the_file_is_under_the_flags_and_the_flags_under_set(cli, task, tmp_path):
    calls = task("run")
    (tmp_path / "r.toml").write_text(
        'seed = 1\n[model]\nid = "org/file"\n[fit]\nrank = 3\n[eval]\nmax_new_tokens = 1\n'
    )
    cli("run", "-c", "r.toml", "-o", "out", "--max-new-tokens", "2", "--seed", "2", "--set", "seed=3")
    recipe = calls[0][1]["recipe"]
    assert (recipe.model.id, recipe.fit.rank, recipe.eval.max_new_tokens, recipe.seed) == ("org/file", 3, 2, 3)
    cli("run", "org/typed", "-c", "r.toml", "-o", "out")
    assert calls[1][0] == ("org/typed",)
    assert calls[1][1]["recipe"].model.id == "org/typed"


def test_a_revision_is_part_of_the_model(cli, task, tmp_path):
    calls = task("run")
    cli("run", "org/m", "-o", "out", "--revision", "abc")
    cli("run", "org/m@abc", "-o", "out", "--revision", "abc")
    assert [args for args, _ in calls] == [("org/m@abc",)] * 2
    assert calls[0][1]["recipe"].model.id == "org/m@abc"
    assert "two revisions, old and abc" in cli("run", "org/m@old", "-o", "out", "--revision", "abc").err
    (tmp_path / "model").mkdir()
    said = cli("run", "./model", "-o", "out", "--revision", "abc")
    assert (said.code, len(calls)) == (2, 2)
    assert "--revision: only models from the hub have revisions" in said.err
    applied = task("apply")
    cli("apply", "org/m", "-o", "out", "--revision", "abc")
    assert applied[0][0] == ("org/m@abc",)


def test_zero_is_a_value(cli, task, tmp_path):
    calls = task("run")
    (tmp_path / "r.toml").write_text("seed = 1\n")
    cli("run", "org/m", "-c", "r.toml", "-o", "out", "--seed", "0")
    assert calls[0][1]["recipe"].seed == 0


def test_the_machine_is_apart_from_the_recipe(cli, task):
    calls = task("inspect")
    cli("inspect", "org/m", "--device", "cpu", "--dtype", "float32", "--batch-size", "4")
    assert calls[0][1]["machine"] == Machine(device="cpu", dtype="float32", batch_size=4)
    assert calls[0][1]["recipe"] == load(base={"model": {"id": "org/m"}})


def test_apply_takes_a_recipe_as_its_source(cli, task, tmp_path):
    calls = task("apply")
    (tmp_path / "recipe.toml").write_text('[model]\nid = "org/file"\n[edit]\nmode = "row"\n')
    cli("apply", "recipe.toml", "-o", "out", "--dry-run", "-q")
    args, kwargs = calls[0]
    assert args == ("recipe.toml",)
    assert (kwargs["recipe"].model.id, kwargs["recipe"].edit.mode, kwargs["dry_run"]) == ("org/file", "row", True)
    said = cli("apply", "recipe.toml", "-o", "out", "--config", "recipe.toml")
    assert said.code == 2
    assert "two recipes" in said.err


@pytest.mark.parametrize("command", ["fit", "apply", "run", "organism", "eval"])
def test_what_exists_is_not_written_over(cli, task, tmp_path, command):
    calls = task(command)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    for name in ("full", "full/kept.txt", "full/kept.txt/below"):
        said = cli(command, "org/m", "-o", name)
        assert said.code == 2
        assert "full" in said.err
        assert "-o" in said.err
    assert not calls
    assert (tmp_path / "full" / "kept.txt").read_text() == "mine"
    assert cli(command, "org/m", "-o", "empty", "-q").code == 0
    assert cli(command, "org/m", "-o", "new/folder", "-q").code == 0
    assert len(calls) == 2


def test_a_full_folder_is_refused_before_anything_loads(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept.txt").write_text("mine")
    program = (
        "import sys; from perpend.cli.main import main; code = main(['run', 'org/m', '-o', 'full']);"
        "sys.exit(90 if {'torch', 'transformers'} & set(sys.modules) else code)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "not empty" in done.stderr


ROOT = typer.main.get_command(app)


def _everything(command, path=()):
    """Yield the program, its groups and its commands, each with the words that lead to it."""
    yield path, command
    for name, member in getattr(command, "commands", {}).items():
        yield from _everything(member, (*path, name))


EVERYTHING = dict(_everything(ROOT))


def test_every_command_is_looked_at():
    assert {(command.name,) for command in COMMANDS} < set(EVERYTHING)
    assert {("export",), ("quant",), ("config",), ("export", "gguf"), ("config", "show")} < set(EVERYTHING)


@pytest.mark.parametrize("path", EVERYTHING, ids=" ".join)
def test_the_help_of_each_command_and_group_has_two_examples_that_parse(cli, path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    said = cli(*path, "--help")
    examples = [line.split() for line in said.out.partition("Examples")[2].splitlines() if line.strip()]
    assert len(examples) >= 2
    for program, *words in examples:
        assert program == "perpend"
        assert tuple(words[: len(path)]) == path
        command = ROOT
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        command.make_context(command.name, words)


@pytest.mark.parametrize("path", EVERYTHING, ids=" ".join)
def test_help_is_readable_at_eighty_columns(cli, path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    said = cli(*path, "--help")
    assert said.code == 0
    assert said.err == ""
    assert max(map(len, said.out.splitlines())) <= 80
    assert said.out == cli(*path, "-h").out


@pytest.mark.parametrize("path", EVERYTHING, ids=" ".join)
def test_a_line_of_help_ends_where_the_next_word_would_not_fit(cli, path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, _, text = cli(*path, "--help").out.partition(" Usage: ")[2].partition("╭")[0].partition("\n")
    assert text.strip()
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        lines = paragraph.splitlines()
        for line, following in pairwise(lines):
            assert len(line.rstrip()) + 1 + len(following.split()[0]) > 79, line


def test_a_docstring_becomes_one_line_per_paragraph_and_item():
    made = flowing("""Do it.

    One line
    and another.

    - a first
      item
    - a second
    2. a third
    """)
    assert made == "Do it.\n\nOne line and another.\n\n- a first item\n- a second\n2. a third"


def test_nothing_typed_shows_the_help(cli):
    assert cli().out == cli("--help").out
    assert cli("config").code == 0


def test_version(cli):
    from perpend import __version__

    assert cli("--version").out == f"perpend {__version__}\n"


def test_names_are_completed():
    assert completions(FLAGS["mode"], "c") == ["column"]
    assert completions(FLAGS["method"], "") == ["mean", "projected", "biprojected"]
