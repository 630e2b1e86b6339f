"""`perpend diff`: what was done to a model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

import perpend
from perpend.cli import render, views
from perpend.cli.options import MEASURE, Request, command
from perpend.cli.text import printable
from perpend.options.table import OUTPUT
from perpend.report.changes import by_kind

Checkpoint = "hub id (org/name or org/name@revision) or directory"
Base = Annotated[str, typer.Argument(metavar="BASE", help=f"The model before: {Checkpoint}.", show_default=False)]
Other = Annotated[str, typer.Argument(metavar="OTHER", help=f"The model after: {Checkpoint}.", show_default=False)]
Third = Annotated[
    str | None,
    typer.Option(help=f"A model that OTHER may be a merge with: {Checkpoint}.", metavar="MODEL", show_default=False),
]
Recovered = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="File for the recovered ablation, in the form of edit.safetensors, with its report beside it.",
        metavar="FILE",
        rich_help_panel=OUTPUT,
        show_default=False,
    ),
]
BARS = " ▁▂▃▄▅▆▇█"


@command(
    "diff",
    options=("dry_run",),
    examples=("diff google/gemma-3-4b-it ./other", "diff ./base ./other --third ./parent --json"),
    panel=MEASURE,
)
def diff(base: Base, other: Other, third: Third = None, output: Recovered = None, *, request: Request) -> None:
    """Tell what was done to one model to make another.

    From the weights alone, tensor by tensor: an ablation with its direction, side, strength per layer and kernel, an
    adapter, a fine-tune, a merge, a round trip through a quantised format, noise, another model; and how sure that is.
    """
    result = perpend.diff(base, other, third=third, output=output, dry_run=request.dry_run)
    request.out.result(result, views.planned if request.dry_run else view)
    if output is not None and not request.dry_run and not output.exists():
        request.out.note(f"{output} was not written: no ablation of what is written was found in a mode that apply has")


def view(data: dict[str, Any]) -> Iterator[RenderableType]:
    """Show the verdict, its grounds, and the changed matrices by kind."""
    verdict, tensors = data["verdict"], data["tensors"]
    yield Text(printable(verdict["detail"]), style="bold")
    if verdict["told"]:
        yield Text(f"confidence {verdict['confidence']:.2f}: {verdict['basis']}")
    for ground in verdict["grounds"]:
        yield Text(f"· {printable(ground)}", style="dim")
    if data["ablation"] and verdict["name"] in ("ablation", "mixed"):
        yield _ablation(data["ablation"])
        yield _kernels(data["kernels"])
    if data["changes"]:
        yield _changes(data["changes"])
        yield _scores(verdict["scores"])
    yield Text(
        f"\n{tensors['matched']} tensors in both: {tensors['equal']} the same byte for byte, {tensors['cast']} the "
        f"same in another dtype, {tensors['changed']} changed",
        style="dim",
    )
    for name in ("missing", "added", "reshaped", "unread"):
        if tensors[name]:
            listed = ", ".join(tensors[name][:4]) + (", …" if len(tensors[name]) > 4 else "")
            yield Text(f"{name}: {len(tensors[name])} ({printable(listed)})", style="yellow")
    yield from views.written(data)


def _ablation(data: dict[str, Any]) -> Table:
    writes = {"output": "what the matrices write", "input": "what the matrices read"}[data["side"]]
    facts = {
        "taken out of": writes,
        "directions": data["rank"],
        "shared": f"{data['scope']} ({data['common']:.1%} of their squared length in common)",
        "neighbouring layers": f"|cos| {data['neighbours']:.4f}" if data["neighbours"] is not None else None,
        "mode": f"{data['mode']}, which keeps {data['keeps']}",
    }
    return render.names_and_values(facts, "\nAblation")


def _kernels(kernels: dict[str, Any]) -> Table:
    right = ("peak weight", "peak layer", "spread", "off by")
    made = render.table("Weight factors over the layers", "matrices", "schedule", *right, "layers", right=right)
    for kind, found in kernels.items():
        numbers = (found["peak_weight"], found["peak_layer"], found["spread"])
        cells = ["–" if value is None else f"{value:.3g}" for value in numbers]
        made.add_row(printable(kind), found["kind"], *cells, f"{found['rms']:.3g}", _bars(found["weights"]))
    return made


def _bars(weights: list[float]) -> str:
    """Draw |λ| of every layer as a line of bars."""
    top = max((abs(w) for w in weights), default=0.0) or 1.0
    return "".join(BARS[round(abs(w) / top * (len(BARS) - 1))] for w in weights)


def _changes(changes: list[dict[str, Any]]) -> Table:
    right = ("changed", "moved", "rank", "predicted")
    made = render.table("Changed matrices", "matrices", *right, "by", right=right)
    for own in by_kind(changes):
        span = f"{own.ranks[0]}" if own.ranks[0] == own.ranks[1] else f"{own.ranks[0]} – {own.ranks[1]}"
        account = own.account or "none of the accounts"
        share = "–" if own.predicted is None else f"{own.predicted:.1%}"
        made.add_row(printable(own.kind), str(own.count), f"{own.moved:.2%}", span, share, account)
    return made


def _scores(scores: dict[str, float]) -> Table:
    return render.names_and_values({name: f"{score:.3f}" for name, score in scores.items()}, "\nAccounts")
