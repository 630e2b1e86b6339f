"""`report.json` and `report.html` beside every output, and the page made again from what lies there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perpend.errors import UsageError
from perpend.report.document import VERSION
from perpend.report.page import read, render
from perpend.tasks.output import replace_text, to_text

REPORT, PAGE = "report.json", "report.html"
BESIDE = {"front": "front.json", "bench": "bench.json"}
"""Parts of a report that other tasks leave in the folder of a run."""
HELD = {"demo.json": "run"}
"""Results that hold the report of a run, by the key where it is."""


@dataclass(frozen=True)
class WrittenPage:
    """A page that was made again."""

    output: str
    task: str
    """Which task the result is of."""
    bytes: int
    dry_run: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return dict(vars(self))


def put(folder: Path, data: Mapping[str, Any]) -> None:
    """Write `report.json` and `report.html` into a folder that is being made."""
    text = to_text({"schema_version": VERSION, **data})
    (folder / REPORT).write_text(text + "\n", encoding="utf-8")
    page = render(read(gathered(json.loads(text), folder), REPORT))
    (folder / PAGE).write_text(page, encoding="utf-8")


def write_report(folder: Path, *, output: Path | None = None, dry_run: bool = False) -> WrittenPage:
    """Make the page of a result again, from the JSON that lies beside it; nothing is measured.

    Args:
        folder: What `run`, `fit`, `apply`, `eval`, `bench` or `demo` made.
        output: File to write; `report.html` in the folder by default, where an older one is replaced.
        dry_run: Only make the page, and do not write it.

    Raises:
        UsageError: no such folder, no report in it, or a report that cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError("no such folder", where=str(folder), valid="the output of an earlier command")
    name = next((n for n in (REPORT, *HELD, BESIDE["bench"]) if (folder / n).is_file()), None)
    if name is None:
        hint = "perpend eval MODEL --edit EDIT -o OUT"
        raise UsageError("holds no report", where=str(folder), valid=f"a folder with {REPORT}", hint=hint)
    data = _json(folder / name)
    held = data.get(HELD[name]) if name in HELD and isinstance(data, dict) else data
    if not isinstance(held, dict):
        raise UsageError("not a report: it holds no keys", where=str(folder / name))
    document = read(gathered(held, folder), str(folder / name))
    path = Path(output) if output is not None else folder / PAGE
    text = render(document)
    if not dry_run:
        replace_text(path, text)
    return WrittenPage(str(path), document.task, len(text.encode()), dry_run)


def gathered(data: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return a report with the parts that lie beside it as files of their own."""
    found = dict(data)
    for key, name in BESIDE.items():
        if not found.get(key) and (folder / name).is_file():
            part = _json(folder / name)
            found[key] = part[key] if isinstance(part, dict) and key in part else part
    return found


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise UsageError(f"cannot be read: {str(error)[:200]}", where=str(path)) from None
