"""What a search may try, and which candidates it tries next.

The candidates of generation g are a pure function of the seed, of g and of the results of all generations before:
a fresh sampler is seeded with (seed, g) and shown those results in the order of their slots. Who ran a trial, in which
order and after which interruption therefore never matters, and a sampler that is resumed cannot repeat itself.

A slot is the place of a candidate in the search: generation `slot // size`, place `slot % size` in it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from perpend.config import EditSection, FitSection, Recipe
from perpend.core.schedule import NormalKernel
from perpend.core.schedule import layers as length
from perpend.errors import UsageError
from perpend.searching.candidate import Candidate

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

POST_NORM = "post-norm"
PUBLIC = {"peak_weight": 0.55, "peak_layer": 0.53, "spread": 0.15}
"""The kernel of the public card of an edited Gemma 3 4B; places as shares of the depth."""
WIDE = 1.0
"""Spread, as a share of the depth, of a kernel that is nearly the same everywhere."""
CLIP = 2.0
"""Drift, in nats per token, beyond which the sampler is not told how bad a candidate is: outliers would rule it."""
DIGITS = 4
"""Decimal places of parameters, so that a recipe says exactly what was tried."""
SAMPLER: dict[str, Any] = {"multivariate": True, "constant_liar": True, "n_startup_trials": 12, "n_ei_candidates": 48}

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
    """plain, column and, where a norm follows a writer, post-norm."""
    max_rank: int
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
        if recipe.fit.rank != usual_fit.rank:
            fixed["rank"] = recipe.fit.rank
        if recipe.edit.mode != usual.mode or recipe.edit.through_post_norm:
            fixed["mode"] = recipe.edit.mode
            fixed["through_post_norm"] = recipe.edit.through_post_norm
        fixed |= {p: getattr(recipe.edit, p) for p in ("attention", "mlp") if getattr(recipe.edit, p) != NormalKernel()}
        modes = ("plain", *(() if packed else ("column",)), *((POST_NORM,) if post_norms else ()))
        return cls(n_layers, modes, recipe.search.max_rank, fixed)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The k whose directions are needed."""
        return (self.fixed["rank"],) if "rank" in self.fixed else tuple(range(1, self.max_rank + 1))

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Ranges of the open parameters; layers and spreads in layers.

        A peak weight below 0 stands for exactly 0: the component is left alone. So zero is found with the probability
        of an interval and not of a point.
        """
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        last, depth = float(self.n_layers - 1), float(self.n_layers)
        found: dict[str, BaseDistribution] = {}
        if "layer" not in self.fixed:
            found["direction"] = CategoricalDistribution(("one", "each"))
            found["layer"] = FloatDistribution(round(0.15 * last, 2), round(0.95 * last, 2))
        if len(self.ranks) > 1:
            found["rank"] = IntDistribution(self.ranks[0], self.ranks[-1])
        if "mode" not in self.fixed:
            found["mode"] = CategoricalDistribution(self.modes)
        for part in ("attention", "mlp"):
            if part not in self.fixed:
                found[f"{part}.peak_weight"] = FloatDistribution(-0.25, 1.5)
                found[f"{part}.peak_layer"] = FloatDistribution(round(0.2 * last, 2), last)
                found[f"{part}.spread"] = FloatDistribution(round(0.04 * depth, 2), round(1.5 * depth, 2), log=True)
        if not found:
            raise UsageError("the recipe leaves nothing to search", hint="leave out layer, rank, mode or a schedule")
        return found

    def candidate(self, params: Params) -> Candidate:
        """Return the candidate that parameters stand for."""
        mode = params.get("mode", "plain")
        fields: dict[str, Any] = {
            "layer": params["layer"] if params.get("direction", "each") == "one" else None,
            "rank": params.get("rank", 1),
            "mode": "plain" if mode == POST_NORM else mode,
            "through_post_norm": mode == POST_NORM,
        }
        for part in ("attention", "mlp"):
            if part not in self.fixed:
                weight, place, spread = (params[f"{part}.{name}"] for name in ("peak_weight", "peak_layer", "spread"))
                fields[part] = NormalKernel(peak_weight=max(0.0, weight), peak_layer=place, spread=spread)
        return Candidate(**{**fields, **self.fixed})

    # ------------------------------------------------------------------------------------------------ what next

    def ask(self, seed: int, generation: int, size: int, seen: Sequence[Seen]) -> list[Proposal]:
        """Return the candidates of a generation.

        Generation 0 is a scan over the depth at which the direction is read, with the public kernel and with a wide
        one; generation 1 begins with variants of the best of the scan; the rest comes from the sampler.

        Args:
            seed: Seed of the search.
            generation: Counted from 0.
            size: Candidates; fewer give the first of the same ones.
            seen: Every trial of every earlier generation, in the order of the slots.
        """
        given = [Proposal(self._within(p), "scan") for p in self._scan(size)] if generation == 0 else []
        if generation == 1:
            given = [Proposal(self._within(p), "warm start") for p in self._variants(seen)][: max(1, size // 2)]
        running = [Seen(p.params, None, running=True) for p in given]
        return [*given, *self._sampled(seed, generation, size - len(given), [*seen, *running])][:size]

    def _kernels(self, weight: float, spread: float) -> Params:
        found: Params = {}
        for part in ("attention", "mlp"):
            found[f"{part}.peak_weight"] = weight
            found[f"{part}.peak_layer"] = PUBLIC["peak_layer"] * self.n_layers
            found[f"{part}.spread"] = spread * self.n_layers
        return found

    def _scan(self, size: int) -> list[Params]:
        usual: Params = {"direction": "one", "rank": self.ranks[0], "mode": "plain"}
        first = {**usual, **self._kernels(PUBLIC["peak_weight"], PUBLIC["spread"]), "layer": 0.53 * self.n_layers}
        if "layer" in self.fixed:
            return [first, *({**first, **self._kernels(1.0, spread)} for spread in (PUBLIC["spread"], WIDE))]
        found = [first]
        for depth in np.linspace(0.9, 0.3, max(2, size // 2)).tolist():
            for spread in (WIDE, PUBLIC["spread"]):
                found.append({**usual, **self._kernels(1.0, spread), "layer": round(depth * (self.n_layers - 1))})
        return found[:size]

    def _variants(self, seen: Sequence[Seen]) -> list[Params]:
        scored = [s for s in seen if s.values is not None]
        if not scored:
            return []
        worst = max(s.values[0] for s in scored if s.values)
        best = max(scored, key=lambda s: (worst - s.values[0]) / max(s.values[1], 0.02) if s.values else 0.0).params
        strongest = min(scored, key=lambda s: s.values[0] if s.values else 0.0).params
        return [
            {**best, "mode": "column"},
            {**best, "attention.peak_weight": 0.6, "mlp.peak_weight": 0.6},
            {**best, "mlp.peak_weight": -0.25},
            {**best, "attention.peak_weight": -0.25},
            {**best, "rank": self.ranks[-1]},
            {**strongest, "attention.peak_weight": 0.6, "mlp.peak_weight": 0.6},
            {**best, "direction": "each"},
            {**best, "attention.peak_weight": 1.3, "mlp.peak_weight": 1.3},
        ]

    def _within(self, params: Params) -> Params:
        """Return parameters of this space alone, within their ranges, with few decimals."""
        found: Params = {}
        for name, range_ in self.distributions.items():
            value = params[name]
            if hasattr(range_, "choices"):
                found[name] = value if value in range_.choices else range_.choices[0]
            else:
                value = min(max(value, range_.low), range_.high)  # type: ignore[attr-defined]
                found[name] = round(float(value), DIGITS) if isinstance(range_.low, float) else value  # type: ignore[attr-defined]
        return found

    def _sampled(self, seed: int, generation: int, count: int, seen: Sequence[Seen]) -> list[Proposal]:
        if count < 1:
            return []
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = self.sampler(seed, generation)
        study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
        study.add_trials([self._frozen(s) for s in seen])
        found = []
        for _ in range(count):
            asked = study.ask(self.distributions)
            params = {name: asked.params[name] for name in self.distributions}
            found.append(Proposal(self._within(params), type(sampler).__name__))
        return found

    def sampler(self, seed: int, generation: int) -> BaseSampler:
        """Return the sampler of a generation: multi-objective TPE (Ozaki et al. 2022, JAIR 73)."""
        from optuna.samplers import TPESampler

        mixed = int(np.random.SeedSequence([seed, generation]).generate_state(1)[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # options that one version calls experimental and another usual
            return TPESampler(seed=mixed, **SAMPLER)

    def _frozen(self, seen: Seen) -> FrozenTrial:
        from optuna.trial import TrialState, create_trial

        given: dict[str, Any] = {"params": seen.params, "distributions": self.distributions}
        if seen.values is None:
            return create_trial(state=TrialState.RUNNING if seen.running else TrialState.FAIL, **given)
        refusal, drift = seen.values
        return create_trial(values=[refusal, min(drift, CLIP)], **given)

    def describe(self, seed: int) -> dict[str, Any]:
        """Return what decides the candidates: sampler, arguments, version, ranges."""
        import optuna

        return {
            "sampler": "TPESampler",
            "arguments": {**SAMPLER, "seed": "from (seed, generation)"},
            "optuna": optuna.__version__,
            "seed": seed,
            "space": {name: str(range_) for name, range_ in self.distributions.items()},
            "fixed": {name: _plain(value) for name, value in self.fixed.items()},
        }


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value


def _inside(recipe: Recipe, n_layers: int) -> float:
    layer = length(recipe.fit.layer, n_layers)
    if not 0 <= layer <= n_layers - 1:
        raise UsageError(f"layer {layer:g}", where="fit.layer", valid=f"0 to {n_layers - 1}")
    return layer
