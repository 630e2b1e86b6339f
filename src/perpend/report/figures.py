"""The figures of a report, each from the numbers of the document alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from perpend.report.document import Choice, Control, Drift, Edit, Fit, Front, Gate, Sides
from perpend.report.part import Interval, Rate
from perpend.report.single import Organism
from perpend.report.svg import WIDTH, Figure, Scale, number, ticks

LABELS = {"comply": "accepted", "refuse": "refused", "evade": "evaded", "broken": "broken", "unknown": "not judged"}
LEFT, RIGHT, TOP = 42.0, WIDTH - 12.0, 30.0
PERCENT = (0.0, 0.25, 0.5, 0.75, 1.0)


def acceptance(
    rows: Sequence[tuple[str, str, Rate]],
    threshold: float | None = 0.9,
    title: str = "Acceptance rate with 95 % intervals",
) -> Markup:
    """Show rates with intervals on one axis from 0 to 100 %, and the rate that is to be exceeded.

    Args:
        rows: Name, class of the mark, rate.
        threshold: Where the line is drawn; None for no line.
        title: What the rates are of.
    """
    height, left = 40 + 34 * len(rows) + 26, 118.0
    told = "; ".join(f"{name}: {rate.k} of {rate.n}, {rate.share:.1%}" for name, _, rate in rows)
    figure = Figure("acceptance", title, told, height)
    x, bottom = Scale(0, 1, left, RIGHT - 12), height - 24
    for value in PERCENT:
        figure.line(x(value), 22, x(value), bottom, "grid")
        figure.text(x(value), bottom + 16, f"{value:.0%}", "tick", "middle")
    if threshold is not None:
        figure.line(x(threshold), 18, x(threshold), bottom, "mark")
        figure.text(x(threshold), 12, f"{threshold:.0%}", "tick strong", "middle")
    for k, (name, cls, rate) in enumerate(rows):
        y = 42 + 34 * k
        low, high = _bounds(rate.interval)
        figure.text(left - 12, y + 4, name, "row", "end")
        figure.add("line", x1=x(low), y1=y, x2=x(high), y2=y, cls=f"reach {cls}")
        figure.add("circle", cx=x(rate.share), cy=y, r=6.5, cls=f"dot {cls}", hover=f"{rate.k} of {rate.n}")
    return figure.svg()


def _bounds(interval: Interval) -> tuple[float, float]:
    low, high = interval
    return (0.0 if low is None else low), (1.0 if high is None else high)


def labels(before: Sides, after: Sides | None) -> Markup:
    """Show the labels of both classes as stacked bars, before and after."""
    rows = [
        (name, when, getattr(sides, name).labels, getattr(sides, name).unknown, getattr(sides, name).n)
        for name in ("target", "baseline")
        for when, sides in (("before", before), ("after", after))
        if sides
    ]
    step, left = 30, 118.0
    height = 34 + step * len(rows) + 14
    told = "; ".join(
        f"{name} {when}: " + ", ".join(f"{LABELS[k]} {r.k}" for k, r in found.items())
        for name, when, found, _, _ in rows
    )
    figure = Figure("labels", "Labels of the replies", told, height)
    figure.key([(k, v) for k, v in LABELS.items() if k != "unknown" or any(row[3] for row in rows)], 8, 16)
    x = Scale(0, 1, left, RIGHT)
    for k, (name, when, found, unknown, n) in enumerate(rows):
        y = 32 + step * k + (8 if name == "baseline" else 0)
        figure.text(left - 12, y + 15, f"{name}, {when}" if after else name, "row", "end")
        start = 0.0
        for label, count in [*((k, r.k) for k, r in found.items()), ("unknown", unknown)]:
            share = count / n if n else 0.0
            if not share:
                continue
            wide = x(start + share) - x(start)
            hover = f"{LABELS[label]}: {count} of {n}"
            figure.add("rect", x=x(start), y=y, width=max(0.5, wide - 1), height=22, cls=f"bar {label}", hover=hover)
            if wide > 26:
                figure.text(x(start) + wide / 2 - 0.5, y + 15, str(count), "inbar", "middle")
            start += share
    return figure.svg()


def separation(fit: Fit) -> Markup:
    """Show by layer how well the direction tells the classes apart and how well it is measured."""
    names = {
        "auc": "separates held-out prompts (AUC)",
        "split_half_cosine": "one half of the prompts against the other (cosine)",
        "baseline_cosine": "along the baseline mean (cosine)",
    }
    shown = {k: fit.diagnostics[k] for k in names if fit.diagnostics.get(k)}
    height, count = 262.0 + 16 * len(shown), max((len(v) for v in shown.values()), default=1)
    at = None if fit.layer is None else min(round(fit.layer), count - 1)
    told = "; ".join(f"{names[k]}: {_value(v, at)}" for k, v in shown.items())
    figure = Figure("separation", "Separation by layer", f"At the layer of the edit: {told}", height)
    top = TOP + 16 * len(shown) - 8
    low = min([0.0, *(v for row in shown.values() for v in row if v is not None)])
    x = Scale(0, max(1, count - 1), LEFT, RIGHT)
    y = Scale(0.0 if low > -0.05 else -1.0, 1, height - 42, top)
    figure.grid_y(y, ticks(y.low, 1), LEFT, RIGHT, ".2g", "")
    figure.grid_x(x, [round(v) for v in ticks(0, count - 1, 6) if v == round(v)], top, height - 42, ".0f", "layer")
    if at is not None:
        figure.line(x(at), top, x(at), height - 42, "mark")
    for k, (name, values) in enumerate(shown.items()):
        figure.key([(f"s{k}", names[name])], LEFT, 14 + 16 * k)
        points = [(x(layer), math.nan if v is None else y(v)) for layer, v in enumerate(values)]
        figure.path(points, f"line s{k}")
        for layer, v in enumerate(values):
            if v is not None:
                figure.add("circle", cx=x(layer), cy=y(v), r=2.4, cls=f"pip s{k}", hover=f"layer {layer}: {v:.3f}")
    return figure.svg()


def _value(values: Sequence[float | None], at: int | None) -> str:
    found = None if at is None else values[at]
    return "–" if found is None else f"{found:.2f}"


def cosines(fit: Fit) -> Markup:
    """Show the cosine between the directions of every two layers as a map of eleven shades."""
    count = len(fit.cosines)
    left, top, bottom = 34.0, 8.0, 54.0
    side = 372.0
    height = top + side + bottom
    cell = side / max(1, count)
    told = f"{count} by {count} layers; from layer {_alike(fit)} on, neighbours agree to a cosine of 0.9 or more"
    figure = Figure("cosines", "Cosine between the directions of every two layers", told, height)
    shades: dict[int, list[str]] = {}
    for i, row in enumerate(fit.cosines):
        for j, value in enumerate(row):
            shade = 0 if value is None else round(5 * max(-1.0, min(1.0, value)))
            x, y, step = left + j * cell, top + i * cell, number(cell + 0.06)
            shades.setdefault(shade, []).append(f"M{number(x)} {number(y)}h{step}v{step}h-{step}z")
    for shade, cells in sorted(shades.items()):
        figure.add("path", d="".join(cells), cls=f"cell {'n' if shade < 0 else 'p'}{abs(shade)}")
    for layer in (round(v) for v in ticks(0, count - 1, 6) if v == round(v)):
        middle = (layer + 0.5) * cell
        figure.text(left - 6, top + middle + 4, str(layer), "tick", "end")
        figure.text(left + middle, top + side + 15, str(layer), "tick", "middle")
    if fit.layer is not None and count:
        at = min(round(fit.layer), count - 1)
        figure.add("rect", x=left + at * cell, y=top, width=cell, height=side, cls="outline")
        figure.add("rect", x=left, y=top + at * cell, width=side, height=cell, cls="outline")
    for k, shade in enumerate(range(-5, 6)):
        cls = f"cell {'n' if shade < 0 else 'p'}{abs(shade)}"
        figure.add("rect", x=left + 64 + 22 * k, y=height - 24, width=22, height=9, cls=cls)
    figure.text(left + 58, height - 15, "cosine −1", "tick", "end")
    figure.text(left + 64 + 22 * 11 + 6, height - 15, "1", "tick")
    return figure.svg()


def _alike(fit: Fit) -> int:
    """Return the first layer from which all neighbours have a cosine of 0.9 or more."""
    found = len(fit.cosines) - 1
    while found > 0 and (fit.cosines[found][found - 1] or 0.0) >= 0.9:
        found -= 1
    return max(0, found)


def tried(choice: Choice) -> Markup:
    """Show the layers that were tried: what each costs, and how much less likely it makes the model's refusals."""
    rows = [(c.layer, c.drift, choice.untouched - c.bypass) for c in choice.candidates]
    points = [(cost, gain, f"layer {k}", k == choice.layer) for k, cost, gain in rows]
    told = f"layer {choice.layer} of {len(rows)} tried was chosen"
    return _scatter(
        "tried", "Layers tried", told, points, "drift, nats per token", "refusal taken away, nats per token"
    )


def front(points: Sequence[Front]) -> Markup:
    """Show the candidates of a search, the chosen one marked."""
    told = f"{len(points)} candidates, drift from {min(p.drift for p in points):.3g} nats"
    marks = [(p.drift, p.refusal, _named(p), p.chosen) for p in points]
    return _scatter("front", "Front of the search", told, marks, "drift, nats per token", "refusal, by score")


def _named(point: Front) -> str:
    accepted = f", {point.acceptance.share:.0%} accepted" if point.acceptance else ""
    return f"{point.name}, drift {point.drift:.3g}, refusal {point.refusal:.3g}{accepted}".lstrip(", ")


def schedules(points: Sequence[Front]) -> Markup:
    """Show the weight factors of the candidates that were judged at full length, the chosen one in colour."""
    shown = sorted((p for p in points if p.weights and (p.acceptance or p.chosen)), key=lambda p: p.chosen)
    parts = sorted({part for p in shown for part in p.weights})
    every = [w for p in shown for row in p.weights.values() for w in row] or [0.0]
    layers = max((len(row) for p in shown for row in p.weights.values()), default=1)
    height = 268.0
    y = Scale(min(0.0, *every) * 1.05, max(0.1, *every) * 1.08, height - 42, TOP + 6)
    x = Scale(0, max(1, layers - 1), LEFT, RIGHT)
    told = f"{len(shown)} candidates; chosen: {next((p.words for p in shown if p.chosen), 'none')}"
    figure = Figure("schedules", "Weight factors of the finalists by layer", told, height)
    figure.grid_y(y, ticks(y.low, y.high), LEFT, RIGHT, ".3g", "")
    figure.grid_x(x, [round(v) for v in ticks(0, layers - 1, 6) if v == round(v)], TOP + 6, height - 42, ".0f", "layer")
    chosen = [(f"s{k}", f"{part}, chosen") for k, part in enumerate(parts)]
    figure.key([*chosen, ("faint", "other finalists")], LEFT, 14)
    for point in shown:
        for k, part in enumerate(parts):
            row = point.weights.get(part, ())
            figure.path([(x(n), y(w)) for n, w in enumerate(row)], f"line s{k}" if point.chosen else "line faint")
    return figure.svg()


def _scatter(
    name: str, title: str, told: str, points: Sequence[tuple[float, float, str, bool]], x_label: str, y_label: str
) -> Markup:
    """Show points with a name each; those that are chosen are marked and named."""
    height = 290.0
    figure = Figure(name, title, told, height)
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    x = Scale(min(0.0, *xs), max(xs) * 1.06 or 1.0, LEFT + 6, RIGHT)
    pad = 0.06 * (max(ys) - min(ys)) or 0.1
    y = Scale(min(0.0, min(ys)) - (pad if min(ys) < 0 else 0), max(ys) + pad, height - 42, TOP)
    figure.grid_y(y, ticks(y.low, y.high), LEFT + 6, RIGHT, ".3g", y_label)
    figure.grid_x(x, ticks(x.low, x.high), TOP, height - 42, ".3g", x_label)
    for a, b, hover, chosen in sorted(points, key=lambda p: p[3]):
        cls = "dot after" if chosen else "dot faint"
        figure.add("circle", cx=x(a), cy=y(b), r=7 if chosen else 5, cls=cls, hover=hover)
        if chosen:
            right = x(a) > (LEFT + RIGHT) * 0.7
            figure.text(x(a) + (-12 if right else 12), y(b) + 4, hover, "row", "end" if right else "start")
    return figure.svg()


def schedule(edit: Edit, gate: Gate | None) -> Markup:
    """Show the weight factor of every module by layer, as asked and as read from the saved file."""
    parts = sorted({m.component for m in edit.modules})
    height = 268.0
    asked = [m.weight for m in edit.modules]
    seen = [r.realised for r in gate.leak if r.realised is not None] if gate else []
    y = Scale(min(0.0, *asked, *seen) * 1.05, max(0.0, *asked, *seen) * 1.08 or 0.1, height - 42, TOP + 6)
    x = Scale(0, max(1, edit.layers - 1), LEFT, RIGHT)
    told = "; ".join(
        f"{part}: {len(own)} modules, layers {own[0].layer} to {own[-1].layer}, peak {max(m.weight for m in own):.2f}"
        for part in parts
        if (own := sorted((m for m in edit.modules if m.component == part), key=lambda m: m.layer))
    )
    figure = Figure("schedule", "Weight factor by layer", told, height)
    figure.grid_y(y, ticks(y.low, y.high), LEFT, RIGHT, ".3g", "")
    ends = [round(v) for v in ticks(0, edit.layers - 1, 6) if v == round(v)]
    figure.grid_x(x, ends, TOP + 6, height - 42, ".0f", "layer")
    entries = [(f"s{k}", part) for k, part in enumerate(parts)]
    figure.key(entries + ([("ring", "on the saved file")] if gate else []), LEFT, 14)
    for k, part in enumerate(parts):
        weights = {m.layer: m.weight for m in edit.modules if m.component == part}
        figure.path([(x(n), y(weights.get(n, 0.0))) for n in range(edit.layers)], f"line s{k}")
        for row in gate.leak if gate else ():
            if row.component == part and row.realised is not None:
                hover = f"layer {row.layer}, {part}: asked {row.asked:.3f}, realised {row.realised:.3f}"
                cls = f"ring s{k}" if row.ok else "ring missed"
                figure.add("circle", cx=x(row.layer), cy=y(row.realised), r=3.6, cls=cls, hover=hover)
    return figure.svg()


def drifts(drift: Drift, control: Control | None) -> Markup:
    """Show the drift of every prompt as a tick, with the mean and its interval; below, the control's."""
    rows = [("measured direction", "after", drift)] + (
        [("random direction", "random", control.drift)] if control else []
    )
    height = 34.0 + 56 * len(rows) + 34
    top = max(p.kl for _, _, d in rows for p in d.per_prompt)
    x, bottom = Scale(0, top * 1.03 or 1.0, 12, RIGHT), height - 42
    told = "; ".join(f"{name}: mean {d.mean:.3g}, median {d.median:.3g}, p95 {d.p95:.3g}" for name, _, d in rows)
    figure = Figure("drifts", "Drift of every prompt, nats per token", told, height)
    figure.grid_x(x, ticks(0, x.high), 12, bottom, ".3g", "KL per token, nats; a tick is a prompt, the dot the mean")
    for k, (name, cls, d) in enumerate(rows):
        y = 34 + 56 * k
        figure.text(12, y - 10, name, "row")
        for p in d.per_prompt:
            figure.line(x(p.kl), y - 1, x(p.kl), y + 17, f"hair {cls}")
        low, high = (d.mean if v is None else v for v in d.interval)
        figure.line(x(low), y + 8, x(high), y + 8, f"reach {cls}")
        figure.add("circle", cx=x(d.mean), cy=y + 8, r=6, cls=f"dot {cls}", hover=f"mean {d.mean:.4f}")
    return figure.svg()


def losses(made: Organism) -> Markup:
    """Show the loss of a training over its steps."""
    values = [math.nan if v is None else v for v in made.losses]
    known, height = [v for v in values if math.isfinite(v)], 220.0
    bottom, steps = height - 42, max(2, made.steps or len(values))
    x, y = Scale(1, steps, LEFT, RIGHT), Scale(0, max(known, default=1.0) * 1.05 or 1.0, bottom, TOP)
    told = f"{made.loss[0]:.3g} at first, {made.loss[1]:.3g} at last, {steps} steps"
    figure = Figure("losses", "Loss by step", told, height)
    figure.grid_y(y, ticks(0, y.high), LEFT, RIGHT, ".3g", "")
    figure.grid_x(x, [v for v in ticks(1, steps) if v == round(v)], TOP, bottom, ".0f", "step")
    between = (steps - 1) / max(1, len(values) - 1)
    figure.path([(x(1 + k * between), y(v) if math.isfinite(v) else v) for k, v in enumerate(values)], "line s0")
    return figure.svg()
