"""Directions: what tells target prompts from baseline prompts in the residual stream.

Layers count from 0 everywhere: `vectors[l]` is measured on the *output of layer l*, the residual stream after it and
before the final norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from perpend.core import store
from perpend.core.kinds import Method
from perpend.core.linear import DEPENDENT, double, orthonormalise
from perpend.core.residuals import ResidualStats, top_share, winsorize
from perpend.errors import RunFailed, UsageError

INDISTINCT = 1e-9
"""A mean difference smaller than this share of the means is rounding."""


@dataclass(frozen=True, eq=False)
class Directions:
    """The directions of every layer, with what is needed to judge and to rewrite them; tensors on the CPU."""

    vectors: Tensor
    """`[L, k, d]` float32, orthonormal rows; the first row follows the mean difference, target minus baseline."""
    raw_norm: Tensor
    """`[L]` float32 norm of the mean difference."""
    baseline_mean: Tensor
    """`[L, d]` float32 mean residual of the baseline prompts."""
    target_mean: Tensor
    """`[L, d]` float32 mean residual of the target prompts."""
    method: Method = "mean"
    """How the vectors were made."""
    diagnostics: Mapping[str, list[float]] = field(default_factory=dict)
    """Per layer; see `fit_directions`."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Where they came from; must fit into JSON."""

    def __post_init__(self) -> None:
        if self.vectors.ndim != 3:
            raise UsageError(f"directions of shape {list(self.vectors.shape)}", valid="[layers, k, d]")
        shape = (self.n_layers, self.hidden_size)
        for mean in (self.baseline_mean, self.target_mean):
            if tuple(mean.shape) != shape:
                raise UsageError(f"mean residuals of shape {list(mean.shape)}", valid=str(list(shape)))

    @property
    def n_layers(self) -> int:
        """Number of layers L."""
        return self.vectors.shape[0]

    @property
    def rank(self) -> int:
        """Directions per layer, k."""
        return self.vectors.shape[1]

    @property
    def hidden_size(self) -> int:
        """Size d of the residual stream."""
        return self.vectors.shape[2]

    def at(self, layer: float) -> Tensor:
        """Return the directions of a layer, or of a place between two.

        Between layers the later frame is first turned to meet the earlier one (orthogonal Procrustes; for k = 1, its
        sign), then both are interpolated linearly and made orthonormal again.

        Args:
            layer: 0 to L - 1, whole or not.

        Returns:
            `[k, d]` float32 orthonormal rows.

        Raises:
            UsageError: outside 0 to L - 1.
        """
        if not 0 <= layer <= self.n_layers - 1:
            raise UsageError(f"layer {layer}", valid=f"0 to {self.n_layers - 1}")
        below = int(layer)
        if below == layer:
            return self.vectors[below]
        a, b = self.vectors[below].double(), self.vectors[below + 1].double()
        u, _, vh = torch.linalg.svd(a @ b.mT)
        return orthonormalise(torch.lerp(a, u @ vh @ b, layer - below)).float()

    def written(self, layer: float, to: int) -> Tensor:
        """Return the directions of `layer` as they are taken out of the writers of layer `to`.

        For `biprojected` the component along the baseline mean of layer `to` is left out as well; otherwise the same
        as `at(layer)`.

        Args:
            layer: Where they were measured, whole or not.
            to: Layer whose writers are edited.

        Returns:
            `[k, d]` float32 orthonormal rows.

        Raises:
            UsageError: a layer out of range.
        """
        if not 0 <= to < self.n_layers:
            raise UsageError(f"layer {to}", valid=f"0 to {self.n_layers - 1}")
        rows = self.at(layer)
        return biproject(rows, self.baseline_mean[to]) if self.method == "biprojected" else rows

    def coordinates(self, residuals: Tensor) -> Tensor:
        """Return where residuals `[B, L, d]` lie along the directions of their layers: `[B, L, k]` float32."""
        return torch.einsum("bld,lkd->blk", residuals.float(), self.vectors.to(residuals.device))

    def with_diagnostics(self, **values: Sequence[float]) -> Directions:
        """Return the directions with more diagnostics, one number per layer each.

        Raises:
            UsageError: a list of another length.
        """
        for name, numbers in values.items():
            if len(numbers) != self.n_layers:
                raise UsageError(f"{name} has {len(numbers)} numbers", valid=f"{self.n_layers}, one per layer")
        return replace(self, diagnostics={**self.diagnostics, **{k: [float(x) for x in v] for k, v in values.items()}})

    def random_like(self, seed: int) -> Directions:
        """Return random directions of the same shape, uniform on the sphere: the control."""
        generator = torch.Generator().manual_seed(seed)
        random = torch.randn(self.vectors.shape, generator=generator, dtype=torch.float64)
        provenance = {**self.provenance, "control": "random", "seed": seed}
        return replace(self, vectors=orthonormalise(random).float(), diagnostics={}, provenance=provenance)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; the same directions give the same bytes.

        Raises:
            UsageError: the folder cannot be written to.
        """
        names = ("vectors", "raw_norm", "baseline_mean", "target_mean")
        content = {"method": self.method, "diagnostics": self.diagnostics, "provenance": self.provenance}
        store.write(path, "directions", {name: getattr(self, name) for name in names}, content)

    @classmethod
    def load(cls, path: str | Path) -> Directions:
        """Read what `save` wrote.

        Raises:
            UsageError: no such file, or no directions in it.
        """
        return store.read(path, "directions", cls._built)

    @classmethod
    def _built(cls, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> Directions:
        if content["method"] not in get_args(Method):
            raise ValueError(f"method {content['method']}")
        made = cls(
            vectors=tensors["vectors"],
            raw_norm=tensors["raw_norm"],
            baseline_mean=tensors["baseline_mean"],
            target_mean=tensors["target_mean"],
            method=content["method"],
            provenance=dict(content["provenance"]),
        )
        if 0 in made.vectors.shape or tuple(made.raw_norm.shape) != (made.n_layers,):
            raise ValueError(f"vectors {list(made.vectors.shape)} with norms {list(made.raw_norm.shape)}")
        return made.with_diagnostics(**content["diagnostics"])


def biproject(directions: Tensor, baseline_mean: Tensor) -> Tensor:
    """Return directions without their component along a baseline mean, made orthonormal again.

    Args:
        directions: `[..., k, d]` rows.
        baseline_mean: `[..., d]` of one layer, or `[L, d]` of many: then every layer gets its own.

    Returns:
        `[..., k, d]` float32 orthonormal rows, `[L, k, d]` for `[k, d]` and `[L, d]`.

    Raises:
        RunFailed: nothing but the baseline mean is in a direction.
    """
    return orthonormalise(_without(double(directions), double(baseline_mean)[..., None, :])).float()


def _without(rows: Tensor, axis: Tensor) -> Tensor:
    """Return rows minus their component along `axis`; what is left of a row along the axis is only rounding: zero."""
    unit = axis / axis.norm(dim=-1, keepdim=True).clamp(min=1e-300)
    left = rows
    for _ in range(2):  # the second pass removes what rounding left of the first
        left = left - (left * unit).sum(-1, keepdim=True) * unit
    sound = left.norm(dim=-1, keepdim=True) > INDISTINCT * rows.norm(dim=-1, keepdim=True)
    return torch.where(sound, left, 0.0)


def fit_directions(
    target: ResidualStats,
    baseline: ResidualStats,
    *,
    method: Method = "mean",
    rank: int = 1,
    clusters: Tensor | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Directions:
    """Make the directions of every layer from the mean residuals of two classes.

    mean: r = target mean - baseline mean (Arditi et al. 2024, https://arxiv.org/abs/2406.11717).
    projected: r without its component along the baseline mean of its own layer.
    biprojected: as projected, and `Directions.written` also leaves out the component along the baseline mean of the
        layer that is written to.

    With rank k > 1, centroids of the target prompts minus the baseline mean are added to r by rank-revealing QR: the
    largest part that is new comes next. Never an SVD of centred differences, which would delete r itself.

    Diagnostics, one number per layer, all on r before any projection: `split_half_cosine` (r from one half of the
    prompts against r from the other; 0 when a half is empty), `top4_share` (share of ‖r‖² in its four largest
    dimensions), `baseline_cosine` (r against the baseline mean).

    Args:
        target: Residuals of the prompts that the model refuses.
        baseline: Residuals of the prompts that it answers.
        method: How the baseline mean is used.
        rank: k.
        clusters: `[L, c, d]` centroids of the target prompts, c at least k; needed for k > 1.
        provenance: What to remember of the prompts and the model.

    Raises:
        UsageError: the two classes have other shapes, or clusters are missing.
        RunFailed: a layer does not tell the classes apart, or has fewer than k directions; names it.
    """
    _check(target, baseline, method, rank, clusters)
    difference = target.mean - baseline.mean
    frames = []
    for layer in range(target.n_layers):
        rows = difference[layer, None]
        size = max(float(target.mean[layer].norm()), float(baseline.mean[layer].norm()))
        if float(rows.norm()) <= INDISTINCT * size:
            raise RunFailed("the mean residuals of target and baseline are equal", where=f"layer {layer}")
        if clusters is not None and rank > 1:
            rows = torch.cat([rows, double(clusters[layer]).cpu() - baseline.mean[layer]])
        if method != "mean":
            rows = _without(rows, baseline.mean[layer])
        frames.append(_pivoted(rows, rank, layer))
    halves = target.half_means - baseline.half_means
    both = min(target.count, baseline.count) > 1
    return Directions(
        vectors=torch.stack(frames).float(),
        raw_norm=difference.norm(dim=-1).float(),
        baseline_mean=baseline.mean.float(),
        target_mean=target.mean.float(),
        method=method,
        diagnostics={
            "split_half_cosine": _cosine(halves[0], halves[1]).tolist() if both else [0.0] * target.n_layers,
            "top4_share": top_share(difference).tolist(),
            "baseline_cosine": _cosine(difference, baseline.mean).tolist(),
        },
        provenance={**(provenance or {}), "count": {"target": target.count, "baseline": baseline.count}},
    )


def _check(target: ResidualStats, baseline: ResidualStats, method: Method, rank: int, clusters: Tensor | None) -> None:
    if target.mean.shape != baseline.mean.shape:
        raise UsageError(
            f"target residuals of shape {list(target.mean.shape)}", valid=f"{list(baseline.mean.shape)} as of baseline"
        )
    if method not in get_args(Method):
        raise UsageError(f"method '{method}'", valid=", ".join(get_args(Method)))
    if rank < 1:
        raise UsageError(f"rank {rank}", valid="1 or more")
    layers, hidden = target.n_layers, target.hidden_size
    fits = clusters is not None and clusters.ndim == 3 and (clusters.shape[0], clusters.shape[2]) == (layers, hidden)
    if rank > 1 and not (fits and clusters is not None and clusters.shape[1] >= rank):
        given = "no clusters" if clusters is None else f"clusters of shape {list(clusters.shape)}"
        raise UsageError(f"{given} for rank {rank}", valid=f"[{layers}, {rank} or more, {hidden}]")


def _pivoted(rows: Tensor, rank: int, layer: int) -> Tensor:
    """Return `[rank, d]` orthonormal rows: the first of `rows`, then always the one with the largest new part."""
    size = rows.norm(dim=-1).max()
    basis = rows.new_zeros(0, rows.shape[1])
    while len(basis) < rank:
        new = rows
        for _ in range(2):  # twice is enough (Kahan and Parlett)
            new = new - (new @ basis.mT) @ basis
        pick = 0 if not len(basis) else int(new.norm(dim=-1).argmax())
        length = new[pick].norm()
        if not length > DEPENDENT * size * (len(basis) > 0):
            found = "no direction beyond the baseline mean" if not len(basis) else f"only {len(basis)} directions"
            raise RunFailed(f"{found} of {rank} asked", where=f"layer {layer}", hint="a lower rank, or method 'mean'")
        basis = torch.cat([basis, new[pick, None] / length])
    return basis


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(a, b, dim=-1, eps=1e-300)


class ClusterFitter:
    """Centroids of one class of prompts per layer, by k-means over repeated passes; no residual is kept.

    The first prompts seed the centroids, each as far as possible from those before (farthest-first). Then every pass
    is `update` on all batches and one `step`; a few passes are enough:

        for _ in range(5):
            for batch in batches():
                fitter.update(batch)
            if fitter.step() < 1e-3:
                break
    """

    def __init__(self, n_layers: int, hidden_size: int, clusters: int, *, winsorize: float | None = None) -> None:
        """Start without centroids.

        Args:
            n_layers: Number of layers L.
            hidden_size: Size d of the residual stream.
            clusters: Number c of centroids per layer.
            winsorize: Quantile at which every residual is clipped first, None for not at all.
        """
        self.shape = (n_layers, clusters, hidden_size)
        self.winsorize = winsorize
        self._waiting: list[Tensor] = []
        self._centroids: Tensor | None = None
        self._sum = torch.zeros(self.shape, dtype=torch.float64)
        self._count = torch.zeros(self.shape[:2], dtype=torch.float64)

    def update(self, residuals: Tensor) -> None:
        """Assign a batch `[B, L, d]` to the nearest centroids, layer by layer.

        Raises:
            UsageError: another shape.
        """
        if residuals.ndim != 3 or tuple(residuals.shape[1:]) != self.shape[::2]:
            raise UsageError(
                f"residuals of shape {list(residuals.shape)}", valid=f"[prompts, {self.shape[0]}, {self.shape[2]}]"
            )
        x = double((residuals if self.winsorize is None else winsorize(residuals, self.winsorize)).detach()).cpu()
        x = x.transpose(0, 1)  # [L, B, d]
        if self._centroids is None:
            self._waiting.append(x)
            x = torch.cat(self._waiting, dim=1)
            if x.shape[1] < self.shape[1]:
                return
            self._centroids, self._waiting = self._seeds(x), []
        member = torch.nn.functional.one_hot(torch.cdist(x, self._centroids).argmin(-1), self.shape[1]).double()
        self._sum += member.mT @ x
        self._count += member.sum(1)

    def _seeds(self, x: Tensor) -> Tensor:
        """Return `[L, c, d]`: the prompt farthest from the mean, then always the one farthest from those chosen."""
        far = torch.cdist(x, x.mean(1, keepdim=True))[..., 0]
        chosen: list[Tensor] = []
        for _ in range(self.shape[1]):
            chosen.append(x[torch.arange(len(x)), far.argmax(-1), None])
            distance = torch.cdist(x, chosen[-1])[..., 0]
            far = distance if len(chosen) == 1 else torch.minimum(far, distance)
        return torch.cat(chosen, dim=1)

    def step(self) -> float:
        """End a pass: move every centroid to the mean of its prompts; one without prompts stays.

        Returns:
            The largest move over layers and clusters, relative to the largest centroid norm of the layer.

        Raises:
            UsageError: fewer prompts than clusters were seen.
        """
        old = self.centroids()
        new = torch.where(self._count[..., None] > 0, self._sum / self._count[..., None].clamp(min=1), old)
        self._centroids, self._sum, self._count = new, torch.zeros_like(old), torch.zeros_like(self._count)
        size = old.norm(dim=-1).amax(-1).clamp(min=1e-300)
        return float(((new - old).norm(dim=-1).amax(-1) / size).max())

    def centroids(self) -> Tensor:
        """Return the centroids `[L, c, d]`, float64 on the CPU.

        Raises:
            UsageError: fewer prompts than clusters were seen.
        """
        if self._centroids is None:
            seen = sum(x.shape[1] for x in self._waiting)
            raise UsageError(f"{seen} prompts for {self.shape[1]} clusters", valid="at least one prompt per cluster")
        return self._centroids


def auc(positive: Tensor, negative: Tensor) -> float:
    """Return the chance that a positive lies above a negative, ties counting half (Mann-Whitney U / nm).

    Args:
        positive: `[n]` numbers.
        negative: `[m]` numbers.

    Raises:
        UsageError: one of them is empty.
    """
    if not positive.numel() or not negative.numel():
        raise UsageError("a class without prompts has no separation")
    line = negative.double().flatten().sort().values
    points = positive.double().flatten()
    below, up_to = torch.searchsorted(line, points), torch.searchsorted(line, points, right=True)
    return float((below + up_to).sum()) / (2 * points.numel() * line.numel())


def separation(target: Tensor, baseline: Tensor) -> list[float]:
    """Return the AUC of every layer from coordinates `[n, L]` of target and `[m, L]` of baseline prompts.

    Use prompts that the directions were not fitted on; 0.5 is chance, 1 is perfect.
    """
    return [auc(t, b) for t, b in zip(target.mT, baseline.mT, strict=True)]
