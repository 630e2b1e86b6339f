"""What a model is made of and what of it can be edited."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from perpend.config import Machine, Recipe
from perpend.models.load import load_model
from perpend.models.session import Session
from perpend.refs import ModelRef


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
    overrides: str
    """The writers as a `[edit.overrides]` table, ready to paste into a recipe."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def inspect(model: str, *, recipe: Recipe | None = None, machine: Machine | None = None) -> Inspection:
    """Find every module that writes to the residual stream.

    Args:
        model: Hub id with `@revision`, directory or GGUF file.
        recipe: Overrides and `trust_remote_code`.
        machine: Device and dtype.

    Raises:
        UsageError: the model cannot be read, or has no decoder layers that can be found.
    """
    recipe, machine = recipe or Recipe(), machine or Machine()
    loaded = load_model(ModelRef.parse(model), machine, trust_remote_code=recipe.model.trust_remote_code)
    session = Session(loaded, machine, overrides=recipe.edit.overrides or None)
    anatomy = session.anatomy
    rows = anatomy.coverage()
    return Inspection(
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
        chat=session.chat.describe(),
        overrides=anatomy.to_toml(),
    )
