"""Provenance: which weights, which recipe, which machine, and what to type to have it again."""

from __future__ import annotations

import datetime
import os
import platform
import resource
import sys
from typing import Any, Literal

import psutil
import torch

from perpend.config import Machine, Recipe, to_toml
from perpend.core.edits import Edit
from perpend.models.anatomy import Anatomy
from perpend.models.session import Session
from perpend.tasks.portable import without_folders
from perpend.tasks.recipes import RECIPE, pinned

Task = Literal["run", "search", "fit", "apply", "adapter", "eval", "bench"]


def about(task: Task, session: Session, recipe: Recipe, machine: Machine) -> dict[str, Any]:
    """Return what decides a result, as plain JSON values; to be asked while the model is in memory.

    Local paths are reduced to the names of their files, since a report travels.
    """
    source, ref = session.loaded.source, session.loaded.ref
    shown = without_folders(pinned(recipe, session.loaded))
    parameters = list(session.model.parameters())
    return {
        "task": task,
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": _COMMANDS[task],
        "recipe": to_toml(shown.model_dump(mode="json")),
        "recipe_hash": recipe.hash(),
        "seed": recipe.seed,
        "model": {
            "id": ref.title,
            "kind": ref.kind,
            "revision": source.revision,
            "architecture": session.anatomy.architecture,
            "parameters": sum(p.numel() for p in parameters),
            "layers": session.n_layers,
            "hidden_size": session.hidden_size,
            "dtype": str(parameters[0].dtype).removeprefix("torch."),
        },
        "machine": {
            "engine": session.engine,
            "device": _device(session.device),
            "batch_size": machine.batch_size,
            "system": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory": psutil.virtual_memory().total,
        },
    }


_COMMANDS: dict[Task, str] = {
    "run": f"perpend run --config {RECIPE} -o OUT",
    "search": f"perpend run --config {RECIPE} -o OUT",
    "fit": f"perpend fit --config {RECIPE} -o OUT",
    "apply": f"perpend apply {RECIPE} -o OUT",
    "adapter": f"perpend adapter {RECIPE} -o OUT",
    "eval": f"perpend eval --config {RECIPE} --edit EDIT -o OUT",
    "bench": f"perpend bench --config {RECIPE} --edit EDIT -o OUT",
}


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
