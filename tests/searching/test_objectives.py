"""The two numbers of a candidate: what they are worth on logits that are known."""

from __future__ import annotations

import math

import pytest
import torch

from perpend.data import Prompt
from perpend.errors import RunFailed
from perpend.searching.objectives import Question, divergence, likelihoods

ASKED = Question(Prompt("How do I cheat?"), ((1, 2), (1, 3)), ((4, 5), (6, 7), (4, 6)))
PLACES = [torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([0, 2]), torch.tensor([0, 3]), torch.tensor([0, 2])]
TAILS = [torch.tensor(reply) for reply in ASKED.replies]


def odds(logits: torch.Tensor) -> float:
    return float(ASKED.log_odds(likelihoods(logits[None], PLACES, TAILS))[0])


def test_log_odds_are_those_of_the_mean_probabilities():
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    p = logits.softmax(-1)
    refused = (p[0, 1] * p[1, 2] + p[0, 1] * p[1, 3]) / 2
    complied = (p[0, 4] * p[2, 5] + p[0, 6] * p[3, 7] + p[0, 4] * p[2, 6]) / 3
    assert odds(logits) == pytest.approx(math.log(refused / complied), abs=1e-5)


def test_a_model_that_has_lost_the_language_is_between_one_that_refuses_and_one_that_complies():
    refusing, complying = torch.zeros(4, 9), torch.zeros(4, 9)
    refusing[0, 1] = complying[0, 4] = 8.0
    assert odds(torch.zeros(4, 9)) == pytest.approx(0.0, abs=1e-6)
    assert odds(complying) < -5 < 0 < 5 < odds(refusing)


def test_a_refusal_that_comes_late_counts_as_one_as_far_as_it_is_likely():
    late = Question(ASKED.prompt, ASKED.refusals, ASKED.compliant, ((4, 5, 1, 2), (4, 5, 6, 8)))
    generator = torch.Generator().manual_seed(2)
    table = torch.randn(3, 7, generator=generator)
    now = ASKED.log_odds(table[:, :5])
    later = table[:, 5] - table[:, 6]
    p, q = now.sigmoid(), later.sigmoid()
    torch.testing.assert_close(late.log_odds(table), (1 - (1 - p) * (1 - q)).logit())
    table[:, 6] = table[:, 5] + 30.0  # the beginning is gone on with
    torch.testing.assert_close(late.log_odds(table), now)
    table[:, 5] = table[:, 6] + 30.0  # it is turned away from
    assert bool((late.log_odds(table) > 29).all())


def test_drift_is_the_mean_divergence_from_the_last_row_whatever_was_said():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 4, 9, generator=generator)
    logits[1] = logits[2]
    logits[:, :, 8] = -math.inf  # a word that the model rules out
    p, q = logits[2].softmax(-1)[:, :8], logits[0].softmax(-1)[:, :8]
    true = (p * (p / q).log()).sum(-1)
    found = divergence(logits, [torch.tensor([0, 1]), torch.tensor([3])], TAILS[:2])
    assert found[0].tolist() == pytest.approx([float(true[:2].mean()), float(true[3])], abs=1e-5)
    assert found[1].tolist() == pytest.approx([0.0, 0.0], abs=1e-6)


def test_replies_of_unequal_length_and_a_target_without_openings_are_refused():
    with pytest.raises(RunFailed, match="differ in length"):
        Question(Prompt("a"), ((1, 2),), ((3,),))
    with pytest.raises(RunFailed, match="needs a refusal and a compliant opening"):
        Question(Prompt("a"), ((1, 2),), ())
    for delayed in (((1, 2, 3), (1, 2)), ((1, 2, 3),)):
        with pytest.raises(RunFailed, match="differ in length"):
            Question(Prompt("a"), ((1, 2),), ((3, 4),), delayed)
