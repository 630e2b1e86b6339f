"""Python code that comes with a model: run only where the user named that very model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from perpend.config import Machine
from perpend.errors import UsageError
from perpend.refs import ModelRef, Resolved

FLAG = "--trust-remote-code"


def trusted(ref: ModelRef, machine: Machine) -> bool:
    """Whether the code of a model may run.

    A hub id without a revision in `machine.trust_remote_code` stands for all of its revisions, a directory for itself,
    however it is spelt.

    Args:
        ref: The model.
        machine: Names the models whose code may run.

    Raises:
        UsageError: a name that is no model.
    """
    return any(_covers(ModelRef.parse(name), ref) for name in machine.trust_remote_code)


def _covers(named: ModelRef, ref: ModelRef) -> bool:
    if named.kind == ref.kind == "hub":
        return named.name == ref.name and named.revision in (None, ref.revision)
    return named.kind == ref.kind and Path(named.name).expanduser().resolve() == Path(ref.name).expanduser().resolve()


def require_own_code(source: Resolved, where: str, machine: Machine) -> None:
    """Refuse a trusted model that brings in the code of another repository, unless that is trusted too.

    Raises:
        UsageError: names the other repository and what to type.
    """
    for path in sorted(source.path.glob("*config.json")):
        for code in _classes(json.loads(path.read_text(encoding="utf-8"))):
            other, sign, _ = code.partition("--")
            if sign and not trusted(ModelRef("hub", other), machine):
                raise UsageError(
                    f"its {path.name} asks for Python code of another repository, {other}",
                    where=where,
                    hint=f"{FLAG} {other}, after reading that code",
                )


def _classes(config: Any) -> Iterator[str]:
    """Yield every class that a configuration maps to code, as `repository--module.Class` or `module.Class`."""
    for value in (config.get("auto_map") or {}).values() if isinstance(config, dict) else ():
        yield from (one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str))
