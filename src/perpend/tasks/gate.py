"""The gate: the saved file is read back and measured again, and differences are an error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perpend.config import Machine, Recipe
from perpend.core.edits import Edit
from perpend.core.quant import RANGES
from perpend.data import Prompt, PromptPair
from perpend.drift import Likeliest
from perpend.errors import GateFailed
from perpend.export.shards import ExportResult
from perpend.export.verify import LeakRow, Untouched, leak_gate, untouched_equal
from perpend.judges.panel import Panel
from perpend.models.load import load_model
from perpend.models.memory import release
from perpend.models.session import Reply, Session
from perpend.refs import ModelRef
from perpend.tasks.measure import records
from perpend.tasks.setup import as_asked

MOVED = 0.05
"""Nats per token by which the likelihood of the measured replies may differ between hooks and saved file."""
DIVERGED = 0.1
"""KL, in nats per token, that the saved file may have from the hooks on those replies."""
FLIPPED = 0.25
"""Share of the subset's labels that may differ: greedy replies part ways at a tie that rounding decides."""


@dataclass(frozen=True)
class Asked:
    """What a saved file has to answer for: an edit of an untouched model, and how its replies are made and judged."""

    session: Session
    """The untouched model; of no use once a file has been proven, for two models are never in memory at once."""
    edit: Edit
    recipe: Recipe
    machine: Machine
    panel: Panel


@dataclass(frozen=True)
class Reference:
    """What the edit did as hooks, on the fixed subset."""

    prompts: tuple[Prompt, ...]
    replies: tuple[Reply, ...]
    likelihood: float
    """Mean log-likelihood per token of the replies, in nats."""
    expected: Mapping[int, Likeliest]
    """What was expected at every token of a reply, by the number of its prompt."""


@dataclass(frozen=True)
class Gate:
    """What the saved file says of the edit."""

    leak: tuple[LeakRow, ...]
    untouched: Untouched
    prompts: int
    """Prompts on which the reloaded file was measured again."""
    same_labels: int
    same_replies: int
    likelihood: tuple[float, float]
    """Mean log-likelihood per token of the same replies: as hooks, and from the saved file."""
    kl: float = 0.0
    """Mean KL(hooks ‖ saved file) per token of the same replies, in nats; see `perpend.drift.Likeliest.kl`."""

    @property
    def worst(self) -> float:
        """Largest difference between an asked and a realised weight factor."""
        return max((row.miss for row in self.leak), default=0.0)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "leak": [row.to_json() for row in self.leak],
            "untouched": asdict(self.untouched) | {"differing": list(self.untouched.differing)},
            "prompts": self.prompts,
            "same_labels": self.same_labels,
            "same_replies": self.same_replies,
            "likelihood": {"hooks": self.likelihood[0], "file": self.likelihood[1]},
            "kl": self.kl,
            "worst": self.worst,
        }


def subset(pair: PromptPair, each: int) -> tuple[Prompt, ...]:
    """Return the fixed subset: the same prompts for the same sets, `each` of either class."""
    return (*pair.target.limited(each), *pair.baseline.limited(each))


@torch.no_grad()
def forced(
    session: Session, prompts: Sequence[Prompt], replies: Sequence[Reply]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield of every reply with a token: its number, the log-probabilities `[n, V]` at its tokens, and the tokens."""
    for batch in session.batches(prompts, [reply.tokens for reply in replies]):
        logs = session.logits(batch).log_softmax(-1)
        for row, index in enumerate(batch.index):
            kept = batch.mask[row].to(logs.device)
            yield index, logs[row][kept], batch.tokens[row].to(logs.device)[kept]


def reference(asked: Asked, pair: PromptPair) -> Reference:
    """Measure the edit as hooks on the fixed subset, greedily."""
    session, recipe = asked.session, asked.recipe
    prompts = subset(pair, recipe.export.gate_prompts)
    expected: dict[int, Likeliest] = {}
    total = count = 0.0
    with session.edited(asked.edit):
        replies = session.generate(prompts, max_new_tokens=recipe.eval.max_new_tokens)
        for index, logs, tokens in forced(session, prompts, replies):
            expected[index] = Likeliest.of(logs)
            total, count = total + _likelihood(logs, tokens), count + len(tokens)
    return Reference(prompts, tuple(replies), total / max(1, count), expected)


def _likelihood(logs: Tensor, tokens: Tensor) -> float:
    return float(logs.gather(-1, tokens[:, None]).double().sum())


def pass_gate(asked: Asked, seen: Reference, source: Path, folder: Path, export: ExportResult) -> Gate:
    """Read the saved file back and compare it with what was asked and what was measured.

    Args:
        asked: What was asked.
        seen: What the edit did as hooks.
        source: The original checkpoint.
        folder: The edited one.
        export: What was written there.

    Raises:
        GateFailed: a weight factor is missed, bytes differ that should not, or the file does not do what the hooks did.
    """
    session, recipe = asked.session, asked.recipe
    leak = leak_gate(
        source,
        folder,
        asked.edit,
        session.anatomy,
        session.model,
        through_post_norm=recipe.edit.through_post_norm,
        allow_leak=recipe.export.allow_leak,
        rounding=recipe.export.rounding,
    )
    untouched = untouched_equal(source, folder, export.edited, export.left_out)
    return proven(asked, seen, ModelRef("dir", str(folder)), leak, untouched)


def proven(asked: Asked, seen: Reference, ref: ModelRef, leak: Sequence[LeakRow], untouched: Untouched) -> Gate:
    """Load the saved model and compare what it does with what was measured.

    Args:
        asked: What was asked; its model is released.
        seen: What the edit did as hooks.
        ref: The saved model.
        leak: What its weights say.
        untouched: What its other bytes say.

    Raises:
        GateFailed: bytes differ that should not, or the file does not do what the hooks did.
    """
    where, recipe, machine = Path(ref.name), asked.recipe, asked.machine
    require_untouched(untouched, where)
    release(asked.session.model)
    if not seen.prompts:
        return Gate(tuple(leak), untouched, 0, 0, 0, (0.0, 0.0))
    loaded = load_model(ref, machine, copy_of=asked.session.loaded.ref)
    again = as_asked(loaded, recipe, machine)
    replies = again.generate(seen.prompts, max_new_tokens=recipe.eval.max_new_tokens)
    labels = [asked.panel.judge(records(seen.prompts, side)).labels for side in (seen.replies, replies)]
    total = divergence = count = 0.0
    for index, logs, tokens in forced(again, seen.prompts, seen.replies):
        total, count = total + _likelihood(logs, tokens), count + len(tokens)
        divergence += float(seen.expected[index].kl(logs).sum())
    gate = Gate(
        leak=tuple(leak),
        untouched=untouched,
        prompts=len(seen.prompts),
        same_labels=sum(a == b for a, b in zip(*labels, strict=True)),
        same_replies=sum(a.tokens == b.tokens for a, b in zip(seen.replies, replies, strict=True)),
        likelihood=(seen.likelihood, total / max(1, count)),
        kl=divergence / max(1, count),
    )
    require_same(gate, where, recipe.export.rounding)
    return gate


def require_untouched(untouched: Untouched, where: Path) -> None:
    """Refuse a file of which something changed that was not edited.

    Raises:
        GateFailed: says what.
    """
    if untouched.differing:
        raise GateFailed(f"bytes differ that were not edited: {', '.join(untouched.differing[:4])}", where=str(where))


def require_same(gate: Gate, folder: Path, rounding: str = "auto") -> None:
    """Refuse a file that does not do what was measured.

    Args:
        gate: What was compared.
        folder: The file.
        rounding: What it was rounded for, as in the recipe. Rounding weights that are not on that lattice moves a model
            by itself, and their edits survive a plain pass without it.

    Raises:
        GateFailed: says by how much.
    """
    moved = abs(gate.likelihood[0] - gate.likelihood[1])
    flipped = gate.prompts - gate.same_labels
    if not (moved <= MOVED and gate.kl <= DIVERGED and flipped <= FLIPPED * gate.prompts):  # NaN does not pass
        raise GateFailed(
            f"the saved file is not what was measured: {flipped} of {gate.prompts} labels differ, the likelihood of "
            f"the same replies by {moved:.3f} nats per token, and its KL from what was measured is {gate.kl:.3f}",
            where=str(folder),
            valid=f"at most {FLIPPED:.0%} of the labels, {MOVED} and {DIVERGED} nats",
            hint=f"without --for {rounding}, which weights need that lie on its lattice (perpend quant check)"
            if rounding in RANGES
            else "",
        )
