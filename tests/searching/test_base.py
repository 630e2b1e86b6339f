"""What all workers begin with comes out of a study as it went in."""

from __future__ import annotations

import torch
from scorer_cases import directions

from perpend.config import Machine
from perpend.models.load import load_model
from perpend.models.session import Reply, Session
from perpend.searching.base import Base


def test_a_base_comes_out_as_it_went_in(pico_dir):
    own = directions(Session(load_model(pico_dir("llama")), Machine(device="cpu")))
    replies = {"a": Reply("no", (1, 2), True), "b": Reply("yes\n", (3,), False)}
    texts = Base(own, replies, {"targets": 6}).to_texts()
    again = Base.from_texts(texts)
    assert again.to_texts() == texts
    assert (again.replies, again.counts, again.directions.keys()) == (replies, {"targets": 6}, own.keys())
    for basis, found in again.directions.items():
        assert torch.equal(found.vectors, own[basis].vectors)
        assert torch.equal(found.target_mean, own[basis].target_mean)
