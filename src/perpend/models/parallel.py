"""Several processes, started by `torchrun` or `accelerate launch`, that work on one task.

Data parallel: every process holds the model and takes its share of the batches; what they found is exchanged, so that
each process goes on with the very residuals, replies and likelihoods that one process would have. Batches are the same
as in one process, and sums are made in the order of the prompts, so the results are too, to the bit.

Tensor parallel: the processes share every matrix and run the same batches; transformers exchanges what is needed.

The first process alone writes and prints; the others write to a folder that is thrown away.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch

from perpend.config import Machine
from perpend.errors import RunFailed, UsageError
from perpend.launched import rank, size

T = TypeVar("T")

WAIT = timedelta(hours=2)
"""How long a process waits for the others: a batch of a large model that is read from disk takes its time."""

_groups: list[Any] = []


@dataclass(frozen=True)
class World:
    """The processes that share the batches.

    Attributes:
        rank: This one.
        size: How many; 1 also where they share every matrix instead.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, machine: Machine) -> World:
        """Join the other processes.

        Raises:
            UsageError: tensor parallel over another number of processes than there are.
        """
        asked = machine.tensor_parallel
        if asked > 1 and asked != size():
            hint = f"torchrun --nproc-per-node {asked} -m perpend ... --tensor-parallel {asked}"
            raise UsageError(
                f"tensor parallel over {asked} processes, of which {size()} run", where="--tensor-parallel", hint=hint
            )
        if size() == 1:
            return cls()
        join()
        return cls() if asked > 1 else cls(rank(), size())

    def exchange(self, found: T, error: BaseException | None = None) -> list[T]:
        """Give every process what each of them found, in their order; what one failed with fails all.

        Raises:
            RunFailed: another process failed; says with what.
        """
        if self.size == 1:
            if error is not None:
                raise error
            return [found]
        parts: list[Any] = [None] * self.size
        said = None if error is None else f"{type(error).__name__}: {error}"
        torch.distributed.all_gather_object(parts, (said, found if error is None else None), group=_groups[0])
        if error is not None:
            raise error
        for number, (problem, _) in enumerate(parts):
            if problem is not None:
                raise RunFailed(f"process {number} failed: {problem}")
        return [part for _, part in parts]


def join() -> None:
    """Open the process groups: one for the model's device, one for what is exchanged through main memory."""
    if _groups:
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=WAIT
        )
    _groups.append(torch.distributed.new_group(backend="gloo", timeout=WAIT))


def leave() -> None:
    """Close the process groups; does nothing in a single process."""
    if _groups:
        _groups.clear()
        torch.distributed.destroy_process_group()


@contextmanager
def shared(out: Path) -> Iterator[Path]:
    """Give the output to the first process, and to every other a path in a folder that is removed afterwards.

    Partial results of an interrupted task that lie beside the output are given to all, so that all go on from there.
    """
    if size() == 1:
        yield out
        return
    join()
    folder = Path(tempfile.mkdtemp(prefix="perpend-")) if rank() else None
    own = out if folder is None else folder / out.name
    kept = out.with_name(out.name + ".resume")
    box: list[Any] = [_packed(kept) if folder is None else None]
    torch.distributed.broadcast_object_list(box, src=0, group=_groups[0])
    if folder is not None:
        for name, data in (box[0] or {}).items():
            path = own.with_name(own.name + ".resume") / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    try:
        yield own
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _packed(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}
