"""What the card of an edited model says, gathered from what was asked and what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from perpend.config import METHODS, Recipe, to_toml
from perpend.core.edits import Edit
from perpend.export.card import CardFacts, describe
from perpend.export.shards import ExportResult
from perpend.models.quantised import packed_as
from perpend.models.session import Session
from perpend.tasks.gate import Gate
from perpend.tasks.portable import without_folders
from perpend.tasks.recipes import RECIPE, pinned
from perpend.tasks.setup import shipped, versions

if TYPE_CHECKING:
    from perpend.tasks.report import Report


def card_facts(
    session: Session,
    edit: Edit,
    recipe: Recipe,
    gate: Gate,
    export: ExportResult,
    output: Path,
    *,
    layer: float | None = None,
    report: Report | None = None,
) -> CardFacts:
    """Gather the facts of a card.

    Args:
        session: The model.
        edit: What was baked.
        recipe: What was asked.
        gate: What the saved file said.
        export: What was written.
        output: Folder of the edited model.
        layer: Layer that the direction was taken from, where there was one for all.
        report: What was measured on the report split; None for nothing.
    """
    source, ref = session.loaded.source, session.loaded.ref
    rank = max((len(part.directions) for part in edit.modules.values()), default=1)
    return CardFacts(
        base=ref.title,
        on_hub=ref.kind == "hub",
        components=describe(edit, session.anatomy),
        n_layers=session.n_layers,
        mode=recipe.edit.mode,
        method=METHODS[recipe.fit.method],
        direction=_origin(recipe, layer),
        measures=report.measures() if report else (),
        judge=report.kind if report else "dictionary only",
        judge_detail=report.judges() if report else "",
        command=f"perpend apply {RECIPE} -o {output.name}",
        revision=source.revision,
        sees=session.loaded.processor is not None,
        refusal=len(shipped(recipe)) == 2,
        title=output.name,
        rank=rank,
        schedule={name: str(getattr(recipe.edit, name)) for name in ("attention", "mlp")},
        drift=report.quantities() if report else (),
        packed="" if source.gguf_file else packed_as(source.path),
        gaps=tuple(str(gap) for gap in session.anatomy.gaps),
        leak=gate.worst,
        modified=tuple(sorted(export.changed)),
        leak_allowed=recipe.export.allow_leak and any(not row.ok for row in gate.leak),
        not_measured=() if report else ("anything on prompts of the report split: `perpend eval` measures it",),
        recipe=to_toml(without_folders(pinned(recipe, session.loaded)).model_dump(mode="json")),
        versions=versions(),
    )


def _origin(recipe: Recipe, layer: float | None) -> str:
    """Return where the direction came from, in words."""
    told = "as `edit.safetensors` holds them, module by module" if layer is None else f"of layer {layer:g}"
    return told + (", refined by gradient descent" if recipe.fit.refined else "")
