"""What a search leaves beside the model: every trial, the front, and both as pictures."""

from __future__ import annotations

import os
from pathlib import Path

from perpend.report.document import Front
from perpend.report.figures import front, schedules
from perpend.report.page import standalone
from perpend.tasks.finalists import Found
from perpend.tasks.output import to_text
from perpend.tasks.trials import Site, row

STUDY, TRIALS, FRONT = "study.log", "trials.jsonl", "front.json"


def write_trials(path: Path, site: Site) -> None:
    """Write a line of JSON per trial that has ended, in the order of the search."""
    lines = [to_text(row(trial, site.plan), indent=None) + "\n" for trial in site.view().finished()]
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(lines), encoding="utf-8")
    os.replace(partial, path)


def put_findings(folder: Path, found: Found, site: Site) -> None:
    """Write `trials.jsonl`, `front.json`, `front.svg` and `schedules.svg` into a folder that is being made."""
    write_trials(folder / TRIALS, site)
    told = found.to_json()
    told["front"] = told.pop("points")
    (folder / FRONT).write_text(to_text(told) + "\n", encoding="utf-8")
    points = [Front.model_validate(point) for point in told["front"]]
    (folder / "front.svg").write_text(standalone(front(points)), encoding="utf-8")
    (folder / "schedules.svg").write_text(standalone(schedules(points)), encoding="utf-8")
