"""One layer chosen by forward passes: what its direction lifts, what it induces, what it costs.

After Arditi et al. 2024, "Refusal in Language Models Is Mediated by a Single Direction"
(https://arxiv.org/abs/2406.11717, section 2.3 and appendix C): a candidate direction is judged by the refusal that is
left when it is ablated everywhere (bypass), by the refusal that adding it to baseline prompts makes (induce), and by
the KL divergence on baseline prompts (drift). Two things differ. Refusal is the mean log-likelihood of the model's
*own* refusals rather than of one first token, since a model with many openings has none that stands for all; and
ablation is the edit of the writers that Perpend exports rather than one of the activations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from perpend import drift
from perpend.config import EditSection
from perpend.core.directions import Directions
from perpend.core.schedule import Constant
from perpend.data import Prompt
from perpend.errors import RunFailed
from perpend.fitting.behaviour import Behaviour
from perpend.fitting.plan import from_layer, plan_edit
from perpend.models.session import Reply, Session
from perpend.progress import track

REFUSAL_TOKENS = 12
DRIFT_TOKENS = 24
MAX_DRIFT = 0.5
"""KL per token, in nats, beyond which ablating a direction everywhere is called ruinous."""
DEEPEST = 0.85
"""No layer beyond this share of the depth is tried: the unembedding begins there."""


@dataclass(frozen=True)
class Probe:
    """What candidates are judged on: prompts with the untouched model's own replies, as token ids."""

    targets: tuple[Prompt, ...]
    refusals: tuple[tuple[int, ...], ...]
    baselines: tuple[Prompt, ...]
    answers: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, behaviour: Behaviour, size: int) -> Probe:
        """Take the first `size` prompts of each class on which the model does what the class says."""

        def part(
            seen: Sequence[tuple[Prompt, Reply]], tokens: int
        ) -> tuple[tuple[Prompt, ...], tuple[tuple[int, ...], ...]]:
            chosen = seen[:size]
            return tuple(p for p, _ in chosen), tuple(r.tokens[:tokens] for _, r in chosen)

        targets, refusals = part(behaviour.refused, REFUSAL_TOKENS)
        baselines, answers = part(behaviour.answered, DRIFT_TOKENS)
        if not targets or not baselines:
            raise RunFailed("no prompt of the select split on which the model refuses a target and answers a baseline")
        return cls(targets, refusals, baselines, answers)

    def refusal(self, session: Session) -> float:
        """Return the mean log-likelihood per token, in nats, of the model's own refusals to the targets."""
        scores = session.log_likelihood(self.targets, self.refusals)
        return float(torch.stack([s.mean() for s in scores]).mean())

    def induced(self, session: Session) -> float:
        """Return the mean log-likelihood per token of those refusals on baseline prompts."""
        refusals = [self.refusals[i % len(self.refusals)] for i in range(len(self.baselines))]
        scores = session.log_likelihood(self.baselines, refusals)
        return float(torch.stack([s.mean() for s in scores]).mean())


@dataclass(frozen=True)
class Candidate:
    """One layer and what its direction does; log-likelihoods are means per token, in nats."""

    layer: int
    bypass: float
    """Log-likelihood of the model's own refusals on targets with the direction ablated; lower is better."""
    induced: float
    """Log-likelihood of refusals on baselines with the mean difference added, minus that without; above 0."""
    drift: float
    """Multi-token KL on baseline prompts with the direction ablated, in nats."""
    fit_for_use: bool
    """Whether drift, induced refusal and depth are within bounds."""


@dataclass(frozen=True)
class Choice:
    """The chosen layer among its candidates."""

    layer: int
    candidates: tuple[Candidate, ...]
    untouched: float
    """Log-likelihood of the model's own refusals on targets without any edit."""


@contextmanager
def added(session: Session, layer: int, vector: Tensor) -> Iterator[None]:
    """Add `vector` `[d]` to the output of `layer` at every position inside the block."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        moved = hidden + vector.to(hidden.device, hidden.dtype)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    handle = session.anatomy.layer_modules(session.model)[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def choose_layer(
    session: Session,
    directions: Directions,
    section: EditSection,
    probe: Probe,
    *,
    max_drift: float = MAX_DRIFT,
    deepest: float = DEEPEST,
    stride: int | None = None,
) -> Choice:
    """Try the direction of each candidate layer with forward passes only.

    Args:
        session: The untouched model.
        directions: One direction per layer.
        section: Mode of the edit; its schedules are not used, every writer is ablated with λ = 1.
        probe: Prompts of the select split with the model's own replies.
        max_drift: Candidates that cost more are not fit for use.
        deepest: Share of the depth beyond which no layer is tried.
        stride: Every how many layers a candidate; the neighbours of the best are tried afterwards. By default such
            that about ten are tried.

    Returns:
        The candidate with the lowest bypass among those fit for use; when none is, the one with the lowest sum of
        bypass and drift.
    """
    last = max(1, min(round(deepest * directions.n_layers), directions.n_layers - 1))
    step = stride or max(1, last // 10)
    untouched, silent = probe.refusal(session), probe.induced(session)
    tried: dict[int, Candidate] = {}

    def attempt(layers: Sequence[int]) -> None:
        for layer in track([x for x in layers if x not in tried], "try layers"):
            tried[layer] = _judge(session, directions, section, probe, layer, silent, max_drift)

    attempt(range(last, 0, -step))
    best = _best(tried.values())
    attempt([x for x in range(best.layer - step + 1, best.layer + step) if 0 < x <= last])
    best = _best(tried.values())
    return Choice(best.layer, tuple(sorted(tried.values(), key=lambda c: c.layer)), untouched)


def _best(candidates: Iterable[Candidate]) -> Candidate:
    found = list(candidates)
    fit = [c for c in found if c.fit_for_use]
    return min(fit, key=lambda c: c.bypass) if fit else min(found, key=lambda c: c.bypass + c.drift)


def _judge(
    session: Session,
    directions: Directions,
    section: EditSection,
    probe: Probe,
    layer: int,
    silent: float,
    max_drift: float,
) -> Candidate:
    everywhere = section.model_copy(update={"attention": Constant(weight=1.0), "mlp": Constant(weight=1.0)})
    edit = plan_edit(session.model, session.anatomy, everywhere, from_layer(directions, layer))
    with session.edited(edit):
        bypass = probe.refusal(session)
    cost = drift.measure(session.logits, session.under(edit), session.batches(probe.baselines, probe.answers)).mean
    difference = directions.target_mean[layer] - directions.baseline_mean[layer]
    with added(session, layer, difference):
        induced = probe.induced(session) - silent
    return Candidate(layer, bypass, induced, cost, cost <= max_drift and induced > 0)
