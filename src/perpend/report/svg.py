"""Plain SVG: scales, axes and marks, styled by the page's classes so that light, dark and print look right."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

WIDTH = 460
"""Units of every figure; on a phone one unit is a little less than a pixel."""


def number(value: float) -> str:
    """Return a coordinate without a tail of digits."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return round numbers from `low` to `high`, about as many as asked."""
    span = high - low
    if not span > 0:
        return [low]
    raw = span / about
    size = 10 ** math.floor(math.log10(raw))
    step = min((m * size for m in (1, 2, 2.5, 5, 10)), key=lambda s: abs(s - raw))
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Scale:
    """A linear map from values to coordinates."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the coordinate of a value; values outside are put on the edge."""
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)


@dataclass
class Figure:
    """An SVG that is being drawn.

    Attributes:
        name: Unique on the page; begins the ids of title and description.
        title: What it shows, for a screen reader.
        told: What is to be seen in it, in words.
        height: Units.
        parts: Marks so far.
    """

    name: str
    title: str
    told: str
    height: float
    parts: list[Markup] = field(default_factory=list)

    def add(self, tag: str, text: str | None = None, hover: str = "", **attributes: object) -> None:
        """Add an element; `cls` is its class, underscores become hyphens, `hover` is shown by the pointer."""
        named = {("class" if k == "cls" else k.replace("_", "-")): v for k, v in attributes.items()}
        shown = {k: number(v) if isinstance(v, int | float) else v for k, v in named.items()}
        opened = Markup("").join(Markup(' {}="{}"').format(k, v) for k, v in shown.items())
        inside = (Markup("<title>{}</title>").format(hover) if hover else Markup("")) + escape(text or "")
        self.parts.append(Markup("<{0}{1}>{2}</{0}>").format(Markup(tag), opened, inside))

    def text(self, x: float, y: float, text: str, cls: str = "", anchor: str = "start") -> None:
        """Add a line of text."""
        self.add("text", text, x=x, y=y, cls=f"t {cls}".strip(), text_anchor=anchor)

    def line(self, x1: float, y1: float, x2: float, y2: float, cls: str) -> None:
        """Add a straight line."""
        self.add("line", x1=x1, y1=y1, x2=x2, y2=y2, cls=cls)

    def path(self, points: Iterable[tuple[float, float]], cls: str) -> None:
        """Add a polyline; where a coordinate is not finite it is broken."""
        words, pen = [], "M"
        for x, y in points:
            if not (math.isfinite(x) and math.isfinite(y)):
                pen = "M"
                continue
            words.append(f"{pen}{number(x)} {number(y)}")
            pen = "L"
        self.add("path", d=" ".join(words), cls=cls)

    def grid_x(self, scale: Scale, at: Sequence[float], top: float, bottom: float, form: str, label: str) -> None:
        """Add vertical grid lines with numbers below, and what they count."""
        for value in at:
            self.line(scale(value), top, scale(value), bottom, "grid")
            self.text(scale(value), bottom + 15, format(value, form), "tick", "middle")
        self.text((scale.start + scale.end) / 2, bottom + 33, label, "axis", "middle")

    def grid_y(self, scale: Scale, at: Sequence[float], left: float, right: float, form: str, label: str) -> None:
        """Add horizontal grid lines with numbers at the left, and above what they count."""
        for value in at:
            self.line(left, scale(value), right, scale(value), "grid")
            self.text(left - 7, scale(value) + 4, format(value, form), "tick", "end")
        self.text(left - 30, scale.end - 12, label, "axis")

    def key(self, entries: Sequence[tuple[str, str]], x: float, y: float) -> None:
        """Add a legend in one row: names with the class of their mark."""
        for cls, name in entries:
            self.add("rect", x=x, y=y - 8, width=14, height=4, rx=2, cls=f"key {cls}")
            self.text(x + 19, y - 1, name, "tick")
            x += 32 + 7.2 * len(name)

    def svg(self) -> Markup:
        """Return the element."""
        head = Markup(
            '<svg viewBox="0 0 {w} {h}" role="img" aria-labelledby="{n}-t {n}-d" class="fig">'
            '<title id="{n}-t">{t}</title><desc id="{n}-d">{d}</desc>'
        ).format(w=WIDTH, h=number(self.height), n=self.name, t=self.title, d=self.told)
        return head + Markup("").join(self.parts) + Markup("</svg>")
