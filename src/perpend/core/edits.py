"""The edit of a whole model: which writers lose which directions, and how strongly.

The mathematics of one writer is in `perpend.core.maps`, the check of the result in `perpend.core.leak`; both are
offered here as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from perpend.core import store
from perpend.core.kinds import Mode
from perpend.core.leak import Realised, realised
from perpend.core.maps import (
    Geometry,
    HookMap,
    ModuleEdit,
    edit_bias,
    edit_weight,
    low_rank,
    plain_map,
    through_post_norm,
)

__all__ = [
    "Edit",
    "Geometry",
    "HookMap",
    "Mode",
    "ModuleEdit",
    "Realised",
    "edit_bias",
    "edit_weight",
    "low_rank",
    "plain_map",
    "realised",
    "through_post_norm",
]


@dataclass(frozen=True, eq=False)
class Edit:
    """An edit of a whole model: which writers, along what, how strongly."""

    modules: Mapping[str, ModuleEdit]
    """Module path of each writer, such as `model.layers.3.mlp.down_proj`, and its edit."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Where it came from; must fit into JSON."""

    def __len__(self) -> int:
        return len(self.modules)

    @property
    def is_empty(self) -> bool:
        """Whether it changes nothing: no modules, or all weight factors 0."""
        return all(part.weight == 0 for part in self.modules.values())

    def scaled(self, factor: float) -> Edit:
        """Return the edit with every weight factor multiplied by `factor`."""
        scaled = {name: replace(part, weight=part.weight * factor) for name, part in self.modules.items()}
        return replace(self, modules=scaled)

    def _packed(self) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
        """Unique directions by name, and each module's weight factor, mode and name of its directions."""
        names: dict[bytes, str] = {}
        tensors: dict[str, Tensor] = {}
        modules: dict[str, dict[str, Any]] = {}
        for module, part in sorted(self.modules.items()):
            key = str(list(part.directions.shape)).encode() + part.directions.numpy().tobytes()
            name = names.setdefault(key, f"directions.{len(names)}")
            tensors[name] = part.directions
            modules[module] = {"directions": name, "weight": part.weight, "mode": part.mode}
        return tensors, modules

    @property
    def sha256(self) -> str:
        """Hash of what the edit does, 64 hex digits; its provenance and the order of its modules do not count."""
        tensors, modules = self._packed()
        digest = hashlib.sha256(store.canonical(modules).encode())
        for name, tensor in tensors.items():
            digest.update(f"{name}{list(tensor.shape)}".encode() + tensor.numpy().tobytes())
        return digest.hexdigest()

    def to_bytes(self) -> bytes:
        """Return the edit as the bytes of a file; the same edit gives the same bytes."""
        tensors, modules = self._packed()
        return store.packed("edit", tensors, {"modules": modules, "provenance": dict(self.provenance)})

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; the same edit gives the same bytes.

        Raises:
            UsageError: the folder cannot be written to.
        """
        tensors, modules = self._packed()
        store.write(path, "edit", tensors, {"modules": modules, "provenance": dict(self.provenance)})

    @classmethod
    def load(cls, path: str | Path) -> Edit:
        """Read what `save` wrote; modules come in alphabetical order.

        Raises:
            UsageError: no such file, or no edit in it.
        """
        return store.read(path, "edit", cls._built)

    @classmethod
    def _built(cls, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> Edit:
        modules = {
            name: ModuleEdit(tensors[part["directions"]], part["weight"], part["mode"])
            for name, part in content["modules"].items()
        }
        return cls(modules, dict(content["provenance"]))
