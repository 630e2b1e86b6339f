"""What a model is made of and what of it can be edited."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Unpack

from perpend.config import Machine, Recipe
from perpend.export.gguf_file import require_absent
from perpend.models.anatomy import Anatomy
from perpend.models.chat import Chat, has_template, read_template
from perpend.models.load import Loaded, load_model
from perpend.options.asked import asked, path_of
from perpend.options.commands import InspectOptions
from perpend.refs import ModelRef
from perpend.tasks.forecast import Planned, forecast
from perpend.tasks.output import to_text
from perpend.whole import write_file


@dataclass(frozen=True)
class Inspection:
    """The anatomy of a model."""

    model: str
    architecture: str
    dtype: str
    n_layers: int
    hidden_size: int
    writers: int
    parameters: int
    """Elements of the matrices that can be edited."""
    coverage: tuple[dict[str, Any], ...]
    gaps: tuple[str, ...]
    post_norms: int
    """Writers with a norm between them and the residual stream."""
    chat: dict[str, Any]
    """How prompts are put; `{"template": "none"}` where the model has no chat template and none is given."""
    overrides: str
    """The writers as a `[edit.overrides]` table, ready to paste into a recipe."""
    output: str | None = None
    """File that was written."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def inspect(
    model: str | None = None,
    *,
    output: str | Path | None = None,
    recipe: Recipe | None = None,
    machine: Machine | None = None,
    dry_run: bool = False,
    **options: Unpack[InspectOptions],
) -> Inspection | Planned:
    """Find every module that writes to the residual stream.

    Args:
        model: Hub id with `@revision`, directory or GGUF file; None takes the recipe's.
        output: File to write the result to, as JSON.
        recipe: Overrides.
        machine: Device and dtype.
        dry_run: Only say what would be read.
        **options: What `perpend inspect` takes, by name: over the recipe and the machine.

    Raises:
        UsageError: the model cannot be read, has no decoder layers that can be found, or the output is there already.
    """
    recipe, machine = asked(inspect, InspectOptions, options, model, recipe, machine)
    model, file = recipe.model.id, path_of(output)
    if file is not None:
        require_absent([file])
    if dry_run:
        cost = forecast(model, recipe, machine, output=file)
        return Planned("inspect", model, None if file is None else str(file), cost)
    loaded = load_model(ModelRef.parse(model), machine)
    anatomy = Anatomy.of(loaded.model, recipe.edit.overrides or None)
    rows = anatomy.coverage()
    made = Inspection(
        model=model,
        architecture=anatomy.architecture,
        dtype=str(loaded.dtype).removeprefix("torch."),
        n_layers=anatomy.n_layers,
        hidden_size=anatomy.hidden_size,
        writers=len(anatomy.writers),
        parameters=sum(row.parameters for row in rows),
        coverage=tuple(asdict(row) for row in rows),
        gaps=tuple(str(gap) for gap in anatomy.gaps),
        post_norms=sum(w.post_norm is not None for w in anatomy.writers),
        chat=_chat(loaded, recipe),
        overrides=anatomy.to_toml(),
        output=None if file is None else str(file),
    )
    if file is not None:
        write_file(file, (to_text(made.to_json()) + "\n").encode("utf-8"), replace=False)
    return made


def _chat(loaded: Loaded, recipe: Recipe) -> dict[str, Any]:
    """Say how prompts are put; a model without a chat template can be looked at all the same."""
    given = recipe.prompts.chat_template
    if given is None and not has_template(loaded.tokenizer, loaded.processor):
        return {"template": "none"}
    template = read_template(given) if given is not None else None
    return Chat(loaded.tokenizer, loaded.processor, recipe.prompts.system, template).describe()
