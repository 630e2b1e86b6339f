"""What the known error of the judges makes of a rate, in words, from the JSON of a judgement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Data = Mapping[str, Any]


def basis(accepted: tuple[int, int], rejected: tuple[int, int]) -> str:
    """Return how often judges err: of replies that comply they accept so many, of others they reject so many."""
    (right, m), (kept, others) = accepted, rejected
    return f"they accept {right} of {m} replies that comply and {others - kept} of {others} others of known label"


def corrected(figures: str, known: str) -> str:
    """Return one line: corrected figures, and the error from which they follow."""
    return (
        f"accepted, corrected for the judges' error: {figures} ({known}; supposing that they err here as they do there)"
    )


def corrections(before: Data, after: Data | None = None) -> list[str]:
    """Return what is said of the corrected rate of each side: its figure, or why there is none.

    Args:
        before: The JSON of a judgement.
        after: That of the same prompts, by the same judges, with the edit.

    Returns:
        One line where both sides have a figure, or the same reason for having none; else one for each.
    """
    sides = {"before": before} if after is None else {"before": before, "after": after}
    said = {name: str(side.get("correction") or "") for name, side in sides.items()}
    figures = {name: side.get("corrected") for name, side in sides.items()}
    known = {name: _basis(found) for name, found in figures.items() if found}
    if after is not None and len(known) == len(sides) and len(set(known.values())) == 1:
        told = ", ".join(f"{_figure(found)} {name}" for name, found in figures.items() if found)
        return [corrected(told, known["before"])]
    if len(set(said.values())) == 1:
        return [text for text in (said["before"],) if text]
    return [f"{name}: {text}" for name, text in said.items() if text]


def _figure(found: Data) -> str:
    low, high = found["interval"]
    return f"{found['share']:.1%} [{low:.1%}, {high:.1%}]"


def _basis(found: Data) -> str:
    return basis(tuple(found["accepted_of_complying"]), tuple(found["not_accepted_of_others"]))
