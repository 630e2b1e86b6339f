"""Directional ablation for open-weight language models: measured, edited, proven on the saved file.

Everything here is loaded when it is first used, so that `import perpend` takes a few milliseconds and no tensors.
The functions are the commands of the command line: `perpend.fit(...)` is `perpend fit ...`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from perpend._version import __version__

if TYPE_CHECKING:
    from perpend.config import Machine, Recipe
    from perpend.config import load as load_recipe
    from perpend.core.directions import Directions
    from perpend.core.edits import Edit
    from perpend.errors import GateFailed, Interrupted, MissingExtra, PerpendError, RunFailed, UsageError
    from perpend.models.anatomy import Anatomy
    from perpend.models.session import Session
    from perpend.refs import DataRef, ModelRef
    from perpend.tasks.adapter import adapter
    from perpend.tasks.apply import apply
    from perpend.tasks.audit import audit
    from perpend.tasks.bench import bench
    from perpend.tasks.chat import chat
    from perpend.tasks.config import config_init, config_show, config_validate
    from perpend.tasks.demo import demo
    from perpend.tasks.diff import diff
    from perpend.tasks.evaluate import eval
    from perpend.tasks.export_gguf import export_gguf
    from perpend.tasks.fit import fit
    from perpend.tasks.inspect import inspect
    from perpend.tasks.ls import ls
    from perpend.tasks.organism import organism
    from perpend.tasks.pages import write_report
    from perpend.tasks.push import push
    from perpend.tasks.quant import quant_check
    from perpend.tasks.run import run
    from perpend.tasks.search import search
    from perpend.tasks.serve import serve
    from perpend.tasks.vector import vector

__all__ = [
    "Anatomy",
    "DataRef",
    "Directions",
    "Edit",
    "GateFailed",
    "Interrupted",
    "Machine",
    "MissingExtra",
    "ModelRef",
    "PerpendError",
    "Recipe",
    "RunFailed",
    "Session",
    "UsageError",
    "__version__",
    "adapter",
    "apply",
    "audit",
    "bench",
    "chat",
    "config_init",
    "config_show",
    "config_validate",
    "demo",
    "diff",
    "eval",
    "export_gguf",
    "fit",
    "inspect",
    "load_recipe",
    "ls",
    "organism",
    "push",
    "quant_check",
    "run",
    "search",
    "serve",
    "vector",
    "write_report",
]

_HOMES = {
    "config": ("Machine", "Recipe", "load_recipe"),
    "core.directions": ("Directions",),
    "core.edits": ("Edit",),
    "errors": ("GateFailed", "Interrupted", "MissingExtra", "PerpendError", "RunFailed", "UsageError"),
    "models.anatomy": ("Anatomy",),
    "models.session": ("Session",),
    "refs": ("DataRef", "ModelRef"),
    "tasks.adapter": ("adapter",),
    "tasks.apply": ("apply",),
    "tasks.audit": ("audit",),
    "tasks.bench": ("bench",),
    "tasks.chat": ("chat",),
    "tasks.config": ("config_init", "config_show", "config_validate"),
    "tasks.demo": ("demo",),
    "tasks.diff": ("diff",),
    "tasks.evaluate": ("eval",),
    "tasks.export_gguf": ("export_gguf",),
    "tasks.fit": ("fit",),
    "tasks.inspect": ("inspect",),
    "tasks.ls": ("ls",),
    "tasks.organism": ("organism",),
    "tasks.pages": ("write_report",),
    "tasks.push": ("push",),
    "tasks.quant": ("quant_check",),
    "tasks.run": ("run",),
    "tasks.serve": ("serve",),
    "tasks.search": ("search",),
    "tasks.vector": ("vector",),
}
_RENAMED = {"load_recipe": "load"}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'perpend' has no attribute '{name}'")
    value = getattr(import_module(f"perpend.{_HOME[name]}"), _RENAMED.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
