"""The recipe as a document: what is written reads back as the same recipe."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perpend.config import Machine, Recipe, build, keys, load, to_toml
from perpend.errors import UsageError
from perpend.tasks.config import commented, config_init, config_show, config_validate, documentation

OTHER = {
    "model": {"id": 'we"ird\\ näme'},
    "prompts": {"system": 'Say "ja".\nThen stop.\x7f', "limit": 3},
    "fit": {"layer": "53%", "winsorize": 0.995},
    "edit": {
        "attention": {"kind": "band", "peak_layer": 4},
        "mlp": {"kind": "list", "values": [0.0, 1.0, 0.5]},
        "overrides": {"model.layers.3.mixer.out": {"component": "attention", "out_axis": 0}, "empty": {}},
    },
    "seed": 11,
}


@pytest.mark.parametrize("data", [{}, OTHER], ids=["default", "other"])
@pytest.mark.parametrize(
    "write", [commented, lambda recipe: config_show(recipe=recipe).text], ids=["commented", "plain"]
)
def test_what_is_written_reads_back_the_same(data, write, tmp_path):
    recipe = build(Recipe, data, "test")
    path = tmp_path / "recipe.toml"
    path.write_text(write(recipe), encoding="utf-8")
    assert load(path) == recipe
    assert load(path).hash() == recipe.hash()


def test_every_key_has_a_comment():
    text = commented(Recipe())
    lines = text.splitlines()
    for key in keys(Recipe):
        if key.startswith(("edit.attention", "edit.mlp")):
            continue
        leaf = key.rpartition(".")[2]
        at = next(k for k, line in enumerate(lines) if line.lstrip("# ").startswith((f"{leaf} =", f"[{key}]")))
        assert lines[at - 1].startswith("#"), f"{key} has no comment"


def test_keys_that_are_off_are_shown_and_become_valid_when_switched_on():
    lines = commented(Recipe()).splitlines()
    off = [line.removeprefix("# ") for line in lines if line.startswith("# ") and " = " in line and "λ" not in line]
    named = {key for line in off for key in tomllib.loads(line)}
    tables = [table for table in Recipe().model_dump().values() if isinstance(table, dict)]
    tables += [value for table in tables for value in table.values() if isinstance(value, dict)]  # the schedules
    assert named == {key for table in tables for key, value in table.items() if value is None}


def test_documentation_is_inherited():
    from perpend.core.schedule import Tent

    assert "peak layer" in documentation(Tent)["peak_weight"]


keys_of_toml = st.text(st.characters(codec="utf-8"), max_size=8)
scalars = st.one_of(
    st.booleans(), st.integers(-(2**40), 2**40), st.floats(allow_nan=False, allow_infinity=False), keys_of_toml
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3), max_leaves=5)
tables = st.recursive(
    st.dictionaries(keys_of_toml, values, max_size=3), lambda inner: st.dictionaries(keys_of_toml, inner, max_size=3)
)


@settings(deadline=None)
@given(tables)
def test_toml_is_written_as_it_is_read(data):
    assert tomllib.loads(to_toml(data)) == data


def test_init_writes_a_file_once(cli, tmp_path):
    assert cli("config", "init", "org/m", "-o", "deep/recipe.toml", "--mode", "column").code == 0
    assert load(tmp_path / "deep" / "recipe.toml") == build(
        Recipe, {"model": {"id": "org/m"}, "edit": {"mode": "column"}}, ""
    )
    again = cli("config", "init", "-o", "deep/recipe.toml")
    assert again.code == 2
    assert "exists" in again.err
    with pytest.raises(UsageError, match="exists"):
        config_init(output=tmp_path / "deep" / "recipe.toml")


def test_init_without_a_file_prints_it(cli):
    said = cli("config", "init")
    assert said.out == commented(Recipe())
    assert said.err == ""


def test_show_prints_what_is_in_force(cli, tmp_path):
    (tmp_path / "r.toml").write_text("seed = 4\n")
    said = cli("config", "show", "-c", "r.toml", "--mode", "row", "--set", "fit.rank=2")
    shown = build(Recipe, tomllib.loads(said.out), "shown")
    assert (shown.seed, shown.edit.mode, shown.fit.rank) == (4, "row", 2)
    as_json = cli("config", "show", "-c", "r.toml", "--mode", "row", "--set", "fit.rank=2", "--json").json
    assert build(Recipe, as_json["recipe"], "json") == shown
    assert as_json["hash"] == shown.hash()


def test_validate_names_file_key_and_nearest(cli, tmp_path):
    (tmp_path / "good.toml").write_text('[edit]\nmode = "column"\n')
    (tmp_path / "bad.toml").write_text('[edit]\nmod = "column"\n')
    assert cli("config", "validate", "good.toml").out.startswith("good.toml: valid")
    said = cli("config", "validate", "bad.toml")
    assert said.code == 2
    assert said.err.startswith("perpend: bad.toml: unknown key 'edit.mod'")
    assert "did you mean 'edit.mode'?" in said.err
    assert config_validate(tmp_path / "good.toml").recipe.edit.mode == "column"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("edit.mode = 'colum'", "edit.mode: unknown value 'colum'; valid: plain, column, row; did you mean 'column'?"),
        (
            "fit.layer = 'atuo'",
            "fit.layer: unknown value 'atuo'; valid: auto, each, a finite number of layers or a share such as '53%'; "
            "did you mean 'auto'?",
        ),
        (
            "edit.mlp.kind = 'normall'",
            "edit.mlp.kind: unknown value 'normall'; valid: normal, tent, band, constant, list; did you mean 'normal'?",
        ),
        ("fit.position = 3", "fit.position: unknown value 3; valid: auto, at most -1"),
        ("fit.position = 'x'", "fit.position: unknown value 'x'; valid: auto, a whole number"),
        (
            "edit.mlp = {kind = 'tent', peak_layer = 'x'}",
            "edit.mlp.peak_layer: unknown value 'x'; valid: a finite number of layers or a share such as '53%'",
        ),
        ("edit.mlp = {kind = 'list', values = [1, 'x']}", "edit.mlp.values.1: 'x' is not a number"),
        ("edit.mlp = 'tent'", "edit.mlp: keys are wanted (got 'tent'); valid: weight, values, peak_weight"),
        ("fit.winsorize = 3", "fit.winsorize: 3 is out of range; valid: less than 1"),
    ],
)
def test_a_value_that_is_not_valid_is_named_with_the_nearest_that_is(text, said, tmp_path):
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(UsageError) as in_file:
        load(tmp_path / "r.toml")
    assert str(in_file.value).startswith(f"{tmp_path / 'r.toml'}: {said}")
    with pytest.raises(UsageError) as on_line:
        load(None, [text.replace(" = ", "=", 1)])
    assert str(on_line.value).startswith(f"--set: {said}")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"dtype": "float"}, "dtype: unknown value 'float'; valid: auto, float32, bfloat16, float16; did you mean"),
        ({"batch_size": 0}, "batch_size: unknown value 0; valid: auto, at least 1"),
        ({"dtyp": "auto"}, "unknown key 'dtyp'; valid: device, dtype,"),
    ],
)
def test_what_is_not_valid_of_a_machine_is_named_too(data, said):
    with pytest.raises(UsageError) as caught:
        build(Machine, data, "machine")
    assert str(caught.value).startswith(f"machine: {said}")
