"""An edit as a PEFT adapter, beside the base model instead of a copy of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from perpend import __version__
from perpend.config import Machine, Recipe
from perpend.errors import UsageError
from perpend.export.adapter import AdapterResult, write_adapter
from perpend.export.card import CARD, base_front_matter
from perpend.options.asked import asked_of_source
from perpend.options.commands import AdapterOptions
from perpend.refs import ModelRef
from perpend.tasks.about import about, again, edit_facts, given, peak_memory
from perpend.tasks.apply import asked_for, original
from perpend.tasks.checks import Wanted, require_possible
from perpend.tasks.earlier import beside_edit
from perpend.tasks.forecast import Planned, forecast
from perpend.tasks.gguf import require_folder
from perpend.tasks.output import appearing, require_free, require_no_partial
from perpend.tasks.pages import put
from perpend.tasks.recipes import EDIT, pinned, write_recipe
from perpend.tasks.setup import open_session, require_fitting, versions

RANK = 16
"""Rank of an adapter of an edit that has none of its own."""


@dataclass(frozen=True)
class Adapted:
    """An adapter on disk."""

    output: str
    model: str
    adapter: AdapterResult
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "task": "adapter",
            "output": self.output,
            "model": self.model,
            "adapter": self.adapter.to_json(),
            "seconds": self.seconds,
        }


def adapter(
    source: str | Path,
    *,
    output: str | Path,
    edit: str | Path | None = None,
    rank: int = RANK,
    recipe: Recipe | None = None,
    machine: Machine | None = None,
    dry_run: bool = False,
    **options: Unpack[AdapterOptions],
) -> Adapted | Planned:
    """Write an edit as a PEFT adapter: exact in plain mode and, as DoRA, in row mode; in column mode to a rank.

    Args:
        source: A model with `edit`, or the `recipe.toml` that lies beside an edit.
        output: Folder to make: `adapter_config.json`, `adapter_model.safetensors`, the edit, the recipe, a card,
            `report.json`, `report.html`.
        edit: `edit.safetensors`, or the folder that `fit` or `run` made.
        rank: Of the adapter where the edit has none of its own: column mode, row mode of a model with fused experts.
        recipe: How the edit was made; by default that of the recipe beside the edit.
        machine: Device and dtype; the adapter does not depend on it.
        dry_run: Only say what would be read, and what of it is edited.
        **options: What `perpend adapter` takes, by name: over the recipe and the machine.

    Raises:
        UsageError: no model, no edit, an output that is not empty, or a model that PEFT refuses.
    """
    started, output = time.monotonic(), Path(output)
    source, recipe, machine = asked_of_source(adapter, AdapterOptions, options, source, recipe, machine)
    if rank < 1:
        raise UsageError(f"a rank of {rank}", where="--rank", valid=f"1 or more, {RANK} by default")
    require_folder(output)
    require_free(output)
    require_no_partial(output)
    model, chosen, found = asked_for(source, edit, recipe)
    ModelRef.parse(model)
    wanted = Wanted(edit=chosen)
    if dry_run:
        asked = forecast(model, found, machine, wanted, output=output)
        return Planned("adapter", model, str(output), asked)
    require_possible(model, found, machine, wanted)
    session = open_session(model, found, machine)
    require_fitting(session, chosen)
    ref, at = session.loaded.ref, session.loaded.source.revision
    base = ref.title
    with original(session, output, found, machine) as plain, appearing(output) as partial:
        folder, model_held = plain.path, plain.session.model
        made = write_adapter(folder, chosen, session.anatomy, model_held, partial, base=base, revision=at, rank=rank)
        chosen.save(partial / EDIT)
        write_recipe(partial, pinned(found, session.loaded), chosen)
        front = _front_matter(base if ref.kind == "hub" else None, base_front_matter(folder))
        (partial / CARD).write_text(_card(base, front, output.name, made), encoding="utf-8")
        adapted = Adapted(str(output), model, made, round(time.monotonic() - started, 1))
        command = again("adapter", found, machine, *given(rank=None if rank == RANK else rank))
        facts = about("adapter", session, found, machine, command) | {"peak_memory": peak_memory()}
        edited = {"versions": versions(), "about": facts, "edit": edit_facts(chosen, session.anatomy)}
        put(partial, adapted.to_json() | edited | beside_edit(Path(edit or source), chosen.sha256))
    return adapted


def _front_matter(base: str | None, passed_on: Mapping[str, Any]) -> str:
    """Return the front matter of a card: the hub's name of the base model, where it has one, and its licence."""
    from huggingface_hub import ModelCardData

    licence = {key: passed_on[key] for key in ("license", "license_name", "license_link") if passed_on.get(key)}
    tags = ["directional-ablation", "lora", "perpend"]
    return str(ModelCardData(base_model=base, library_name="peft", tags=tags, **licence).to_yaml()).strip()


def _card(base: str, front: str, title: str, made: AdapterResult) -> str:
    """Return a short card: what it is, how exact it is, how to load it, and what to mind."""
    exact = (
        "It is the edit itself, to the rounding of float32."
        if made.exact
        else (f"It is the edit to rank {made.rank}: of a module's change at most {100 * made.error:.2g} % is left out.")
    )
    return (
        f"---\n{front}\n---\n\n# {title}\n\n"
        f"An edit of {base} by Perpend {__version__} as a PEFT adapter (directional ablation). {exact}\n\n"
        "```python\nfrom peft import PeftModel\n\n"
        f'model = PeftModel.from_pretrained(base, "{title}")  # or .merge_and_unload()\n```\n\n'
        "The edit changes how the model behaves; where it takes refusals away, harmful requests are answered too, and "
        "nothing was put in their place. It is meant for research on interpretability and on the robustness of "
        "safeguards; do not put it before users without safeguards of your own. The base model's licence applies.\n"
    )
