"""What an edit costs: how far the edited model has moved from the reference on the reference's own answers.

Both models read the same tokens (teacher forcing), so that nothing is generated and every position is a pair. The
control asks what an edit of the same cost does that knows nothing of the direction.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from perpend.core.edits import Edit
from perpend.core.linear import orthonormalise
from perpend.core.stats import bootstrap_mean, bootstrap_ratio, wilson
from perpend.errors import RunFailed, UsageError
from perpend.judges.coherence import distinct, longest_repeat, words
from perpend.models.chat import strip_reasoning
from perpend.progress import track


class TeacherForced(Protocol):
    """What is needed of a batch."""

    @property
    def index(self) -> Sequence[int]:
        """Positions of the rows in the list of prompts."""

    @property
    def tokens(self) -> Tensor:
        """`[B, T]` int64, the tokens of the reference's answers."""

    @property
    def mask(self) -> Tensor:
        """`[B, T]` bool, which of them are there."""


@dataclass(frozen=True)
class PromptDrift:
    """Drift on the answer to one prompt.

    Attributes:
        index: Position of the prompt.
        tokens: Tokens of the answer that were read.
        kl: Mean over them of KL(reference ‖ candidate), nats per token.
        first: The same at the first token alone.
        reference_loss: Mean cross-entropy of the answer under the reference, nats per token.
        candidate_loss: The same under the candidate.
        flips: Share of tokens at which the most likely token is another one.
    """

    index: int
    tokens: int
    kl: float
    first: float
    reference_loss: float
    candidate_loss: float
    flips: float


@dataclass(frozen=True)
class Drift:
    """Drift over a set of prompts; every prompt weighs the same.

    Attributes:
        prompts: One entry per prompt with an answer, in prompt order.
        empty: Prompts whose answer has no token.
    """

    prompts: tuple[PromptDrift, ...]
    empty: int = 0

    @property
    def n(self) -> int:
        """Prompts measured."""
        return len(self.prompts)

    @property
    def tokens(self) -> int:
        """Tokens read."""
        return sum(p.tokens for p in self.prompts)

    @cached_property
    def _kl(self) -> tuple[float, float, float]:
        return bootstrap_mean([p.kl for p in self.prompts])

    @property
    def mean(self) -> float:
        """Mean KL, nats per token."""
        return self._kl[0]

    @property
    def interval(self) -> tuple[float, float]:
        """95 % bootstrap interval of the mean over prompts."""
        return self._kl[1:]

    @property
    def median(self) -> float:
        """Median over prompts of their KL."""
        return statistics.median(p.kl for p in self.prompts)

    @property
    def p95(self) -> float:
        """95th percentile over prompts of their KL."""
        return float(np.quantile([p.kl for p in self.prompts], 0.95))

    @property
    def first(self) -> float:
        """Mean KL at the first token; near zero wherever the template fixes it, so never to be read alone."""
        return statistics.fmean(p.first for p in self.prompts)

    def _losses(self) -> tuple[list[float], list[float]]:
        """Summed cross-entropy of each answer under the reference, and under the candidate."""
        return [p.reference_loss * p.tokens for p in self.prompts], [p.candidate_loss * p.tokens for p in self.prompts]

    @property
    def cross_entropy(self) -> tuple[float, float]:
        """Cross-entropy of the answers under the reference and under the candidate, nats per token over all tokens."""
        before, after = self._losses()
        return sum(before) / self.tokens, sum(after) / self.tokens

    @property
    def cross_entropy_ratio(self) -> float:
        """Cross-entropy of the answers under the candidate over that under the reference, both over all tokens.

        1 means that the candidate finds the answers as likely; infinite when the reference is certain of them all.
        """
        before, after = self.cross_entropy
        return after / before if before else 1.0 if not after else float("inf")

    @property
    def cross_entropy_ratio_interval(self) -> tuple[float, float]:
        """95 % bootstrap interval of the ratio over prompts."""
        before, after = self._losses()
        return bootstrap_ratio(after, before) if any(before) else (1.0, 1.0) if not any(after) else (math.inf, math.inf)

    @property
    def flip_rate(self) -> float:
        """Mean share of tokens at which greedy decoding would go another way."""
        return statistics.fmean(p.flips for p in self.prompts)

    def to_json(self) -> dict[str, Any]:
        """Return all figures with n and intervals, and the KL of every prompt."""
        ratio = self.cross_entropy_ratio
        flips, first = (bootstrap_mean([getattr(p, k) for p in self.prompts]) for k in ("flips", "first"))
        return {
            "n": self.n,
            "tokens": self.tokens,
            "empty": self.empty,
            "mean": self.mean,
            "interval": list(self.interval),
            "median": self.median,
            "p95": self.p95,
            "first_token": self.first,
            "first_token_interval": list(first[1:]),
            "cross_entropy": {"reference": self.cross_entropy[0], "candidate": self.cross_entropy[1]},
            "cross_entropy_ratio": _or_none(ratio),
            "cross_entropy_ratio_interval": [_or_none(x) for x in self.cross_entropy_ratio_interval],
            "flip_rate": self.flip_rate,
            "flip_rate_interval": list(flips[1:]),
            "per_prompt": [{"index": p.index, "tokens": p.tokens, "kl": p.kl} for p in self.prompts],
        }


def _or_none(x: float) -> float | None:
    return x if math.isfinite(x) else None


B = TypeVar("B", bound=TeacherForced)

MOST, LEAST = 64.0, 1 / 64
"""Factors on the weight factors between which a drift is looked for."""


def measure(reference: Callable[[B], Tensor], candidate: Callable[[B], Tensor], batches: Iterable[B]) -> Drift:
    """Measure KL(reference ‖ candidate) and what goes with it.

    Log-probabilities are float32, sums float64; logits of one batch of each model are held at a time.

    Args:
        reference: Logits `[B, T, V]` of a batch under the model that gave the answers; `[:, t]` predicts token t.
        candidate: The same under the edited model.
        batches: Batches with the answers of the reference; read once.

    Returns:
        The drift, in prompt order whatever the batches were.

    Raises:
        UsageError: a prompt in two batches, another vocabulary, or no answer with a token.
        RunFailed: logits that are not finite where they matter; names the prompt.
    """
    found: dict[int, PromptDrift | None] = {}
    for batch in track(batches, "drift", size=lambda b: len(b.index)):
        with torch.no_grad():
            ours, theirs = reference(batch), candidate(batch)
        if ours.shape != theirs.shape:
            shapes = f"{list(ours.shape)} and {list(theirs.shape)}"
            raise UsageError(f"logits of shape {shapes} cannot be compared", valid="two models of one vocabulary")
        for row, index in enumerate(batch.index):
            if index in found:
                raise UsageError(f"prompt {index} is in two batches")
            keep = batch.mask[row].to(ours.device)
            tokens = batch.tokens[row].to(ours.device)[keep]
            found[index] = _row(index, ours[row][keep], theirs[row].to(ours.device)[keep], tokens)
    measured = tuple(p for _, p in sorted(found.items()) if p is not None)
    if not measured:
        raise UsageError("no answer to measure drift on", valid="at least one reply with a token")
    return Drift(measured, len(found) - len(measured))


def _row(index: int, ours: Tensor, theirs: Tensor, tokens: Tensor) -> PromptDrift | None:
    """Compare the logits `[n, V]` of both models on one answer of n tokens; None for n = 0."""
    if not len(tokens):
        return None
    p, q = ours.float().log_softmax(-1), theirs.float().log_softmax(-1)
    weight = p.exp()
    kl = _summed(torch.where(weight > 0, weight * (p - q), 0.0))
    losses = [-_summed(x.gather(-1, tokens[:, None])) for x in (p, q)]
    if not all(bool(x.isfinite().all()) for x in (kl, *losses)):
        raise RunFailed(f"logits on the answer to prompt {index} are not finite")
    flips = (ours.argmax(-1) != theirs.argmax(-1)).float().mean()
    means = [float(x.mean()) for x in (kl.clamp_min(0), *losses)]
    return PromptDrift(index, len(tokens), means[0], max(0.0, float(kl[0])), means[1], means[2], float(flips))


def _summed(x: Tensor) -> Tensor:
    """Sum over the last axis in float64, on the CPU where the device has none."""
    return (x.cpu() if x.device.type == "mps" else x).sum(-1, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Likeliest:
    """What a model expects at every token of one answer, small enough to be kept when the model is gone.

    Attributes:
        tokens: `[n, k]` int64 on the CPU, the k likeliest tokens at each position.
        logs: `[n, k]` float32 on the CPU, their log-probabilities in nats.
    """

    tokens: Tensor
    logs: Tensor

    @classmethod
    def of(cls, logs: Tensor, k: int = 64) -> Likeliest:
        """Keep the k likeliest of log-probabilities `[n, V]`."""
        kept = logs.float().topk(min(k, logs.shape[-1]), dim=-1)
        return cls(kept.indices.cpu(), kept.values.cpu())

    def kl(self, logs: Tensor) -> Tensor:
        """Return KL(this ‖ other) in nats at every position, `[n]` float64 on the CPU.

        The kept tokens count one by one and all others as one outcome: a lower bound of the KL over the vocabulary
        (log sum inequality), short of it only by how differently the two spread what is left.

        Args:
            logs: `[n, V]`, log-probabilities of the other model.
        """
        p, q = self.logs.double(), logs.float().gather(-1, self.tokens.to(logs.device)).cpu().double()
        rest = [(1 - x.exp().sum(-1)).clamp_min(1e-9) for x in (p, q)]
        return ((p.exp() * (p - q)).sum(-1) + rest[0] * (rest[0] / rest[1]).log()).clamp_min(0)


@dataclass(frozen=True)
class Repetition:
    """How repetitive, long and finished a set of replies is; means over replies that have words.

    Attributes:
        n: Replies.
        distinct_2: Share of distinct word bigrams.
        distinct_3: Share of distinct word trigrams.
        longest_repeat: Length of the longest stretch that comes twice, as a share of the words.
        words: Words per reply.
        length_ratio: Words over the words of the reference's replies; None without a reference.
        unfinished: Replies that were cut off.
        unfinished_reasoning: Of those, the ones cut off before the reasoning ended.
    """

    n: int
    distinct_2: float
    distinct_3: float
    longest_repeat: float
    words: float
    length_ratio: float | None
    unfinished: int
    unfinished_reasoning: int

    def to_json(self) -> dict[str, Any]:
        """Return all figures; counts with share and 95 % Wilson interval."""
        found: dict[str, Any] = {
            k: getattr(self, k) for k in ("n", "distinct_2", "distinct_3", "longest_repeat", "words")
        }
        found["length_ratio"] = self.length_ratio
        for key in ("unfinished", "unfinished_reasoning"):
            k = getattr(self, key)
            found[key] = {"k": k, "n": self.n, "share": k / max(1, self.n), "interval": list(wilson(k, self.n))}
        return found


def repetition(
    replies: Sequence[str], finished: Sequence[bool] | None = None, reference: Sequence[str] | None = None
) -> Repetition:
    """Measure how repetitive, long and finished replies are.

    Args:
        replies: Texts; reasoning blocks are taken off.
        finished: Whether each ended by itself; all by default.
        reference: Replies of the reference to the same prompts.

    Raises:
        UsageError: lists of different lengths.
    """
    ended = [True] * len(replies) if finished is None else list(finished)
    if len(ended) != len(replies) or (reference is not None and len(reference) != len(replies)):
        raise UsageError("one entry per reply is needed", valid=f"{len(replies)} of each")
    texts = [strip_reasoning(reply) for reply in replies]
    said = [words(text) for text in texts]
    spoken = [w for w in said if w]

    def mean(values: Iterable[float]) -> float:
        return statistics.fmean(values) if spoken else 0.0

    total = sum(map(len, said))
    before = None if reference is None else sum(len(words(strip_reasoning(reply))) for reply in reference)
    return Repetition(
        n=len(replies),
        distinct_2=mean(distinct(w, 2) for w in spoken),
        distinct_3=mean(distinct(w, 3) for w in spoken),
        longest_repeat=mean(longest_repeat(w)[1] / len(w) for w in spoken),
        words=mean(len(w) for w in spoken),
        length_ratio=total / before if before else None,
        unfinished=ended.count(False),
        unfinished_reasoning=sum(not text and not end for text, end in zip(texts, ended, strict=True)),
    )


def rotated(edit: Edit, seed: int) -> Edit:
    """Return the edit with all its directions turned by one random rotation of the residual stream: the control.

    Modules, weight factors and modes stay, and so do the angles between the directions of any two modules, so that
    nothing but the place of the directions in the stream is lost; each is uniform on the sphere (Haar measure).

    Args:
        edit: What is controlled for; modules of one width.
        seed: Seed of the rotation.
    """
    own = {name: part.directions.double() for name, part in edit.modules.items()}
    if not own:
        return edit
    _, size, axes = torch.linalg.svd(torch.cat(list(own.values())), full_matrices=False)
    basis = axes[size > 1e-5 * size[0]]  # what float32 rounding adds to the span is left out
    generator = torch.Generator().manual_seed(seed)
    there = orthonormalise(torch.randn(basis.shape, generator=generator, dtype=torch.float64))
    turned = {name: orthonormalise(v @ basis.mT @ there).float() for name, v in own.items()}
    modules = {name: replace(part, directions=turned[name]) for name, part in edit.modules.items()}
    return Edit(modules, {**edit.provenance, "control": "random", "seed": seed})


@dataclass(frozen=True)
class Found:
    """Where a search for a drift ended.

    Attributes:
        factor: On the weight factors.
        drift: What it costs, nats per token.
        matched: The drift is the one that was looked for, to the tolerance; else the nearest that was reached.
    """

    factor: float
    drift: float
    matched: bool


def equal_drift(
    cost: Callable[[float], float], aim: float, *, tolerance: float = 0.05, steps: int = 10, start: float = 1.0
) -> Found:
    """Find the factor at which an edit costs `aim`, by bracketing and interpolation in the logarithms.

    Args:
        cost: Drift at a factor on the weight factors; `RunFailed` stands for more than any.
        aim: Drift that is looked for, nats per token, above 0.
        tolerance: Relative difference that counts as equal.
        steps: Most calls of `cost`.
        start: First factor.

    Returns:
        The factor whose drift is nearest, and whether it is near enough. Where drift has a largest value below `aim`,
        that is the largest within `MOST`.

    Raises:
        UsageError: no positive drift to look for.
        RunFailed: no factor gives finite logits.
    """
    if not aim > 0:
        raise UsageError(f"a drift of {aim} to be equal to", valid="more than 0")
    low, high, factor, best = (0.0, 0.0), (math.inf, math.inf), start, None
    power, last = 2.0, None  # drift grows with the square of a small edit
    for _ in range(steps):
        found = _tried(cost, factor)
        miss = abs(math.log(max(found, 1e-12) / aim))
        if math.isfinite(found) and (best is None or miss < best[0]):
            best = (miss, factor, found)
        if miss <= math.log1p(tolerance):
            break
        if last is not None and math.isfinite(found) and found > 0 and last[1] > 0:
            power = min(4.0, max(0.7, math.log(found / last[1]) / math.log(factor / last[0])))
        last = (factor, found) if math.isfinite(found) else None
        least = 1.05 if low[0] == 0 else 1.5  # drift that hardly grows any more is left behind quickly
        low, high = ((factor, found), high) if found < aim else (low, (factor, found))
        if low[0] and math.isfinite(high[0]):
            factor = _between(low, high, aim)
        elif factor in (LEAST, MOST):
            break
        else:
            step = (aim / max(found, 1e-12)) ** (1 / power)
            step = min(8.0, max(least, 1.05 * step)) if found < aim else max(0.25, step / 1.05)
            factor = min(MOST, max(LEAST, factor * step))
    if best is None:
        raise RunFailed("no random direction of any size gives finite logits")
    return Found(best[1], best[2], best[0] <= math.log1p(tolerance))


def _between(low: tuple[float, float], high: tuple[float, float], aim: float) -> float:
    """Return the factor between two at which a power law through both drifts is `aim`; the middle where one broke."""
    share = 0.5
    if low[1] > 0 and math.isfinite(high[1]):
        share = min(0.9, max(0.1, math.log(aim / low[1]) / math.log(high[1] / low[1])))
    return float(low[0] ** (1 - share) * high[0] ** share)


def _tried(cost: Callable[[float], float], factor: float) -> float:
    """Return the drift at a factor, infinite where the model breaks."""
    try:
        return cost(factor)
    except RunFailed:
        return math.inf
