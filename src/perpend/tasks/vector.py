"""A control vector of a fit, for those who want no edited weights."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from perpend import __version__
from perpend.core.directions import Directions
from perpend.core.reliability import cosines, expected_cosine
from perpend.errors import UsageError
from perpend.export.beside import REPORT, pages_of
from perpend.export.control_vector import shifts, write_control_vector
from perpend.export.gguf_file import appearing, require_absent
from perpend.report.document import Document
from perpend.tasks.about import origin, typed
from perpend.tasks.earlier import read_report, shown
from perpend.tasks.gguf import require_gguf
from perpend.tasks.pages import names_beside, put_beside
from perpend.tasks.recipes import DIRECTIONS
from perpend.tasks.setup import versions


@dataclass(frozen=True)
class Vector:
    """A control vector on disk."""

    output: str
    layers: tuple[int, ...]
    """Layers that add."""
    norms: tuple[float, ...]
    """Length of what each adds."""
    bytes: int
    pages: tuple[str, ...]
    """Its report, beside it."""
    dry_run: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        lists = {name: list(getattr(self, name)) for name in ("layers", "norms", "pages")}
        return {"task": "vector", **asdict(self), **lists}


def vector(source: str | Path, *, output: str | Path, layers: str | None = None, dry_run: bool = False) -> Vector:
    """Write the control vector of a fit as a GGUF file for llama.cpp, and its report; no model is loaded.

    Args:
        source: What `fit` made: the folder, or its `directions.safetensors`.
        output: File to make, NAME.gguf; `OUTPUT.report.json` and `OUTPUT.report.html` come with it.
        layers: `18` or `12-20`, counted from 0; by default the layer that the fit chose.
        dry_run: Only say what would be written.

    Raises:
        UsageError: no directions there, layers that are not, or an output that exists or is no NAME.gguf.
        MissingExtra: the gguf package is not installed.
    """
    started, given, output = time.monotonic(), Path(source), Path(output)
    require_gguf(output)
    path = given / DIRECTIONS if given.is_dir() else given
    if not path.is_file():
        raise UsageError(f"no {DIRECTIONS}", where=str(given), hint="perpend fit MODEL -o fit")
    directions = Directions.load(path)
    span = _span(layers) if layers is not None else _chosen(path.parent / REPORT, directions.n_layers)
    made = shifts(directions, span)
    norms = tuple(round(float(v.norm()), 4) for v in made.values())
    pages = pages_of(output)
    planned = Vector(str(output), tuple(made), norms, 0, names_beside(output), True)
    if dry_run:
        require_absent([output], pages)
        return planned
    about = {"general.name": f"{output.stem}", "perpend.version": __version__, "perpend.method": directions.method}
    with appearing([output], pages) as (partial,):
        size = write_control_vector(partial, made, hint=_model(directions), about=about)
        command = typed("vector", given, "-o", output.name, *(["--layers", layers] if layers is not None else []))
        took = round(time.monotonic() - started, 1)
        put_beside(output, _report(directions, made, size, command, path.parent) | {"seconds": took})
    return replace(planned, bytes=size, dry_run=False)


def _report(
    directions: Directions, made: Mapping[int, Tensor], size: int, command: str, folder: Path
) -> dict[str, Any]:
    """Return what the report says: the vector, the directions, and of the fit beside them what fits to them."""
    raw = directions.raw_norm.tolist()
    beside = read_report(folder / REPORT)
    fitted = beside if beside is not None and beside.fit is not None and _same(beside.fit.raw_norm, raw) else None
    layer = next(iter(made)) if len(made) == 1 else None
    own = {
        "position": directions.provenance.get("position"),
        "diagnostics": dict(directions.diagnostics),
        "raw_norm": raw,
        "expected_cosine": [expected_cosine(c) for c in directions.diagnostics.get("split_half_cosine", ())],
        "cosines": cosines(directions.vectors),
    }
    of_fit = fitted.fit.model_dump(mode="json", include={"counts", "choice"}) if fitted and fitted.fit else {}
    whole = shown({"fit": of_fit | own | {"layer": layer}}) or {"fit": own | {"layer": layer}}
    moves = [{"layer": n, "norm": float(v.norm()), "apart": raw[n]} for n, v in made.items()]
    return {
        "task": "vector",
        "model": _model(directions) or folder.name,
        "versions": versions(),
        "about": origin("vector", command) | _of_model(fitted),
        **whole,
        "vector": {"method": directions.method, "rank": directions.rank, "bytes": size, "shifts": moves},
    }


def _same(one: tuple[float | None, ...], other: list[float]) -> bool:
    """Say whether a report is of these directions, by the lengths of their mean differences."""
    return len(one) == len(other) and all(
        a is not None and math.isclose(a, b, rel_tol=1e-6) for a, b in zip(one, other, strict=True)
    )


def _of_model(fitted: Document | None) -> dict[str, Any]:
    """Return which model the directions were measured in, and by which recipe."""
    if fitted is None or fitted.about is None:
        return {}
    return fitted.about.model_dump(mode="json", include={"model", "recipe", "recipe_hash", "seed"}, exclude_unset=True)


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
