"""What a search may try, and which candidates it tries next.

The candidates of generation g are a pure function of the seed, of g and of the results of all generations before:
a fresh sampler is seeded with (seed, g) and shown those results in the order of their slots. Who ran a trial, in which
order and after which interruption therefore never matters, and a sampler that is resumed cannot repeat itself.

A slot is the place of a candidate in the search: generation `slot // size`, place `slot % size` in it.

Candidates that take one layer's direction everywhere and those that take each layer's own are *strata*: every second
slot belongs to the other, and the sampler of a stratum is shown its trials alone. What is best for the weight factors
differs between them, and where the first trials of one do better than those of the other, one sampler would never
come back to the other.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from perpend.config import EditSection, FitSection, Recipe
from perpend.core.kinds import Basis, Method
from perpend.core.schedule import NormalKernel
from perpend.core.schedule import layers as length
from perpend.errors import UsageError
from perpend.searching.candidate import Candidate
from perpend.searching.front import FLOOR, decades, worth

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

POST_NORM = "post-norm"
PUBLIC = {"peak_weight": 0.55, "peak_layer": 0.53, "spread": 0.15}
"""The kernel of the public card of an edited Gemma 3 4B; places as shares of the depth."""
WIDE = 1.0
"""Spread, as a share of the depth, of a kernel that is nearly the same everywhere."""
PEAK = 0.67
"""Place, as a share of the depth, of the wide kernels of each layer's own direction that a search begins with."""
EDGE = (0.33, 0.4)
"""First edited layer of those, as shares of the depth: of attention and of MLP."""
CLIP = 2.0
"""Drift, in nats per token, beyond which the sampler is not told how bad a candidate is: outliers would rule it."""
DIGITS = 4
"""Decimal places of parameters, so that a recipe says exactly what was tried."""
SAMPLER: dict[str, Any] = {"multivariate": True, "constant_liar": True, "n_startup_trials": 8, "n_ei_candidates": 48}

PARTS = ("attention", "mlp")

Params = dict[str, Any]


@dataclass(frozen=True)
class Proposal:
    """Parameters to try, and where they came from."""

    params: Params
    origin: str


@dataclass(frozen=True)
class Seen:
    """A trial as the sampler is shown it."""

    params: Params
    values: tuple[float, float] | None
    """Refusal in nats and drift in nats per token, both to be small; None when it failed or has not ended."""
    running: bool = False
    """It is asked for in the same generation, so that no other is asked for right beside it."""


@dataclass(frozen=True)
class Space:
    """The parameters of a search and their ranges, for one model."""

    n_layers: int
    modes: tuple[str, ...]
    """plain, column, row and, where a norm follows a writer, post-norm."""
    max_rank: int
    methods: tuple[Method, ...] = ("mean",)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields of a candidate that the recipe decides."""

    @classmethod
    def of(cls, recipe: Recipe, n_layers: int, *, post_norms: bool, packed: bool = False) -> Space:
        """Return what is left open by a recipe: what it says other than by default is kept and not searched.

        Args:
            recipe: What is searched.
            n_layers: Layers of the model.
            post_norms: Whether a norm follows some writer.
            packed: Whether weights are quantised in memory, so that only plain mode can be tried.

        Raises:
            UsageError: the iterative strategy, or a layer outside the model.
        """
        usual_fit, usual, fixed = FitSection(), EditSection(), dict[str, Any]()
        if recipe.fit.strategy != usual_fit.strategy:
            raise UsageError(
                "a search measures the directions once",
                where="fit.strategy",
                valid=usual_fit.strategy,
                hint="leave it out",
            )
        if recipe.fit.layer != "auto":
            fixed["layer"] = None if recipe.fit.layer == "each" else _inside(recipe, n_layers)
        for name in ("rank", "method"):
            if getattr(recipe.fit, name) != getattr(usual_fit, name):
                fixed[name] = getattr(recipe.fit, name)
        if recipe.edit.mode != usual.mode or recipe.edit.through_post_norm:
            fixed["mode"] = recipe.edit.mode
            fixed["through_post_norm"] = recipe.edit.through_post_norm
        fixed |= {p: getattr(recipe.edit, p) for p in PARTS if getattr(recipe.edit, p) != NormalKernel()}
        modes = ("plain", *(() if packed else ("column", "row")), *((POST_NORM,) if post_norms else ()))
        return cls(n_layers, modes, recipe.search.max_rank, ("mean", "projected"), fixed)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The k whose directions are needed."""
        return (self.fixed["rank"],) if "rank" in self.fixed else tuple(range(1, self.max_rank + 1))

    @property
    def bases(self) -> tuple[Basis, ...]:
        """The methods and k whose directions are needed."""
        methods = (self.fixed["method"],) if "method" in self.fixed else self.methods
        return tuple((method, rank) for rank in self.ranks for method in methods)

    @property
    def strata(self) -> tuple[str, ...]:
        """Where directions come from: one layer, each layer its own, or both in turn."""
        if "layer" not in self.fixed:
            return ("one", "each")
        return ("each",) if self.fixed["layer"] is None else ("one",)

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Ranges of the open parameters; layers and spreads in layers.

        A peak weight below 0 stands for exactly 0: the component is left alone. A first layer of 0 or less and a last
        one that the model does not have stand for no such edge. So each is found with the probability of an interval
        and not of a point.
        """
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        last, depth = float(self.n_layers - 1), float(self.n_layers)
        found: dict[str, BaseDistribution] = {}
        if "layer" not in self.fixed:
            found["direction"] = CategoricalDistribution(self.strata)
            found["layer"] = FloatDistribution(round(0.15 * last, 2), round(0.95 * last, 2))
        if "method" not in self.fixed and len(self.methods) > 1:
            found["method"] = CategoricalDistribution(self.methods)
        if len(self.ranks) > 1:
            found["rank"] = IntDistribution(self.ranks[0], self.ranks[-1])
        if "mode" not in self.fixed:
            found["mode"] = CategoricalDistribution(self.modes)
        for part in PARTS:
            if part not in self.fixed:
                found[f"{part}.peak_weight"] = FloatDistribution(-0.25, 1.5)
                found[f"{part}.peak_layer"] = FloatDistribution(round(0.2 * last, 2), last)
                found[f"{part}.spread"] = FloatDistribution(round(0.04 * depth, 2), round(1.5 * depth, 2), log=True)
                found[f"{part}.first"] = FloatDistribution(round(-0.25 * last, 2), round(0.7 * last, 2))
                found[f"{part}.last"] = FloatDistribution(round(0.75 * last, 2), round(1.2 * last, 2))
        if not found:
            raise UsageError("the recipe leaves nothing to search", hint="leave out layer, rank, mode or a schedule")
        return found

    def ranges(self, stratum: str) -> dict[str, BaseDistribution]:
        """Return the ranges of the parameters that candidates of a stratum have."""
        without = ("layer",) if stratum == "each" else ()
        return {name: range_ for name, range_ in self.distributions.items() if name not in without}

    def candidate(self, params: Params) -> Candidate:
        """Return the candidate that parameters stand for."""
        mode = params.get("mode", "plain")
        fields: dict[str, Any] = {
            "layer": params["layer"] if params.get("direction", "each") == "one" else None,
            "rank": params.get("rank", self.ranks[0]),
            "method": params.get("method", self.bases[0][0]),
            "mode": "plain" if mode == POST_NORM else mode,
            "through_post_norm": mode == POST_NORM,
        }
        fields |= {part: self._kernel(params, part) for part in PARTS if part not in self.fixed}
        return Candidate(**{**fields, **self.fixed})

    def _kernel(self, params: Params, part: str) -> NormalKernel:
        first, last = params[f"{part}.first"], params[f"{part}.last"]
        return NormalKernel(
            peak_weight=max(0.0, params[f"{part}.peak_weight"]),
            peak_layer=params[f"{part}.peak_layer"],
            spread=params[f"{part}.spread"],
            first=math.ceil(first) if first > 0 else None,
            last=math.floor(last) if last < self.n_layers - 1 else None,
        )

    def ask(self, seed: int, generation: int, size: int, seen: Sequence[Seen]) -> list[Proposal]:
        """Return the candidates of a generation, the strata in turn.

        Generation 0 is a scan: the kernel of a public edit and kernels of two widths over the depth, and wide kernels
        of each layer's own direction with and without a hard edge. Generation 1 begins with variants of the best of
        the scan; the rest comes from the sampler.

        Args:
            seed: Seed of the search.
            generation: Counted from 0.
            size: Candidates; fewer give the first of the same ones.
            seen: Every trial of every earlier generation, in the order of the slots.
        """
        n = len(self.strata)
        lists = [
            iter(self._asked((seed, generation, k), stratum, len(range(k, size, n)), seen))
            for k, stratum in enumerate(self.strata)
        ]
        return [next(lists[slot % n]) for slot in range(size)]

    def _asked(self, seed: tuple[int, int, int], stratum: str, size: int, seen: Sequence[Seen]) -> list[Proposal]:
        """Return the candidates of one stratum in a generation."""
        generation, own = seed[1], [s for s in seen if s.params.get("direction", stratum) == stratum]
        given: list[Proposal] = []
        if generation == 0:
            given = self._new([Proposal(p, "scan") for p in self._scan(stratum, size)], stratum, [])[:size]
        elif generation == 1:
            variants = [Proposal(p, "warm start") for p in self._variants(stratum, seen)]
            given = self._new(variants, stratum, own)[: max(1, size // 2)]
        running = [Seen(p.params, None, running=True) for p in given]
        return [*given, *self._sampled(seed, stratum, size - len(given), [*own, *running])]

    def _new(self, proposals: Sequence[Proposal], stratum: str, seen: Sequence[Seen]) -> list[Proposal]:
        """Return proposals within the ranges, without those that were tried or come twice."""
        tried, found = [s.params for s in seen], []
        for proposal in proposals:
            params = self._within(proposal.params, stratum)
            if params not in tried:
                tried.append(params)
                found.append(Proposal(params, proposal.origin))
        return found

    def _kernels(self, weights: tuple[float, float], place: float, spread: float, first: tuple[float, float]) -> Params:
        """Return parameters of both kernels; places and spreads as shares of the depth, a first layer of 0 for none."""
        found: Params = {}
        for part, weight, edge in zip(PARTS, weights, first, strict=True):
            found[f"{part}.peak_weight"] = weight
            found[f"{part}.peak_layer"] = place * self.n_layers
            found[f"{part}.spread"] = spread * self.n_layers
            found[f"{part}.first"] = edge * self.n_layers
            found[f"{part}.last"] = float(self.n_layers)
        return found

    def _scan(self, stratum: str, size: int) -> list[Params]:
        usual: Params = {"direction": stratum, "method": self.methods[0], "rank": self.ranks[0], "mode": "plain"}
        if stratum == "each":
            return [{**usual, **params} for params in self._edged()]
        usual["layer"] = 0.53 * self.n_layers

        def kernels(weight: float, spread: float) -> Params:
            return self._kernels((weight, weight), PUBLIC["peak_layer"], spread, (0.0, 0.0))

        found = [{**usual, **kernels(PUBLIC["peak_weight"], PUBLIC["spread"])}]
        depths = [0.53] if "layer" in self.fixed else np.linspace(0.9, 0.3, max(2, size // 2)).tolist()
        for depth in depths:
            for spread in (WIDE, PUBLIC["spread"]):
                found.append({**usual, **kernels(1.0, spread), "layer": round(depth * (self.n_layers - 1))})
        return found

    def _edged(self) -> list[Params]:
        """Return wide kernels for each layer's own direction: stronger and weaker, with the edge at several depths."""

        def wide(weights: tuple[float, float], first: tuple[float, float], **more: Any) -> Params:
            return {**self._kernels(weights, PEAK, WIDE, first), **more}

        lower, higher = (EDGE[0] / 2, EDGE[1] / 2), (EDGE[0] * 1.4, EDGE[1] * 1.4)
        return [
            wide((1.2, 1.0), EDGE),
            wide((0.9, 0.7), EDGE),
            wide((1.2, 1.0), higher),
            wide((1.2, 1.0), EDGE, method="projected"),
            wide((0.6, 0.4), EDGE),
            wide((1.0, 0.8), lower),
            wide((1.2, 1.0), EDGE, mode="row"),
            self._kernels((1.0, 1.0), PUBLIC["peak_layer"], PUBLIC["spread"], (0.0, 0.0)),
            wide((0.9, 0.7), higher),
            wide((1.2, 0.0), EDGE),
            wide((1.0, 1.0), (0.0, 0.0)),
        ]

    def _variants(self, stratum: str, seen: Sequence[Seen]) -> list[Params]:
        """Return relatives of the best and of the strongest trial of a stratum, the most promising first."""
        best, strongest = self._leaders([s for s in seen if s.params.get("direction", stratum) == stratum])
        other = self._leaders([s for s in seen if s.params.get("direction", stratum) != stratum])[0]
        found: list[Params] = []
        if best and strongest:
            edge = dict(zip((f"{part}.first" for part in PARTS), (x * self.n_layers for x in EDGE), strict=True))
            found = [
                _stronger(best, 1.15),
                {**best, **edge},
                {**best, "method": self.methods[-1]},
                _stronger(strongest, 0.6),
                {**best, "mlp.peak_weight": -0.25},
                {**best, "mode": "column"},
                _stronger(best, 0.8),
                {**best, "rank": self.ranks[-1]},
                {**best, "attention.peak_weight": -0.25},
                {**best, "mode": "row"},
            ]
        crossed = [{**other, "direction": "each"}] if other and stratum == "each" else []
        return [*found[:3], *crossed, *found[3:]]

    def _leaders(self, seen: Sequence[Seen]) -> tuple[Params, Params]:
        """Return the parameters of the trial at the knee, and of that with the least refusal of the sound ones."""
        scored = [(s.params, s.values) for s in seen if s.values is not None]
        if not scored:
            return {}, {}
        worst, least = (find(refusal for _, (refusal, _) in scored) for find in (max, min))

        def knee(item: tuple[Params, tuple[float, float]]) -> float:
            return worth((worst - item[1][0]) / max(worst - least, 1e-9), item[1][1])

        return max(scored, key=knee)[0], min(scored, key=lambda item: item[1][0])[0]

    def _within(self, params: Params, stratum: str) -> Params:
        """Return parameters of this space alone, within their ranges, with few decimals."""
        found: Params = {}
        for name, range_ in self.ranges(stratum).items():
            value = params[name]
            if hasattr(range_, "choices"):
                found[name] = value if value in range_.choices else range_.choices[0]
            else:
                value = min(max(value, range_.low), range_.high)  # type: ignore[attr-defined]
                found[name] = round(float(value), DIGITS) if isinstance(range_.low, float) else value  # type: ignore[attr-defined]
        return found

    def _sampled(self, seed: tuple[int, int, int], stratum: str, count: int, seen: Sequence[Seen]) -> list[Proposal]:
        if count < 1:
            return []
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler, ranges = self.sampler(*seed), self.ranges(stratum)
        ranges.pop("direction", None)
        study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
        study.add_trials([_frozen(s, ranges) for s in seen])
        found = []
        for _ in range(count):
            asked = study.ask(ranges)
            params = self._within({**asked.params, "direction": stratum}, stratum)
            found.append(Proposal(params, type(sampler).__name__))
        return found

    def sampler(self, seed: int, generation: int, stratum: int) -> BaseSampler:
        """Return the sampler of a stratum in a generation: multi-objective TPE (Ozaki et al. 2022, JAIR 73)."""
        from optuna.samplers import TPESampler

        mixed = int(np.random.SeedSequence([seed, generation, stratum]).generate_state(1)[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # options that one version calls experimental and another usual
            return TPESampler(seed=mixed, **SAMPLER)

    def describe(self, seed: int) -> dict[str, Any]:
        """Return what decides the candidates: sampler, arguments, version, ranges."""
        import optuna

        return {
            "sampler": "TPESampler",
            "arguments": {**SAMPLER, "seed": "from (seed, generation, stratum)"},
            "objectives": ["refusal, nats", f"drift, decades above {FLOOR:g} nats per token"],
            "strata": list(self.strata),
            "optuna": optuna.__version__,
            "seed": seed,
            "space": {name: str(range_) for name, range_ in self.distributions.items()},
            "fixed": {name: _plain(value) for name, value in self.fixed.items()},
        }


def _frozen(seen: Seen, ranges: dict[str, BaseDistribution]) -> FrozenTrial:
    """Return a trial as the sampler of a stratum is shown it."""
    from optuna.trial import TrialState, create_trial

    given: dict[str, Any] = {"params": {name: seen.params[name] for name in ranges}, "distributions": ranges}
    if seen.values is None:
        return create_trial(state=TrialState.RUNNING if seen.running else TrialState.FAIL, **given)
    refusal, drift = seen.values
    return create_trial(values=[refusal, decades(min(drift, CLIP))], **given)


def _stronger(params: Params, factor: float) -> Params:
    """Return parameters with all weight factors multiplied; a component that is left alone stays so."""
    names = [f"{part}.peak_weight" for part in PARTS if params.get(f"{part}.peak_weight", 0.0) > 0]
    return {**params, **{name: params[name] * factor for name in names}}


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value


def _inside(recipe: Recipe, n_layers: int) -> float:
    layer = length(recipe.fit.layer, n_layers)
    if not 0 <= layer <= n_layers - 1:
        raise UsageError(f"layer {layer:g}", where="fit.layer", valid=f"0 to {n_layers - 1}")
    return layer
