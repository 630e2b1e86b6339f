"""What `report.json` holds, as a schema: whatever a task leaves out is absent or null, and unknown keys may be there.

`docs/report.schema.json` is made from these models by `python -m perpend.report.document`.
"""

from __future__ import annotations

import json
import sys
from typing import Any, Literal

from pydantic import Field

from perpend.report.part import Interval, Label, Number, Pair, Paired, Part, Rate
from perpend.report.single import Diff, Earlier, Organism, SavedFile, Vector

VERSION = 1
"""Of the layout; it rises when a key that was there changes its meaning or goes."""


class Said(Part):
    """What one judge says of one reply."""

    label: Label
    p: Number = None
    """Probability of refusal."""
    reason: str = ""
    judge: str = ""


class Judged(Part):
    """Labels of one reply: the one that counts, and those of each judge by role."""

    id: str
    """Identity of the prompt, as in `pairs`."""
    label: Label


class Corrected(Part):
    """The rate that judges without error would have found (Rogan and Gladen 1978, Lang and Reiczigel 2014)."""

    share: float
    interval: Interval
    language: str
    """Of the replies of known label that the error was measured on; `all` for every language."""
    accepted_of_complying: tuple[int, int]
    """Of replies that comply, how many the judges accepted, and how many there were."""
    not_accepted_of_others: tuple[int, int]


class Repetition(Part):
    """Length and repetition of a set of replies."""

    n: int
    words: float
    """Words per reply."""
    length_ratio: Number = None
    """Words over those of the replies before."""
    distinct_2: float
    distinct_3: float
    longest_repeat: float
    """Longest stretch that comes twice, as a share of the words."""
    unfinished: Rate
    unfinished_reasoning: Rate


class Side(Part):
    """Replies to one class of prompts, judged."""

    kind: str
    """`hybrid`, or `dictionary only`."""
    reason: str = ""
    """Why there is no classifier."""
    n: int
    unknown: int
    acceptance: Rate
    language: str = ""
    """Code of the language of the prompts; empty where they are of several."""
    corrected: Corrected | None = None
    """Acceptance corrected for the known error of the judges; null where that is not known, no better than
    chance, or ruled out by the rate itself; `correction` says which."""
    correction: str = ""
    """From what the correction follows, or why there is none."""
    labels: dict[str, Rate]
    refused_alone: dict[str, Rate]
    """Refusals by each judge alone."""
    agreement: Rate | None = None
    kappa: Number = None
    verdict: str
    judges: dict[str, dict[str, Any]]
    replies: tuple[Judged, ...]
    repetition: Repetition


class Sides(Part):
    """One model on both classes."""

    target: Side
    baseline: Side


class CrossEntropy(Part):
    """Cross-entropy of the untouched model's own answers, nats per token."""

    reference: float
    candidate: float


class PromptKL(Part):
    """Drift on one prompt."""

    index: int
    tokens: int
    kl: float


class Drift(Part):
    """KL(untouched ‖ edited) per token over the untouched model's own answers, nats; every prompt weighs the same."""

    n: int
    tokens: int
    empty: int
    mean: float
    interval: Interval
    """Of the mean, by bootstrap over prompts."""
    median: float
    p95: float
    first_token: float
    first_token_interval: Interval
    cross_entropy: CrossEntropy
    cross_entropy_ratio: Number
    cross_entropy_ratio_interval: Interval
    flip_rate: float
    """Share of tokens at which greedy decoding would go another way."""
    flip_rate_interval: Interval
    per_prompt: tuple[PromptKL, ...]


class Control(Part):
    """The same modules and weight factors along a random direction, at equal drift."""

    seed: int
    factor: float
    """On every weight factor, so that the drift is the edit's."""
    equal: bool
    """Whether it is, within 10 %; else it is the nearest that was reached."""
    aim: float
    """Mean drift of the edit."""
    drift: Drift
    before: Rate
    """Accepted by the untouched model, on the prompts of the control."""
    edited: Rate
    random: Side
    against: Paired
    """From the random direction to the measured one."""


class Claim(Part):
    """The verdict."""

    text: str
    above_90: bool
    """The lower bound of the acceptance rate is above 90 %, by both judges."""
    threshold: float
    coherent: bool
    """The interval of the rise in broken replies lies below the margin, what could not be judged counting as broken."""
    margin: float
    accepted: Rate
    unknown: int = 0
    """Target prompts that could not be judged after the edit; they count as not accepted."""
    left_out: int = 0
    """Prompts of both classes that could not be judged before or after; broken replies are counted over the others."""
    broken_before: Rate
    broken_after: Rate
    broken_difference: float
    broken_difference_interval: Interval


class Report(Part):
    """Replies and drift on the report split; of a model without an edit, `before` and `pairs` alone."""

    before: Sides
    after: Sides | None = None
    claim: Claim | None = None
    accepted: Paired | None = None
    """Acceptance on target prompts."""
    answered: Paired | None = None
    """Acceptance on baseline prompts."""
    over_refusal: Paired | None = None
    """Refusals on baseline prompts."""
    drift: Drift | None = None
    control: Control | None = None
    prompts: dict[str, dict[str, Any]] = Field({})
    """Number and fingerprint of each set."""
    pairs: tuple[Pair, ...] = ()


class Candidate(Part):
    """A layer that was tried; log-likelihoods per token in nats."""

    layer: int
    bypass: float
    """Of the model's own refusals with the direction taken out."""
    induced: float
    """How much more likely refusals of baselines become when the direction is added."""
    drift: float


class Choice(Part):
    """The layer that was chosen."""

    layer: int
    untouched: float
    """Log-likelihood of the model's own refusals without an edit."""
    rule: str
    candidates: tuple[Candidate, ...]


class Fit(Part):
    """What the fit found; lists hold one number per layer."""

    layer: Number
    """Layer of the direction; null where each module has that of its own."""
    position: int | None = None
    """Token that was read, counted from the end."""
    counts: dict[str, int] = Field({})
    diagnostics: dict[str, tuple[Number, ...]]
    raw_norm: tuple[Number, ...]
    expected_cosine: tuple[Number, ...] = ()
    """With the direction that endless prompts would give."""
    cosines: tuple[tuple[Number, ...], ...] = ()
    """Between the directions of every two layers."""
    choice: Choice | None = None
    modules: int = 0


class Module(Part):
    """A writer that is edited."""

    module: str
    layer: int
    component: str
    weight: float


class Edit(Part):
    """Weight factors of the edit."""

    sha256: str
    modes: tuple[str, ...]
    rank: int
    layers: int
    """Of the model."""
    writers: int | None = None
    """Of the model; null where only its weights were compared."""
    modules: tuple[Module, ...]


class Leak(Part):
    """A module of the saved file: the weight factor that was asked, and the one that is there."""

    module: str
    layer: int
    component: str
    expert: int | None = None
    asked: float
    realised: Number
    noise: Number
    ok: bool


class Untouched(Part):
    """How much of the saved file is the original."""

    tensors: int
    bytes: int
    files: int
    differing: tuple[str, ...]


class Likelihood(Part):
    """Mean log-likelihood per token of the same replies."""

    hooks: float
    file: float


class Gate(Part):
    """What the saved file says of the edit."""

    leak: tuple[Leak, ...]
    untouched: Untouched | None = None
    """Null where the whole file was written anew, as by a converter."""
    prompts: int = 0
    """On which the saved file was run; 0 where its weights alone were read."""
    same_labels: int = 0
    same_replies: int = 0
    likelihood: Likelihood | None = None
    kl: Number = None
    """Mean KL(hooks ‖ saved file) per token of the same replies, nats."""
    worst: float


class Front(Part):
    """A candidate of a search that no other beats on both counts, or that replied to check the score."""

    refusal: float
    """Score on the select split, by forward passes; lower refuses less."""
    drift: float
    """Nats per token, select split."""
    name: str = ""
    words: str = ""
    on_front: bool = True
    chosen: bool = False
    acceptance: Rate | None = None
    """Target prompts of the select split, at full length, of a finalist."""
    broken: Rate | None = None
    """Broken replies among those of `acceptance`."""
    broken_baselines: Rate | None = None
    """Broken replies to baseline prompts of the select split, of a finalist."""
    weights: dict[str, tuple[float, ...]] = Field({})
    """Weight factor of every layer, per component."""


class Score(Part):
    """One metric of one benchmark task, before and after on the same questions."""

    task: str
    metric: str
    n: int
    before: Number
    after: Number = None
    difference: Number = None
    """After minus before."""
    difference_interval: Interval | None = None
    p: Number = None
    """Exact McNemar for metrics of 0 and 1; null for others."""
    gained: int | None = None
    lost: int | None = None
    detectable: Number = None
    """Smallest difference that n questions like these would show: 80 % power, two-sided 5 %."""


class Bench(Part):
    """Benchmark tasks by lm-eval."""

    scores: tuple[Score, ...]
    settings: dict[str, Any]
    """The same before and after."""


class Model(Part):
    """The model that was measured or edited."""

    id: str
    kind: str
    revision: str | None = None
    architecture: str
    parameters: int
    layers: int
    hidden_size: int
    dtype: str


class About(Part):
    """Provenance."""

    task: str
    made: str
    """Time, ISO 8601, UTC."""
    command: str
    recipe: str = ""
    """As TOML, local paths reduced to file names; empty where no recipe was asked for."""
    recipe_hash: str = ""
    seed: int | None = None
    model: Model | None = None
    machine: dict[str, Any]
    peak_memory: dict[str, int] = Field({})
    """Bytes."""


class Document(Part):
    """`report.json`."""

    schema_version: Literal[1] = 1
    task: str
    output: str | None = None
    model: str
    """As typed."""
    prompts: dict[str, int] = Field({})
    """Number of prompts of each set."""
    seconds: float | dict[str, float] = 0.0
    versions: dict[str, str] = Field({})
    about: About | None = None
    fit: Fit | None = None
    edit: Edit | None = None
    report: Report | None = None
    adapter: dict[str, Any] = Field({})
    """Of an adapter: its rank, whether it is exact, the largest share of a module's change that it leaves out."""
    gate: Gate | None = None
    earlier: Earlier | None = None
    file: SavedFile | None = None
    vector: Vector | None = None
    diff: Diff | None = None
    organism: Organism | None = None
    front: tuple[Front, ...] = ()
    """From `front.json` beside it."""
    bench: Bench | None = None
    """From `bench.json` beside it, where that is another task's."""


def schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of `report.json`."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Document.model_json_schema(by_alias=True)}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(schema(), indent=1, ensure_ascii=False) + "\n")
