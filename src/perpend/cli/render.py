"""From the JSON of a result to what a person reads: tables and a few lines, never a model's text unescaped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from perpend.cli.text import printable, seconds, shortened

Data = dict[str, Any]
Rows = Sequence[Mapping[str, Any]]

REPLY = 160
"""Characters of a reply that are shown."""


def table(title: str, *columns: str, right: Iterable[str] = ()) -> Table:
    """Return an empty table; `right` names the columns that hold numbers."""
    made = Table(title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        made.add_column(Text(column), justify="right" if column in right else "left", overflow="fold")
    return made


def cell(value: Any) -> Text:
    """Return a value as a table shows it: numbers with four figures, everything else printable."""
    if isinstance(value, bool):
        return Text("yes" if value else "no")
    if isinstance(value, float):
        return Text("–" if value != value else f"{value:.4g}")
    return Text("–" if value is None else printable(str(value)))


def count(value: int) -> str:
    """Return a large number with a unit: 512, 3.1 k, 2.4 M, 1.2 B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return str(value)


def percent(value: float | None) -> str:
    """Return a share of one as a percentage with one decimal."""
    return "–" if value is None else f"{100 * value:.1f} %"


def interval(low: float | None, high: float | None) -> str:
    """Return an interval of shares as percentages."""
    return "–" if low is None or high is None else f"{100 * low:.1f}–{100 * high:.1f} %"


def change(before: Any, after: Any) -> Text:
    """Return `before → after`."""
    return Text.assemble(cell(before), " → ", cell(after))


def facts(title: str, pairs: Mapping[str, Any]) -> Table:
    """Return names and values in two columns, without those that are None."""
    made = Table(
        title=Text(title) if title else None,
        title_justify="left",
        title_style="bold",
        box=None,
        show_header=False,
        pad_edge=False,
    )
    made.add_column(style="dim", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in pairs.items():
        if value is not None:
            made.add_row(Text(name), cell(value))
    return made


def coverage(rows: Rows, gaps: Sequence[str] = ()) -> Iterator[RenderableType]:
    """Show what of each layer can be edited; neighbouring layers that agree share a row.

    Args:
        rows: `layer`, `component`, `matched`, `total`, `parameters` of each layer and component.
        gaps: What writes to the residual stream and cannot be edited.
    """
    made = table("Coverage", "layers", "component", "matched", "parameters", right=("matched", "parameters"))
    for component in dict.fromkeys(row["component"] for row in rows):
        own = sorted((r for r in rows if r["component"] == component), key=lambda r: r["layer"])
        for run in runs(own, lambda r: (r["matched"], r["total"], r["parameters"])):
            first, last = run[0]["layer"], run[-1]["layer"]
            short = run[0]["matched"] < run[0]["total"]
            made.add_row(
                f"{first}" if first == last else f"{first}–{last}",
                component,
                f"{run[0]['matched']} of {run[0]['total']}",
                count(sum(r["parameters"] for r in run)),
                style="yellow" if short else "",
            )
    yield made
    for gap in gaps:
        yield Text(f"not editable: {printable(gap)}", style="yellow")


def runs(rows: Rows, key: Any) -> Iterator[list[Mapping[str, Any]]]:
    """Yield maximal runs of rows of consecutive layers for which `key` is the same."""
    for _, group in groupby(enumerate(rows), lambda pair: (pair[1]["layer"] - pair[0], key(pair[1]))):
        yield [row for _, row in group]


def labels(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None, title: str = "Accepted") -> Table:
    """Show acceptance by judge, before and after, with 95 % intervals.

    Args:
        before: From the judge's name (dictionary, classifier, hybrid) to `accepted`, `n`, `low`, `high`.
        after: The same after the edit.
        title: What was counted.
    """
    columns = [name for name, side in (("before", before), ("after", after)) if side]
    heads = [head for name in columns for head in (name, "95 %")]
    made = Table(title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    made.add_column("judge")
    for head in heads:
        made.add_column(head, justify="right")
    sides = [side for side in (before, after) if side]
    for judge in dict.fromkeys(name for side in sides for name in side):
        cells: list[str] = []
        for side in sides:
            rate = side.get(judge) or {}
            n, accepted = rate.get("n"), rate.get("accepted")
            cells.append("–" if not n else f"{accepted} of {n} ({percent(accepted / n)})")
            cells.append(interval(rate.get("low"), rate.get("high")))
        made.add_row(judge, *cells, style="bold" if judge == "hybrid" else "")
    return made


def gate(rows: Rows) -> Iterator[RenderableType]:
    """Show what the saved file's tensors say of the edit: the worst of each component, then every miss.

    Args:
        rows: `module`, `layer`, `component`, `asked`, `realised`, `noise`, `ok` of each edited module.
    """
    right = ("modules", "weight factors", "largest miss", "noise")
    made = table("Weight factors on the saved file", "component", *right, "", right=right)
    for component in dict.fromkeys(row["component"] for row in rows):
        own = [r for r in rows if r["component"] == component]
        asked = [r["asked"] for r in own]
        made.add_row(
            component,
            str(len(own)),
            f"{min(asked):.2f}–{max(asked):.2f}",
            f"{max(abs(r['asked'] - r['realised']) for r in own):.4f}",
            f"{max(r['noise'] for r in own):.4f}",
            verdict(all(r["ok"] for r in own)),
        )
    yield made
    missed = [r for r in rows if not r["ok"]]
    if missed:
        right = ("layer", "asked", "realised", "noise")
        listed = table("Missed", "module", *right, right=right)
        for row in missed:
            listed.add_row(cell(row["module"]), *(cell(row[name]) for name in right))
        yield listed


def verdict(ok: bool) -> Text:
    """Return `ok` or `missed`, in colour."""
    return Text("ok", style="green") if ok else Text("missed", style="bold red")


def drift(data: Mapping[str, Any]) -> Table:
    """Show what an edit cost: every number of a drift measurement under its own name."""
    made = table("Drift on baseline prompts", "measure", "value", "95 %", right=("value", "95 %"))
    for name, value in data.items():
        if isinstance(value, Mapping) and "mean" in value:
            low, high = value.get("low"), value.get("high")
            span = "–" if low is None or high is None else f"{low:.4g}–{high:.4g}"
            made.add_row(spaced(name), cell(value["mean"]), span)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            made.add_row(spaced(name), cell(value), "")
    return made


def spaced(name: str) -> str:
    """Return the name of a JSON key as words."""
    return name.replace("_", " ")


def pairs(rows: Rows, limit: int = 4) -> Iterator[RenderableType]:
    """Show prompts with the reply before and after, each on one line.

    Args:
        rows: `prompt`, `before`, `after` and, where known, `label_before`, `label_after`.
        limit: At most this many.
    """
    for row in rows[:limit]:
        yield Text.assemble("\n", (shortened(row["prompt"], REPLY), "bold"))
        for side in ("before", "after"):
            if row.get(side) is not None:
                label = row.get(f"label_{side}")
                style = "green" if label == "comply" else "yellow"
                marked = (f" [{printable(str(label))}]", style) if label else ""
                yield Text.assemble((f"  {side:6}", "dim"), marked, " ", shortened(row[side], REPLY))
    if len(rows) > limit:
        yield Text(f"  and {len(rows) - limit} more with --json", style="dim")


def listing(data: Data) -> Iterator[RenderableType]:
    """Show `perpend ls`."""
    for kind, entries in data.items():
        made = Table(
            title=Text(kind), title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False
        )
        made.add_column(no_wrap=True, style="cyan")
        made.add_column(overflow="fold")
        for entry in entries:
            made.add_row(cell(entry["name"]), cell(entry["summary"]))
        yield made
        if kind != list(data)[-1]:
            yield ""


def validated(data: Data) -> Iterator[RenderableType]:
    """Show `perpend config validate`."""
    yield Text(f"{printable(data['source'])}: valid, recipe {data['hash']}")


def wrote(data: Data) -> Iterator[RenderableType]:
    """Say where the result went and how long it took, where that is known."""
    took = f" in {seconds(data['seconds'])}" if isinstance(data.get("seconds"), int | float) else ""
    if data.get("output"):
        verb = "would write" if data.get("dry_run") else "wrote"
        yield Text(f"{verb} {printable(str(data['output']))}{took}")


def summary(data: Data) -> Iterator[RenderableType]:
    """Show any result by the names of its parts: tables for those that have one, names and values for the rest."""
    plain = {spaced(k): v for k, v in data.items() if isinstance(v, str | int | float | bool) and k not in _SAID}
    if plain:
        yield facts(str(data.get("title") or ""), plain)
    if data.get("coverage"):
        yield from coverage(data["coverage"], data.get("gaps") or ())
    if data.get("gate"):
        yield from gate(data["gate"])
    if data.get("before") or data.get("after"):
        yield labels(data.get("before"), data.get("after"))
    if data.get("drift"):
        yield drift(data["drift"])
    if data.get("pairs"):
        yield from pairs(data["pairs"])
    for line in data.get("notes") or ():
        yield Text(printable(str(line)))
    yield from wrote(data)


_SAID = {"title", "output", "seconds", "dry_run"}
