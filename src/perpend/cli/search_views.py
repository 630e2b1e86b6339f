"""What a person reads of a search."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from rich.console import RenderableType
from rich.text import Text

from perpend.cli import render, views
from perpend.cli.render import Data
from perpend.cli.text import printable
from perpend.units import seconds

View = Iterator[RenderableType]


def openings(data: Data) -> View:
    """Show what refusals are weighed against: openings that the model gives without its direction."""
    heard = f"{data['complied']} of {data['targets']} targets answered without the direction of layer {data['layer']}"
    yield Text(f"\nscore: refusals against openings; {heard}", style="dim")
    if data["delayed"]:
        yield Text(f"and refusals after a compliant beginning, of {data['delayed']} targets", style="dim")
    for text in data["openings"]:
        yield Text(f"  {printable(text)!r}", style="dim")


def survivor(data: Data) -> View:
    """Say how often a candidate that replied shortly is accepted and refuses."""
    accepted, refused = data["accepted_shortly"], data["refused_shortly"]
    said = f"short replies: {_told(accepted)} accepted, {_count(refused)} refused"
    yield Text(f"{data['name']}: {said}; {_scored(data)}", style="dim")


def finalist(data: Data) -> View:
    """Say how a finalist was judged at full length."""
    said = f"judged at full length: {_told(data['acceptance'])} accepted, {_count(data['refused'])} refused"
    broken = f"broken {_count(data['broken'])} of targets, {_count(data['broken_baselines'])} of baselines"
    yield Text(f"{data['name']}: {said}, {broken}; {_scored(data)}")


def _told(rate: Data | None) -> str:
    return f"{_count(rate)} [{render.span(rate['interval'], '.0%')}]" if rate else "–"


def _scored(data: Data) -> str:
    return f"refusal {data['refusal']:.2f} by score, drift {data['drift']:.4f}"


def found(data: Data) -> View:
    """Show the front with intervals, the chosen edit in words, and how far the score is to be trusted."""
    broken = ("broken", "baselines broken")
    right = ("refusal", "drift", "accepted", *broken)
    made = render.table(
        "Front of the search, select split", "", *right[:2], "95 %", "accepted", "95 %", *broken, right=right
    )
    before, score = data["broken"]["untouched"], data["untouched"]["refusal"]
    counts = [_count(before[name]) for name in ("target", "baseline")]
    made.add_row("untouched", f"{score:.3f}", "0", "", f"{data['untouched']['acceptance']:.1%}", "", *counts)
    for point in data["points"]:
        made.add_row(
            f"{point['name']}{' *' if point['chosen'] else ''}",
            f"{point['refusal']:.3f}",
            f"{point['drift']:.4f}",
            Text(render.span(point["drift_interval"], ".4f"), style="dim"),
            *render.rate(point["acceptance"] or point["accepted_shortly"]),
            _count(point["broken"]),
            _count(point["broken_baselines"]),
            style="bold" if point["chosen"] else "" if point["on_front"] else "dim",
        )
    yield made
    trials, untouched = data["trials"], data["untouched"]
    ended = ", ".join(f"{n} {name}" for name, n in trials.items() if n and name != "finished")
    yield Text(f"{trials['finished']} trials ({ended}); {printable(data['why'])}", style="dim")
    legend = "* chosen; dim: not on the front; rates without broken are of short replies"
    yield Text(f"refusal by score, the untouched model's {untouched['refusal']:.3f}; {legend}", style="dim")
    correlation = data["correlation"]
    yield Text(correlation["text"], style="yellow" if correlation["poor"] else "dim")
    for refinement in data["refinements"]:
        yield Text(printable(refinement["text"]), style="dim")
    chosen = data["chosen"]
    yield Text(f"chosen, {printable(data['rule'])}: {chosen['name']}: {chosen['words']}", style="bold")
    yield Text(printable(data["broken"]["text"]), style="" if data["broken"]["kept"] else "yellow")
    if not data["met"]:
        yield Text(f"no finalist has {printable(data['rule'])}: the nearest was taken", style="yellow")


def _count(rate: Data | None) -> str:
    return f"{rate['k']}/{rate['n']}" if rate else "–"


def written(data: Data) -> View:
    """Say where the result went and what to type next."""
    yield from views.written(data)
    if data.get("output"):
        yield Text(f"next: perpend chat {printable(shlex.quote(str(data['output'])))}")


def joined(data: Data) -> View:
    """Say what a process did that joined a search."""
    yield Text(f"{data['trials']} trials of {data['study']} in {seconds(data['seconds'])}; {printable(data['why'])}")


PARTS = {"openings": openings, "survivor": survivor, "finalist": finalist, "search": found}
"""Views of the parts of a search beside those of a run."""
