"""Durations and sizes as a person reads them, the same in the terminal, in errors and on the page."""

from __future__ import annotations


def seconds(value: float) -> str:
    """Return a duration as `850 ms`, `12.3 s`, `4 min 05 s` or `2 h 03 min`."""
    if value < 1:
        return f"{value * 1000:.0f} ms"
    if value < 60:
        return f"{value:.1f} s"
    minutes = round(value / 60) if value >= 3600 else int(value // 60)
    if value < 3600:
        return f"{minutes} min {int(value % 60):02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(value: float) -> str:
    """Return bytes as GB, as MB for less than 100 MB, as kB for less than one, as B for less than one of these."""
    if value < 999.5:
        return f"{value:.0f} B"
    if value < 999.5e3:
        return f"{value / 1e3:.0f} kB"
    return f"{value / 1e9:.1f} GB" if value >= 1e8 else f"{value / 1e6:.1f} MB"
