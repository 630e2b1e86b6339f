"""The recipe beside the weights: what was asked, and the edit that came of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from perpend import __version__
from perpend.config import Recipe, load, read_toml, to_toml
from perpend.core.edits import Edit
from perpend.errors import UsageError

RECIPE, EDIT, DIRECTIONS = "recipe.toml", "edit.safetensors", "directions.safetensors"


@dataclass(frozen=True)
class Written:
    """A recipe read back with its edit."""

    recipe: Recipe
    edit: Edit


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
    recipe, result = load(path), read_toml(path).get("result") or {}
    if "edit" not in result:
        raise UsageError(
            "names no edit: it says what to do and not yet what was found", where=str(path), hint="perpend run --config"
        )
    edit = Edit.load(path.parent / str(result["edit"]))
    if edit.sha256 != result.get("edit_sha256"):
        raise UsageError("the edit beside it is not the one it was written with", where=str(path))
    return Written(recipe, edit)


def beside(path: Path, edit: Edit) -> Recipe | None:
    """Return the recipe that `edit` was made with, from beside it; None where there is none.

    Args:
        path: Where the edit was read from: a file, or the folder that holds it.
        edit: What was read there.
    """
    file = (path if path.is_dir() else path.parent) / RECIPE
    if not file.is_file() or (read_toml(file).get("result") or {}).get("edit_sha256") != edit.sha256:
        return None
    return load(file)


def find_edit(path: Path) -> Edit:
    """Read an edit from its file, from a folder that holds one, or from a recipe beside one.

    Raises:
        UsageError: there is none.
    """
    if path.suffix == ".toml":
        return read_recipe(path).edit
    return Edit.load(path / EDIT if path.is_dir() else path)
