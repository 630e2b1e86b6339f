"""`report.json` and `report.html` beside every output, and the page made again from what lies there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perpend.errors import UsageError
from perpend.export.beside import PAGE, REPORT, pages_of, report_of
from perpend.report.document import VERSION
from perpend.report.page import read, render
from perpend.tasks.output import replace_text, to_text
from perpend.whole import partial_of

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
    text = _text(data)
    (folder / REPORT).write_text(text, encoding="utf-8")
    page = render(read(gathered(json.loads(text), folder), REPORT))
    (folder / PAGE).write_text(page, encoding="utf-8")


def put_beside(output: Path, data: Mapping[str, Any]) -> None:
    """Write the report of a file that is being made: into the `.partial` files that appear with it."""
    report, page = pages_of(output)
    text = _text(data)
    partial_of(report).write_text(text, encoding="utf-8")
    partial_of(page).write_text(render(read(json.loads(text), report.name), report.name), encoding="utf-8")


def names_beside(output: Path) -> tuple[str, str]:
    """Return the names of the report of an output that is one file, as a result lists them."""
    report, page = pages_of(output)
    return str(report), str(page)


def _text(data: Mapping[str, Any]) -> str:
    return to_text({"schema_version": VERSION, **data}) + "\n"


def write_report(folder: Path, *, output: Path | None = None, dry_run: bool = False) -> WrittenPage:
    """Make the page of a result again, from the JSON that lies beside it; nothing is measured.

    Args:
        folder: What a command made: a folder, or a file such as `OUT.gguf`; or its `report.json`.
        output: File to write; the page beside that JSON by default, where an older one is replaced.
        dry_run: Only make the page, and do not write it.

    Raises:
        UsageError: no such output, no report of it, or a report that cannot be read.
    """
    path = _report(Path(folder))
    data = _json(path)
    held = data.get(HELD[path.name]) if path.name in HELD and isinstance(data, dict) else data
    if not isinstance(held, dict):
        raise UsageError("not a report: it holds no keys", where=str(path))
    alone = path.name.endswith(f".{REPORT}")
    document = read(held if alone else gathered(held, path.parent), str(path))
    page = path.with_name(path.name.removesuffix(REPORT) + PAGE) if alone else path.with_name(PAGE)
    page = page if output is None else Path(output)
    text = render(document, path.name if alone else REPORT)
    if not dry_run:
        replace_text(page, text)
    return WrittenPage(str(page), document.task, len(text.encode()), dry_run)


def _report(given: Path) -> Path:
    """Return the JSON that a page is made from.

    Raises:
        UsageError: there is none.
    """
    found = report_of(given)
    if found is not None:
        return found
    other = next((given / name for name in (*HELD, BESIDE["bench"]) if (given / name).is_file()), None)
    if other is not None:
        return other
    if not given.exists():
        raise UsageError("no such folder or file", where=str(given), valid="the output of an earlier command")
    hint = "perpend eval MODEL --edit EDIT -o OUT"
    valid = f"a folder with {REPORT}" if given.is_dir() else f"a file with {given.name}.{REPORT} beside it"
    raise UsageError("holds no report" if given.is_dir() else "has no report", where=str(given), valid=valid, hint=hint)


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
