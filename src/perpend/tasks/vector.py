"""A control vector of a fit, for those who want no edited weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perpend import __version__
from perpend.core.directions import Directions
from perpend.errors import UsageError
from perpend.export.control_vector import shifts, write_control_vector
from perpend.export.gguf_file import appearing, require_absent
from perpend.tasks.pages import REPORT
from perpend.tasks.recipes import DIRECTIONS


@dataclass(frozen=True)
class Vector:
    """A control vector on disk."""

    output: str
    layers: tuple[int, ...]
    """Layers that add."""
    norms: tuple[float, ...]
    """Length of what each adds."""
    bytes: int
    dry_run: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"task": "vector", **asdict(self), "layers": list(self.layers), "norms": list(self.norms)}


def vector(source: str | Path, *, output: str | Path, layers: str | None = None, dry_run: bool = False) -> Vector:
    """Write the control vector of a fit as a GGUF file for llama.cpp; no model is loaded.

    Args:
        source: What `fit` made: the folder, or its `directions.safetensors`.
        output: File to make.
        layers: `18` or `12-20`, counted from 0; by default the layer that the fit chose.
        dry_run: Only say what would be written.

    Raises:
        UsageError: no directions there, layers that are not, or an output that exists.
        MissingExtra: the gguf package is not installed.
    """
    given, output = Path(source), Path(output)
    path = given / DIRECTIONS if given.is_dir() else given
    if not path.is_file():
        raise UsageError(f"no {DIRECTIONS}", where=str(given), hint="perpend fit MODEL -o fit")
    directions = Directions.load(path)
    span = _span(layers) if layers is not None else _chosen(path.parent / REPORT, directions.n_layers)
    made = shifts(directions, span)
    norms = tuple(round(float(v.norm()), 4) for v in made.values())
    if dry_run:
        require_absent([output])
        return Vector(str(output), tuple(made), norms, 0, True)
    about = {"general.name": f"{output.stem}", "perpend.version": __version__, "perpend.method": directions.method}
    with appearing([output]) as (partial,):
        size = write_control_vector(partial, made, hint=_model(directions), about=about)
    return Vector(str(output), tuple(made), norms, size)


def _model(directions: Directions) -> str:
    name = str(directions.provenance.get("model", ""))
    return Path(name).name if Path(name).exists() else name


def _span(layers: str) -> range:
    first, dash, last = layers.strip().partition("-")
    if not first.isdigit() or (dash and not last.isdigit()):
        raise UsageError(f"layers '{layers}'", where="--layers", valid="18, or 12-20")
    return range(int(first), int(last or first) + 1)


def _chosen(report: Path, n_layers: int) -> range:
    """Return the layer that a fit chose, from the report beside it."""
    try:
        layer = round(json.loads(report.read_text(encoding="utf-8"))["fit"]["layer"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        layer = None
    if layer is None:
        valid = f"1 to {n_layers - 1}"
        raise UsageError(
            "the fit chose no single layer", where="--layers", valid=valid, hint=f"--layers {n_layers // 2}"
        )
    return range(layer, layer + 1)
