"""The benchmarks that have a goal, in one run: start-up, export against `cp`, fit and evaluation against bare passes.

    python bench/all.py [MODEL] [--results bench/results] [--quick] [--kept]

Runs `startup.py`, `export_vs_cp.py` and, where there is a model, `fit_and_eval.py`; keeps what they print as JSON in
the folder of results and prints one table: what was measured, the goal, and whether it was held. MODEL is by default
the organism that `make demo` has made. `--quick` takes fewer repetitions, fewer prompts and a smaller checkpoint, to
see that all of it runs, and keeps nothing; `--kept` measures nothing and prints the table of what is kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ORGANISM = HERE.parent / "out" / "demo" / "organism"
PARTS = ("startup", "export_vs_cp", "fit_and_eval")


@dataclass(frozen=True)
class Row:
    """A figure beside its goal.

    Attributes:
        name: What was measured.
        value: What was found.
        goal: At most this.
        unit: Goes behind both numbers.
    """

    name: str
    value: float
    goal: float
    unit: str = "×"

    @property
    def held(self) -> bool:
        """Whether the goal was reached."""
        return self.value <= self.goal

    def __str__(self) -> str:
        said = "held" if self.held else "missed"
        return f"{self.name:58}{_number(self.value):>8} {self.unit:2}{_number(self.goal):>7} {self.unit:2}  {said}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 20 else f"{value:.3f}"


def rows(results: Mapping[str, Mapping[str, Any]]) -> Iterator[Row]:
    """Yield every figure that has a goal, of the parts that were run.

    Args:
        results: What the parts printed, by name.
    """
    if fit := results.get("fit_and_eval"):
        yield Row("fit / bare forward passes over the same tokens", fit["fit_ratio"], 1.1)
        yield Row("memory of a fit beside the model", fit["fit_added_memory_mb"], 300, "MB")
        yield Row("evaluation / bare generate", fit["eval_ratio"], 1.1)
    if export := results.get("export_vs_cp"):
        size = f"{export['bytes'] / 1e9:.1f} GB"
        yield Row(f"export of {size} / cp, flushed to the disk as the export is", export["times_cp_flushed"], 1.5)
        yield Row(f"export of {size} / cp that leaves its bytes to the cache", export["times_cp"], 1.5)
        yield Row("memory of an export / largest edited matrix", export["peak_times_largest"], 3)
        if "rss_bytes" in export:
            yield Row("resident memory of a process that exports", export["rss_bytes"] / 1e6, 1000, "MB")
    if start := results.get("startup"):
        for name in ("perpend --help", "import perpend"):
            yield Row(f"start-up of {name}, processor time", start["seconds"][name]["cpu"], 0.3, "s")


def commands(model: Path | str | None, quick: bool) -> dict[str, list[str]]:
    """Return what is called for each part."""
    few = {
        "startup": ["2"],
        "export_vs_cp": ["--gb", "0.3", "--repeats", "1"],
        "fit_and_eval": ["--prompts", "8", "--tokens", "8", "--repeats", "2"],
    }
    given = {"startup": ["--json"], "export_vs_cp": [], "fit_and_eval": [str(model)]}
    parts = PARTS if model else PARTS[:2]
    return {p: [sys.executable, str(HERE / f"{p}.py"), *given[p], *(few[p] if quick else [])] for p in parts}


def measured(command: list[str]) -> dict[str, Any]:
    """Run a part, with its stderr on ours; return the JSON that it prints.

    Raises:
        SystemExit: it failed; a start-up over its budget has not.
    """
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    try:
        return dict(json.loads(done.stdout))
    except ValueError:
        sys.exit(f"{Path(command[1]).name} ended with {done.returncode} and printed no JSON")


def kept(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the results that are there."""
    paths = {part: folder / f"{part}.json" for part in PARTS}
    return {part: json.loads(path.read_text(encoding="utf-8")) for part, path in paths.items() if path.is_file()}


def main() -> None:
    """Measure, keep, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(ORGANISM) if ORGANISM.is_dir() else None)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--quick", action="store_true", help="a look at whether all of it runs; nothing is kept")
    parser.add_argument("--kept", action="store_true", help="the table of the results that are there")
    asked = parser.parse_args()
    results = kept(asked.results) if asked.kept else {}
    for part, command in {} if asked.kept else commands(asked.model, asked.quick).items():
        print(f"{part} …", file=sys.stderr, flush=True)
        results[part] = measured(command)
        if not asked.quick:
            asked.results.mkdir(parents=True, exist_ok=True)
            (asked.results / f"{part}.json").write_text(json.dumps(results[part], indent=1) + "\n", encoding="utf-8")
    if "fit_and_eval" not in results:
        print("fit and evaluation left out: make demo first, or name a model", file=sys.stderr)
    print(f"{'':58}{'found':>8}   {'goal':>7}")
    for row in rows(results):
        print(row)


if __name__ == "__main__":
    main()
