"""What most tasks begin with: a session on the model and the prompts of the recipe."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path
from typing import Any

from perpend import __version__
from perpend.config import ExportSection, Machine, Recipe, SearchSection
from perpend.core.edits import Edit
from perpend.data import Splits, load_splits
from perpend.judges.panel import Panel
from perpend.models.chat import read_template
from perpend.models.load import Loaded, load_model, unloaded
from perpend.models.memory import release
from perpend.models.session import Sampling, Session
from perpend.models.vllm import VllmSession
from perpend.progress import note
from perpend.refs import ModelRef
from perpend.serving.duet import Duet
from perpend.tasks.checks import Wanted, require_possible, require_writers
from perpend.tasks.recipes import find_edit


def open_session(model: str, recipe: Recipe, machine: Machine) -> Session:
    """Load a model; its prompts are checked by then, so that nothing large is read for a misspelt column.

    Raises:
        UsageError: the model cannot be read or has no chat template.
    """
    if recipe.prompts.chat_template is not None:
        read_template(recipe.prompts.chat_template)
    loaded = load_model(ModelRef.parse(model), machine)
    return as_asked(loaded, recipe, machine)


def open_engine(model: str, recipe: Recipe, machine: Machine, adapter: Path | None) -> Session:
    """Open a model in the engine that is asked for; with vLLM, with an adapter where there is one.

    Raises:
        UsageError: the model or the adapter cannot be read.
        MissingExtra: vLLM is not installed.
    """
    if machine.engine != "vllm":
        return open_session(model, recipe, machine)
    prompts, loaded = recipe.prompts, unloaded(ModelRef.parse(model), machine)
    return VllmSession(loaded, machine, adapter=adapter, system=prompts.system, chat_template=prompts.chat_template)


def as_asked(loaded: Loaded, recipe: Recipe, machine: Machine) -> Session:
    """Wrap a loaded model the way a recipe says: system prompt, chat template, writers named by hand.

    Raises:
        UsageError: no chat template, or one that cannot be read.
    """
    prompts, overrides = recipe.prompts, recipe.edit.overrides or None
    return Session(loaded, machine, system=prompts.system, chat_template=prompts.chat_template, overrides=overrides)


def open_duet(model: str, recipe: Recipe, machine: Machine, edit: Path | None) -> Duet:
    """Load a model to talk to, and read the edit that can be put in place.

    Raises:
        UsageError: the model or the edit cannot be read, or the edit is not one of this model.
    """
    chosen = find_edit(Path(edit)) if edit is not None else None
    require_possible(model, recipe, machine, Wanted(edit=chosen, judged=True))
    session = open_session(model, recipe, machine)
    if chosen is not None:
        require_fitting(session, chosen)
    return Duet(session, chosen, lambda: open_panel(recipe, machine))


def as_stored(session: Session, recipe: Recipe, machine: Machine) -> tuple[Session, Machine]:
    """Return a session on the weights as they are stored, in which an export is made and proven.

    A model that was quantised to measure is released and read again; every other session is returned as it is.
    """
    if machine.quantization == "none":
        return session, machine
    note("the export is made and proven on the weights as they are stored: the model is read again")
    release(session.model)
    machine = machine.model_copy(update={"quantization": "none"})
    return open_session(str(session.loaded.ref), recipe, machine), machine


def shipped(recipe: Recipe) -> list[str]:
    """Return the classes whose prompts are the shipped ones."""
    return [side for side in ("target", "baseline") if getattr(recipe.prompts, side).split("#")[0] == f"perpend:{side}"]


def open_splits(recipe: Recipe) -> Splits:
    """Read the prompts of a recipe, and say so when those of a class are the shipped ones."""
    splits = load_splits(recipe.prompts)
    own = shipped(recipe)
    if len(own) == 2:
        note("no prompts given: using the shipped sets (perpend:target, perpend:baseline)")
    for side in own if len(own) == 1 else ():
        note(f"no {side} prompts given: using the shipped set (perpend:{side})")
    return splits


def require_fitting(session: Session, edit: Edit) -> None:
    """Refuse an edit of another model, before anything is made with this one.

    Raises:
        UsageError: names a module that is no writer here, or has another width.
    """
    require_writers(session.anatomy, edit)


def open_panel(recipe: Recipe, machine: Machine) -> Panel:
    """Return the judges; where the classifier cannot be had, the panel says that it is a dictionary alone."""
    panel = Panel.load(recipe.eval.classifier, machine)
    if panel.kind != "hybrid":
        note(f"rates are by dictionary only, not the hybrid rate: {panel.reason}")
    return panel


def sampling(session: Session, recipe: Recipe) -> Sampling | None:
    """Return the model's own sampling settings when the recipe asks for them, else None: greedy."""
    return Sampling.of(session.model, recipe.seed) if recipe.eval.sample else None


def versions() -> dict[str, str]:
    """Return the versions that decide numbers."""
    import torch
    import transformers

    return {
        "perpend": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def journal_key(task: str, model: str, recipe: Recipe, machine: Machine, splits: Splits) -> dict[str, Any]:
    """Return what decides the partial results of a task; the cost of a search and what the export must pass do not."""
    return {
        "task": task,
        "model": model,
        "recipe": recipe.model_copy(update={"export": ExportSection(), "search": SearchSection()}).hash(),
        "prompts": [prompts.fingerprint for prompts in splits.sets()],
        "chat_template": template_hash(recipe),
        "dtype": machine.dtype,
        **({"quantization": machine.quantization} if machine.quantization != "none" else {}),
        "batch_size": machine.batch_size,
        **versions(),
    }


def template_hash(recipe: Recipe) -> str | None:
    """Return the SHA-256 of the chat template that a recipe reads in place of the model's own; None without one."""
    template = recipe.prompts.chat_template
    return hashlib.sha256(read_template(template).encode()).hexdigest() if template else None
