"""The recipe beside the weights: what was asked, and the edit that came of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perpend import __version__
from perpend.config import Recipe, load, read_toml, to_toml
from perpend.errors import UsageError

if TYPE_CHECKING:
    from perpend.core.edits import Edit
    from perpend.models.load import Loaded

RECIPE, EDIT, DIRECTIONS = "recipe.toml", "edit.safetensors", "directions.safetensors"


@dataclass(frozen=True)
class Written:
    """A recipe read back with its edit."""

    recipe: Recipe
    edit: Edit


def pinned(recipe: Recipe, loaded: Loaded) -> Recipe:
    """Return the recipe with the commit of a model from the hub, so that it names these weights for good."""
    ref, revision = loaded.ref, loaded.source.revision
    return recipe.for_model(f"{ref.name}@{revision}") if ref.kind == "hub" and revision else recipe


def write_recipe(folder: Path, recipe: Recipe, edit: Edit) -> None:
    """Write `recipe.toml`, which names the edit file beside it by its hash."""
    result = {"perpend": __version__, "recipe_hash": recipe.hash(), "edit": EDIT, "edit_sha256": edit.sha256}
    text = to_toml({**recipe.model_dump(mode="json"), "result": result})
    (folder / RECIPE).write_text(text, encoding="utf-8")


def read_recipe(path: Path) -> Written:
    """Read a recipe written beside an edit, and the edit.

    Raises:
        UsageError: no recipe, no edit beside it, or an edit of another hash.
    """
    from perpend.core.edits import Edit

    recipe, result = load(path), _result(path)
    if "edit" not in result:
        raise UsageError(
            "names no edit: it says what to do and not yet what was found", where=str(path), hint="perpend run --config"
        )
    name = str(result["edit"])
    if Path(name).name != name:
        raise UsageError(f"names an edit that is not beside it: {name[:200]}", where=str(path), valid=EDIT)
    edit = Edit.load(path.parent / name)
    if edit.sha256 != result.get("edit_sha256"):
        raise UsageError("the edit beside it is not the one it was written with", where=str(path))
    return Written(recipe, edit)


def _result(path: Path) -> dict[str, Any]:
    """Return what a recipe says of its result; empty where it says nothing."""
    result = read_toml(path).get("result", {})
    if not isinstance(result, dict):
        raise UsageError("result is not a table", where=str(path), valid="[result], as perpend writes it")
    return result


def beside(path: Path, edit: Edit) -> Recipe | None:
    """Return the recipe that `edit` was made with, from beside it; None where there is none.

    Args:
        path: Where the edit was read from: a file, or the folder that holds it.
        edit: What was read there.
    """
    file = (path if path.is_dir() else path.parent) / RECIPE
    if not file.is_file() or _result(file).get("edit_sha256") != edit.sha256:
        return None
    return load(file)


def find_edit(path: Path) -> Edit:
    """Read an edit from its file, from a folder that holds one, or from a recipe beside one.

    Raises:
        UsageError: there is none.
    """
    from perpend.core.edits import Edit

    if path.suffix == ".toml":
        return read_recipe(path).edit
    return Edit.load(path / EDIT if path.is_dir() else path)


def require_written(asked: Recipe, made: Recipe, path: Path) -> None:
    """Refuse a recipe that asks for another model, fit or edit than the one that an edit was written with.

    Args:
        asked: What is to be done now.
        made: What was read from `path`.
        path: The recipe beside the edit.

    Raises:
        UsageError: names the keys that differ.
    """
    now, then = _values(asked, ("fit", "edit")), _values(made, ("fit", "edit"))
    keys = [key for key in now if now[key] != then[key]]
    _require_none(([] if asked.model.id == made.model.id else ["model.id"]) + keys, path)


def laid_over(asked: Recipe, made: Recipe, edit: Path) -> Recipe:
    """Return the recipe that an edit was made with, for the model that is asked for now.

    Args:
        asked: Its model is taken, and what it says of replies and export that is not the default.
        made: The recipe beside the edit; everything else is taken from it.
        edit: Where the edit was read from.

    Raises:
        UsageError: `asked` says of prompts, fit or edit what is neither the default nor what was written.
    """
    path = (edit if edit.is_dir() else edit.parent) / RECIPE
    _require_none(_changed(asked, made, ("fit", "edit")), path)
    if others := _changed(asked, made, ("prompts", "seed")):
        hint = f"perpend apply {path}, which takes other prompts"
        raise UsageError(f"the edit beside it was made with another {', '.join(others)}", where=str(path), hint=hint)
    usual = Recipe()

    def over(name: str) -> Any:
        given = {key: value for key, value in getattr(asked, name) if value != getattr(getattr(usual, name), key)}
        return getattr(made, name).model_copy(update=given)

    return made.model_copy(update={"model": asked.model, "eval": over("eval"), "export": over("export")})


def _changed(asked: Recipe, made: Recipe, sections: tuple[str, ...]) -> list[str]:
    """Return the keys of which `asked` says neither the default nor what `made` says."""
    now, then, usual = (_values(recipe, sections) for recipe in (asked, made, Recipe()))
    return [key for key in now if now[key] not in (usual[key], then[key])]


def _values(recipe: Recipe, sections: tuple[str, ...]) -> dict[str, Any]:
    """Return the values of some sections by dotted key."""
    data = recipe.model_dump(mode="json", include=set(sections))
    tables = {name: part if isinstance(part, dict) else {"": part} for name, part in data.items()}
    return {f"{name}.{key}".rstrip("."): value for name, table in tables.items() for key, value in table.items()}


def _require_none(keys: list[str], path: Path) -> None:
    if keys:
        raise UsageError(
            f"the edit beside it is fixed, and another {', '.join(keys)} asks for another edit",
            where=str(path),
            hint=f"perpend run --config {path}",
        )
