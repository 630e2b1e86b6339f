"""From the options that were given, typed or as keywords, to the recipe and the machine that they amount to."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from perpend.config import Machine, Recipe, build, load
from perpend.errors import UsageError, nearest
from perpend.options.commands import OPTIONS, options_of
from perpend.options.table import Option, StudyOptions
from perpend.refs import DataRef, ModelRef

PROMPTS = ("prompts.target", "prompts.baseline")
"""Keys of options that name prompts."""
MODELS = "org/name, org/name@revision, a directory, a .gguf file"


def asked(
    function: Callable[..., object],
    kind: Any,
    given: Mapping[str, object],
    model: str | Path | None,
    recipe: Recipe | None,
    machine: Machine | None,
    *,
    needs_model: bool = True,
) -> tuple[Recipe, Machine]:
    """Return what a call of a public function asks for.

    Args:
        function: The function, for the message.
        kind: The options that it takes.
        given: Its keywords; None counts as not given.
        model: Its model; None takes the recipe's.
        recipe: What the keywords lie over.
        machine: The same.
        needs_model: Refuse a recipe without a model.

    Raises:
        UsageError: an unknown keyword, a wrong value, no model, or two recipes.
    """
    require_known(function, kind, given)
    if model is not None and not isinstance(model, str | Path):
        where = f"perpend.{function.__name__}"
        raise UsageError(f"a {type(model).__name__} is no model", where=where, valid=MODELS, hint="recipe=, machine=")
    name = None if model is None else str(model)
    return recipe_of(given, name, recipe, needs_model=needs_model), machine_of(given, machine)


def asked_of_source(
    function: Callable[..., object],
    kind: Any,
    given: Mapping[str, object],
    source: str | Path,
    recipe: Recipe | None,
    machine: Machine | None,
) -> tuple[str, Recipe | None, Machine]:
    """Return what a call asks for whose source is a model, or the recipe beside an edit.

    Args:
        function: The function, for the message.
        kind: The options that it takes.
        given: Its keywords.
        source: A model, or a path that ends in .toml.
        recipe: What the keywords lie over; None is returned as None where no keyword sets a key of it.
        machine: The same of the machine.

    Raises:
        UsageError: an unknown keyword, a wrong value, or two recipes.
    """
    require_known(function, kind, given)
    name, found = str(source), machine_of(given, machine)
    if not _of_recipe(given):
        return name, recipe, found
    if not name.lower().endswith(".toml"):
        recipe = recipe_of(given, name, recipe)
        return recipe.model.id, recipe, found
    if given.get("config") is not None:
        raise UsageError("two recipes", where="--config", hint=f"leave out --config or {name}")
    return name, recipe_of(given, None, recipe, None if recipe else Path(name), needs_model=False), found


def require_known(function: Callable[..., object], kind: Any, given: Mapping[str, object]) -> None:
    """Refuse a keyword that a function does not take.

    Raises:
        UsageError: names the nearest that it does.
    """
    own = [p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    valid = [*own, *options_of(kind)]
    for name in given:
        if name not in valid:
            where = f"perpend.{function.__name__}"
            raise UsageError(
                f"unknown argument '{name}'", where=where, valid=", ".join(valid), hint=nearest(name, valid)
            )


def require_no_search(given: Mapping[str, object]) -> None:
    """Refuse options of a search where none was asked for.

    Raises:
        UsageError: names the first.
    """
    for name in (*options_of(StudyOptions), "storage", "workers"):
        if given.get(name) is not None:
            raise UsageError("is of a search", where=f"--{name.replace('_', '-')}", hint="--search")


def recipe_of(
    given: Mapping[str, object],
    model: str | None = None,
    recipe: Recipe | None = None,
    file: Path | None = None,
    *,
    needs_model: bool = True,
) -> Recipe:
    """Return the recipe: defaults, then the file or `recipe`, then options, then `set`.

    Args:
        given: Options by keyword.
        model: The model; None takes the recipe's.
        recipe: What the options lie over.
        file: A recipe named otherwise than by `config`.
        needs_model: Refuse a recipe without a model.

    Raises:
        UsageError: names the option, or the file and the key, and what is valid.
    """
    options, config = _of_recipe(given), file or given.get("config")
    if recipe is not None and config is not None:
        raise UsageError("two recipes", where="--config", valid="recipe or config")
    if recipe is None or options:
        base: dict[str, Any] = {} if recipe is None else _as_given(recipe)
        for name in options:
            option = OPTIONS[name]
            if option.key:
                _check(option, value := _value(option, given[name]))
                _put(base, option.key, value)
        text = given.get("set") or ()
        recipe = load(Path(str(config)) if config else None, (text,) if isinstance(text, str) else text, base)  # type: ignore[arg-type]
    recipe = _at_revision(recipe.for_model(model or ""), given.get("revision"))
    if needs_model and not recipe.model.id:
        raise UsageError("no model given", where="MODEL", valid=MODELS)
    return recipe


def machine_of(given: Mapping[str, object], machine: Machine | None = None) -> Machine:
    """Return how it is run.

    Args:
        given: Options by keyword.
        machine: What they lie over.

    Raises:
        UsageError: names the option and what is valid.
    """
    found: dict[str, Any] = {}
    for name, option in OPTIONS.items():
        if option.machine and given.get(name) is not None:
            found[option.machine] = _value(option, given[name])
            _build(Machine, {option.machine: found[option.machine]}, option, option.machine)
    if not found:
        return machine or Machine()
    return build(Machine, (machine.model_dump(exclude_unset=True) if machine else {}) | found, "machine")


def _of_recipe(given: Mapping[str, object]) -> list[str]:
    """Return the options given that say something of the recipe."""
    return [name for name, option in OPTIONS.items() if given.get(name) is not None and not option.machine]


def _at_revision(recipe: Recipe, revision: object) -> Recipe:
    """Return the recipe with its model at the revision that `--revision` names."""
    if revision is None or not recipe.model.id:
        return recipe
    ref = ModelRef.parse(recipe.model.id)
    if ref.kind != "hub":
        raise UsageError("only models from the hub have revisions", where="--revision", valid="org/name")
    if ref.revision not in (None, revision):
        raise UsageError(f"two revisions, {ref.revision} and {revision}", where="--revision")
    return recipe.for_model(f"{ref.name}@{revision}")


def _as_given(recipe: Recipe) -> dict[str, Any]:
    """Return what a recipe was made with; a default is not what was asked for, which a demo tells apart."""
    data = recipe.model_dump(mode="json", exclude_unset=True)
    for part in ("attention", "mlp"):
        if part in data.get("edit", {}):
            data["edit"][part]["kind"] = getattr(recipe.edit, part).kind
    return data


def _value(option: Option, value: object) -> object:
    """Return what an option writes to its key."""
    if option.kind is not bool:
        return str(value) if isinstance(value, Path) and option.kind is str else value
    if not isinstance(value, bool):
        raise UsageError(f"{value!r} is neither True nor False", where=option.names[0])
    return option.value if value else not option.value


def _put(data: dict[str, Any], key: str, value: object) -> None:
    *path, leaf = key.split(".")
    for part in path:
        data = data.setdefault(part, {})
    data[leaf] = value


def _check(option: Option, value: object) -> None:
    """Check the value of an option alone, so that the complaint names the option."""
    data: dict[str, Any] = {}
    _put(data, option.key, value)
    valid = choices(option.key)
    try:
        _build(Recipe, data, option, option.key)
        if option.key in PROMPTS:
            DataRef.parse(str(value))
    except UsageError as error:
        if not valid:
            raise error if error.where == option.names[0] else error.within(option.names[0]) from None
        listed = ", ".join((*valid, option.also) if option.also else valid)
        hint = nearest(str(value), valid)
        raise UsageError(f"unknown value '{value}'", where=option.names[0], valid=listed, hint=hint) from None


def _build(root: type[BaseModel], data: Mapping[str, Any], option: Option, key: str) -> None:
    """Check the value of an option, and name the option alone where it is wrong.

    Raises:
        UsageError: a value that its key does not take.
    """
    try:
        build(root, data, option.names[0])
    except UsageError as error:
        said = error.what.removeprefix(f"{key}: ")
        raise UsageError(said, where=option.names[0], valid=error.valid, hint=error.hint) from None


def path_of(value: str | Path | None) -> Path | None:
    """Return a path that may be given as text."""
    return None if value is None else Path(value)


def listed(value: str | Sequence[str]) -> list[str]:
    """Return the items of a list, or of text with commas, as they are typed."""
    items = value.split(",") if isinstance(value, str) else value
    return [item.strip() for item in items if item.strip()]


def choices(key: str, *, of_machine: bool = False) -> tuple[str, ...]:
    """Return the names that a key of the recipe, or of the machine, accepts; empty when it is no matter of names."""
    kinds: list[Any] = [Machine if of_machine else Recipe]
    for part in key.split("."):
        sections = [section for kind in kinds for section in _sections(kind)]
        kinds = [section.model_fields[part].annotation for section in sections if part in section.model_fields]
    return tuple(dict.fromkeys(v for kind in kinds for v in _literals(kind) if isinstance(v, str)))


def _sections(kind: Any) -> list[type[BaseModel]]:
    """Return the sections that a kind of value can be: itself, or the members of a union."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [kind]
    return [section for part in get_args(kind) for section in _sections(part)]


def _literals(kind: Any) -> list[Any]:
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return [value for part in get_args(kind) for value in _literals(part)]
