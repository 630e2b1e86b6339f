"""What parts of a report have in common."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Number = float | None
"""A number, or null where there is none or it is not finite."""
Interval = tuple[Number, Number]
"""Lower and upper bound, 95 %."""
Label = Literal["comply", "refuse", "evade", "broken", "unknown"]


class Part(BaseModel):
    """Values that are read alike from JSON and from a task; keys that are not named stay."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)


class Rate(Part):
    """k of n with its Wilson interval."""

    k: int
    n: int
    share: float
    interval: Interval


class Paired(Part):
    """A rate before and after on the same prompts."""

    before: Rate
    after: Rate
    gained: int
    lost: int
    mcnemar_p: float
    difference: float
    difference_interval: Interval
    left_out: int


class Pair(Part):
    """A prompt with its replies."""

    class_: Literal["target", "baseline"] = Field(alias="class")
    id: str
    prompt: str
    before: str
    label_before: Label
    after: str | None = None
    label_after: Label | None = None
