"""Gradient refinement: weight factors that no kernel has, found by descent on the two objectives of the search.

λ of attention and of MLP in every layer (and, by option, the direction) are the parameters of hooks through which the
model is differentiable. Adam descends on log(1 + exp(log-odds of refusing)), which is flat where a target is complied
with, over a few trees of prompts at a time, plus what holds λ:

- the *leash*: drift beyond `max_drift` costs in proportion, and what is returned is the best of the iterates whose
  drift over all prompts of the scorer is within it, the start among them;
- the *bound*: 0 ≤ λ ≤ `bound`. Larger weight factors write the direction back reversed, and answers loop;
- the *prior*: squared differences between neighbouring layers, since λ that jump fit the prompts they were found on.

Nothing is generated: what comes out is for the caller to confirm by generation, on other prompts.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from perpend.core.directions import Directions
from perpend.core.edits import Geometry, through_post_norm
from perpend.core.kernels import nearest_normal
from perpend.core.linear import orthonormalise, working
from perpend.core.schedule import PerLayer
from perpend.errors import UsageError
from perpend.models.offload import value_of
from perpend.models.rows import Rows, Stack, per_row
from perpend.models.session import Session
from perpend.models.writers import Writer
from perpend.progress import track
from perpend.searching.candidate import Candidate
from perpend.searching.forward import Scorer, log_odds
from perpend.searching.objectives import divergence, likelihoods
from perpend.searching.sheets import together
from perpend.searching.study import Outcome

TREES = 2
"""Trees of each class that a step reads."""
CHECKS = 5
"""Steps between two scores over all prompts."""
PULL = 10.0
"""What twice the drift of the leash costs, in nats of refusal."""
TURN = 0.1
"""Rate of the direction, as a share of that of λ."""
SLACK = 1e-4
"""Drift, in nats per token, by which two scores of one candidate may differ: a leash is often a stored score."""
DIGITS = 3
"""Decimal places of λ in what is returned."""


@dataclass(frozen=True)
class Refined:
    """What refinement found.

    Attributes:
        candidate: The best iterate within the leash; the candidate that it started from when none is better.
        outcome: Its score.
        start: The score that it started from.
        directions: The directions of each k with which it was scored: the scorer's own, unless they were refined.
        history: Scores on the way, one every `CHECKS` steps.
    """

    candidate: Candidate
    outcome: Outcome
    start: Outcome
    directions: Mapping[int, Directions]
    history: tuple[Outcome, ...]


def refine(
    session: Session,
    scorer: Scorer,
    candidate: Candidate,
    *,
    steps: int = 20,
    max_drift: float | None = None,
    bound: float = 1.2,
    smooth: float = 0.02,
    rate: float = 0.05,
    kernel: bool = False,
    direction: bool = False,
    seed: int = 0,
) -> Refined:
    """Refine a candidate by gradient descent.

    Args:
        session: The untouched model.
        scorer: Made on it; its prompts are read.
        candidate: Where it begins, such as the best of a front.
        steps: Of Adam.
        max_drift: The leash, in nats per token; None for the drift of the candidate.
        bound: Largest weight factor.
        smooth: Weight of the prior, in nats per mean squared difference of neighbours over `bound`².
        rate: Learning rate of λ.
        kernel: Project the result to the nearest normal kernel of each component; it is scored as such.
        direction: Refine the direction of the candidate's layer as well. The result then needs `Refined.directions`
            and has no recipe.
        seed: Of which prompts a step reads.

    Returns:
        The refined candidate with schedules of one weight factor per layer, or normal kernels.

    Raises:
        UsageError: the model's edits cannot be rows of a batch; a refined direction of every layer's own or of a
            method that rewrites it layer by layer; or a bound below 0.
    """
    if bound <= 0:
        raise UsageError(f"a bound of {bound:g} on the weight factors", valid="more than 0")
    work = _Descent(session, scorer, candidate, bound, direction)
    (start,) = scorer.score([candidate])
    leash = max_drift if max_drift is not None else start.drift
    if start.failed:
        return Refined(candidate, start, start, scorer.directions, ())
    best = [(start, candidate, scorer.directions)]
    history: list[Outcome] = []
    optimiser = torch.optim.Adam(work.groups(rate))
    batches = work.batches(seed)
    for step in track(range(1, steps + 1), "refine"):
        optimiser.zero_grad()
        torch.autograd.backward(work.loss(*next(batches), leash, smooth))
        optimiser.step()
        work.hold()
        if step % CHECKS == 0 or step == steps:
            made, directions = work.result(kernel)
            (found,) = scorer.score([made], directions=directions)
            history.append(found)
            if not found.failed and not found.dropped:
                best.append((found, made, directions))
    within = [item for item in best if item[0].drift <= leash + SLACK] or best[:1]
    outcome, chosen, directions = min(within, key=lambda item: item[0].refusal)
    return Refined(chosen, outcome, start, directions, tuple(history))


class _Descent:
    """The parameters, and the model as a function of them."""

    def __init__(self, session: Session, scorer: Scorer, candidate: Candidate, bound: float, direction: bool) -> None:
        if scorer.room is None:
            raise UsageError("the gradient needs a model whose edits can be rows of a batch", hint="search.refine = 0")
        self.session, self.scorer, self.candidate, self.bound = session, scorer, candidate, bound
        everywhere = PerLayer(values=(1.0,) * session.n_layers)
        whole = replace(candidate, attention=everywhere, mlp=everywhere)
        edit = whole.edit(session, scorer.directions, scorer.recipe)
        if not per_row(session.anatomy, edit):
            raise UsageError(f"{candidate.mode} mode of these experts has no gradient", valid="plain mode")
        own = candidate.weights(session.n_layers)
        start = torch.tensor([own["attention"], own["mlp"]], dtype=torch.float32).clamp(0, bound)
        self.factors = start.requires_grad_()
        """`[2, L]` λ of attention and of MLP."""
        self.rows: Tensor | None = None
        """`[k, d]` the direction that is refined."""
        self._writers = [session.anatomy.writer(name) for name in edit.modules]
        if direction:
            self.rows = self._free(candidate).requires_grad_()
            self._geometries = dict[str, Geometry]()
        else:
            self._geometries = {w.name: self._geometry(w, edit.modules[w.name].directions) for w in self._writers}

    def _free(self, candidate: Candidate) -> Tensor:
        given = self.scorer.directions[candidate.rank]
        if candidate.layer is None or given.method == "biprojected":
            raise UsageError(
                "only one direction that all layers share can be refined", valid="a layer for the candidate"
            )
        return given.at(candidate.layer).clone()

    def _geometry(self, writer: Writer, directions: Tensor) -> Geometry:
        module = self.session.model.get_submodule(writer.name)
        mode = self.candidate.mode
        matrix = None if mode == "plain" else writer.matrix(value_of(module, writer.parameter))
        return Geometry.of(matrix, directions, mode)

    def groups(self, rate: float) -> list[dict[str, object]]:
        """Return the parameters for an optimiser."""
        found: list[dict[str, object]] = [{"params": [self.factors], "lr": rate}]
        return found if self.rows is None else [*found, {"params": [self.rows], "lr": TURN * rate * self._size()}]

    def _size(self) -> float:
        return float(self.session.hidden_size**-0.5)

    def _stacks(self) -> list[tuple[nn.Module, Stack]]:
        """Return the maps of all writers at the present parameters."""
        found = []
        for writer in self._writers:
            module = self.session.model.get_submodule(writer.name)
            if self.rows is None:
                geometry = self._geometries[writer.name]
            else:
                geometry = self._geometry(writer, self._written(writer, orthonormalise(self.rows)))
            made = geometry.at(self.factors[int(writer.component == "mlp"), writer.layer])
            found.append((module, Stack.of([made.to(self.session.device, working(self.session.loaded.dtype))])))
        return found

    def _written(self, writer: Writer, rows: Tensor) -> Tensor:
        gain = None
        if self.candidate.through_post_norm and writer.post_norm is not None:
            gain = self.session.anatomy.post_norm_gain(self.session.model, writer)
        return rows if gain is None else through_post_norm(rows, gain)

    def batches(self, seed: int) -> Iterator[tuple[list[int], list[int]]]:
        """Yield which trees of targets and of baselines a step reads; every tree before any comes again."""
        deals = [_dealt(len(self.scorer.sheets[k].trees), random.Random(f"{seed} {k}")) for k in ("target", "baseline")]
        while True:
            yield next(deals[0]), next(deals[1])

    def loss(self, targets: Sequence[int], baselines: Sequence[int], leash: float, smooth: float) -> Tensor:
        """Return what is minimised, in nats."""
        rows = Rows(self.session, self._stacks())
        asked, told = self.scorer.sheets["target"], self.scorer.sheets["baseline"]
        odds, spent = [], []
        for k in targets:
            of, planted = asked.trees[k]
            found = together(planted, rows, likelihoods, False)
            odds.append(log_odds(self.scorer.questions(of), found))
        for k in baselines:
            spent.append(together(told.trees[k][1], rows, divergence, True))
        refusal = nn.functional.softplus(torch.cat(odds, dim=1)).mean()
        excess = (torch.cat(spent, dim=1).mean() / max(leash, 1e-6) - 1).clamp_min(0)
        rough = self.factors.diff(dim=1).square().mean() / self.bound**2
        return refusal + PULL * excess + smooth * rough.to(refusal.device)

    @torch.no_grad()
    def hold(self) -> None:
        """Keep λ within the bound."""
        self.factors.clamp_(0, self.bound)

    def result(self, kernel: bool) -> tuple[Candidate, Mapping[int, Directions]]:
        """Return the present parameters as a candidate, and the directions that it needs."""
        values = [[round(float(x), DIGITS) for x in row] for row in self.factors.detach()]
        parts = [nearest_normal(v) if kernel else PerLayer(values=tuple(v)) for v in values]
        made = replace(self.candidate, attention=parts[0], mlp=parts[1])
        if self.rows is None or self.candidate.layer is None:
            return made, self.scorer.directions
        given = self.scorer.directions[self.candidate.rank]
        place = round(self.candidate.layer)
        vectors = given.vectors.clone()
        vectors[place] = orthonormalise(self.rows.detach()).float()
        moved = replace(given, vectors=vectors, provenance={**given.provenance, "refined": place})
        return replace(made, layer=float(place)), {**self.scorer.directions, self.candidate.rank: moved}


def _dealt(n: int, rng: random.Random) -> Iterator[list[int]]:
    """Yield up to `TREES` of n numbers, from decks that hold each once."""
    deck: list[int] = []
    while True:
        if not deck:
            deck = list(range(n))
            rng.shuffle(deck)
        yield deck[:TREES]
        deck = deck[TREES:]
