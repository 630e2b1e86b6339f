"""What a person reads of each result: from its JSON to tables and lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from perpend.cli import render
from perpend.cli.render import Data
from perpend.cli.text import printable
from perpend.export.beside import PAGE, REPORT
from perpend.units import seconds, size

View = Iterator[RenderableType]
UNKNOWN = "unknown: the model is not on this machine yet"


def listing(data: Data) -> View:
    """Show `perpend ls`."""
    for kind, entries in data.items():
        yield render.names_and_values({entry["name"]: entry["summary"] for entry in entries}, kind, style="cyan")
        if kind != list(data)[-1]:
            yield ""


def validated(data: Data) -> View:
    """Show `perpend config validate`."""
    yield Text(f"{printable(data['source'])}: valid, recipe {data['hash']}")


def written(data: Data) -> View:
    """Say where the result went, how long it took, and which page shows it."""
    took = data.get("seconds")
    if isinstance(took, Mapping):
        took = sum(took.values())
    if data.get("output"):
        verb = "would write" if data.get("dry_run") else "wrote"
        yield _path(f"{verb} {printable(str(data['output']))}{f' in {seconds(took)}' if took else ''}")
        for page in data.get("pages") or ():
            name = printable(str(page))
            if Path(page).name == PAGE:
                yield _path(f"report: {name}")
            elif Path(page).name != REPORT:
                yield _path(f"{verb} {name}", style="dim")


def _path(line: str, style: str = "") -> Text:
    """Return a line that is left to the terminal to wrap, so that a path in it can be copied whole."""
    return Text(line, style, no_wrap=True, overflow="ignore")


def planned(data: Data) -> View:
    """Show a dry run: what would be read and written."""
    facts = {name: data[name] for name in ("model", "base", "modules", "lessons") if data.get(name)}
    facts["prompts"] = ", ".join(f"{name} {n}" for name, n in (data.get("prompts") or {}).items()) or None
    yield render.names_and_values({**facts, **forecast(data.get("forecast") or {})})
    yield from written(data)


def rehearsal(data: Data) -> View:
    """Show a dry run of a conversation or a server: what would be loaded."""
    reads = UNKNOWN if data["reads"] is None else size(data["reads"])
    edits = data["edited_modules"]
    facts = {
        "model": data["model"],
        "reads": reads,
        "memory": f"{size(data['memory_free'])} free",
        "edits": None if edits is None else f"{edits} modules, switched on and off by hooks",
        "would listen at": data["url"],
    }
    yield render.names_and_values(facts)


def served(data: Data) -> View:
    """Say where a server is, and what it can be asked for."""
    facts = {
        "page": data["url"],
        "OpenAI clients": f"base_url={data['api']}",
        "models": ", ".join(data["models"]) + (" (any scale)" if data["edit_sha256"] else ""),
        "labels": data["judges"],
    }
    yield render.names_and_values(facts)


def forecast(data: Data) -> dict[str, str | None]:
    """Return what a task would do, as names and values; unknown sizes are said to be so."""
    if not data:
        return {}

    def sized(name: str) -> str:
        return UNKNOWN if data[name] is None else size(data[name])

    edited = data["edited_parameters"]
    return {
        "reads": sized("reads"),
        "writes": None if data["writes"] == 0 else f"{sized('writes')}, {sized('disk_free')} free",
        "memory for the weights": f"{sized('memory')}, {sized('memory_free')} free",
        "peak memory": None if data.get("peak_memory") is None else sized("peak_memory"),
        "read when needed": f"{sized('read_when_needed')} in {data['passes']} passes, {sized('bytes_read')} in all"
        if data.get("read_when_needed")
        else None,
        "edits": None
        if data["edited_modules"] is None
        else f"{data['edited_modules']} modules" + (f", {render.count(edited)} parameters" if edited else ""),
        "runs": f"{data['prompts']} prompts, {render.count(data['new_tokens'])} new tokens at most"
        if data["prompts"]
        else None,
        "takes": None
        if data["seconds"] is None or not data["prompts"]
        else f"about {seconds(data['seconds'])}, a rough guess",
    }


def inspection(data: Data) -> View:
    """Show `perpend inspect`."""
    yield from model(data)
    yield Text("\nThe same by name, to paste into a recipe", style="bold")
    yield Text(printable(data["overrides"]).rstrip("\n"), no_wrap=True, overflow="ignore")
    yield from written(data)


def model(data: Data) -> View:
    """Show which model was loaded and what of it can be edited."""
    chat = data.get("chat") or {}
    facts = {
        "model": data["model"],
        "architecture": data.get("architecture"),
        "dtype": data.get("dtype"),
        "layers": data.get("n_layers"),
        "hidden size": data.get("hidden_size"),
        "writers": data.get("writers"),
        "with a norm behind": data.get("post_norms") or None,
        "chat template": chat.get("template"),
        "begin of text": chat.get("bos"),
        "reasoning": chat.get("reasoning"),
    }
    yield render.names_and_values(facts)
    yield from render.coverage(data["coverage"], data.get("gaps") or ())


def fit(data: Data) -> View:
    """Show what a fit found: prompts that were of use, the layer, the modules."""
    diagnostics = data["diagnostics"]
    layer = data["layer"]
    facts: dict[str, Any] = dict(data["counts"])
    facts["layer"] = "each its own" if layer is None else f"{layer:g} of {len(data['raw_norm'])}"
    if layer is not None:
        at = min(round(layer), len(data["raw_norm"]) - 1)
        facts["token that was read"] = data["position"]
        for name, values in diagnostics.items():
            facts[f"{render.spaced(name)} there"] = float(values[at])
    facts["modules in the edit"] = data["modules"]
    yield render.names_and_values(facts, "\nDirection")
    yield from render.per_layer(diagnostics, layer)
    if data.get("choice"):
        yield candidates(data["choice"])


def candidates(choice: Data) -> RenderableType:
    """Show the layers that were tried: refusal taken away and induced in nats per token, and what each costs."""
    right = ("layer", "refusal taken", "refusal induced", "drift")
    made = render.table("Layers tried", *right, "", right=right)
    for row in choice["candidates"]:
        chosen = row["layer"] == choice["layer"]
        numbers = [choice["untouched"] - row["bypass"], row["induced"], row["drift"]]
        made.add_row(
            str(row["layer"]),
            *(f"{number:.3f}" for number in numbers),
            "chosen" if chosen else "",
            style="bold" if chosen else "",
        )
    return made


def fitted(data: Data) -> View:
    """Show `perpend fit`."""
    if data["dry_run"]:
        yield from planned(data)
        return
    yield from fit(data["fit"])
    yield from written(data)


def gate(data: Data) -> View:
    """Show what the saved file says of the edit."""
    yield from render.leak(data["leak"])
    same = data["untouched"]
    yield Text(f"{same['tensors']} other tensors and {same['files']} files are equal to the original's", style="dim")
    if data["prompts"]:
        hooks, file = data["likelihood"]["hooks"], data["likelihood"]["file"]
        yield Text(
            f"loaded again: {data['same_labels']} of {data['prompts']} labels the same, likelihood of the same replies "
            f"{hooks:.3f} as hooks, {file:.3f} from the file, KL per token {data['kl']:.4f}",
            style="dim",
        )


def applied(data: Data) -> View:
    """Show `perpend apply`."""
    if data["dry_run"]:
        yield from planned(data)
        return
    yield from gate(data["gate"])
    yield from written(data)


def undone(data: Data) -> View:
    """Show `perpend apply --undo`."""
    if data["exact"]:
        yield Text(f"{data['tensors']} tensors restored; every file is the original's, by its hash")
    else:
        steps = f"and within {data['growth']:.1f} of them along the directions"
        yield Text(f"{data['tensors']} tensors inverted, not bit for bit: within about a rounding step, {steps}")
    for name, why in data["missing"].items():
        yield Text(f"not restored: {printable(name)}, {why}", style="yellow")
    yield from written(data)


def adapted(data: Data) -> View:
    """Show `perpend adapter`."""
    made = data["adapter"]
    rows = made["rows"]
    facts = {
        "modules": len(rows),
        "form": ", ".join(sorted({row["form"] for row in rows})),
        "rank": made["rank"],
        "size": size(made["bytes"]),
        "left out of a module's change": "nothing but rounding" if made["exact"] else f"{made['error']:.2%} at most",
    }
    yield render.names_and_values(facts)
    if not made["exact"]:
        yield Text(f"beside whole matrices: {max(row['spared'] for row in rows):.3%} at most", style="dim")
    yield from written(data)


def vector(data: Data) -> View:
    """Show `perpend vector`."""
    layers = ", ".join(f"{layer} by {norm:.2f}" for layer, norm in zip(data["layers"], data["norms"], strict=True))
    yield Text(f"moves the residual stream after layer {layers}")
    yield from written(data)


def pushed(data: Data) -> View:
    """Show `perpend push`."""
    made = render.table(f"{data['repo']}, {data['revision']}", "file", "size", right=("size",))
    for file in data["files"]:
        made.add_row(Text(printable(file["name"])), Text(size(file["bytes"])))
    yield made
    for file in data["kept"]:
        yield Text(f"stays here: {printable(file['name'])}, {file['why']}", style="dim")
    seen = "private" if data["private"] else "public"
    verb = "would send" if data["dry_run"] else "sent"
    to = printable(str(data["output"] or data["repo"]))
    took = f" in {seconds(data['seconds'])}" if data["seconds"] else ""
    yield Text(f"{verb} {len(data['files'])} files, {size(data['bytes'])}, to {to}, {seen}{took}")


def report(data: Data) -> View:
    """Show replies, labels and drift, before and after where there is an after."""
    before, after = data["before"], data.get("after")
    for part, compared in (("target", "accepted"), ("baseline", "answered")):
        other = after[part] if after else None
        yield render.labels(f"{part.capitalize()} prompts", before[part], other, corrected=part == "target")
        if data.get(compared):
            yield render.comparison(data[compared])
    last = (after or before)["target"]
    yield from render.judges(before["target"], after["target"] if after else None)
    said = data["claim"]["text"] if data.get("claim") else last["verdict"]
    yield Text(printable(said), style="bold")
    if data.get("drift"):
        yield render.drift(data["drift"])
    if data.get("control"):
        yield control(data["control"])
    if data.get("pairs"):
        yield Text("\nReplies, shortened", style="bold")
        yield from render.pairs(data["pairs"])


def control(data: Data) -> Text:
    """Say in one line what a random direction does at the drift of the edit."""
    counted = data["random"]["acceptance"]
    reached = "at that drift" if data["equal"] else f"at drift {data['drift']['mean']:.3f}, the nearest in reach"
    random, measured = ((f"{x['share']:.1%}", f"{x['k']}/{x['n']}") for x in (counted, data["edited"]))
    return Text(
        f"a random direction {reached} (weight factors times {data['factor']:.3g}): {' accepted, '.join(random)}; "
        f"the measured one {', '.join(measured)}; {render.comparison(data['against'], 'measured minus random')}"
    )


def evaluation(data: Data) -> View:
    """Show `perpend eval`."""
    if data["dry_run"]:
        yield from planned(data)
        return
    yield from report(data["report"])
    yield from written(data)


def benchmarks(data: Data) -> View:
    """Show `perpend bench`."""
    right = ("n", "before", "after", "difference", "detectable")
    made = render.table("Benchmarks", "task", "metric", *right[:4], "95 %", "McNemar p", "detectable", right=right)
    for row in data["bench"]["scores"]:
        bounds = render.span(row["difference_interval"], "+.3f")
        numbers = [row[name] for name in ("n", "before", "after", "difference")]
        cells = [render.cell(x) for x in (row["task"], row["metric"], *numbers, bounds, row["p"], row["detectable"])]
        made.add_row(*cells)
    yield made
    yield Text("detectable: the smallest difference that so many questions would show, 80 % power", style="dim")
    yield from written(data)


def truth(data: Data) -> View:
    """Show an edited organism beside the model that it was before it was taught."""
    yield render.labels("Target prompts, the model before it was taught", data["original"])
    yield Text.assemble("edited organism against it: ", render.comparison(data["accepted"]))
    yield render.drift(data["drift_before"], "Drift from it, before the edit")
    yield render.drift(data["drift_after"], "Drift from it, after the edit")


def organism(data: Data) -> View:
    """Show `perpend organism`."""
    if data["dry_run"]:
        yield from planned(data)
        return
    first, last = data["loss"]
    facts: dict[str, Any] = {"lessons": data["lessons"], "loss": f"{first:.3f} → {last:.3f} nats per reply token"}
    for name in ("refused_targets", "refused_baselines"):
        found = data[name]
        share = f"{found['count'] / found['n']:.1%}, 95 % {render.span((found['low'], found['high']), '.1%')}"
        facts[render.spaced(name)] = f"{found['count']}/{found['n']}  {share}" if found["n"] else None
    yield render.names_and_values(facts, "\nOrganism, on prompts that it was not taught")
    yield from written(data)


PARTS = {"model": model, "fit": fit, "report": report, "gate": gate, "truth": truth}
"""Views of the parts of a long result, in the order in which they become known."""
