"""The recipe as a document: shown, written with comments, checked."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Unpack, get_args, get_origin

from pydantic import BaseModel

from perpend.config import METHODS, MODES, RULES, Recipe, keys, load, to_toml
from perpend.core.schedule import KINDS
from perpend.errors import UsageError
from perpend.options.asked import asked, choices
from perpend.options.commands import ConfigOptions
from perpend.whole import write_file

_SEPARATE = ("target_select", "baseline_select", "target_report", "baseline_report")
_DESCRIBED = {"fit.method": METHODS, "fit.choice": RULES, "edit.mode": MODES}
_EXAMPLES: dict[str, Any] = {
    **{f"prompts.{name}": "prompts.jsonl#column=text" for name in _SEPARATE},
    "prompts.system": "You are a helpful assistant.",
    "prompts.chat_template": "template.jinja",
    "prompts.limit": 64,
    "fit.winsorize": 0.995,
    **{f"edit.{part}.{edge}": place for part in ("attention", "mlp") for edge, place in (("first", 10), ("last", 28))},
    "search.minutes": 30.0,
    "search.max_drift": 0.1,
    "search.min_acceptance": 0.9,
}
_HEAD = """\
# A recipe of Perpend: what is done, and nothing about the machine it is done on.
# Every key may be left out; what stands here are the defaults. Keys after a # are off unless given.
# Check it with `perpend config validate FILE`, use it with `--config FILE`.

"""


@dataclass(frozen=True)
class RecipeText:
    """A recipe and how it is written.

    Attributes:
        recipe: The recipe, complete.
        text: TOML.
        source: File that was read, None when there was none.
        output: File that was written, None when nothing was.
    """

    recipe: Recipe
    text: str
    source: Path | None = None
    output: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the recipe, its hash and the files."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "hash": self.recipe.hash(),
            "source": str(self.source) if self.source else None,
            "output": str(self.output) if self.output else None,
        }


def config_show(
    model: str | None = None, *, recipe: Recipe | None = None, **options: Unpack[ConfigOptions]
) -> RecipeText:
    """Return the effective recipe, every key with its value.

    Args:
        model: The model that it names.
        recipe: The recipe; None shows the defaults.
        **options: What `perpend config show` takes, by name: over the recipe.

    Raises:
        UsageError: an unknown keyword or a wrong value.
    """
    recipe, _ = asked(config_show, ConfigOptions, options, model, recipe, None, needs_model=False)
    return RecipeText(recipe, to_toml(recipe.model_dump(mode="json")))


def config_init(
    model: str | None = None,
    *,
    output: str | Path | None = None,
    recipe: Recipe | None = None,
    **options: Unpack[ConfigOptions],
) -> RecipeText:
    """Write a recipe in which every key has a comment.

    Args:
        model: The model that it names.
        output: File to write; None only returns the text.
        recipe: The values; None takes the defaults.
        **options: What `perpend config init` takes, by name: over the recipe.

    Raises:
        UsageError: the file exists already or cannot be written, an unknown keyword or a wrong value.
    """
    recipe, _ = asked(config_init, ConfigOptions, options, model, recipe, None, needs_model=False)
    text, output = commented(recipe), None if output is None else Path(output)
    if output is not None:
        if output.exists():
            raise UsageError("the file exists", where=str(output), hint=f"-o {output.with_stem(output.stem + '-2')}")
        write_file(output, text.encode("utf-8"), replace=False)
    return RecipeText(recipe, text, output=output)


def config_validate(file: str | Path) -> RecipeText:
    """Check a recipe file.

    Args:
        file: The TOML file.

    Raises:
        UsageError: names the file, the key, and the nearest valid key.
    """
    recipe = load(path := Path(file))
    return RecipeText(recipe, to_toml(recipe.model_dump(mode="json")), source=path)


def commented(recipe: Recipe) -> str:
    """Return a recipe as TOML with the documentation of every key above it."""
    lines = _HEAD.splitlines()
    _section(recipe, "", lines)
    return "\n".join(lines) + "\n"


def _section(section: BaseModel, prefix: str, lines: list[str], above: str = "") -> None:
    """Append the plain keys of a section, then its inner sections: TOML wants tables last."""
    fields = sorted(type(section).model_fields, key=lambda name: name != "kind")
    values = {name: getattr(section, name) for name in fields}
    inner = {name: value for name, value in values.items() if isinstance(value, BaseModel | Mapping)}
    plain = {name: value for name, value in values.items() if name not in inner}
    comments = documentation(type(section))
    if prefix:
        about = inspect.cleandoc(type(section).__doc__ or "").split("\n\n")[0].replace("\n", " ")
        lines += ["", *_comment(above), *_comment(about), f"[{prefix}]"]
    for name, value in plain.items():
        key = f"{prefix}.{name}" if prefix else name
        lines += _comment(comments.get(name, ""))
        lines += [f"#   {choice}: {what}" for choice, what in _DESCRIBED.get(key, {}).items()]
        if value is None:
            lines.append("# " + to_toml({name: _EXAMPLES.get(key, "")}).strip())
        else:
            dumped = section.model_dump(mode="json")[name]
            kind = type(section).model_fields[name].annotation
            names = tuple(KINDS) if name == "kind" else get_args(kind) if get_origin(kind) is Literal else ()
            listed = f"  # {', '.join(names)}" if names and key not in _DESCRIBED else ""
            lines.append(to_toml({name: dumped}).strip() + listed)
    for name, value in inner.items():
        key = f"{prefix}.{name}" if prefix else name
        if isinstance(value, BaseModel):
            _section(value, key, lines, comments.get(name, ""))
        else:
            body = to_toml({prefix: {name: value}}).strip() if value else f"[{key}]"
            lines += ["", *_comment(comments.get(name, "")), body]


def _comment(text: str) -> list[str]:
    return [f"# {line}" if line else "#" for line in text.splitlines()]


def completed_assignments(incomplete: str) -> list[str]:
    """Return the assignments `key=` or `key=value` that begin as typed, for a shell."""
    key, sign, value = incomplete.partition("=")
    if sign:
        return [f"{key}={choice}" for choice in choices(key) if choice.startswith(value)]
    return [f"{name}=" for name in keys(Recipe) if name.startswith(key)]


@lru_cache
def documentation(section: type[BaseModel]) -> dict[str, str]:
    """Return what the strings under the fields of a section say, inherited ones included."""
    found: dict[str, str] = {}
    for cls in reversed(section.__mro__):
        if cls.__module__.startswith("perpend."):
            found |= _documented(sys.modules[cls.__module__]).get(cls.__name__, {})
    return found


@lru_cache
def _documented(module: ModuleType) -> dict[str, dict[str, str]]:
    tree = ast.parse(inspect.getsource(module))
    return {node.name: _fields(node) for node in tree.body if isinstance(node, ast.ClassDef)}


def _fields(node: ast.ClassDef) -> dict[str, str]:
    found = {}
    for field, text in zip(node.body, node.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
            and isinstance(text.value.value, str)
        ):
            found[field.target.id] = inspect.cleandoc(text.value.value)
    return found
