"""What can be refused before weights are read: by a dry run, and by the work itself before it loads a model."""

from __future__ import annotations

from dataclasses import dataclass

from perpend.config import Machine, Recipe
from perpend.core.edits import Edit
from perpend.errors import UsageError, nearest
from perpend.fitting.accumulate import fixed_position, require_measured
from perpend.fitting.fit import fixed_layer
from perpend.fitting.plan import weight_factors
from perpend.judges.classifier import require_judge
from perpend.models.anatomy import Anatomy
from perpend.models.chat import read_template
from perpend.models.load import skeleton
from perpend.refs import ModelRef, Resolved
from perpend.searching.space import Space


@dataclass(frozen=True)
class Wanted:
    """What a task does with a model, as far as it can be checked beforehand.

    Attributes:
        fits: Whether directions are measured and an edit is planned.
        searches: Whether the edit is searched for.
        judged: Whether replies are judged.
        edit: The edit, where it is there already.
    """

    fits: bool = False
    searches: bool = False
    judged: bool = False
    edit: Edit | None = None

    @property
    def changes(self) -> bool:
        """Whether the model is edited."""
        return self.fits or self.edit is not None


def local(ref: ModelRef) -> Resolved | None:
    """Return the files of a model without fetching any; None where it is on the hub alone.

    Raises:
        UsageError: no such directory or file.
    """
    try:
        return ref.resolve(fetch=False)
    except UsageError:
        if ref.kind == "hub":
            return None
        raise


def require_sound(recipe: Recipe, wanted: Wanted) -> None:
    """Refuse what is wrong whatever the model: the chat template, the classifier, a fit that contradicts itself.

    Raises:
        UsageError: says which, and what is valid.
    """
    if recipe.prompts.chat_template is not None:
        read_template(recipe.prompts.chat_template)
    if wanted.judged:
        require_judge(recipe.eval.classifier)
    if wanted.fits:
        require_measured(recipe.fit)
        if recipe.fit.layer != "auto" or wanted.searches:
            fixed_position(recipe.fit)


def require_of(anatomy: Anatomy, recipe: Recipe, wanted: Wanted) -> None:
    """Refuse what does not go with a model: an edit of another, a layer or weight factors that it does not have.

    Raises:
        UsageError: says which, and what is valid.
    """
    if wanted.edit is not None:
        require_writers(anatomy, wanted.edit)
    if not wanted.fits:
        return
    anatomy.require_complete(recipe.edit.allow_partial)
    weight_factors(anatomy, recipe.edit)
    fixed_layer(recipe, anatomy.n_layers)
    if wanted.searches:
        norms = any(writer.post_norm is not None for writer in anatomy.writers)
        _ = Space.of(recipe, anatomy.n_layers, post_norms=norms).distributions


def require_writers(anatomy: Anatomy, edit: Edit) -> None:
    """Refuse an edit of another model than the one that `anatomy` is of.

    Raises:
        UsageError: names a module that is no writer here, or has another width.
    """
    writers = {writer.name for writer in anatomy.writers}
    for name, part in edit.modules.items():
        if name not in writers:
            raise UsageError(
                f"edits {name}, which is no writer of this model", where="edit", hint=nearest(name, writers)
            )
        if part.directions.shape[1] != anatomy.hidden_size:
            raise UsageError(
                f"its directions have {part.directions.shape[1]} dimensions",
                where="edit",
                valid=f"{anatomy.hidden_size}, as the model",
            )


def require_possible(model: str, recipe: Recipe, machine: Machine, wanted: Wanted) -> None:
    """Refuse before weights are read what can be refused by then; of a model that is not here yet, what it decides not.

    Args:
        model: Hub id, directory or GGUF file.
        recipe: What is asked.
        machine: Names the models whose own Python code may run.
        wanted: What is done.

    Raises:
        UsageError: as `require_sound` and `require_of`, or the model's configuration cannot be read.
    """
    require_sound(recipe, wanted)
    ref = ModelRef.parse(model)
    source = local(ref) if wanted.changes else None
    if source is not None:
        require_of(Anatomy.of(skeleton(source, ref, machine), recipe.edit.overrides or None), recipe, wanted)
