"""How long the program takes to start; `perpend --help` and `import perpend` have a budget of 0.3 s.

    python bench/startup.py [repetitions]

Prints the median and the fastest of the wall times and the least processor time. The processor time is held against
the budget: starting waits for nothing, and a busy machine stretches the wall time of any run.
"""

from __future__ import annotations

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
    repetitions = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    over = False
    print(f"{'':22}{'median':>8}{'fastest':>9}{'cpu':>8}")
    for name, arguments in CASES.items():
        runs = sorted(once(arguments) for _ in range(repetitions))
        fastest, cpu = runs[0][0], min(c for _, c in runs)
        over = over or (name in HELD and cpu > BUDGET)
        print(f"{name:22}{statistics.median(w for w, _ in runs):7.3f}s{fastest:8.3f}s{cpu:7.3f}s")
    print(f"budget {BUDGET} s for {' and '.join(HELD)}: {'exceeded' if over else 'kept'}")
    return int(over)


if __name__ == "__main__":
    sys.exit(main())
