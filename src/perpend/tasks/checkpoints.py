"""Checkpoints that are examined tensor by tensor: no model is built of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from perpend.config import Machine
from perpend.errors import UsageError
from perpend.export.checkpoint import Checkpoint
from perpend.models.headers import TensorEntry
from perpend.models.memory import free_memory, pick_device
from perpend.refs import ModelRef, Resolved
from perpend.tasks.checks import local
from perpend.tasks.forecast import Forecast, Planned, disk_free, reading_rate


def checkpoint_of(model: str) -> Resolved:
    """Return where a safetensors checkpoint is; downloaded first where it is not here.

    Raises:
        UsageError: no such model, or a GGUF file.
    """
    return _compared(ModelRef.parse(model).resolve(), model)


def _compared(source: Resolved, model: str) -> Resolved:
    if source.gguf_file:
        raise UsageError("a GGUF file: only safetensors checkpoints are compared", where=model)
    return source


def reading(task: str, models: Sequence[str], machine: Machine, *, output: Path | None = None) -> Planned:
    """Say what a task would read that goes through checkpoints tensor by tensor and builds no model.

    Args:
        task: Its name.
        models: Hub ids or directories; nothing is fetched.
        machine: Where.
        output: File that would be written.

    Raises:
        UsageError: a checkpoint that is here cannot be read.
    """
    here = [_tensors(model) for model in models]
    known = [tensors for tensors in here if tensors is not None]
    complete = len(known) == len(here)
    size = sum(t.nbytes for tensors in known for t in tensors) if complete else None
    asked = Forecast(
        reads=size,
        writes=1 << 20 if output else 0,
        disk_free=disk_free(output),
        memory=sum(max(t.nbytes for t in tensors) for tensors in known) if complete else None,
        memory_free=free_memory(pick_device(machine.device), machine.memory),
        parameters=None if here[0] is None else sum(math.prod(t.shape) for t in here[0]),
        edited_modules=None,
        edited_parameters=None,
        prompts=0,
        new_tokens=0,
        seconds=round(size / reading_rate(ModelRef.parse(models[0])), 1) if size is not None else None,
        bytes_read=size,
    )
    return Planned(task, models[0], str(output) if output else None, asked)


def _tensors(model: str) -> list[TensorEntry] | None:
    """Return the tensors of a checkpoint; None where it is on the hub alone."""
    source = local(ModelRef.parse(model))
    return None if source is None else list(Checkpoint(_compared(source, model).path).tensors.values())
