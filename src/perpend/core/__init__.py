"""Importable mathematics of directional ablation: torch tensors in, torch tensors out, no model.

Names load on first use, so that a schedule can be read without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perpend.core.directions import ClusterFitter as ClusterFitter
    from perpend.core.directions import Directions as Directions
    from perpend.core.directions import fit_directions as fit_directions
    from perpend.core.edits import Edit as Edit
    from perpend.core.edits import HookMap as HookMap
    from perpend.core.edits import ModuleEdit as ModuleEdit
    from perpend.core.edits import edit_bias as edit_bias
    from perpend.core.edits import edit_weight as edit_weight
    from perpend.core.residuals import ResidualFitter as ResidualFitter
    from perpend.core.residuals import ResidualStats as ResidualStats

_HOME = {
    "directions": ("ClusterFitter", "Directions", "fit_directions"),
    "edits": ("Edit", "HookMap", "ModuleEdit", "edit_bias", "edit_weight"),
    "residuals": ("ResidualFitter", "ResidualStats"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _MODULE:
        return getattr(import_module(f"perpend.core.{_MODULE[name]}"), name)
    raise AttributeError(f"module 'perpend.core' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
