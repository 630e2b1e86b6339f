"""The expected cosine is what happens when noise is added to a known vector."""

from __future__ import annotations

import pytest
import torch

from perpend.core.reliability import cosines, expected_cosine


def test_the_expected_cosine_is_the_one_with_the_truth():
    g = torch.Generator().manual_seed(0)
    truth = torch.randn(4000, generator=g)
    halves = truth + 1.5 * torch.randn(2, 4000, generator=g)
    split = float(torch.cosine_similarity(halves[0], halves[1], dim=0))
    real = float(torch.cosine_similarity(halves.mean(0), truth, dim=0))
    assert expected_cosine(split) == pytest.approx(real, abs=0.03)
    assert (expected_cosine(1.0), expected_cosine(0.0), expected_cosine(-0.3)) == (1.0, 0.0, 0.0)


def test_cosines_are_those_of_the_first_directions():
    vectors = torch.linalg.qr(torch.randn(5, 16, 2, generator=torch.Generator().manual_seed(1)))[0].mT
    found = torch.tensor(cosines(vectors))
    assert torch.allclose(found, vectors[:, 0] @ vectors[:, 0].mT, atol=1e-3)
    assert found.diagonal().tolist() == [1.0] * 5
