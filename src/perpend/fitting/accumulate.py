"""Directions of all layers from one streaming pass over the prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from perpend.config import FitSection
from perpend.core.directions import ClusterFitter, Directions, fit_directions, separation
from perpend.core.kinds import Basis
from perpend.core.residuals import ResidualFitter, ResidualStats
from perpend.data import Prompt, PromptPair
from perpend.errors import UsageError
from perpend.models.session import Session
from perpend.progress import track

KMEANS_PASSES = 4
Checkpoint = Callable[[str, dict[str, Any] | None], dict[str, Any] | None]
"""`checkpoint(name, state)` keeps a state; with None it returns the kept one, or None."""


def fixed_position(section: FitSection) -> int:
    """Return the position that a recipe names.

    Raises:
        UsageError: it is `auto`, which is for layers that are tried.
    """
    if isinstance(section.position, int):
        return section.position
    raise UsageError("auto needs layers to be tried", where="fit.position", valid="fit.layer = 'auto', or a number")


def require_measured(section: FitSection) -> None:
    """Refuse a recipe whose direction was found otherwise than by measuring.

    Raises:
        UsageError: a search has refined it.
    """
    if section.refined:
        told = "a direction that a search has refined cannot be measured again"
        raise UsageError(told, where="fit.refined", hint="perpend apply RECIPE -o OUT, with the edit beside it")


def residual_stats(
    session: Session,
    prompts: Sequence[Prompt],
    section: FitSection,
    *,
    label: str,
    checkpoint: Checkpoint | None = None,
) -> ResidualStats:
    """Stream `prompts` through the model and return the statistics of their residuals.

    Args:
        session: The model, with whatever edit is in place.
        prompts: One class.
        section: Position and winsorising.
        label: Shown beside the progress bar, and the name of the kept state.
        checkpoint: Keeps the sums after every window, so that an interrupted pass goes on where it was.
    """
    fitter = ResidualFitter(session.n_layers, session.hidden_size, winsorize=section.winsorize)
    kept = checkpoint(label, None) if checkpoint else None
    if kept:
        fitter.load_state_dict(kept)
    left = prompts[fitter.count :]
    windows = session.capture(left, position=fixed_position(section))
    for residuals in track(windows, f"read residuals, {label}", total=len(left), size=len):
        fitter.update(residuals)
        if checkpoint:
            checkpoint(label, fitter.state_dict())
    return fitter.stats()


def accumulate(
    session: Session,
    pair: PromptPair,
    section: FitSection,
    *,
    held_out: PromptPair | None = None,
    checkpoint: Checkpoint | None = None,
    provenance: dict[str, Any] | None = None,
) -> Directions:
    """Fit the directions of every layer in one pass over each class.

    Args:
        session: The model, with whatever edit is in place.
        pair: Target and baseline prompts to fit on.
        section: Method, position, winsorising, rank.
        held_out: Prompts of the select split; with them the diagnostics say how well each layer separates the classes.
        checkpoint: See `residual_stats`.
        provenance: What the directions remember.

    Returns:
        Directions with the diagnostics `split_half_cosine`, `top4_share`, `baseline_cosine` and, with `held_out`,
        `auc`.
    """
    basis = (section.method, section.rank)
    found = families(session, pair, section, [basis], held_out=held_out, checkpoint=checkpoint, provenance=provenance)
    return found[basis]


def families(
    session: Session,
    pair: PromptPair,
    section: FitSection,
    bases: Sequence[Basis],
    *,
    held_out: PromptPair | None = None,
    checkpoint: Checkpoint | None = None,
    provenance: dict[str, Any] | None = None,
) -> dict[Basis, Directions]:
    """Fit directions of several methods and k: the prompts are read once, and clustered once for each k above 1.

    Args:
        session: The model, with whatever edit is in place.
        pair: Target and baseline prompts to fit on.
        section: Position and winsorising.
        bases: Each method and k.
        held_out: See `accumulate`; only the first of the bases says how well it separates these.
        checkpoint: See `residual_stats`.
        provenance: What the directions remember.
    """
    stats = class_stats(session, pair, section, checkpoint=checkpoint)
    found: dict[Basis, Directions] = {}
    for rank in dict.fromkeys(rank for _, rank in bases):
        own = section.model_copy(update={"rank": rank})
        clusters = centroids(session, pair.target.prompts, own) if rank > 1 else None
        for method in (method for method, k in bases if k == rank):
            found[method, rank] = fit_directions(
                *stats, method=method, rank=rank, clusters=clusters, provenance=provenance
            )
    if held_out is not None:
        first = bases[0]
        places = [
            coordinates(session, side.prompts, found[first], section) for side in (held_out.target, held_out.baseline)
        ]
        found[first] = found[first].with_diagnostics(auc=separation(*places))
    return found


def class_stats(
    session: Session, pair: PromptPair, section: FitSection, *, checkpoint: Checkpoint | None = None
) -> tuple[ResidualStats, ResidualStats]:
    """Return the statistics of target and baseline residuals."""
    return (
        residual_stats(session, pair.target.prompts, section, label="target", checkpoint=checkpoint),
        residual_stats(session, pair.baseline.prompts, section, label="baseline", checkpoint=checkpoint),
    )


def directions_of(
    session: Session,
    pair: PromptPair,
    section: FitSection,
    stats: tuple[ResidualStats, ResidualStats],
    *,
    provenance: dict[str, Any] | None = None,
) -> Directions:
    """Fit directions on the statistics of both classes; more than one per layer need further passes over the targets.

    Raises:
        RunFailed: a layer does not tell the classes apart.
    """
    clusters = centroids(session, pair.target.prompts, section) if section.rank > 1 else None
    return fit_directions(*stats, method=section.method, rank=section.rank, clusters=clusters, provenance=provenance)


def coordinates(session: Session, prompts: Sequence[Prompt], directions: Directions, section: FitSection) -> Tensor:
    """Return where each prompt lies along the first direction of each layer: `[n, L]` float32."""
    windows = session.capture(prompts, position=fixed_position(section))
    windows = track(windows, "read residuals, held out", total=len(prompts), size=len)
    return torch.cat([directions.coordinates(residuals)[..., 0] for residuals in windows])


def centroids(session: Session, prompts: Sequence[Prompt], section: FitSection) -> Tensor:
    """Return `[L, 2k, d]` centroids of the target prompts by a few streaming k-means passes.

    Raises:
        UsageError: fewer prompts than clusters.
    """
    fitter = ClusterFitter(session.n_layers, session.hidden_size, 2 * section.rank, winsorize=section.winsorize)
    for _ in range(KMEANS_PASSES):
        windows = session.capture(prompts, position=fixed_position(section))
        for residuals in track(windows, "cluster targets", total=len(prompts), size=len):
            fitter.update(residuals)
        if fitter.step() < 1e-3:
            break
    return fitter.centroids()
