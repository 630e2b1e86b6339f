"""`torchrun` with two processes on CPUs: the typed command writes what one process writes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from perpend.core.directions import Directions
from perpend.core.edits import Edit

BRIEF = ("--device", "cpu", "--limit", "6", "--batch-size", "2", "--no-filter", "--layer", "50%")


def typed(folder: Path, *arguments: str, processes: int) -> subprocess.CompletedProcess[str]:
    """Type `torchrun ... -m perpend`, or `perpend` alone for one process."""
    launcher: tuple[str, ...] = ()
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        launcher = ("-m", "torch.distributed.run", "--nproc-per-node", str(processes))
        launcher += ("--master-addr", "127.0.0.1", "--master-port", port)
    line = [sys.executable, *launcher, "-m", "perpend", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_two_processes_fit_and_judge_what_one_does(pico_dir: Callable[[str], Path], tmp_path: Path) -> None:
    model = str(pico_dir("llama"))
    for processes, name in ((1, "one"), (2, "two")):
        done = typed(tmp_path, "fit", model, "-o", name, *BRIEF, "-q", processes=processes)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{name}\n", "the first process alone prints"
        judged = ("-o", f"{name}-judged", "--limit", "6", "--classifier", "none", "--max-new-tokens", "6")
        told = ("eval", model, "-e", name, *judged, "--device", "cpu", "--batch-size", "2", "-q")
        done = typed(tmp_path, *told, processes=processes)
        assert done.returncode == 0, done.stderr
    one, two = (Directions.load(tmp_path / name / "directions.safetensors") for name in ("one", "two"))
    assert one.vectors.equal(two.vectors)
    assert one.target_mean.equal(two.target_mean)
    edits = [Edit.load(tmp_path / name / "edit.safetensors").sha256 for name in ("one", "two")]
    assert edits[0] == edits[1]
    for name in ("before.jsonl", "after.jsonl"):
        assert (tmp_path / "one-judged" / name).read_bytes() == (tmp_path / "two-judged" / name).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two", "one-judged", "two-judged"}


@pytest.mark.slow
def test_what_takes_one_process_says_so_once(pico_dir: Callable[[str], Path], tmp_path: Path) -> None:
    done = typed(tmp_path, "run", str(pico_dir("llama")), "-o", "out", *BRIEF, processes=2)
    assert done.returncode != 0
    assert "run runs in one process; valid: fit, eval" in done.stderr
    assert not list(tmp_path.iterdir())
