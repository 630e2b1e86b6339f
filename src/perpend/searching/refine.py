"""Gradient refinement: weight factors that no kernel has, found by descent on the two objectives of the search.

λ of attention and of MLP in every layer (and, by option, the direction) are the parameters of hooks through which the
model is differentiable. Adam descends on log(1 + exp(log-odds of refusing)), which is flat where a target is complied
with, over a few trees of prompts at a time, plus what holds λ:

- the *leash*: drift beyond `max_drift` costs in proportion, and what is returned is the best of the iterates whose
  drift over all prompts of the scorer is within it, the start among them;
- the *bound*: 0 ≤ λ ≤ `bound`, or what the candidate has where that is more. Larger weight factors write the direction
  back reversed, and answers loop;
- the *prior*: squared differences between neighbouring layers, since λ that jump fit the prompts they were found on.

A step goes forward and backward through one tree at a time, whose activations are all that memory has to hold. Where it
does not, the prompts of every tree are halved; a step reads the same prompts as before.

Nothing is generated: what comes out is for the caller to confirm by generation, on other prompts. Those may be among
the scorer's: what is held out is read by no step, and does not count where the best iterate is taken.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from perpend.core.directions import Directions
from perpend.core.edits import Geometry, through_post_norm
from perpend.core.kernels import nearest_normal
from perpend.core.kinds import Basis
from perpend.core.linear import orthonormalise, working
from perpend.core.schedule import PerLayer
from perpend.errors import RunFailed, UsageError
from perpend.models.batching import out_of_memory
from perpend.models.memory import reclaim
from perpend.models.offload import value_of
from perpend.models.rows import Planted, Rows, Stack, per_row
from perpend.models.session import Session
from perpend.models.writers import Writer
from perpend.progress import note, track
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
        directions: The directions with which it was scored: the scorer's own, unless they were refined.
        history: Scores on the way, one every `CHECKS` steps.
    """

    candidate: Candidate
    outcome: Outcome
    start: Outcome
    directions: Mapping[Basis, Directions]
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
    held_out: Collection[int] = (),
    seed: int = 0,
) -> Refined:
    """Refine a candidate by gradient descent.

    Args:
        session: The untouched model.
        scorer: Made on it; its prompts are read.
        candidate: Where it begins, such as the best of a front.
        steps: Of Adam.
        max_drift: The leash, in nats per token; None for the drift of the candidate.
        bound: Largest weight factor, unless the candidate has larger ones.
        smooth: Weight of the prior, in nats per mean squared difference of neighbours over `bound`².
        rate: Learning rate of λ.
        kernel: Project the result to the nearest normal kernel of each component; it is scored as such.
        direction: Refine the direction of the candidate's layer as well. The result then needs `Refined.directions`,
            which no recipe measures.
        held_out: Targets of the scorer, by their place, that nothing is chosen by.
        seed: Of which prompts a step reads.

    Returns:
        The refined candidate with schedules of one weight factor per layer, or normal kernels.

    Raises:
        UsageError: the model's edits cannot be rows of a batch; a refined direction of every layer's own or of a
            method that rewrites it layer by layer; a bound below 0; or no target that is not held out.
        RunFailed: memory does not hold the activations of a single prompt.
    """
    if bound <= 0:
        raise UsageError(f"a bound of {bound:g} on the weight factors", valid="more than 0")
    work = _Descent(session, scorer, candidate, bound, direction, held_out)
    (start,) = scorer.score([candidate])
    leash = max_drift if max_drift is not None else start.drift
    if start.failed:
        return Refined(candidate, start, start, scorer.directions, ())
    best = [(start, candidate, scorer.directions)]
    history: list[Outcome] = []
    optimiser = torch.optim.Adam(work.groups(rate))
    batches = work.batches(seed)
    for step in track(range(1, steps + 1), "refine"):
        work.descend(*next(batches), leash, smooth)
        optimiser.step()
        work.hold()
        if step % CHECKS == 0 or step == steps:
            made, directions = work.result(kernel)
            (found,) = scorer.score([made], directions=directions)
            history.append(found)
            if not found.failed and not found.dropped:
                best.append((found, made, directions))
    within = [item for item in best if item[0].drift <= leash + SLACK] or best[:1]
    outcome, chosen, directions = min(within, key=lambda item: work.refusal(item[0]))
    return Refined(chosen, outcome, start, directions, tuple(history))


class _Descent:
    """The parameters, and the model as a function of them."""

    def __init__(
        self,
        session: Session,
        scorer: Scorer,
        candidate: Candidate,
        bound: float,
        direction: bool,
        held_out: Collection[int],
    ) -> None:
        if scorer.room is None:
            raise UsageError("the gradient needs a model whose edits can be rows of a batch", hint="search.refine = 0")
        self.session, self.scorer, self.candidate = session, scorer, candidate
        self._read = [k for k in range(len(scorer.found.questions)) if k not in held_out]
        self._trees = [k for k, (of, _) in enumerate(scorer.sheets["target"].trees) if self._kept(of)]
        self._parts = {kind: [[tree] for tree in sheet.trees] for kind, sheet in scorer.sheets.items()}
        """The trees of the sheets, each in as many parts as memory asks for."""
        if not self._read:
            raise UsageError("every target is held out", valid="some that the steps may read")
        everywhere = PerLayer(values=(1.0,) * session.n_layers)
        whole = replace(candidate, attention=everywhere, mlp=everywhere)
        edit = whole.edit(session, scorer.directions, scorer.recipe)
        if not per_row(session.anatomy, edit):
            raise UsageError(f"{candidate.mode} mode of these experts has no gradient", valid="plain mode")
        own = candidate.weights(session.n_layers)
        start = torch.tensor([own["attention"], own["mlp"]], dtype=torch.float32).clamp_min(0)
        self.bound = max(bound, float(start.max()))
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
        given = self.scorer.directions[candidate.basis]
        if candidate.layer is None or not turns(candidate):
            raise UsageError(
                "only one direction that all layers share can be refined", valid="a layer for the candidate"
            )
        return given.at(candidate.layer).clone()

    def _geometry(self, writer: Writer, directions: Tensor) -> Geometry:
        module = self.session.model.get_submodule(writer.name)
        mode = self.candidate.mode
        matrix = None if mode == "plain" else writer.matrix(value_of(module, writer.parameter))
        return Geometry.of(matrix, directions, mode)

    @property
    def _parameters(self) -> list[Tensor]:
        return [self.factors] if self.rows is None else [self.factors, self.rows]

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
        trees = {"target": self._trees, "baseline": range(len(self.scorer.sheets["baseline"].trees))}
        deals = [_dealt(of, random.Random(f"{seed} {kind}")) for kind, of in trees.items()]
        while True:
            yield next(deals[0]), next(deals[1])

    def descend(self, targets: Sequence[int], baselines: Sequence[int], leash: float, smooth: float) -> float:
        """Set the gradient of what is minimised, and return what that is, in nats.

        Args:
            targets: Trees of targets.
            baselines: Trees of baselines.
            leash: Nats per token.
            smooth: Weight of the prior.

        Raises:
            RunFailed: memory does not hold the activations of a single prompt.
        """
        sheets = self.scorer.sheets
        n = sum(len(self._kept(sheets["target"].trees[k][0])) for k in targets)
        m = sum(len(sheets["baseline"].trees[k][0]) for k in baselines)
        refusal, down = self._summed("target", targets, self._refusals)
        spent, up = self._summed("baseline", baselines, self._spent)
        excess = spent / m / max(leash, 1e-6) - 1
        prior = smooth * self.factors.diff(dim=1).square().mean() / self.bound**2
        (even,) = torch.autograd.grad(prior, [self.factors])
        pull = PULL / m / max(leash, 1e-6) if excess > 0 else 0.0
        for parameter, less, more in zip(self._parameters, down, up, strict=True):
            parameter.grad = less / n + pull * more
            if parameter is self.factors:
                parameter.grad += even
        return refusal / n + PULL * max(0.0, excess) + float(prior.detach())

    def _refusals(self, of: range, planted: Planted) -> Tensor:
        """Return what is minimised of a tree of targets, summed over those that the steps read."""
        rows = Rows(self.session, self._stacks())
        odds = log_odds(self.scorer.questions(of), together(planted, rows, likelihoods, False))
        return nn.functional.softplus(odds[:, self._kept(of)]).sum()

    def _spent(self, of: range, planted: Planted) -> Tensor:
        """Return the drift on a tree of baselines, summed over them."""
        return together(planted, Rows(self.session, self._stacks()), divergence, True).sum()

    def _summed(
        self, kind: str, trees: Sequence[int], each: Callable[[range, Planted], Tensor]
    ) -> tuple[float, list[Tensor]]:
        """Return a sum over trees and its gradient; the activations of one part of a tree are held at a time."""
        total, gradient = 0.0, [torch.zeros_like(parameter) for parameter in self._parameters]
        for k in trees:
            while (found := self._gradient(self._parts[kind][k], each)) is None:
                self._halve(kind, k)
            total += found[0]
            gradient = [a + b for a, b in zip(gradient, found[1], strict=True)]
        return total, gradient

    def _gradient(
        self, parts: Sequence[tuple[range, Planted]], each: Callable[[range, Planted], Tensor]
    ) -> tuple[float, list[Tensor]] | None:
        """Return a sum over the parts of a tree and its gradient; None where memory does not hold one."""
        total, gradient = 0.0, [torch.zeros_like(parameter) for parameter in self._parameters]
        try:
            for of, planted in parts:
                value = each(of, planted)
                made = torch.autograd.grad(value, self._parameters)
                total, gradient = total + float(value.detach()), [a + b for a, b in zip(gradient, made, strict=True)]
        except Exception as error:
            if not out_of_memory(error):
                raise
            return None
        return total, gradient

    def _halve(self, kind: str, tree: int) -> None:
        """Halve the prompts of every part of every tree, where a part has several.

        Raises:
            RunFailed: the tree that memory does not hold is in parts of one prompt already.
        """
        reclaim()
        before = len(self._parts[kind][tree])
        for name, trees in self._parts.items():
            sheet = self.scorer.sheets[name]
            for parts in trees:
                parts[:] = [half for part in parts for half in sheet.halves(part[0]) or [part]]
        if len(self._parts[kind][tree]) == before:
            raise RunFailed("out of memory on a single prompt", hint="--refine 0, or a smaller dtype")
        longest = max(len(part[1].tree) for trees in self._parts.values() for parts in trees for part in parts)
        note(f"out of memory: going on with trees of {longest} tokens")

    def _kept(self, of: range) -> list[int]:
        """Return the places, within a tree, of the targets that the steps read."""
        return [place for place, k in enumerate(self.scorer.asked(of)) if k in self._read]

    def refusal(self, outcome: Outcome) -> float:
        """Return the refusal of an outcome over the targets that the steps read."""
        each = outcome.per_target
        return outcome.refusal if each is None else statistics.fmean(each[k] for k in self._read)

    @torch.no_grad()
    def hold(self) -> None:
        """Keep λ within the bound."""
        self.factors.clamp_(0, self.bound)

    def result(self, kernel: bool) -> tuple[Candidate, Mapping[Basis, Directions]]:
        """Return the present parameters as a candidate, and the directions that it needs."""
        values = [[round(float(x), DIGITS) for x in row] for row in self.factors.detach()]
        parts = [nearest_normal(v) if kernel else PerLayer(values=tuple(v)) for v in values]
        made = replace(self.candidate, attention=parts[0], mlp=parts[1])
        if self.rows is None or self.candidate.layer is None:
            return made, self.scorer.directions
        given = self.scorer.directions[self.candidate.basis]
        place = round(self.candidate.layer)
        vectors = given.vectors.clone()
        vectors[place] = orthonormalise(self.rows.detach()).float()
        moved = replace(given, vectors=vectors, provenance={**given.provenance, "refined": place})
        return replace(made, layer=float(place)), {**self.scorer.directions, self.candidate.basis: moved}


def turns(candidate: Candidate) -> bool:
    """Return whether the direction of a candidate can be refined: one that all modules share as it is."""
    return candidate.layer is not None and candidate.method != "biprojected"


def _dealt(cards: Sequence[int], rng: random.Random) -> Iterator[list[int]]:
    """Yield up to `TREES` of some numbers, from decks that hold each once."""
    deck: list[int] = []
    while True:
        if not deck:
            deck = list(cards)
            rng.shuffle(deck)
        yield deck[:TREES]
        deck = deck[TREES:]
