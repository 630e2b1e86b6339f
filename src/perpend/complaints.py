"""What pydantic says of a recipe or a machine, as one line that names the key, what is valid, and the nearest of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from perpend.errors import UsageError, nearest

SCHEDULES = {"normal", "tent", "band", "constant", "list"}
"""Kinds of schedule, which pydantic names in the path of a key."""
KINDS = dict.fromkeys(("int_parsing", "int_type", "int_from_float"), "a whole number")
KINDS |= dict.fromkeys(("float_parsing", "float_type"), "a number") | {"finite_number": "a finite number"}
KINDS |= dict.fromkeys(("bool_parsing", "bool_type"), "true or false") | {"string_type": "text"}
KINDS |= dict.fromkeys(("list_type", "tuple_type"), "a list")
BOUNDS = {"greater_than": ("gt", "more than"), "greater_than_equal": ("ge", "at least")}
BOUNDS |= {"less_than": ("lt", "less than"), "less_than_equal": ("le", "at most")}
TABLES = {"model_type", "model_attributes_type", "dict_type"}


def explain(error: ValidationError, where: str, keys: Sequence[str], sections: Sequence[str]) -> UsageError:
    """Turn the first complaint of a validation, and what else is said of the same value, into one line.

    Args:
        error: The complaints.
        where: File or flag.
        keys: Every key, in dotted form.
        sections: Keys of the first level.
    """
    found: list[Mapping[str, Any]] = [dict(one) for one in error.errors()]
    first = found[0]
    if first["type"] == "extra_forbidden":
        return _unknown_key(".".join(_named(first["loc"])), where, keys, sections)
    key = _key(first["loc"], keys)
    same = [one for one in found if _key(one["loc"], keys) == key]
    words = [word for one in same for word in _words(one)]
    given = first.get("input")
    if first["type"] == "union_tag_invalid":
        key, given = f"{key}.kind", first["ctx"]["tag"]
    if first["type"] in TABLES:
        below = [name.removeprefix(f"{key}.") for name in keys if name.startswith(f"{key}.")]
        return UsageError(f"{key}: keys are wanted{_shown(given)}", where=where, valid=", ".join(below))
    others = list(dict.fromkeys(text for one in same if (text := _described(one))))
    if words:
        said = f"unknown value {short(given)}"
        hint = nearest(given, words) if isinstance(given, str) else ""
        return UsageError(f"{key}: {said}", where=where, valid=", ".join((*words, *others)), hint=hint)
    if first["type"] in KINDS:
        return UsageError(f"{key}: {short(given)} is not {KINDS[first['type']]}", where=where)
    if first["type"] in BOUNDS:
        return UsageError(f"{key}: {short(given)} is out of range", where=where, valid=_described(first))
    said = str(first["msg"]).removeprefix("Value error, ")
    if said.startswith("must be "):
        return UsageError(f"{key}: unknown value {short(given)}", where=where, valid=_described(first))
    said = said if len(said) <= 300 else f"{said[:300]}…"
    return UsageError(f"{key}: {said[0].lower()}{said[1:]}{_shown(given)}", where=where)


def _unknown_key(key: str, where: str, keys: Sequence[str], sections: Sequence[str]) -> UsageError:
    section, _, leaf = key.rpartition(".")
    siblings = [k for k in keys if k.rpartition(".")[0] == section] if section else list(sections)
    elsewhere = [k for k in keys if k.rpartition(".")[2] == leaf]
    hint = nearest(key, elsewhere or keys) or nearest(leaf, siblings)
    return UsageError(f"unknown key '{key[:200]}'", where=where, valid=", ".join(siblings or keys), hint=hint)


def _named(path: Sequence[object]) -> list[str]:
    return [str(part) for part in path if part not in SCHEDULES]


def _key(path: Sequence[object], keys: Sequence[str]) -> str:
    """Return the key that a path of pydantic's leads to, without the names it gives to the parts of a union."""
    found: list[str] = []
    for part in _named(path):
        longer = ".".join((*found, part))
        if not part.isdigit() and not any(k == longer or k.startswith(f"{longer}.") for k in keys):
            break
        found.append(part)
    return ".".join(found)


def _words(one: Mapping[str, Any]) -> list[str]:
    """Return the names that a complaint says are valid."""
    context = one.get("ctx") or {}
    expected = {"literal_error": "expected", "union_tag_invalid": "expected_tags"}.get(one["type"])
    return re.findall(r"'([^']*)'", context[expected]) if expected else []


def _described(one: Mapping[str, Any]) -> str:
    """Return in words what a complaint asks for that is no matter of names."""
    if one["type"] in BOUNDS:
        name, words = BOUNDS[one["type"]]
        return f"{words} {one['ctx'][name]:g}"
    if one["type"] == "value_error":
        return str(one["msg"]).removeprefix("Value error, ").removeprefix("must be ")
    return KINDS.get(one["type"], "")


def _shown(given: object) -> str:
    return f" (got {short(given)})" if isinstance(given, str | int | float | bool) else ""


def short(value: object) -> str:
    """Return a value as Python writes it, cut where it goes on for long."""
    try:
        text = repr(value)
    except ValueError:  # a number of thousands of digits
        return "a very large number"
    return text if len(text) <= 80 else f"{text[:80]}…"
