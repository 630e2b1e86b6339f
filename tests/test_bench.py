"""The benchmarks with a goal run from one program, print JSON, and what missed its goal is said to have missed it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_all", BENCH / "all.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["bench_all"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def found(**changed: Any) -> dict[str, dict[str, Any]]:
    """Results of which every figure is just within its goal, but for those that are changed."""
    export = {"bytes": 2_400_000_000, "times_cp": 1.5, "times_cp_flushed": 1.5, "peak_times_largest": 3.0}
    results: dict[str, dict[str, Any]] = {
        "fit_and_eval": {"fit_ratio": 1.1, "fit_added_memory_mb": 300, "eval_ratio": 1.1},
        "export_vs_cp": export | {"rss_bytes": 10**9},
        "startup": {"seconds": {name: {"cpu": 0.3} for name in ("perpend --help", "import perpend")}},
    }
    for part in results.values():
        part.update({name: value for name, value in changed.items() if name in part})
    return results


def test_every_goal_is_a_row_and_is_held_or_missed(program):
    rows = list(program.rows(found()))
    assert len(rows) == 9
    assert all(row.held and str(row).endswith("held") for row in rows)


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("fit_ratio", 1.11, "fit / bare"),
        ("fit_added_memory_mb", 301, "memory of a fit"),
        ("eval_ratio", 1.2, "evaluation / bare"),
        ("times_cp", 2.6, "cache"),
        ("times_cp_flushed", 1.51, "flushed"),
        ("peak_times_largest", 3.1, "largest edited matrix"),
        ("rss_bytes", 2 * 10**9, "resident memory"),
        ("seconds", {"perpend --help": {"cpu": 0.31}, "import perpend": {"cpu": 0.1}}, "perpend --help"),
    ],
)
def test_what_is_above_its_goal_is_said_to_have_missed_it(program, name, value, shown):
    missed = [str(row) for row in program.rows(found(**{name: value})) if not row.held]
    assert len(missed) == 1
    assert shown in missed[0]
    assert missed[0].endswith("missed")


def test_parts_that_were_not_run_have_no_rows(program):
    assert len(list(program.rows({"startup": found()["startup"]}))) == 2
    assert set(program.commands(None, quick=False)) == {"startup", "export_vs_cp"}


def test_what_is_kept_is_json_and_makes_the_table(program):
    assert set(program.kept(BENCH / "results")) == set(program.PARTS)
    for path in (BENCH / "results").glob("*.json"):
        json.loads(path.read_text(encoding="utf-8"))
    done = subprocess.run([sys.executable, str(BENCH / "all.py"), "--kept"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1:] == [str(row) for row in program.rows(program.kept(BENCH / "results"))]


def test_a_part_prints_json_and_its_table_beside_it(program):
    command = program.commands(None, quick=True)["startup"]
    done = subprocess.run([*command[:2], "1", "--json"], capture_output=True, text=True)
    assert json.loads(done.stdout)["seconds"]["perpend --help"]["cpu"] > 0
    assert "budget 0.3 s" in done.stderr
    assert len(list(program.rows({"startup": json.loads(done.stdout)}))) == 2


@pytest.mark.parametrize("part", ["startup", "export_vs_cp", "fit_and_eval"])
def test_every_option_of_a_part_is_one_that_it_has(program, part):
    command = program.commands("MODEL", quick=True)[part]
    said = subprocess.run([*command[:2], "--help"], capture_output=True, text=True, check=True).stdout
    for option in (word for word in command if word.startswith("--")):
        assert option in said


def test_a_part_that_prints_no_json_ends_the_run(program, tmp_path):
    (tmp_path / "part.py").write_text("raise SystemExit(3)")
    with pytest.raises(SystemExit, match=r"part\.py ended with 3 and printed no JSON"):
        program.measured([sys.executable, str(tmp_path / "part.py")])
