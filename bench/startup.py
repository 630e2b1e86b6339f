"""How long the program takes to start; `perpend --help` and `import perpend` have a budget of 0.3 s.

    python bench/startup.py [repetitions] [--json]

Prints the median and the fastest of the wall times and the least processor time; with `--json` as JSON, and the table
on stderr. The processor time is held against the budget: starting waits for nothing, and a busy machine stretches the
wall time of any run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

BUDGET = 0.3
HELD = ("perpend --help", "import perpend")
CASES = {
    "perpend --help": ["-m", "perpend", "--help"],
    "perpend fit --help": ["-m", "perpend", "fit", "--help"],
    "perpend --version": ["-m", "perpend", "--version"],
    "perpend ls methods": ["-m", "perpend", "ls", "methods"],
    "import perpend": ["-c", "import perpend"],
    "python alone": ["-c", "pass"],
}


def once(arguments: list[str]) -> tuple[float, float]:
    """Run a fresh interpreter; return wall and processor seconds."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, env=dict(os.environ))
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    """Measure every case; return 1 when one is over the budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repetitions", type=int, nargs="?", default=10)
    parser.add_argument("--json", action="store_true", help="print JSON, and the table on stderr")
    asked = parser.parse_args()
    table = sys.stderr if asked.json else sys.stdout
    print(f"{'':22}{'median':>8}{'fastest':>9}{'cpu':>8}", file=table)
    cases: dict[str, dict[str, float]] = {}
    for name, arguments in CASES.items():
        runs = [once(arguments) for _ in range(asked.repetitions)]
        walls, cpu = [wall for wall, _ in runs], min(worked for _, worked in runs)
        found = {"median": statistics.median(walls), "fastest": min(walls), "cpu": cpu}
        cases[name] = {kind: round(seconds, 3) for kind, seconds in found.items()}
        print(f"{name:22}{found['median']:7.3f}s{found['fastest']:8.3f}s{cpu:7.3f}s", file=table)
    over = any(cases[name]["cpu"] > BUDGET for name in HELD)
    print(f"budget {BUDGET} s for {' and '.join(HELD)}: {'exceeded' if over else 'kept'}", file=table)
    if asked.json:
        print(json.dumps({"repetitions": asked.repetitions, "seconds": cases}, indent=1))
    return int(over)


if __name__ == "__main__":
    sys.exit(main())
