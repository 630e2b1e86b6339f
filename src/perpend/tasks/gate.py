"""The gate: the saved file is read back and measured again, and differences are an error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perpend.config import Machine, Recipe
from perpend.core.edits import Edit
from perpend.data import Prompt, PromptPair
from perpend.errors import GateFailed
from perpend.export.shards import ExportResult
from perpend.export.verify import LeakRow, Untouched, leak_gate, untouched_equal
from perpend.judges.panel import Panel
from perpend.models.load import load_model, release
from perpend.models.session import Reply, Session
from perpend.refs import ModelRef
from perpend.tasks.measure import records
from perpend.tasks.setup import as_asked

MOVED = 0.05
"""Nats per token by which the likelihood of the measured replies may differ between hooks and saved file."""
FLIPPED = 0.25
"""Share of the subset's labels that may differ: greedy replies part ways at a tie that rounding decides."""


@dataclass(frozen=True)
class Reference:
    """What the edit did as hooks, on the fixed subset."""

    prompts: tuple[Prompt, ...]
    replies: tuple[Reply, ...]
    likelihood: float
    """Mean log-likelihood per token of the replies, in nats."""


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
            "worst": self.worst,
        }


def subset(pair: PromptPair, each: int) -> tuple[Prompt, ...]:
    """Return the fixed subset: the same prompts for the same sets, `each` of either class."""
    return (*pair.target.limited(each), *pair.baseline.limited(each))


def likelihood(session: Session, prompts: Sequence[Prompt], replies: Sequence[Reply]) -> float:
    """Return the mean log-likelihood per token of given replies, in nats; 0 without any."""
    scores = session.log_likelihood(prompts, [r.tokens for r in replies])
    total = sum(len(s) for s in scores)
    return float(sum(s.double().sum() for s in scores)) / total if total else 0.0


def reference(session: Session, edit: Edit, pair: PromptPair, recipe: Recipe) -> Reference:
    """Measure the edit as hooks on the fixed subset, greedily."""
    prompts = subset(pair, recipe.export.gate_prompts)
    with session.edited(edit):
        replies = session.generate(prompts, max_new_tokens=recipe.eval.max_new_tokens)
        return Reference(prompts, tuple(replies), likelihood(session, prompts, replies))


def pass_gate(
    session: Session,
    source: Path,
    folder: Path,
    export: ExportResult,
    edit: Edit,
    seen: Reference,
    panel: Panel,
    recipe: Recipe,
    machine: Machine,
) -> Gate:
    """Read the saved file back and compare it with what was asked and what was measured.

    The model of `session` is released: two models are never in memory at once.

    Args:
        session: The untouched model, by which tensors are recognised; of no use afterwards.
        source: The original checkpoint.
        folder: The edited one.
        export: What was written there.
        edit: What was asked.
        seen: What the edit did as hooks.
        panel: Labels the replies.
        recipe: What may leak, and how replies are made.
        machine: Device and dtype.

    Raises:
        GateFailed: a weight factor is missed, bytes differ that should not, or the file does not do what the hooks did.
    """
    leak = leak_gate(
        source,
        folder,
        edit,
        session.anatomy,
        session.model,
        through_post_norm=recipe.edit.through_post_norm,
        allow_leak=recipe.export.allow_leak,
        rounding=recipe.export.rounding,
    )
    untouched = untouched_equal(source, folder, export.edited, export.left_out)
    return proven(session, ModelRef("dir", str(folder)), leak, untouched, seen, panel, recipe, machine)


def proven(
    session: Session,
    ref: ModelRef,
    leak: Sequence[LeakRow],
    untouched: Untouched,
    seen: Reference,
    panel: Panel,
    recipe: Recipe,
    machine: Machine,
) -> Gate:
    """Load the saved model and compare what it does with what was measured.

    The model of `session` is released: two models are never in memory at once.

    Args:
        session: The untouched model; of no use afterwards.
        ref: The saved model.
        leak: What its weights say.
        untouched: What its other bytes say.
        seen: What the edit did as hooks.
        panel: Labels the replies.
        recipe: How replies are made.
        machine: Device and dtype.

    Raises:
        GateFailed: bytes differ that should not, or the file does not do what the hooks did.
    """
    where = Path(ref.name)
    require_untouched(untouched, where)
    release(session.model)
    if not seen.prompts:
        return Gate(tuple(leak), untouched, 0, 0, 0, (0.0, 0.0))
    loaded = load_model(ref, machine, trust_remote_code=recipe.model.trust_remote_code)
    again = as_asked(loaded, recipe, machine)
    replies = again.generate(seen.prompts, max_new_tokens=recipe.eval.max_new_tokens)
    labels = [panel.judge(records(seen.prompts, side)).labels for side in (seen.replies, replies)]
    gate = Gate(
        leak=tuple(leak),
        untouched=untouched,
        prompts=len(seen.prompts),
        same_labels=sum(a == b for a, b in zip(*labels, strict=True)),
        same_replies=sum(a.tokens == b.tokens for a, b in zip(seen.replies, replies, strict=True)),
        likelihood=(seen.likelihood, likelihood(again, seen.prompts, seen.replies)),
    )
    require_same(gate, where)
    return gate


def require_untouched(untouched: Untouched, where: Path) -> None:
    """Refuse a file of which something changed that was not edited.

    Raises:
        GateFailed: says what.
    """
    if untouched.differing:
        raise GateFailed(f"bytes differ that were not edited: {', '.join(untouched.differing[:4])}", where=str(where))


def require_same(gate: Gate, folder: Path) -> None:
    """Refuse a file that does not do what was measured.

    Raises:
        GateFailed: says by how much.
    """
    moved = abs(gate.likelihood[0] - gate.likelihood[1])
    flipped = gate.prompts - gate.same_labels
    if moved > MOVED or flipped > FLIPPED * gate.prompts:
        raise GateFailed(
            f"the saved file is not what was measured: {flipped} of {gate.prompts} labels differ, and the likelihood "
            f"of the same replies by {moved:.3f} nats per token",
            where=str(folder),
            valid=f"at most {FLIPPED:.0%} of the labels and {MOVED} nats",
        )
