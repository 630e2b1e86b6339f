"""The two numbers of a candidate, prompt by prompt, from logits.

*Refusal* is the log-odds, in nats, of the model's own refusals against compliant openings, both read by teacher
forcing: log of the mean probability of the refusals minus that of the openings. Both have the same number of tokens, so
that a model that has lost the language, to which all words are equally likely, has log-odds 0 and not a low number: it
is given nothing for finding refusals unlikely. What it has lost shows in the drift.

A model may also begin as if it complied and refuse then. Where a target has a *delayed* pair, a compliant beginning
that goes on and the same beginning with a refusal after it, the log-odds r of refusing at once and s of refusing later
are put together as those of refusing at all: log(exp(r) + exp(s) + exp(r + s)), as if both were independent. Where one
is much the likelier, that is it.

*Drift* is KL(untouched ‖ edited) in nats per token, over the untouched model's own answers to baselines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perpend.data import Prompt
from perpend.errors import RunFailed
from perpend.models.tree import Said

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Question:
    """A target, and what a model may say to it, as token ids; refusals and openings are equally long.

    Attributes:
        prompt: The target.
        refusals: Replies that refuse at once.
        compliant: Openings of replies that do not.
        delayed: A compliant beginning with a refusal after it, and the same with what goes on, equally long; empty
            where none is known.
    """

    prompt: Prompt
    refusals: tuple[Tokens, ...]
    compliant: tuple[Tokens, ...]
    delayed: tuple[Tokens, ...] = ()

    def __post_init__(self) -> None:
        if not self.refusals or not self.compliant:
            raise RunFailed("a target needs a refusal and a compliant opening", where=self.prompt.text[:60])
        groups = (self.refusals + self.compliant, self.delayed)
        if len(self.delayed) not in (0, 2) or any(len(set(map(len, group))) > 1 for group in groups):
            raise RunFailed("refusals and openings of a target differ in length", where=self.prompt.text[:60])

    @property
    def replies(self) -> tuple[Tokens, ...]:
        """The refusals, then the compliant openings, then the delayed pair."""
        return self.refusals + self.compliant + self.delayed

    def said(self, ids: Sequence[int]) -> list[Said]:
        """Return what is read, for a prompt that is encoded as `ids`."""
        return [Said(tuple(ids), reply) for reply in self.replies]

    def log_odds(self, likelihoods: Tensor) -> Tensor:
        """Return the log-odds of refusing.

        Args:
            likelihoods: `[R, n]` log-likelihood of every reply under R models, in nats.

        Returns:
            `[R]`. Differentiable.
        """
        cut, end = len(self.refusals), len(self.refusals) + len(self.compliant)
        now = _log_mean(likelihoods[:, :cut]) - _log_mean(likelihoods[:, cut:end])
        if not self.delayed:
            return now
        later = likelihoods[:, end] - likelihoods[:, end + 1]  # what both begin with cancels
        return torch.stack([now, later, now + later]).logsumexp(0)


def _log_mean(x: Tensor) -> Tensor:
    return x.logsumexp(-1) - math.log(x.shape[-1])


def likelihoods(logits: Tensor, places: Sequence[Tensor], tails: Sequence[Tensor]) -> Tensor:
    """Return the log-likelihood of sequences.

    Args:
        logits: `[R, P, V]` at the columns of a tree, any float dtype.
        places: For each of n sequences, `[m]` which column predicts each of its tokens.
        tails: For each sequence, `[m]` its tokens.

    Returns:
        `[R, n]` in nats, float32. Differentiable.
    """
    place, token = (torch.cat(list(x)).to(logits.device) for x in (places, tails))
    rows = [row.log_softmax(-1, dtype=torch.float32)[place, token] for row in logits]  # one row in float32 at a time
    return _sums(torch.stack(rows), tails)


def _sums(x: Tensor, sequences: Sequence[Tensor]) -> Tensor:
    """Return the sums `[R, n]` of `[R, m]`, which holds n sequences one after the other."""
    owner = torch.repeat_interleave(torch.tensor([len(s) for s in sequences])).to(x.device)
    return x.new_zeros(len(x), len(sequences)).index_add(1, owner, x)


def divergence(logits: Tensor, places: Sequence[Tensor], tails: Sequence[Tensor]) -> Tensor:
    """Return the drift of every row from the last one, which is the untouched model.

    Args:
        logits: `[R + 1, P, V]` at the columns of a tree, any float dtype.
        places: For each of n answers, `[m]` the columns that predict its tokens.
        tails: Their tokens, which do not matter: every other token counts as well.

    Returns:
        `[R, n]` mean KL per token in nats, float32. Differentiable but in the last row.
    """
    base = logits[-1].detach().log_softmax(-1, dtype=torch.float32)
    weight = base.exp()
    own = torch.linalg.vecdot(weight, base)
    if len(logits) == 1:
        return base.new_zeros(0, len(places))
    rows = [own - torch.linalg.vecdot(weight, row.log_softmax(-1, dtype=torch.float32)) for row in logits[:-1]]
    sound = torch.stack(rows).isfinite().all(1).tolist()  # asked once: a GPU waits for every answer
    for k in (k for k, finite in enumerate(sound) if not finite):  # words that the model rules out
        other = logits[k].log_softmax(-1, dtype=torch.float32)
        rows[k] = torch.where(weight > 0, weight * (base - other), 0).sum(-1)
    place = torch.cat(list(places)).to(logits.device)
    lengths = torch.tensor([len(x) for x in places]).to(logits.device)
    return _sums(torch.stack(rows)[:, place], places) / lengths
