"""What the report of an output is called: in a folder, and beside an output that is one file.

In a folder it is `report.json` and `report.html`. Beside a file it has the whole name of that file in front, as it was
asked for: `edited.gguf` has `edited.gguf.report.json` and `edited.gguf.report.html`, also where it was written in parts
(`edited-00001-of-00003.gguf`). So the reports of `a.gguf` and `a.safetensors` are two, and no name ends as weights do.
"""

from __future__ import annotations

import re
from pathlib import Path

REPORT, PAGE = "report.json", "report.html"
PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
"""Name of a numbered part of a GGUF model."""


def pages_of(output: Path) -> tuple[Path, Path]:
    """Return the report of an output that is one file, as JSON and as a page."""
    json, page = (output.with_name(f"{output.name}.{name}") for name in (REPORT, PAGE))
    return json, page


def report_of(path: Path) -> Path | None:
    """Return the JSON of the report that a path stands for; None where there is none.

    Args:
        path: A folder, its `report.json`, an output that is one file, a numbered part of it, or its `….report.json`.
    """
    part = PART.fullmatch(path.name)
    asked = path.with_name(f"{part['stem']}.gguf") if part else path
    found = [pages_of(path)[0], pages_of(asked)[0], *([path] if is_report(path.name) else [path / REPORT])]
    return next((file for file in found if path.name and file.is_file()), None)


def is_report(name: str) -> bool:
    """Say whether a file is called as a report is, in a folder or beside a file, as JSON or as a page."""
    return name in (REPORT, PAGE) or name.endswith((f".{REPORT}", f".{PAGE}"))
