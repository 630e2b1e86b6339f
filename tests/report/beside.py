"""What holds of the report of every output: valid by the published schema, one page, made again alike, alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from perpend.tasks.pages import write_report

SCHEMA = json.loads((Path(__file__).parent.parent.parent / "docs" / "report.schema.json").read_text())
LINKS = re.compile(r"""\b(?:src|srcset|href|action|data)="([^"]*)"|url\(([^)]*)\)|@import (\S+)""")


def sound(output: Path) -> tuple[dict[str, Any], str]:
    """Return JSON and page of an output that is one file, or a folder, after looking at what holds of all of them."""
    alone = not output.is_dir()
    report = output.with_name(f"{output.name}.report.json") if alone else output / "report.json"
    page = report.with_suffix(".html")
    data, text = json.loads(report.read_text(encoding="utf-8")), page.read_text(encoding="utf-8")
    pytest.importorskip("jsonschema").Draft202012Validator(SCHEMA).validate(data)
    links = {"".join(found) for found in LINKS.findall(text)}
    assert "#main" in links
    assert not [link for link in links if not link.startswith(("#", "data:"))]
    assert "default-src 'none'" in text
    assert text.count("<script") == 1
    assert f"<code>{report.name}</code> beside it" in text
    assert str(output.parent.resolve()) not in text
    for key in ("made", "command"):
        assert data["about"][key]
    assert data["versions"]["perpend"] in text
    page.write_text("old")
    for given in (output, report):
        write_report(given)
        assert page.read_text(encoding="utf-8") == text
        page.write_text("old")
    page.write_text(text, encoding="utf-8")
    return data, text
