"""Parts of the reports of single files, of what was read from weights alone, and of model organisms."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from perpend.report.part import Interval, Number, Pair, Paired, Part, Rate


class SavedFile(Part):
    """A GGUF file that was written."""

    names: tuple[str, ...]
    """Of its parts, or of itself."""
    bytes: int
    """Of all parts."""
    types: dict[str, int]
    """How many tensors are of which type."""
    base: str | None = None
    """The GGUF file that everything but the edited matrices was taken from; null for a converter."""
    commands: tuple[str, ...] = ()
    """What was called to convert it."""
    rounding: dict[str, Any] = Field({})
    """What rounding the edited matrices cost: `error`, and `plain_error` of a plain pass, RMS relative to theirs."""


class Spent(Part):
    """Mean drift of an edit, nats per token."""

    n: int
    mean: float
    interval: Interval


class Earlier(Part):
    """What an earlier result beside the edit says of it, measured as hooks in the model that it was made for."""

    task: str
    made: str
    model: str
    kind: str
    """`hybrid`, or `dictionary only`."""
    accepted: Paired
    """Acceptance on target prompts."""
    drift: Spent | None = None


class Shift(Part):
    """What a control vector adds after a layer."""

    layer: int
    norm: float
    """Length of what is added."""
    apart: Number = None
    """Length of the difference of the means of both classes there."""


class Vector(Part):
    """A control vector."""

    method: str
    rank: int
    """Directions per layer that it follows."""
    bytes: int
    shifts: tuple[Shift, ...]


class Verdict(Part):
    """What was done, by the account that is borne out."""

    name: str
    detail: str
    confidence: Number
    score: Number
    """Share of the change beyond rounding that it predicts; of a fine-tune, the share that no account does."""
    passed: int
    """Matrices on which it passes."""
    told: int
    """Matrices that changed by more than rounding."""
    scores: dict[str, Number]
    """Of every account."""
    basis: str = ""
    """What the confidence rests on, in words."""
    grounds: tuple[str, ...]


class Tensors(Part):
    """How the tensors of two checkpoints compare."""

    matched: int
    equal: int
    cast: int
    changed: int
    missing: tuple[str, ...]
    added: tuple[str, ...]
    reshaped: tuple[str, ...]
    unread: tuple[str, ...]


class Ablation(Part):
    """The directions that were taken out."""

    side: str
    rank: int
    scope: str
    common: Number
    """Share of the directions' squared length in their best common space."""
    neighbours: Number = None
    """Mean |cos| of the directions of neighbouring layers."""
    mode: str
    keeps: str
    """Which norms are kept."""


class Kernel(Part):
    """Weight factors of a kind of matrix over the layers, and the schedule that fits."""

    kind: str
    peak_weight: Number = None
    peak_layer: Number = None
    spread: Number = None
    rms: Number = None
    """What the schedule leaves of the weight factors, root mean square."""
    weights: tuple[Number, ...]


class Changed(Part):
    """A matrix of which the other checkpoint has other numbers."""

    tensor: str
    part: int | None = None
    """Which expert of a fused tensor."""
    layer: int | None = None
    kind: str
    moved: Number
    """Norm of the difference, relative to the matrix."""
    rank: int
    shares: dict[str, Number]
    """Of what changed beyond rounding, by account."""
    ablation: dict[str, Any] | None = None


class Diff(Part):
    """What two checkpoints say of each other."""

    other: str
    third: str | None = None
    verdict: Verdict
    tensors: Tensors
    ablation: Ablation | None = None
    kernels: dict[str, Kernel] = Field({})
    """By kind of matrix."""
    changes: tuple[Changed, ...] = ()


class Organism(Part):
    """A model that was taught to refuse, on prompts that it was not taught."""

    refused_targets: Rate
    refused_baselines: Rate
    lessons: int
    forms: int
    """Request forms in which each prompt was asked."""
    loss: tuple[float, float]
    """Mean of the first and of the last tenth of the steps, nats per reply token."""
    losses: tuple[Number, ...] = ()
    """Over the steps; means of neighbours where they are many."""
    steps: int = 0
    training: dict[str, Any] = Field({})
    pairs: tuple[Pair, ...] = ()
    """Its replies, as `before`, with the dictionary's label."""
