"""Acceptance of a model and of an edit of it, as they are and with all layers quantised, on the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from perpend.config import Machine, Recipe
from perpend.core.edits import Edit, edit_bias
from perpend.core.quant import GROUP, simulate
from perpend.export.checkpoint import Checkpoint
from perpend.export.survey import Survey
from perpend.judges.judgement import Judgement
from perpend.judges.panel import Comparison, compare
from perpend.models.memory import release
from perpend.models.session import Session
from perpend.models.simulated import quantise, require_plain
from perpend.tasks.measure import ask, judge
from perpend.tasks.setup import open_panel, open_session, open_splits, require_fitting

OWN = "own"
"""The weights as the checkpoint has them, or as the edit would be saved."""


@dataclass(frozen=True)
class Replies:
    """Judgements of the same target prompts, by `base@own`, `edit@own`, `base@q4_0`, `edit@q4_0` and so on."""

    judged: dict[str, Judgement]

    def compared(self) -> dict[str, Comparison]:
        """Return what is to be told apart: what the edit does, what quantising does alone, and to the edit."""
        found = {}
        for name in self.judged:
            side, _, kind = name.partition("@")
            if kind != OWN:
                found[f"{side}@{OWN} → {name}"] = compare(self.judged[f"{side}@{OWN}"], self.judged[name])
            if side == "edit":
                found[f"base@{kind} → {name}"] = compare(self.judged[f"base@{kind}"], self.judged[name])
        return found

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "judged": {name: judgement.to_json() for name, judgement in self.judged.items()},
            "compared": {name: comparison.to_json() for name, comparison in self.compared().items()},
        }


def replies(model: str, edit: Edit | None, kinds: Sequence[str], recipe: Recipe, machine: Machine) -> Replies:
    """Let a model reply to the targets of the report split, untouched and edited, as it is and after each plain pass.

    Weights are overwritten in memory, so the model is loaded once per type and once as it is; two are never in memory.

    Args:
        model: The untouched model.
        edit: What would be baked; None measures quantising alone.
        kinds: Types of the plain passes.
        recipe: Prompts, replies, judges, and rounding of the edit.
        machine: Device and dtype. Values of a quantised file are exact in float32 and rounded once more in bfloat16.

    Raises:
        UsageError: the model, the prompts or the edit cannot be read, or the weights are not in memory.
    """
    prompts, panel = list(open_splits(recipe).report.target), open_panel(recipe, machine)
    judged: dict[str, Judgement] = {}
    for kind in (OWN, *kinds):
        session = open_session(model, recipe, machine)
        if edit is not None:
            require_fitting(session, edit)
        survey = Survey(Checkpoint(session.loaded.source.path), session.model, session.anatomy, edit)
        if kind != OWN:
            quantise(session.model, session.anatomy, kind)
        judged[f"base@{kind}"] = judge(prompts, ask(session, prompts, recipe), panel).judged
        if edit is not None:
            put(session, survey, edit, kind, recipe.export.rounding)
            judged[f"edit@{kind}"] = judge(prompts, ask(session, prompts, recipe), panel).judged
        release(session.model)
    return Replies(judged)


def put(session: Session, survey: Survey, edit: Edit, kind: str, rounding: str) -> None:
    """Overwrite the edited writers in memory by their edit, as it would be saved and then quantised.

    Args:
        session: The model; its other matrices stay as they are.
        survey: Of its files, with the edit.
        edit: The edit.
        kind: Type of the plain pass, or `own` for none.
        rounding: As in the recipe.
    """
    for name, part in edit.modules.items():
        if part.weight == 0:
            continue
        writer = session.anatomy.writer(name)
        parameter, bias = writer.weight(session.model), writer.bias_of(session.model)
        require_plain(writer.key, parameter)
        for piece, saved in survey.saved(writer, rounding):
            held = kind != OWN and saved.shape[1] % GROUP == 0
            writer.assign(parameter.data, simulate(saved.contiguous(), kind) if held else saved, piece.expert)
            if bias is not None:
                own = bias.data if piece.expert is None else bias.data[piece.expert]
                own.copy_(edit_bias(own, part, survey.read(piece)))
