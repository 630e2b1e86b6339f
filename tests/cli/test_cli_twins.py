"""The functions of the library are the commands: the same arguments, which come to the same recipe and machine."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer

import perpend
from perpend.cli.flags import EVERYWHERE
from perpend.cli.main import app
from perpend.config import EditSection, Machine, Recipe
from perpend.core.schedule import Tent
from perpend.errors import UsageError
from perpend.options import commands
from perpend.options.commands import OPTIONS, options_of
from perpend.options.table import StudyOptions

TWINS = {
    "adapter": "adapter",
    "apply": "apply",
    "audit": "audit",
    "bench": "bench",
    "chat": "chat",
    "config_init": "config init",
    "config_show": "config show",
    "config_validate": "config validate",
    "demo": "demo",
    "diff": "diff",
    "eval": "eval",
    "export_gguf": "export gguf",
    "fit": "fit",
    "inspect": "inspect",
    "ls": "ls",
    "organism": "organism",
    "push": "push",
    "quant_check": "quant check",
    "run": "run",
    "search": "search",
    "serve": "serve",
    "vector": "vector",
    "write_report": "report",
}
OF_THE_LIBRARY = {"recipe", "machine", "tell", "training", "screen", "ready"}
"""Arguments that are objects, which cannot be typed."""
OF_PYTHON = {"for": "rounding"}
"""What Python's own words stand in the way of."""

GIVEN: dict[str, tuple[str, Any]] = {
    "config": ("asked.toml", Path("asked.toml")),
    "set": ("fit.rank=2", ["fit.rank=2"]),
    "seed": ("0", 0),
    "target": ("perpend:baseline", "perpend:baseline"),
    "baseline": ("perpend:target", "perpend:target"),
    "limit": ("5", 5),
    "system": ("Be brief.", "Be brief."),
    "chat_template": ("chat.jinja", Path("chat.jinja")),
    "method": ("projected", "projected"),
    "layer": ("18", 18),
    "mode": ("column", "column"),
    "strategy": ("iterative", "iterative"),
    "modules_per_batch": ("4", 4),
    "max_new_tokens": ("32", 32),
    "classifier": ("none", "none"),
    "rounding": ("q4_0", "q4_0"),
    "trials": ("7", 7),
    "minutes": ("1.5", 1.5),
    "max_drift": ("0.1", 0.1),
    "min_acceptance": ("0.9", 0.9),
    "refine": ("0", 0),
    "revision": ("abc", "abc"),
    "trust_remote_code": ("org/m", ["org/m"]),
    "device": ("cpu", "cpu"),
    "dtype": ("float32", "float32"),
    "batch_size": ("4", 4),
    "memory": ("3GB", 3_000_000_000),
    "offload": ("disk", "disk"),
    "offload_folder": ("folder", "folder"),
    "quantization": ("8bit", "8bit"),
    "device_map": ("balanced", "balanced"),
    "tensor_parallel": ("2", 2),
    "engine": ("vllm", "vllm"),
}


def function(name: str) -> Callable[..., Any]:
    module = import_module(f"perpend.{perpend._HOME[name]}")
    return getattr(module, perpend._RENAMED.get(name, name))


def kind_of(name: str) -> Any:
    """Return the class that types the keywords of a function; None where it takes no shared ones."""
    text = function(name).__annotations__.get("options")
    return getattr(commands, text.removeprefix("Unpack[").removesuffix("]")) if text else None


def typed(name: str, but: Any = ()) -> tuple[list[str], dict[str, Any]]:
    """Return every shared option of a command as it is typed, and as keywords."""
    words, keywords = [], {}
    for key, option in options_of(kind_of(name)).items():
        if key not in but:
            text, value = (None, True) if option.kind is bool else GIVEN[key]
            words += [option.names[0], *([text] if text else [])]
            keywords[key] = value
    return words, keywords


class Stop(Exception):
    pass


@pytest.fixture
def came_to(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Recipe, Machine]]:
    """`came_to("fit", "org/m", mode="row")` is the recipe and the machine with which the function begins its work."""

    def call(name: str, *args: Any, **keywords: Any) -> tuple[Recipe, Machine]:
        real, found = function(name), []
        module = sys.modules[real.__module__]
        own = next(own for own in ("asked", "asked_of_source") if hasattr(module, own))
        resolve = getattr(module, own)

        def seen(*given: Any, **how: Any) -> Any:
            found.append(resolve(*given, **how)[-2:])
            raise Stop

        with monkeypatch.context() as patch:
            patch.setattr(module, own, seen)
            with pytest.raises(Stop):
                real(*args, **keywords)
        return found[0]

    return call


def test_every_function_has_a_command():
    functions = {name for name in perpend.__all__ if inspect.isfunction(getattr(perpend, name))}
    assert functions - {"load_recipe"} == set(TWINS)


@pytest.mark.parametrize("name", TWINS)
def test_a_function_takes_what_its_command_takes(name):
    command = typer.main.get_command(app)
    for word in TWINS[name].split():
        command = command.commands[word]
    options = [p.opts[0].lstrip("-").replace("-", "_") for p in command.params if p.param_type_name == "option"]
    told = [*options, *(p.name for p in command.params if p.param_type_name == "argument")]
    parameters = inspect.signature(function(name)).parameters.values()
    own = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} - OF_THE_LIBRARY
    shared = set(options_of(kind_of(name))) if kind_of(name) else set()
    assert own & shared == set()
    assert {OF_PYTHON.get(word, word) for word in told} - {*EVERYWHERE, "help"} == own | shared


NEEDS = {"bench": (["--tasks", "a,b"], {"tasks": ["a", "b"]})}
NO_OUTPUT = ("audit", "chat", "quant_check", "serve")
MEASURED = [n for n in TWINS if kind_of(n) and not n.startswith("config")]


@pytest.mark.parametrize("name", MEASURED)
def test_flags_and_keywords_come_to_the_same(cli, task, came_to, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("asked.toml").write_text("[edit]\nthrough_post_norm = true\n[eval]\nmax_new_tokens = 7\n")
    words, keywords = typed(name, options_of(StudyOptions) if name == "run" else ())
    more, also = NEEDS.get(name, ([], {}))
    model = () if name == "demo" else ("org/m",)
    where = {} if name in NO_OUTPUT else {"output": Path("out")}
    calls = task(name)
    said = cli(*TWINS[name].split(), *model, *(["-o", "out"] if where else []), *more, *words)
    assert len(calls) == 1, said.err
    asked = calls[0][1]
    recipe, machine = came_to(name, *model, **where, **also, **keywords)
    assert (recipe, machine) == (asked["recipe"], asked["machine"])
    assert recipe.edit.through_post_norm  # the file is read too
    assert recipe != Recipe().for_model(recipe.model.id)
    if "device" in keywords:
        assert machine.device == "cpu"


def test_the_recipe_shown_is_that_of_the_flags(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("asked.toml").write_text("[edit]\nthrough_post_norm = true\n")
    words, keywords = typed("config_show")
    said = cli("config", "show", "org/m", *words, "--json")
    assert said.json["recipe"] == perpend.config_show("org/m", **keywords).to_json()["recipe"]
    assert cli("config", "init", "org/m", *words).out == perpend.config_init("org/m", **keywords).text


def test_keywords_lie_over_the_recipe_and_the_machine(came_to):
    recipe = Recipe.model_validate({"model": {"id": "org/m"}, "fit": {"rank": 3, "filter": False}, "seed": 4})
    recipe = recipe.model_copy(update={"edit": EditSection(attention=Tent(peak_weight=0.5))})
    machine = Machine(dtype="float32", device="cpu")
    found, how = came_to("fit", output="o", recipe=recipe, machine=machine, no_filter=False, limit=3, device="cuda")
    assert found.model.id == "org/m"
    assert (found.fit.rank, found.fit.filter, found.prompts.limit, found.seed) == (3, True, 3, 4)
    assert found.edit == recipe.edit
    assert found.fit.model_fields_set == {"rank", "filter"}  # defaults stay defaults
    assert (how.dtype, how.device) == ("float32", "cuda")
    assert came_to("fit", "org/m", output="o", recipe=recipe, machine=machine) == (recipe, machine)
    assert came_to("fit", output="o", recipe=recipe, revision="v2", seed=None)[0] == recipe.for_model("org/m@v2")


WRONG = {
    "unknown argument 'moed'.*did you mean 'mode'": {"moed": "row"},
    "unknown argument 'ouput'.*did you mean 'output'": {"ouput": "elsewhere"},
    "--mode: unknown value 'colum'.*plain, column, row.*did you mean 'column'": {"mode": "colum"},
    "--dtype: .*'float32'": {"dtype": "float"},
    "--no-filter: 'no' is neither True nor False": {"no_filter": "no"},
    "--config: two recipes": {"config": "r.toml", "recipe": Recipe()},
    "--revision: two revisions": {"revision": "b", "model": "org/m@a"},
    "no model given": {"model": None},
    "perpend.fit: a Recipe is no model": {"model": Recipe()},
}


@pytest.mark.parametrize("said", WRONG)
def test_what_a_function_does_not_take_is_refused_in_a_line(said, tmp_path):
    given = {"model": "org/m", "output": tmp_path / "out", **WRONG[said]}
    with pytest.raises(UsageError, match=said) as caught:
        perpend.fit(**given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_a_recipe_takes_keywords(came_to, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text('seed = 3\n[model]\nid = "org/file"\n')
    recipe, machine = came_to("apply", path, output="o", max_new_tokens=9, device="cpu")
    assert (recipe.model.id, recipe.seed, recipe.eval.max_new_tokens, machine.device) == ("org/file", 3, 9, "cpu")
    assert came_to("apply", path, output="o")[0] is None  # what lies beside the edit
    with pytest.raises(UsageError, match="two recipes"):
        perpend.apply(path, output="o", config=path)


def test_options_of_a_search_are_for_a_search(monkeypatch, tmp_path):
    for given in ({"trials": 3}, {"workers": 2}, {"storage": "trials.log"}):
        with pytest.raises(UsageError, match=f"--{next(iter(given))}: is of a search; try: --search"):
            perpend.run("org/m", output=tmp_path / "out", **given)
    calls = []
    monkeypatch.setattr("perpend.tasks.search.search", lambda **given: calls.append(given) or _a_run())
    assert perpend.run("org/m", output=tmp_path / "out", search=True, trials=3, workers=2) == _a_run()
    assert (calls[0]["recipe"].search.trials, calls[0]["recipe"].model.id, calls[0]["workers"]) == (3, "org/m", 2)


def _a_run() -> Any:
    from perpend.tasks.run import Run

    return Run("out", "org/m", "", (), {}, None, None, None, None, {})


def test_every_option_is_of_some_command():
    kinds = [value for name, value in vars(commands).items() if name.endswith("Options") and isinstance(value, type)]
    assert set(OPTIONS) == {name for kind in kinds for name in options_of(kind)}
    assert all(bool(o.key) + bool(o.machine) == 1 for n, o in OPTIONS.items() if n not in ("config", "set", "revision"))
