"""Writers named by hand: the `[edit.overrides]` table of a recipe, read and written."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, get_args

from torch import nn

from perpend.errors import UsageError, nearest
from perpend.models.writers import Component, Role, Writer

_DEFAULT_ROLE: dict[str, Role] = {"attention": "attention_out", "mlp": "mlp_down"}
_KEYS = ("component", "out_axis", "role", "parameter", "bias", "post_norm", "further_norms")


def checked(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Check the form of an overrides table.

    Raises:
        UsageError: an unknown key or value; names the nearest valid one.
    """
    _refuse_unknown(overrides, ("layers", "writers"), "edit.overrides")
    for pattern, table in overrides.get("writers", {}).items():
        where = f'edit.overrides.writers."{pattern}"'
        if not isinstance(table, Mapping):
            raise UsageError("is no table", where=where, valid='{component = "mlp", out_axis = 0}')
        _refuse_unknown(table, _KEYS, where)
        choices = {"component": get_args(Component), "out_axis": (0, 1, 2)}
        choices |= {"role": get_args(Role)} if "role" in table else {}
        for key, valid in choices.items():
            if table.get(key) not in valid:
                given = f"{key} is {table[key]!r}" if key in table else f"{key} is missing"
                raise UsageError(given, where=where, valid=", ".join(map(str, valid)))
    return dict(overrides)


def _refuse_unknown(table: Mapping[str, Any], valid: Sequence[str], where: str) -> None:
    for key in table:
        if key not in valid:
            raise UsageError(f"unknown key '{key}'", where=where, valid=", ".join(valid), hint=nearest(key, valid))


def writers(
    model: nn.Module, tables: Mapping[str, Mapping[str, Any]], path: str, n_layers: int, size: int
) -> list[Writer]:
    """Build the writers that overrides name.

    Args:
        model: The model.
        tables: Module paths, with `{layer}` for the index of the layer, to checked tables.
        path: Path of the list of decoder layers.
        n_layers: Its length.
        size: Hidden size.

    Raises:
        UsageError: a path matches no module, or the axis named is not the hidden size.
    """
    built: list[Writer] = []
    modules = dict(model.named_modules())
    for pattern, table in tables.items():
        names = [(k, pattern.replace("{layer}", str(k))) for k in range(n_layers)]
        if "{layer}" not in pattern:
            names = [(k, name) for k, name in names if name.startswith(f"{path}.{k}.")]
        found = [(k, name) for k, name in names if name in modules]
        if not found:
            raise UsageError(
                f"'{pattern}' matches no module of {type(model).__name__}",
                where="edit.overrides.writers",
                hint=_nearest_pattern(pattern, modules, path),
            )
        for layer, name in found:
            built.append(_named(modules[name], name, layer, table, size))
    return built


def _nearest_pattern(pattern: str, modules: Iterable[str], path: str) -> str:
    patterns = {
        name.replace(f"{path}.0.", f"{path}.{{layer}}.", 1) for name in modules if name.startswith(f"{path}.0.")
    }
    close = difflib.get_close_matches(pattern, sorted(patterns), n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else ""


def _named(module: nn.Module, name: str, layer: int, table: Mapping[str, Any], size: int) -> Writer:
    where = f'edit.overrides.writers."{name}"'
    parameters = dict(module.named_parameters(recurse=False))
    parameter = table.get("parameter", "weight")
    if parameter not in parameters:
        raise UsageError(f"has no parameter '{parameter}'", where=where, valid=", ".join(parameters) or "none")
    shape, axis = tuple(parameters[parameter].shape), table["out_axis"]
    if not (2 <= len(shape) <= 3 and len(shape) - 2 <= axis < len(shape)) or shape[axis] != size:
        raise UsageError(f"axis {axis} of {parameter} {list(shape)} is not the hidden size {size}", where=where)
    component: Component = table["component"]
    experts = shape[0] if len(shape) == 3 else None
    role = "expert_down" if experts and component == "mlp" else _DEFAULT_ROLE[component]
    placed = {key: _placed(table.get(key), layer) for key in ("post_norm", "further_norms")}
    return Writer(
        name=name,
        layer=layer,
        component=component,
        role=table.get("role", role),
        parameter=parameter,
        bias=table.get("bias", "bias" if "bias" in parameters else None),
        out_axis=axis,
        experts=experts,
        post_norm=placed["post_norm"],
        shape=shape,
        parameters=math.prod(shape),
        further_norms=tuple(placed["further_norms"] or ()),
    )


def _placed(value: Any, layer: int) -> Any:
    if isinstance(value, list):
        return [_placed(item, layer) for item in value]
    return value.replace("{layer}", str(layer)) if isinstance(value, str) else value


def to_toml(writers: Iterable[Writer], layers: str, apart: Collection[str] = ()) -> str:
    """Write writers as the `[edit.overrides]` table, one line for what is alike in all layers.

    Args:
        writers: What to write.
        layers: Path of the list of decoder layers.
        apart: Modules that no line may name, since they are no writers.
    """
    lines = ["[edit.overrides]", f"layers = {json.dumps(layers)}", "", "[edit.overrides.writers]"]
    tables: dict[str, dict[str, dict[str, Any]]] = {}
    others = {re.sub(rf"^{re.escape(layers)}\.\d+\.", f"{layers}.{{layer}}.", name) for name in apart}
    for writer in writers:
        at = f"{layers}.{writer.layer}."
        pattern = writer.name.replace(at, f"{layers}.{{layer}}.", 1)
        tables.setdefault(pattern, {})[writer.name] = _as_override(writer, at, layers)
    for pattern, by_name in tables.items():
        first, *rest = by_name.values()
        alike = pattern not in others and all(table == first for table in rest)
        for name, table in ({pattern: first} if alike else by_name).items():
            body = ", ".join(f"{key} = {json.dumps(item)}" for key, item in table.items())
            lines.append(f"{json.dumps(name)} = {{{body}}}")
    return "\n".join(lines) + "\n"


def _as_override(writer: Writer, at: str, layers: str) -> dict[str, Any]:
    def pattern(path: str) -> str:
        return path.replace(at, f"{layers}.{{layer}}.", 1)

    usual = "expert_down" if writer.experts and writer.component == "mlp" else _DEFAULT_ROLE[writer.component]
    table: dict[str, Any] = {"component": writer.component, "out_axis": writer.out_axis}
    table |= {"role": writer.role} if writer.role != usual else {}
    table |= {"parameter": writer.parameter} if writer.parameter != "weight" else {}
    table |= {"bias": writer.bias} if writer.bias not in (None, "bias") else {}
    table |= {"post_norm": pattern(writer.post_norm)} if writer.post_norm else {}
    table |= {"further_norms": [pattern(norm) for norm in writer.further_norms]} if writer.further_norms else {}
    return table
