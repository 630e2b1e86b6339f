"""`torchrun` and `accelerate launch` with two processes on CPUs: what can be shared is, and the rest is refused."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from perpend.cli.main import main
from perpend.core.directions import Directions
from perpend.core.edits import Edit

BRIEF = ("--device", "cpu", "--limit", "6", "--batch-size", "2", "--no-filter", "--layer", "50%")

LAUNCHERS: dict[str, Callable[[str, str], tuple[str, ...]]] = {
    "torchrun": lambda n, port: ("-m", "torch.distributed.run", "--nproc-per-node", n, "--master-port", port),
    "accelerate": lambda n, port: (
        *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", n, "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port),
    ),
}


def typed(
    folder: Path, *arguments: str, processes: int, launcher: str = "torchrun"
) -> subprocess.CompletedProcess[str]:
    """Type `torchrun ... -m perpend`, or the like of another launcher, or `perpend` alone for one process."""
    before: tuple[str, ...] = ()
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        before = LAUNCHERS[launcher](str(processes), port)
    line = [sys.executable, *before, "-m", "perpend", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_fit_and_judge_what_one_does(
    pico_dir: Callable[[str], Path], tmp_path: Path, launcher: str
) -> None:
    model = str(pico_dir("llama"))
    for processes, name in ((1, "one"), (2, "two")):
        done = typed(tmp_path, "fit", model, "-o", name, *BRIEF, "-q", processes=processes, launcher=launcher)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{name}\n", "the first process alone prints"
        judged = ("-o", f"{name}-judged", "--limit", "6", "--classifier", "none", "--max-new-tokens", "6")
        told = ("eval", model, "-e", name, *judged, "--device", "cpu", "--batch-size", "2", "-q")
        done = typed(tmp_path, *told, processes=processes, launcher=launcher)
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
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_what_takes_one_process_says_so(pico_dir: Callable[[str], Path], tmp_path: Path, launcher: str) -> None:
    done = typed(tmp_path, "run", str(pico_dir("llama")), "-o", "out", *BRIEF, processes=2, launcher=launcher)
    assert done.returncode != 0
    assert "run runs in one process, and 2 were started; valid: fit, eval; try: perpend run, typed alone" in done.stderr
    assert not list(tmp_path.iterdir())


COMMANDS = {
    "run": "run m -o out",
    "search": "search m -o out",
    "apply": "apply m --edit e -o out",
    "adapter": "adapter m --edit e -o out",
    "vector": "vector e -o out.gguf",
    "gguf": "export gguf e -o out.gguf",
    "demo": "demo -o out",
    "organism": "organism m -o out",
    "init": "config init -o out.toml",
    "chat": "chat m",
    "serve": "serve m",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_several_processes_were_started_for_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert main(COMMANDS[name].split()) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert (
            f"torchrun, accelerate launch: {name} runs in one process, and 2 were started; valid: fit, eval; try: "
            in said
        )
        assert f"perpend {name}, typed alone" in said
        assert ("with --device-map or --workers for" in said) == (name in ("run", "search"))
        assert ("for several GPUs" in said) == (name not in ("vector", "gguf", "init"))
    assert not list(tmp_path.iterdir())


def test_one_process_that_torchrun_started_is_like_one_that_was_typed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main(["config", "init", "-o", str(tmp_path / "recipe.toml")]) == 0
    assert (tmp_path / "recipe.toml").is_file()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["ls", "modes"]) == 0  # reads nothing and writes nothing
    assert "column" in capsys.readouterr().out
