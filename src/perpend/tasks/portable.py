"""A recipe for a text that travels: without the folders of one machine."""

from __future__ import annotations

from pathlib import Path

from perpend.config import Recipe
from perpend.refs import SUFFIXES

SOURCES = ("target", "baseline", "target_select", "baseline_select", "target_report", "baseline_report")
"""Keys of the prompts section that name prompts."""


def without_folders(recipe: Recipe) -> Recipe:
    """Return the recipe with local paths reduced to the names of their files; also of files that are gone by now."""
    prompts = recipe.prompts
    sources = {key: _data(getattr(prompts, key)) for key in SOURCES}
    sources["chat_template"] = Path(prompts.chat_template).name if prompts.chat_template else None
    judge = recipe.eval.model_copy(update={"classifier": named(recipe.eval.classifier)})
    sections = {"prompts": prompts.model_copy(update=sources), "eval": judge}
    return recipe.for_model(named(recipe.model.id)).model_copy(update=sections)


def named(text: str) -> str:
    """Return the name of a local file or folder without where it lies, and every other text as it is."""
    path = Path(text).expanduser()
    local = text.startswith((".", "~")) or path.is_absolute() or path.exists()
    return path.resolve().name if text and local else text


def _data(text: str | None) -> str | None:
    name, sign, options = (text or "").partition("#")
    return Path(name).name + sign + options if name.lower().endswith(SUFFIXES) else text
