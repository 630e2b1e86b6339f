"""One self-contained page from one document: no script but its own few lines, nothing fetched, all text escaped."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from markupsafe import Markup
from pydantic import ValidationError

from perpend import units
from perpend._version import __version__
from perpend.core.store import STUMBLES
from perpend.errors import UsageError
from perpend.escape import on_page
from perpend.judges.corrections import corrections
from perpend.report import figures
from perpend.report.changes import by_kind
from perpend.report.document import Document, Drift, Fit, Report, Side
from perpend.report.part import Interval
from perpend.report.single import Organism

QUESTIONS = {
    "run": "What one edit did to",
    "eval": "How replies changed in",
    "fit": "The direction that was found in",
    "apply": "An edit, read back from the file of",
    "adapter": "An edit as an adapter of",
    "bench": "Benchmarks before and after an edit of",
    "search": "What a search found in",
    "export_gguf": "A GGUF file of an edit of",
    "vector": "A control vector for",
    "diff": "What was done to",
    "organism": "A model that was taught to refuse:",
}


def read(data: Mapping[str, Any], where: str) -> Document:
    """Return a document from JSON.

    Args:
        data: What a file holds.
        where: Its name.

    Raises:
        UsageError: not a report; names the first key that is wrong.
    """
    try:
        return Document.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UsageError(f"not a report: {key}: {first['msg']}", where=where) from None


def render(document: Document, report_name: str = "report.json") -> str:
    """Return the page of a document.

    Args:
        document: What it shows.
        report_name: What the JSON beside it is called.

    Raises:
        UsageError: its parts do not fit together, such as a layer that its lists do not have.
    """
    from jinja2 import TemplateError

    try:
        return _rendered(document, report_name)
    except (*STUMBLES, TemplateError) as error:
        what = f"not a report: its parts do not fit together: {type(error).__name__} {str(error)[:200]}"
        raise UsageError(what, where=report_name) from error


def _rendered(document: Document, report_name: str) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("perpend.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=True,
        finalize=_shown,
    )
    environment.filters |= {
        "pct": percent,
        "num": plain,
        "signed": signed,
        "span": span,
        "points": points,
        "size": units.size,
        "clock": units.seconds,
    }
    report, about = document.report, document.about
    stages = document.seconds if isinstance(document.seconds, dict) else {"all": document.seconds}
    style, script = (_asset(name) for name in ("report.css", "report.js"))
    return environment.get_template("report.html.jinja").render(
        d=document,
        r=report,
        replied=report.pairs if report else document.organism.pairs if document.organism else (),
        question=QUESTIONS.get(document.task, "A report on"),
        name=about.model.id if about and about.model else document.model.rstrip("/").rpartition("/")[2],
        used="vector" if document.vector else "edit",
        kinds=by_kind([change.model_dump() for change in document.diff.changes]) if document.diff else (),
        report_name=report_name,
        names=figures.LABELS,
        figures=drawn(document),
        matrices=matrices(document),
        corrections=_corrections(report),
        drifts=drift_rows(document),
        version=__version__,
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        stages={name: took for name, took in stages.items() if took},
    )


def standalone(figure: Markup) -> str:
    """Return a figure as an SVG file of its own, with the styles of the page."""
    style = Markup("<style>svg{{background:var(--paper)}}{}</style>").format(Markup(_asset("report.css")))
    head, body = str(figure).split(">", 1)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{head} xmlns="http://www.w3.org/2000/svg">{style}{body}\n'


def _shown(value: Any) -> Any:
    """Make text that is no markup of ours harmless before it is escaped."""
    return on_page(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _asset(name: str) -> str:
    return resources.files("perpend.report").joinpath("templates", name).read_text(encoding="utf-8").strip()


def _hash(text: str) -> str:
    """Return the source expression by which a content security policy admits this text and no other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def drawn(document: Document) -> dict[str, Markup]:
    """Return the figures for which the document has numbers."""
    found: dict[str, Markup] = {**_of_replies(document.report), **_of_fit(document.fit)}
    if document.edit and document.edit.modules:
        found["schedule"] = figures.schedule(document.edit, document.gate)
    if document.earlier:
        paired = document.earlier.accepted
        found["earlier"] = figures.acceptance([("before", "before", paired.before), ("after", "after", paired.after)])
    if document.organism:
        found |= _of_organism(document.organism)
    if document.front:
        found["front"] = figures.front(document.front)
        found["schedules"] = figures.schedules(document.front)
    return found


def _of_replies(report: Report | None) -> dict[str, Markup]:
    if not report:
        return {}
    old = report.before.target.acceptance
    rows = [("before" if report.after else "replies", "before", old)]
    if report.control:
        rows.append(("random direction", "random", report.control.random.acceptance))
    if report.after:
        rows.append(("after", "after", report.after.target.acceptance))
    found = {"acceptance": figures.acceptance(rows), "labels": figures.labels(report.before, report.after)}
    return {**found, "drifts": figures.drifts(report.drift, report.control)} if report.drift else found


def _of_fit(fit: Fit | None) -> dict[str, Markup]:
    if not fit:
        return {}
    found = {}
    if fit.diagnostics:
        found["separation"] = figures.separation(fit)
    if fit.cosines:
        found["cosines"] = figures.cosines(fit)
    if fit.choice and fit.choice.candidates:
        found["tried"] = figures.tried(fit.choice)
    return found


def _of_organism(made: Organism) -> dict[str, Markup]:
    kinds = {"targets": ("after", made.refused_targets), "baselines": ("before", made.refused_baselines)}
    rows = [(name, cls, rate) for name, (cls, rate) in kinds.items() if rate.n]
    found = {"refused": figures.acceptance(rows, threshold=None, title="Prompts refused, with 95 % intervals")}
    return found | ({"losses": figures.losses(made)} if len(made.losses) > 1 else {})


def matrices(document: Document) -> list[dict[str, Any]]:
    """Return how often each pair of labels of dictionary and classifier came, per class and side."""
    report = document.report
    if not report:
        return []
    found = []
    for when, sides in (("before", report.before), ("after", report.after)):
        for name in ("target", "baseline") if sides else ():
            side: Side = getattr(sides, name)
            if "classifier" not in side.judges:
                continue
            said = [(_label(r, "dictionary"), _label(r, "classifier")) for r in side.replies]
            columns = [x for x in figures.LABELS if any(b == x for _, b in said)]
            rows = [(x, [said.count((x, y)) for y in columns]) for x in figures.LABELS if any(a == x for a, _ in said)]
            title = f"{name} prompts, {when}" if report.after else f"{name} prompts"
            found.append({"title": title, "columns": columns, "rows": rows, "side": side})
    return found


def _corrections(report: Report | None) -> list[str]:
    """Return what the known error of the judges makes of the acceptance of each side, as sentences."""
    if not report:
        return []
    sides = [side.target.model_dump() for side in (report.before, report.after) if side]
    return [f"{line[:1].upper()}{line[1:]}." for line in corrections(*sides)]


def _label(judged: Any, role: str) -> str:
    said = (judged.model_extra or {}).get(role)
    return str(said["label"]) if said else "unknown"


def drift_rows(document: Document) -> list[tuple[str, str, str, str]]:
    """Return the rows of the table of cost: what, value, 95 % interval, the control's value."""
    report = document.report
    if not report or not report.drift:
        return []
    one, other = report.drift, report.control.drift if report.control else None

    def row(name: str, key: str, interval: str, form: str) -> tuple[str, str, str, str]:
        bounds: Interval | None = getattr(one, interval) if interval else None
        control = "" if other is None else _number(getattr(other, key), form)
        return name, _number(getattr(one, key), form), span(bounds, form) if bounds else "", control

    def entropy(drift: Drift) -> str:
        return f"{drift.cross_entropy.reference:.3f} → {drift.cross_entropy.candidate:.3f}"

    return [
        row("KL per token, mean over prompts, nats", "mean", "interval", ".4f"),
        row("KL per token, median prompt", "median", "", ".4f"),
        row("KL per token, 95th percentile", "p95", "", ".4f"),
        row("KL of the first token", "first_token", "first_token_interval", ".4f"),
        (
            "Cross-entropy of its own answers, nats per token",
            entropy(one),
            "",
            entropy(other) if other else "",
        ),
        row("The same as a ratio", "cross_entropy_ratio", "cross_entropy_ratio_interval", ".3f"),
        row("Greedy tokens that change", "flip_rate", "flip_rate_interval", ".1%"),
    ]


def _number(value: float | None, form: str) -> str:
    """Return a number with a true minus sign, and its per cent sign at a space where no line is broken."""
    if value is None:
        return "–"
    text = format(value, form).replace("%", "\u202f%")
    return "−" + text[1:] if text.startswith("-") else text


def percent(value: float | None) -> str:
    """Return a share as per cent."""
    return _number(value, ".1%")


def plain(value: float | None, form: str = ".3f") -> str:
    """Return a number, a dash where there is none."""
    return _number(value, form)


def signed(value: float | None, form: str = "+.3f") -> str:
    """Return a number with its sign, a dash where there is none."""
    return _number(value, form)


def points(value: float | None) -> str:
    """Return a difference of shares in percentage points, with its sign."""
    return "–" if value is None else f"{100 * value:+.1f}".replace("-", "−")


def span(bounds: Sequence[float | None] | None, form: str = ".1%") -> str:
    """Return an interval, a dash without one."""
    if not bounds or None in bounds:
        return "–"
    return f"{_number(bounds[0], form)} – {_number(bounds[1], form)}"
