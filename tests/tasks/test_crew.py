"""The workers of one machine: which device each takes, how many cores, and what becomes of one that fails."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import contextmanager

import pytest
import torch

import perpend.tasks.crew as crews
from perpend.config import Machine, Recipe
from perpend.progress import reporting


@pytest.fixture
def gpus(monkeypatch):
    """A machine of so many GPUs, as far as anyone can ask."""

    def install(n: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: n > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n)

    return install


def test_every_worker_takes_the_next_gpu(gpus):
    gpus(2)
    found = crews.machines(Machine(dtype="float32"), 3)
    assert [machine.device for machine in found] == ["cuda:0", "cuda:1", "cuda:0"]
    assert {machine.dtype for machine in found} == {"float32"}


def test_a_device_that_was_named_is_that_of_all_workers(gpus):
    gpus(2)
    assert crews.devices(Machine(device="cuda:1"), 2) == ["cuda:1", "cuda:1"]
    assert crews.devices(Machine(device="cpu"), 2) == ["cpu", "cpu"]
    gpus(0)
    assert crews.devices(Machine(), 2) == ["auto", "auto"]


def test_workers_share_the_cores(monkeypatch):
    monkeypatch.setattr(crews.psutil, "cpu_count", lambda logical: 8)
    assert [crews.threads(n) for n in (1, 2, 3, 20)] == [8, 4, 2, 1]


@contextmanager
def worker(monkeypatch, tmp_path, program: str):
    """Run a program as the only worker of a crew; yields its process id and what is noted."""
    popen, noted = crews.subprocess.Popen, []
    monkeypatch.setattr(
        crews.subprocess, "Popen", lambda command, **more: popen([sys.executable, "-c", program], **more)
    )

    class Notes:
        def note(self, line: str) -> None:
            noted.append(line)

    with reporting(Notes()), crews.crew(tmp_path, Recipe(), [Machine()], "a.log") as processes:
        yield processes[0], noted


def test_a_worker_that_fails_is_told_with_its_last_line(monkeypatch, tmp_path):
    with worker(monkeypatch, tmp_path, "import sys; print('first'); sys.exit('no room')") as (process, noted):
        os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    assert noted == ["worker 1 ended with status 1: no room"]


def test_a_worker_that_is_asked_to_end_before_it_has_begun_is_no_failure(monkeypatch, tmp_path):
    program = "import time; print('up', flush=True); time.sleep(60)"
    with worker(monkeypatch, tmp_path, program) as (process, noted):
        while "up" not in (tmp_path / "worker-1.log").read_text():
            os.kill(process, 0)
    assert noted == []
    assert crews.ENDED[-1] == -signal.SIGINT
