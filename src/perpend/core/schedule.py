"""The weight factor over the layers.

A schedule gives every layer l of a model with L layers its weight factor λ_l, the share of the direction that the
edit takes away: 1 removes it, 0 leaves it, more than 1 reverses part of it, less than 0 strengthens it.

Layers count from 0. A place or a width is a number of layers (`18`) or a share of the depth (`"53%"`, so that
`"53%"` of 34 layers is layer 18.02).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, model_validator

CUT = 0.045
"""Weight factors smaller than this in magnitude, those that read as less than 0.05, become 0: they vanish when weights
are rounded to bfloat16."""


_LENGTH = "must be a finite number of layers or a share such as '53%'"


def _as_length(value: object) -> object:
    """Accept 18, 18.5, "18" and "53%"; keep the text form of a share of the depth."""
    if isinstance(value, str):
        text = value.strip()
        try:
            number = float(text.rstrip("%"))
        except ValueError:
            raise ValueError(_LENGTH) from None
        return text if text.endswith("%") else number
    return value


def _finite(value: float | str) -> float | str:
    if not math.isfinite(float(str(value).rstrip("%"))):
        raise ValueError(_LENGTH)
    return value


Length = Annotated[float | str, BeforeValidator(_as_length), AfterValidator(_finite)]
"""A number of layers, or a share of the depth such as `"53%"`."""


def layers(length: float | str, n_layers: int) -> float:
    """Return a `Length` as a number of layers of a model with `n_layers` layers."""
    return float(length[:-1]) / 100 * n_layers if isinstance(length, str) else float(length)


class _Schedule(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def weights(self, n_layers: int) -> list[float]:
        """Return the weight factor of every layer, `n_layers` floats; those under the cut are exactly 0."""
        raise NotImplementedError


class _Peaked(_Schedule):
    """A schedule with a peak: the shape is a function of the distance to the peak layer, in spreads."""

    peak_weight: FiniteFloat = 1.0
    """λ at the peak layer."""
    peak_layer: Length = "53%"
    """Where the weight factor is largest."""
    spread: Length = "15%"
    """Width: the standard deviation of the normal kernel, the half-width of tent and band."""
    cut: Annotated[FiniteFloat, Field(ge=0)] = CUT
    """Weight factors below this in magnitude are set to 0."""
    first: Length | None = None
    """First layer that is edited: λ is exactly 0 below it; None for no such edge."""
    last: Length | None = None
    """Last layer that is edited: λ is exactly 0 above it; None for no such edge."""

    @model_validator(mode="after")
    def _positive_spread(self) -> _Peaked:
        if layers(self.spread, 100) <= 0:
            raise ValueError("spread must be greater than 0")
        return self

    def _shaped(self, n_layers: int, shape: Callable[[float], float]) -> list[float]:
        peak, spread = layers(self.peak_layer, n_layers), layers(self.spread, n_layers)
        first = -math.inf if self.first is None else layers(self.first, n_layers)
        last = math.inf if self.last is None else layers(self.last, n_layers)
        raw = [self.peak_weight * shape((layer - peak) / spread) for layer in range(n_layers)]
        return [w if abs(w) >= self.cut and first <= layer <= last else 0.0 for layer, w in enumerate(raw)]


class NormalKernel(_Peaked):
    """λ_l = peak_weight · exp(-(l - peak_layer)² / (2 spread²)): the default schedule.

    The public card of an edited Gemma 3 4B (layers 7-29 of 34, 0.05 → 0.55 → 0.05) is this kernel with
    peak_weight 0.55, peak_layer 18, spread 5.
    """

    kind: Literal["normal"] = "normal"

    def weights(self, n_layers: int) -> list[float]:
        """Return λ of every layer: the normal kernel."""
        return self._shaped(n_layers, lambda z: math.exp(-z * z / 2))


class Tent(_Peaked):
    """Linear fall from the peak to 0 at `spread` layers from it."""

    kind: Literal["tent"] = "tent"

    def weights(self, n_layers: int) -> list[float]:
        """Return λ of every layer: a tent."""
        return self._shaped(n_layers, lambda z: max(0.0, 1 - abs(z)))


class Band(_Peaked):
    """The peak weight within `spread` layers of the peak layer, 0 outside."""

    kind: Literal["band"] = "band"

    def weights(self, n_layers: int) -> list[float]:
        """Return λ of every layer: the peak weight in the band, else 0."""
        return self._shaped(n_layers, lambda z: float(abs(z) <= 1))


class Constant(_Schedule):
    """The same weight factor in every layer."""

    kind: Literal["constant"] = "constant"
    weight: FiniteFloat = 1.0
    """λ of every layer."""

    def weights(self, n_layers: int) -> list[float]:
        """Return λ of every layer: all the same."""
        return [self.weight] * n_layers


class PerLayer(_Schedule):
    """One weight factor per layer, written out."""

    kind: Literal["list"] = "list"
    values: tuple[FiniteFloat, ...]
    """λ of each layer, as many as the model has."""

    def weights(self, n_layers: int) -> list[float]:
        """Return λ of every layer as written out.

        Raises:
            ValueError: the list has another length than the model has layers.
        """
        if len(self.values) != n_layers:
            raise ValueError(f"the list has {len(self.values)} weight factors and the model {n_layers} layers")
        return list(self.values)


Schedule = Annotated[NormalKernel | Tent | Band | Constant | PerLayer, Field(discriminator="kind")]
"""Any schedule; told apart by `kind`: normal, tent, band, constant, list."""

KINDS: dict[str, type[_Schedule]] = {
    "normal": NormalKernel,
    "tent": Tent,
    "band": Band,
    "constant": Constant,
    "list": PerLayer,
}
"""The schedules by the name that configuration uses."""
