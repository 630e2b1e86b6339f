"""Two processes find what one finds, to the bit."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import perpend
from perpend.config import Machine
from perpend.errors import UsageError
from perpend.models.parallel import World

Dirs = Callable[[str], Path]

PROGRAM = """
import sys, torch
torch.set_num_threads(1)
import pico
from perpend.config import Machine
from perpend.core.edits import Edit, ModuleEdit
from perpend.data import Prompt
from perpend.models.load import load_model
from perpend.models.parallel import leave, rank
from perpend.models.session import Session
model, out, shared, offload = sys.argv[1:5]
machine = Machine(device="cpu", batch_size=2, tensor_parallel=int(shared), offload=offload)
one = Session(load_model(model, machine), machine)
texts = [f"{word} {k}" * (1 + k % 3) for k in range(9) for word in ("Bake", "Explain")]
prompts = [Prompt(text) for text in texts]
v = torch.nn.functional.normalize(torch.arange(1.0, 1 + one.hidden_size)[None])
edit = Edit({w.name: ModuleEdit(v, 0.8) for w in one.anatomy.writers})
found = {"residuals": torch.cat(list(one.capture(prompts)))}
with one.edited(edit):
    found["edited"] = torch.cat(list(one.capture(prompts)))
    found["replies"] = [list(r.tokens) for r in one.generate(prompts, max_new_tokens=4)]
    found["scores"] = one.log_likelihood(prompts, [[7, 8, 9]] * len(prompts))
torch.save(found, f"{out}.{rank()}")
leave()
"""


def run(model: Path, out: Path, processes: int, shared: int = 1, offload: str = "auto") -> list[dict]:
    """Run the program in so many processes, as torchrun would start them; returns what each found."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    base = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    several = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    words = [sys.executable, "-c", PROGRAM, str(model), str(out), str(shared), offload]
    started = [
        subprocess.Popen(
            words,
            env={**base, **({**several, "RANK": str(k), "LOCAL_RANK": str(k)} if processes > 1 else {})},
            stderr=subprocess.PIPE,
            text=True,
        )
        for k in range(processes)
    ]
    said = [process.communicate(timeout=120)[1] for process in started]
    assert [p.returncode for p in started] == [0] * processes, "\n".join(said)
    return [torch.load(f"{out}.{k}", weights_only=True) for k in range(processes)]


def same(a: dict, b: dict) -> None:
    assert torch.equal(a["residuals"], b["residuals"])
    assert torch.equal(a["edited"], b["edited"])
    assert a["replies"] == b["replies"]
    assert all(torch.equal(x, y) for x, y in zip(a["scores"], b["scores"], strict=True))


@pytest.mark.parametrize("offload", ["auto", "disk"])
def test_two_processes_find_what_one_finds_to_the_bit(pico_dir: Dirs, tmp_path: Path, offload: str) -> None:
    model = pico_dir("llama")
    (alone,) = run(model, tmp_path / "one", 1)
    assert not torch.equal(alone["residuals"], alone["edited"])
    for found in run(model, tmp_path / "two", 2, offload=offload):
        same(alone, found)


def test_two_processes_share_every_matrix(pico_dir: Dirs, tmp_path: Path) -> None:
    model = pico_dir("llama")
    (alone,) = run(model, tmp_path / "one", 1)
    for found in run(model, tmp_path / "two", 2, shared=2):
        for key in ("residuals", "edited"):
            torch.testing.assert_close(found[key], alone[key], rtol=1e-3, atol=1e-3)
        assert found["replies"] == alone["replies"]


def test_other_numbers_of_processes_are_refused_with_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="torchrun --nproc-per-node 4"):
        World.of(Machine(tensor_parallel=4))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="apply runs in one process, and 2 were started"):
        perpend.apply("model", output=tmp_path / "out")
    assert not list(tmp_path.iterdir())
