"""The processes that `--workers` starts beside the one that leads a search, each on a device of its own.

They are workers like any other: `python -m perpend.tasks.crew JOB` reads from a JSON file what to do, and joins the
study.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

import psutil

from perpend.config import Machine, Recipe
from perpend.data import load_splits
from perpend.models.session import Session
from perpend.progress import note
from perpend.searching.study import Ledger, Trial
from perpend.tasks.setup import open_session
from perpend.tasks.trials import deadline, join, patient, study_name

STORAGE = "PERPEND_STORAGE"
"""Environment variable that says where the study is: a URL may hold a password, which no file or command should."""
GRACE = 600.0
"""Seconds that a worker may take to end its batch."""
ENDED = (0, 130, -signal.SIGINT)
"""Statuses of a worker that ended as it was asked to; the last is of one that had not begun."""


def devices(machine: Machine, workers: int) -> list[str]:
    """Return the device of each worker: every GPU in turn where none was named."""
    import torch

    if machine.device != "auto" or not torch.cuda.is_available():
        return [machine.device] * workers
    return [f"cuda:{k % torch.cuda.device_count()}" for k in range(workers)]


def threads(workers: int) -> int:
    """Return the cores that one of so many workers takes."""
    return max(1, (psutil.cpu_count(logical=False) or os.cpu_count() or 1) // workers)


def machines(machine: Machine, workers: int) -> list[Machine]:
    """Return how each worker is run, on a device of its own."""
    return [machine.model_copy(update={"device": device}) for device in devices(machine, workers)]


@contextmanager
def share_cores(session: Session, workers: int) -> Iterator[None]:
    """Leave the other processes their cores inside the block."""
    import torch

    before = torch.get_num_threads()
    if session.device.type == "cpu":
        torch.set_num_threads(min(before, threads(workers)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def crew(folder: Path, recipe: Recipe, machines: Sequence[Machine], where: str | Path) -> Iterator[list[int]]:
    """Keep one worker process per machine section inside the block; leaving it lets each end its batch.

    Yields their process ids.

    Args:
        folder: For what they are told and what they say.
        recipe: What is searched.
        machines: One per process.
        where: Storage of the study.
    """
    running: list[tuple[subprocess.Popen[bytes], Path]] = []
    cores = str(threads(len(machines) + 1))
    with contextlib.ExitStack() as stack:
        for k, machine in enumerate(machines, start=1):
            job, log = folder / f"worker-{k}.json", folder / f"worker-{k}.log"
            told = {"recipe": recipe.model_dump(mode="json"), "machine": machine.model_dump(mode="json")}
            job.write_text(json.dumps({**told, "leader": os.getpid()}), encoding="utf-8")
            said = stack.enter_context(log.open("wb"))
            running.append((_start(job, said, {STORAGE: str(where), "OMP_NUM_THREADS": cores}), log))
        try:
            yield [process.pid for process, _ in running]
        finally:
            for process, _ in running:
                if process.poll() is None:
                    process.send_signal(signal.SIGINT)
            for k, (process, log) in enumerate(running, start=1):
                _ended(k, process, log)


def _start(job: Path, said: IO[bytes], told: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a worker in a session of its own, so that a Ctrl-C on the terminal reaches it by way of the leader."""
    command = [sys.executable, "-m", "perpend.tasks.crew", str(job)]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env={**os.environ, **told}, start_new_session=True
    )


def _ended(number: int, process: subprocess.Popen[bytes], log: Path) -> None:
    try:
        code = process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
    if code not in ENDED:
        last = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
        note(f"worker {number} ended with status {code}: {last or 'it said nothing'}")


def take_part(
    recipe: Recipe, machines: Sequence[Machine], where: str | Path, *, stop: Callable[[], str | None]
) -> tuple[str, str, int]:
    """Join the study of a recipe and run trials until the search ends.

    Args:
        recipe: What is searched.
        machines: One per worker: the first is this process, the others are started beside it.
        where: Storage of the study.
        stop: Asked before every batch of this process; where it ends, the others end too.

    Returns:
        The study, why it ended, and the trials that these workers ran.
    """
    splits = load_splits(recipe.prompts)
    ledger = Ledger(where, study_name(recipe, machines[0], splits))
    session = open_session(recipe.model.id, recipe, machines[0])
    site, own = join(ledger, session, splits, recipe, stop), [os.getpid()]
    before = {trial.slot for trial in site.view().finished()}
    with contextlib.ExitStack() as stack:
        if len(machines) > 1:
            stack.enter_context(share_cores(session, len(machines)))
            folder = stack.enter_context(TemporaryDirectory(prefix="perpend-"))
            own += stack.enter_context(crew(Path(folder), recipe, machines[1:], where))
        why = site.work(stop)
    return ledger.name, why, sum(t.slot not in before and _of(t, ledger, own) for t in site.view().finished())


def _of(trial: Trial, ledger: Ledger, processes: Sequence[int]) -> bool:
    """Return whether one of these processes of this machine ran a trial."""
    host = ledger.worker.rsplit("-", 2)[0]
    return trial.owner is not None and trial.owner.startswith(tuple(f"{host}-{pid}-" for pid in processes))


def main(job: str) -> int:
    """Run one worker; returns the exit status."""
    told: dict[str, Any] = json.loads(Path(job).read_text(encoding="utf-8"))
    recipe, machine = (Recipe.model_validate(told["recipe"]), Machine.model_validate(told["machine"]))
    leader = told["leader"]
    with patient() as asked:
        stop = deadline(recipe.search.minutes, time.monotonic(), asked)

        def orphaned() -> str | None:
            return stop() or (None if os.getppid() == leader else "the process that leads the search is gone")

        _, why, ran = take_part(recipe, [machine], os.environ[STORAGE], stop=orphaned)
    sys.stderr.write(f"{ran} trials; {why}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
