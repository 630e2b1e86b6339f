"""One layer chosen by forward passes: what its direction lifts, what it induces, what it costs.

After Arditi et al. 2024, "Refusal in Language Models Is Mediated by a Single Direction"
(https://arxiv.org/abs/2406.11717, section 2.3 and appendix C): a candidate direction is judged by the refusal that is
left when it is ablated everywhere (bypass), by the refusal that adding it to baseline prompts makes (induce), and by
the KL divergence on baseline prompts (drift). Some things differ, under both rules. Refusal is the mean log-likelihood
of the model's *own* refusals rather than of one first token, since a model with many openings has none that stands for
all; ablation is the edit of the writers that Perpend exports rather than one of the activations, so that embeddings
keep what they write; and drift is taken over all tokens of the model's own answers rather than over the first. Of the
template's tokens one is read unless the position is `auto` too, which tries up to five.

Two rules choose among the candidates. `published` is the paper's: every layer is tried, and the one with the least
refusal left within bounds on depth, drift and induced refusal is taken. `thrift`, the default, takes the most refusal
removed per drift among those that remove at least half of what the best one does: late layers of small models remove
more and cost many times as much. Candidates that ruin the model or whose direction does not induce refusal do not
count where another does something: a ruined model finds refusals unlikely too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from perpend import drift
from perpend.config import EditSection, Rule
from perpend.core.directions import Directions
from perpend.core.schedule import Constant
from perpend.data import Prompt
from perpend.errors import RunFailed
from perpend.fitting.accumulate import Checkpoint
from perpend.fitting.behaviour import Behaviour
from perpend.fitting.plan import from_layer, plan_edit
from perpend.models.recall import Recalled
from perpend.models.session import Reply, Session
from perpend.progress import track

REFUSAL_TOKENS = 12
DRIFT_TOKENS = 24
MAX_DRIFT = 0.1
"""Published rule: KL per token, in nats, beyond which a direction is left out."""
DEEPEST = 0.8
"""Published rule: share of the depth beyond which no direction is taken."""
TRIED = 0.9
"""Share of the depth beyond which no layer is tried by either rule: the unembedding begins there."""
RUIN = 0.5
"""Drift, in nats per token, beyond which the default rule calls a model ruined."""
SOME = 0.1
"""Refusal taken away, in nats per token, below which no candidate of the default rule is preferred for being sound."""
NEGLIGIBLE = 0.01
"""Drift, in nats per token, below which two candidates cost the same."""


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
    in_bounds: bool
    """Whether drift, induced refusal and depth are within the published bounds."""


@dataclass(frozen=True)
class Choice:
    """The chosen layer among its candidates."""

    best: Candidate
    candidates: tuple[Candidate, ...]
    untouched: float
    """Log-likelihood of the model's own refusals on targets without any edit."""
    rule: Rule

    @property
    def layer(self) -> int:
        """The chosen layer."""
        return self.best.layer


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
    rule: Rule = "thrift",
    stride: int | None = None,
    checkpoint: Checkpoint | None = None,
) -> Choice:
    """Try the direction of each candidate layer with forward passes only.

    Args:
        session: The untouched model.
        directions: One direction per layer.
        section: Mode of the edit; its schedules are not used, every writer is ablated with λ = 1.
        probe: Prompts of the select split with the model's own replies.
        rule: Which candidate is taken; see the head of this module.
        stride: Every how many layers a candidate; the neighbours of the best are tried afterwards. By default every
            layer under the published rule, and such that about ten are tried under the other.
        checkpoint: Keeps every candidate that was tried, so that an interrupted choice goes on where it was.

    Returns:
        The chosen candidate and all that were tried.
    """
    last = min(max(1, round(TRIED * directions.n_layers)), directions.n_layers - 1)
    first = min(1, last)
    step = stride or (1 if rule == "published" else max(1, last // 10))
    untouched, silent, reference = probe.refusal(session), probe.induced(session), Recalled(session)
    kept = checkpoint("layers", None) if checkpoint else None
    tried = {row["layer"]: Candidate(**row) for row in (kept or {"tried": []})["tried"]}

    def attempt(layers: Sequence[int]) -> Candidate:
        for layer in track([x for x in layers if x not in tried], "try layers"):
            tried[layer] = _judge(session, directions, section, probe, layer, silent, reference)
            if checkpoint:
                checkpoint("layers", {"tried": [asdict(candidate) for candidate in tried.values()]})
        return best(tried.values(), untouched, rule)

    found = attempt(range(last, first - 1, -step))
    around = range(found.layer - step + 1, found.layer + step)
    found = attempt([x for x in around if first <= x <= last])
    return Choice(found, tuple(sorted(tried.values(), key=lambda c: c.layer)), untouched, rule)


def best(candidates: Iterable[Candidate], untouched: float, rule: Rule) -> Candidate:
    """Return the candidate that a rule takes; where the published bounds leave none, the other rule decides."""
    found = list(candidates)
    if rule == "published" and any(c.in_bounds for c in found):
        return min((c for c in found if c.in_bounds), key=lambda c: c.bypass)
    sound = [c for c in found if c.drift <= RUIN and c.induced > 0]
    found = sound if any(untouched - c.bypass >= SOME for c in sound) else found
    most = max(untouched - c.bypass for c in found)
    able = [c for c in found if untouched - c.bypass >= min(most, most / 2)]
    return max(able, key=lambda c: (untouched - c.bypass) / max(c.drift, NEGLIGIBLE))


def _judge(
    session: Session,
    directions: Directions,
    section: EditSection,
    probe: Probe,
    layer: int,
    silent: float,
    reference: Recalled,
) -> Candidate:
    everywhere = section.model_copy(update={"attention": Constant(weight=1.0), "mlp": Constant(weight=1.0)})
    edit = plan_edit(session.model, session.anatomy, everywhere, from_layer(directions, layer))
    with session.edited(edit):
        bypass = probe.refusal(session)
    cost = drift.measure(reference, session.under(edit), session.batches(probe.baselines, probe.answers)).mean
    difference = directions.target_mean[layer] - directions.baseline_mean[layer]
    with added(session, layer, difference):
        induced = probe.induced(session) - silent
    in_bounds = cost <= MAX_DRIFT and induced > 0 and layer < DEEPEST * directions.n_layers
    return Candidate(layer, bypass, induced, cost, in_bounds)
