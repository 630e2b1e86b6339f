"""Tables and lines for a terminal, from plain JSON values; text of a model or a file is always made printable."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from perpend.cli.text import printable, shortened
from perpend.judges.corrections import corrections

Data = Mapping[str, Any]
Rows = Sequence[Data]

REPLY = 160
"""Characters of a reply that are shown."""
SHOWN = {"target": 4, "baseline": 2}
"""Pairs of replies that are shown of each class."""
LABELS = {"comply": "green", "refuse": "yellow", "evade": "yellow", "broken": "red"}


def table(title: str, *columns: str, right: Iterable[str] = ()) -> Table:
    """Return an empty table; `right` names the columns that hold numbers."""
    made = _framed(title)
    for column in columns:
        made.add_column(Text(column), justify="right" if column in right else "left", overflow="fold")
    return made


def _framed(title: str) -> Table:
    heading = Text(f"\n{printable(title)}")
    return Table(title=heading, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False)


def names_and_values(pairs: Data, title: str = "", style: str = "dim") -> Table:
    """Return names and values in two columns, without those that are None."""
    heading = {"title": Text(printable(title)), "title_justify": "left", "title_style": "bold"} if title else {}
    made = Table(box=None, show_header=False, pad_edge=False, **heading)  # type: ignore[arg-type]
    made.add_column(style=style, no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in pairs.items():
        if value is not None:
            made.add_row(Text(printable(name)), cell(value))
    return made


def cell(value: Any) -> Text:
    """Return a value as a table shows it: numbers with four figures, everything else printable."""
    if isinstance(value, Text):
        return value
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


def spaced(name: str) -> str:
    """Return the name of a JSON key as words."""
    return name.replace("_", " ")


def span(bounds: Sequence[float | None] | None, form: str = ".4g") -> str:
    """Return an interval, `–` without one."""
    if not bounds or None in bounds:
        return "–"
    return f"{bounds[0]:{form}} – {bounds[1]:{form}}"


def rate(data: Data | None) -> list[Text]:
    """Return a rate (`k`, `n`, `share`, `interval`) as two cells: the share with k of n, and its 95 % interval."""
    if not data or not data["n"]:
        return [Text("–"), Text("")]
    low, high = data["interval"]
    return [Text(f"{data['share']:.1%} {data['k']}/{data['n']}"), Text(_percents(low, high), style="dim")]


def _percents(low: float, high: float) -> str:
    return f"{100 * low:.1f} – {high:.1%}"


def coverage(rows: Rows, gaps: Sequence[str] = ()) -> Iterator[RenderableType]:
    """Show what of each layer can be edited; neighbouring layers that agree share a row.

    Args:
        rows: `layer`, `component`, `matched`, `total`, `tensors`, `parameters` of each layer and component.
        gaps: What writes to the residual stream and cannot be edited.
    """
    right = ("matched", "tensors", "parameters")
    made = table("Writers", "layers", "component", *right, right=right)
    for component in dict.fromkeys(row["component"] for row in rows):
        own = sorted((r for r in rows if r["component"] == component), key=lambda r: r["layer"])
        for run in _runs(own, lambda r: (r["matched"], r["total"], r["tensors"], r["parameters"])):
            first, last = run[0]["layer"], run[-1]["layer"]
            made.add_row(
                f"{first}" if first == last else f"{first} – {last}",
                component,
                f"{sum(r['matched'] for r in run)} of {sum(r['total'] for r in run)}",
                count(sum(r["tensors"] for r in run)),
                count(sum(r["parameters"] for r in run)),
                style="yellow" if run[0]["matched"] < run[0]["total"] else "",
            )
    matched, total = (sum(row[name] for row in rows) for name in ("matched", "total"))
    made.add_section()
    sizes = (count(sum(row[name] for row in rows)) for name in ("tensors", "parameters"))
    made.add_row("all", "", f"{matched} of {total}", *sizes)
    yield made
    for gap in gaps:
        yield Text(f"not editable: {printable(gap)}", style="yellow")


def _runs(rows: Rows, key: Any) -> Iterator[list[Data]]:
    """Yield maximal runs of rows of consecutive layers for which `key` is the same."""
    for _, group in groupby(enumerate(rows), lambda pair: (pair[1]["layer"] - pair[0], key(pair[1]))):
        yield [row for _, row in group]


def labels(title: str, before: Data, after: Data | None = None, *, corrected: bool = False) -> Table:
    """Show the labels of the replies to one class of prompts, refusals by each judge alone, and what was not judged.

    Args:
        title: Which prompts; their number is added.
        before: A judgement: `labels` and `refused_alone`, both by name, each a rate.
        after: The judgement of the same prompts with the edit.
        corrected: Show acceptance corrected for the error of the judges, where it is known.
    """
    sides = [before] if after is None else [before, after]
    over = ", rates over those judged" if any(side["unknown"] for side in sides) else ""
    made = _framed(f"{title}, n = {before['n']}{over}")
    made.add_column("")
    for name in ("before", "after") if after is not None else ("replies",):
        made.add_column(name, justify="right")
        made.add_column("95 %")
    for label in before["labels"]:
        cells = [part for side in sides for part in rate(side["labels"].get(label))]
        made.add_row(_LABEL_NAMES.get(label, label), *cells, style="bold" if label == "comply" else "")
        if label == "comply" and corrected and any(side.get("corrected") for side in sides):
            made.add_row("  corrected", *(part for side in sides for part in _corrected(side.get("corrected"))))
        for judge in before["refused_alone"] if label == "refuse" else ():
            cells = [part for side in sides for part in rate(side["refused_alone"].get(judge))]
            made.add_row(f"  {judge}", *cells, style="dim")
    if any(side["unknown"] for side in sides):
        lost = [(f"{side['unknown'] / side['n']:.1%} {side['unknown']}/{side['n']}", "") for side in sides]
        made.add_row("not judged", *(part for cells in lost for part in cells), style="yellow")
    return made


_LABEL_NAMES = {"comply": "accepted", "refuse": "refused", "evade": "evaded"}


def comparison(data: Data, name: str = "difference") -> Text:
    """Say in one line what changed between paired replies: `difference`, its interval, gained, lost, McNemar's p."""
    low, high = data["difference_interval"]
    if not data["before"]["n"]:
        return Text(f"{name}: no prompt was judged both times", style="yellow")
    over = f" of the {data['before']['n']} judged both times" if data.get("left_out") else ""
    return Text(
        f"{name} {data['difference']:+.1%} [{low:+.1%}, {high:+.1%}]{over}, {data['gained']} gained, "
        f"{data['lost']} lost, exact McNemar p = {data['mcnemar_p']:.2g}"
    )


def _corrected(data: Data | None) -> tuple[str, str]:
    return (f"{data['share']:.1%}", _percents(*data["interval"])) if data else ("–", "")


def judges(before: Data, after: Data | None = None) -> Iterator[Text]:
    """Say which judges spoke, how far they agree, and what their known error makes of the rate of each side."""
    data = after or before
    if data.get("agreement"):
        both = data["agreement"]
        said = f"judges agree on {both['share']:.1%}, {both['k']}/{both['n']}, Cohen's κ {data['kappa']:.2f}"
        yield Text(said, style="dim")
    elif data.get("reason"):
        yield Text(f"{data['kind']}: {printable(data['reason'])}", style="yellow")
    for line in corrections(before, after):
        yield Text(line, style="dim")


def leak(rows: Rows) -> Iterator[RenderableType]:
    """Show what the saved file's tensors say of the edit: the worst of each component, then every miss.

    Args:
        rows: `module`, `layer`, `component`, `asked`, `realised`, `noise`, `ok` of each edited module.
    """
    right = ("modules", "weight factors", "largest miss", "noise")
    made = table("Weight factors on the saved file", "component", *right, "", right=right)
    for component in dict.fromkeys(row["component"] for row in rows):
        own = [r for r in rows if r["component"] == component]
        asked = [r["asked"] for r in own]
        misses = [abs(r["asked"] - r["realised"]) for r in own if r["realised"] is not None]
        made.add_row(
            component,
            str(len(own)),
            f"{min(asked):.2f} – {max(asked):.2f}",
            f"{max(misses, default=0.0):.4f}",
            f"{max((r['noise'] for r in own if r['noise'] is not None), default=0.0):.4f}",
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


def drift(data: Data, title: str = "Drift on baseline prompts") -> Table:
    """Show what an edit cost: figures of a drift measurement in nats and shares, intervals beside them."""
    made = table(f"{title} ({data['n']} prompts, {data['tokens']} tokens)", "", "value", "95 %", right=("value",))
    for name, (words, form) in _DRIFT.items():
        value = data.get(name)
        bounds = data.get("interval" if name == "mean" else f"{name}_interval")
        if value is not None:
            made.add_row(words, f"{value:{form}}", Text(span(bounds, form), style="dim") if bounds else "")
    return made


_DRIFT = {
    "mean": ("KL per token, mean", ".4f"),
    "median": ("KL per token, median prompt", ".4f"),
    "p95": ("KL per token, 95th percentile", ".4f"),
    "first_token": ("KL of the first token", ".4f"),
    "cross_entropy_ratio": ("cross-entropy of own answers, ratio", ".3f"),
    "flip_rate": ("greedy tokens that change", ".1%"),
}


def pairs(rows: Rows, shares: Mapping[str, int] = SHOWN) -> Iterator[RenderableType]:
    """Show prompts with the reply before and after, each on one line.

    Args:
        rows: `prompt`, `before`, `after` and, where known, `class`, `label_before`, `label_after`.
        shares: How many of each class, in this order; what one class lacks is filled up from the next that has more.
    """
    by_class = {name: [row for row in rows if row.get("class", "target") == name] for name in shares}
    spare = sum(shares.values()) - sum(min(len(by_class[name]), n) for name, n in shares.items())
    for name, n in shares.items():
        own = by_class[name]
        more = min(spare, max(0, len(own) - n))
        spare -= more
        for row in own[: n + more]:
            yield from _pair(row, "› " if name == "target" else f"› {name}: ")


def _pair(row: Data, mark: str) -> Iterator[RenderableType]:
    yield Text.assemble((mark, "dim"), (shortened(row["prompt"], REPLY), "bold"))
    for side in ("before", "after"):
        if row.get(side) is not None:
            label = str(row.get(f"label_{side}") or "")
            marked = (f"[{printable(label)}] ", LABELS.get(label, "yellow")) if label else ""
            yield Text.assemble((f"  {side:7}", "dim"), marked, shortened(row[side], REPLY))


DIAGNOSTICS = {
    "auc": ("AUC", "held-out prompts told apart"),
    "split_half_cosine": ("halves", "cosine of the directions of two halves of the prompts"),
    "top4_share": ("top 4", "share of its square in its four largest dimensions"),
}
"""Diagnostics of a direction that are shown for every layer: the head of the column, and what it means."""
SIDE_BY_SIDE = 3
"""Layers that share a line."""


def per_layer(
    diagnostics: Mapping[str, Sequence[float | None]], chosen: float | None = None
) -> Iterator[RenderableType]:
    """Show the diagnostics of every layer, counted down the columns.

    Args:
        diagnostics: One number per layer each, by name.
        chosen: The layer that the direction is taken from, where there is one.
    """
    names = [name for name in DIAGNOSTICS if diagnostics.get(name)]
    if not names:
        return
    layers = len(diagnostics[names[0]])
    lines = -(-layers // SIDE_BY_SIDE)
    made = Table(title="Every layer", title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))
    for block in range(-(-layers // lines)):
        for head in (*([""] if block else []), "layer", *(DIAGNOSTICS[name][0] for name in names)):
            made.add_column(Text(head), justify="right", no_wrap=True)
    for line in range(lines):
        cells: list[Text] = []
        for layer in range(line, layers, lines):
            style = "bold" if chosen is not None and layer == round(chosen) else ""
            numbers = [diagnostics[name][layer] for name in names]
            texts = [str(layer), *("–" if x is None or x != x else f"{x:.3f}" for x in numbers)]
            cells += [*([Text("")] if cells else []), *(Text(text, style=style) for text in texts)]
        made.add_row(*cells)
    yield made
    yield Text("; ".join(": ".join(DIAGNOSTICS[name]) for name in names), style="dim")
