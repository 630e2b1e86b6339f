"""What an earlier result says of an edit that is used again: the fit that it came of, and what it did as hooks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from perpend.errors import UsageError
from perpend.export.beside import REPORT
from perpend.report.document import Document
from perpend.report.page import render
from perpend.report.single import Earlier, Spent


def beside_edit(path: Path, sha256: str) -> dict[str, Any]:
    """Return the parts `fit` and `earlier` of a report, from the one beside an edit; empty where there is none of it.

    Args:
        path: Where the edit was read from: its folder, or a file in it, such as a recipe.
        sha256: Of the edit. A report of another one says nothing.
    """
    found = read_report((path if path.is_dir() else path.parent) / REPORT)
    if found is None or found.edit is None or found.edit.sha256 != sha256:
        return {}
    told = found.earlier or _measured(found)
    parts = {"fit": found.fit, "earlier": told}
    return shown({name: part.model_dump(mode="json") for name, part in parts.items() if part is not None})


def shown(parts: dict[str, Any]) -> dict[str, Any]:
    """Return parts of somebody else's report if a page can show them; else none, as they are no reason to fail."""
    try:
        render(Document.model_validate({"task": "fit", "model": "", **parts}))
    except UsageError:
        return {}
    return parts


def read_report(path: Path) -> Document | None:
    """Return a report, which anybody may have made; None where it is none."""
    try:
        return Document.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError, ValidationError):
        return None


def _measured(found: Document) -> Earlier | None:
    """Return in few numbers what a report measured of its edit."""
    report = found.report
    if report is None or report.after is None or report.accepted is None or found.about is None:
        return None
    about, drift = found.about, report.drift
    return Earlier(
        task=found.task,
        made=about.made,
        model=about.model.id if about.model else found.model,
        kind=report.after.target.kind,
        accepted=report.accepted,
        drift=Spent(n=drift.n, mean=drift.mean, interval=drift.interval) if drift else None,
    )
