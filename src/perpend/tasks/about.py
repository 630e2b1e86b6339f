"""Provenance: which weights, which recipe, which machine, and what to type to have it again."""

from __future__ import annotations

import datetime
import os
import platform
import resource
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch import Tensor

from perpend.config import Machine, Recipe, to_toml
from perpend.core.edits import Edit
from perpend.models.anatomy import Anatomy
from perpend.models.session import Session
from perpend.refs import ModelRef
from perpend.tasks.portable import named, without_folders
from perpend.tasks.recipes import RECIPE, pinned

Task = Literal[
    "run",
    "search",
    "fit",
    "apply",
    "adapter",
    "eval",
    "bench",
    "export_gguf",
    "vector",
    "diff",
    "organism",
]


def about(task: Task, session: Session, recipe: Recipe, machine: Machine, command: str = "") -> dict[str, Any]:
    """Return what decides a result, as plain JSON values; to be asked while the model is in memory.

    Local paths are reduced to the names of their files, since a report travels.

    Args:
        task: What was done.
        session: The model.
        recipe: What was asked.
        machine: How it was run.
        command: What to type to have it again, where that is more than the recipe.
    """
    source, loaded = session.loaded.source, session.loaded
    weights = list(session.model.parameters())
    model = model_facts(
        loaded.ref, source.revision, session.anatomy, weights, str(weights[0].dtype).removeprefix("torch.")
    )
    found = origin(task, command or again(task, recipe, machine), pinned(recipe, loaded), model)
    own = {"engine": session.engine, "device": _device(session.device), "batch_size": machine.batch_size}
    return found | {"recipe_hash": recipe.hash(), "machine": found["machine"] | own}


def origin(
    task: Task, command: str, recipe: Recipe | None = None, model: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return what decides a result that no model was run for, as plain JSON values.

    Args:
        task: What was done.
        command: What to type to have it again.
        recipe: What was asked, where that was a recipe.
        model: What `model_facts` says of the model, where it is known.
    """
    asked = {}
    if recipe is not None:
        shown = to_toml(without_folders(recipe).model_dump(mode="json"))
        asked = {"recipe": shown, "recipe_hash": recipe.hash(), "seed": recipe.seed}
    return {
        "task": task,
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        **asked,
        **({"model": dict(model)} if model else {}),
        "machine": {
            "device": "cpu",
            "system": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory": psutil.virtual_memory().total,
        },
    }


def model_facts(
    ref: ModelRef, revision: str | None, anatomy: Anatomy, weights: Iterable[Tensor], dtype: str
) -> dict[str, Any]:
    """Return what a model is, as plain JSON values; its weights may be without numbers."""
    return {
        "id": ref.title,
        "kind": ref.kind,
        "revision": revision,
        "architecture": anatomy.architecture,
        "parameters": sum(weight.numel() for weight in weights),
        "layers": anatomy.n_layers,
        "hidden_size": anatomy.hidden_size,
        "dtype": dtype,
    }


def typed(*words: str | Path | None) -> str:
    """Return a command as it is typed, with the names of local files instead of their folders."""
    shown = (named(str(word)) for word in words if word is not None)
    return "perpend " + " ".join(shlex.quote(word) for word in shown)


def again(task: Task, recipe: Recipe, machine: Machine, *more: str | Path | None) -> str:
    """Return what to type to have a result again, beside its recipe: what was asked, and what of the machine decides.

    Args:
        task: What was done. A search is not repeated: its recipe is that of the edit which was found.
        recipe: What was asked.
        machine: How it was run.
        more: Options of this task alone; None for one that was not given.
    """
    verb = "run" if task == "search" else task
    verb = "apply" if verb == "run" and recipe.fit.refined else verb  # such a direction is not measured again
    source = [RECIPE] if verb in ("apply", "adapter") else ["--config", RECIPE]
    line = typed(verb, *source, *more, *by_machine(machine), "-o", "OUT")
    return f"torchrun --nproc-per-node {machine.tensor_parallel} -m {line}" if machine.tensor_parallel > 1 else line


def given(**options: object) -> list[str]:
    """Return options as they are typed, by their names; those that are None or False were not given."""
    found: list[str] = []
    for name, value in options.items():
        if value is not None and value is not False:
            found += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return found


def by_machine(machine: Machine) -> list[str]:
    """Return the options of a machine that decide figures, where they are not the default."""
    found: list[str] = []
    for name in DECIDING:
        value, usual = getattr(machine, name), Machine.model_fields[name].default
        for one in value if isinstance(value, tuple) else [value] if value != usual else ():
            found += given(**{name: one})
    return found


DECIDING = (
    "device",
    "dtype",
    "batch_size",
    "quantization",
    "device_map",
    "tensor_parallel",
    "engine",
    "trust_remote_code",
)
"""Keys of the machine by which figures differ, if only in rounding; memory and offloading are of this machine alone."""


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory() -> dict[str, int]:
    """Return the most memory in use so far, in bytes: of this process, and of every CUDA device it used."""
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        found |= {f"cuda:{k}": torch.cuda.max_memory_allocated(k) for k in range(torch.cuda.device_count())}
    return found


def edit_facts(edit: Edit, anatomy: Anatomy) -> dict[str, Any]:
    """Return the weight factor of every module, with its layer and component, as plain JSON values."""
    writers = [anatomy.writer(name) for name in edit.modules]
    parts = edit.modules.values()
    return {
        "sha256": edit.sha256,
        "modes": sorted({part.mode for part in parts}),
        "rank": max((len(part.directions) for part in parts), default=0),
        "layers": anatomy.n_layers,
        "writers": len(anatomy.writers),
        "modules": [
            {"module": w.name, "layer": w.layer, "component": w.component, "weight": part.weight}
            for w, part in zip(writers, parts, strict=True)
        ],
    }
