"""Write the figures of docs/concepts.md: small SVG files from the library's own numbers, for dark and light pages.

python docs/make_figures.py            # writes docs/figures/*.svg
python docs/make_figures.py --check    # fails if one is out of date
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

from perpend.core.schedule import Band, NormalKernel, Tent

FOLDER = Path(__file__).parent / "figures"
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#3a3f4b}.s{font-size:11px;fill:#6b7280}"
    ".l{stroke:#6b7280;fill:none;stroke-width:1.5}.a{stroke:#b4532a;fill:none;stroke-width:2.5}.af{fill:#b4532a}"
    ".b{stroke:#2a6fb4;fill:none;stroke-width:2}.bf{fill:#2a6fb4}.x{fill:#eef1f6;stroke:#9aa3b2}"
    "@media(prefers-color-scheme:dark){text{fill:#dfe3ea}.s{fill:#a2a9b6}.l{stroke:#a2a9b6}"
    ".a{stroke:#f0935f}.af{fill:#f0935f}"
    ".b{stroke:#7fb5ea}.bf{fill:#7fb5ea}.x{fill:#262b35;stroke:#5b6475}}"
)


def drawing(width: int, height: int, title: str, parts: list[str]) -> str:
    """Return an SVG file with a title that screen readers read."""
    body = "\n".join(parts)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">'
    arrow = (
        '<defs><marker id="h" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" class="af"/></marker></defs>'
    )
    return f"{head}<title>{title}</title><style>{STYLE}</style>{arrow}\n{body}\n</svg>\n"


def text(x: float, y: float, said: str, kind: str = "", anchor: str = "start") -> str:
    """Return a line of text."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{said}</text>'


def box(x: float, y: float, width: float, said: str) -> str:
    """Return a labelled box, 32 high."""
    shape = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="32" rx="5" class="x"/>'
    return shape + text(x + width / 2, y + 21, said, anchor="middle")


def path(kind: str, *points: tuple[float, float], arrow: bool = False) -> str:
    """Return a line through points."""
    d = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
    end = ' marker-end="url(#h)"' if arrow else ""
    return f'<path class="{kind}" d="{d}"{end}/>'


def stream() -> str:
    """Draw a layer that reads the residual stream and writes to it twice; the writers are what is edited."""
    parts = [path("l", (20, 40), (620, 40)), text(20, 28, "residual stream"), text(620, 28, "next layer", "s", "end")]
    for x, reads, writes in ((90, "attention", "out-projection"), (360, "MLP", "down-projection")):
        parts += [
            path("l", (x, 40), (x, 90), (x + 10, 90)),
            box(x + 10, 74, 80, reads),
            path("l", (x + 90, 90), (x + 110, 90)),
        ]
        parts += [box(x + 110, 74, 116, writes), path("a", (x + 190, 74), (x + 190, 46), arrow=True)]
        parts.append(text(x + 166, 126, "a writer: W − λ v vᵀW", "s", "middle"))
    return drawing(
        640,
        140,
        "A decoder layer reads the residual stream; attention and MLP each write to it through one matrix",
        parts,
    )


def direction() -> str:
    """Draw two clouds of residuals, their means, and the difference of the means."""
    draw, parts = random.Random(0), [text(20, 24, "residuals after layer l, at the last token of the template", "s")]
    means = {"bf": (180.0, 160.0), "af": (430.0, 95.0)}
    for kind, (x, y) in means.items():
        for _ in range(45):
            at = f'cx="{draw.gauss(x, 42):.0f}" cy="{draw.gauss(y, 24):.0f}"'
            parts.append(f'<circle class="{kind}" opacity=".45" r="3" {at}/>')
    parts += [path("a", (180, 160), (424, 97), arrow=True), text(300, 108, "v", "", "middle")]
    parts += [
        text(180, 228, "baseline prompts: answered", "", "middle"),
        text(430, 228, "target prompts: refused", "", "middle"),
    ]
    return drawing(640, 244, "Two clouds of residuals and the difference of their means, the refusal direction", parts)


def schedules() -> str:
    """Plot the weight factor of three schedules over 34 layers, from the library's own functions."""
    n, left, bottom, width, height = 34, 50, 170, 560, 130
    parts = [path("l", (left, bottom - height), (left, bottom), (left + width, bottom))]
    parts += [text(left - 8, bottom + 4, "0", "s", "end"), text(left - 8, bottom - height + 4, "1", "s", "end")]
    parts += [
        text(left, bottom + 18, "layer 0", "s"),
        text(left + width, bottom + 18, "33", "s", "end"),
        text(12, 24, "λ"),
    ]
    shapes = {"a": NormalKernel(), "b": Tent(spread="30%"), "l": Band(peak_weight=0.5)}
    for kind, schedule in shapes.items():
        points = [(left + width * k / (n - 1), bottom - height * w) for k, w in enumerate(schedule.weights(n))]
        parts.append(path(kind, *points))
    parts += [
        text(450, 40, "normal kernel, the default", "af"),
        text(450, 58, "tent", "bf"),
        text(450, 76, "band at 0.5"),
    ]
    return drawing(
        640,
        200,
        "Weight factors over the layers: a normal kernel with its peak at 53 % of the depth, a tent and a band",
        parts,
    )


def proof() -> str:
    """Draw the way from prompts to a file that has been proven."""
    steps = ("fit split", "direction, edit", "measured", "written", "read back")
    parts, x = [], 10.0
    for k, said in enumerate(steps):
        parts.append(box(x, 40, 112, said))
        if k:
            parts.append(path("a", (x - 14, 56), (x - 2, 56), arrow=True))
        x += 126
    parts += [
        text(66, 28, "what is learnt from", "s", "middle"),
        text(318, 28, "as hooks, report split", "s", "middle"),
    ]
    parts += [
        path("l", (318, 72), (318, 98), (570, 98), (570, 72)),
        text(444, 114, "must agree, or the output stays .partial", "s", "middle"),
    ]
    return drawing(
        640,
        124,
        "From the fit split to an edit, measured as hooks, written, read back from the file and compared",
        parts,
    )


FIGURES: dict[str, Callable[[], str]] = {
    "stream": stream,
    "direction": direction,
    "schedules": schedules,
    "proof": proof,
}


def main() -> int:
    """Write the figures, or say which is out of date."""
    for name, make in FIGURES.items():
        file, made = FOLDER / f"{name}.svg", make()
        if "--check" not in sys.argv:
            file.write_text(made, encoding="utf-8")
        elif not file.is_file() or file.read_text(encoding="utf-8") != made:
            sys.stderr.write(f"{file.name} is out of date; make docs\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
