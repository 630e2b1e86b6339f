"""The layer whose direction carries the refusal is found; hooks are taken away."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from fitting_cases import directions, pair, session_on

import pico
from perpend.config import EditSection
from perpend.core.directions import Directions
from perpend.core.linear import orthonormalise
from perpend.errors import RunFailed
from perpend.fitting import layers
from perpend.fitting.behaviour import Behaviour
from perpend.fitting.layers import (
    DEEPEST,
    DRIFT_TOKENS,
    MAX_DRIFT,
    REFUSAL_TOKENS,
    Candidate,
    Probe,
    added,
    best,
    choose_layer,
)
from perpend.judges.labels import Label
from perpend.models.session import Reply, Session
from perpend.tasks.journal import Journal

LAYERS = 7
SORRY = 77
"""The one token of refusals."""


def probe(n: int = 3) -> Probe:
    both = pair(n)
    return Probe(both.target.prompts, ((SORRY,) * 3,) * n, both.baseline.prompts, ((40, 41, 42),) * n)


@pytest.fixture(scope="module")
def refusing(tmp_path_factory) -> tuple[Session, torch.Tensor]:
    """A model in which one direction, written by the MLP of layer 1, makes the token of refusals likely."""
    folder = tmp_path_factory.mktemp("refusing")
    model = pico.build("gpt2", n_layer=LAYERS)
    generator = torch.Generator().manual_seed(5)
    p = torch.randn(32, generator=generator)
    p = (p - p.mean()) / (p - p.mean()).norm()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(0.2)
        model.transformer.h[1].mlp.c_proj.bias.add_(6 * p)
        model.transformer.ln_f.weight.fill_(1.0)
        model.lm_head.weight[SORRY] = 2 * p
    model.save_pretrained(folder)
    pico.tokenizer().save_pretrained(folder)
    return session_on(folder), p


def planted(layer: int, p: torch.Tensor) -> Directions:
    """Directions of which that of one layer is `p`; the others are orthogonal to it."""
    found = directions(LAYERS, 32)
    vectors = found.vectors[:, 0] - (found.vectors[:, 0] @ p)[:, None] * p
    vectors = orthonormalise(vectors[:, None]).float()
    vectors[layer, 0] = p
    return directions(LAYERS, 32, vectors=vectors, baseline_mean=0 * vectors[:, 0], target_mean=3 * vectors[:, 0] + p)


@pytest.mark.parametrize("layer", [1, 4, 6])
def test_a_planted_layer_is_found(refusing, layer):
    session, p = refusing
    found = choose_layer(session, planted(layer, p), EditSection(), probe())
    top = next(c for c in found.candidates if c.layer == layer)
    assert found.layer == layer
    assert top.bypass < found.untouched - 1
    assert top.induced > 0
    assert [c.layer for c in found.candidates] == [1, 2, 3, 4, 5, 6]
    assert all(c.bypass > top.bypass + 1 for c in found.candidates if c.layer != layer)


def test_wide_steps_are_narrowed_around_the_best(refusing):
    session, p = refusing
    found = choose_layer(session, planted(6, p), EditSection(), probe(), stride=3)
    assert [c.layer for c in found.candidates] == [3, 4, 5, 6]
    assert found.layer == 6


def judged(monkeypatch: pytest.MonkeyPatch, rule: str, n_layers: int) -> list[int]:
    """Return the layers of a deep model that are judged under a rule, the sixth of which takes the most refusal."""
    seen = list[int]()

    def judge(session, directions, section, probe, layer, silent, reference):
        seen.append(layer)
        return tried(layer, -2.0 if layer == 6 else -1.0, 0.05)

    monkeypatch.setattr(layers, "_judge", judge)
    monkeypatch.setattr(layers, "Recalled", lambda session: None)
    silent = SimpleNamespace(refusal=lambda session: -0.5, induced=lambda session: 0.0)
    found = choose_layer(None, SimpleNamespace(n_layers=n_layers), EditSection(), silent, rule=rule)
    assert found.layer == 6
    assert len(seen) == len(set(seen))
    return sorted(seen)


def test_the_published_rule_tries_every_layer_and_thrift_about_ten(monkeypatch):
    assert judged(monkeypatch, "published", 40) == list(range(1, 37))
    assert 10 <= len(judged(monkeypatch, "thrift", 40)) <= 16


def test_an_interrupted_choice_goes_on_with_the_layers_that_are_left(refusing, tmp_path, monkeypatch):
    session, p = refusing
    whole, judged, judge = choose_layer(session, planted(4, p), EditSection(), probe()), [], layers._judge

    def stopping(*args):
        if len(judged) == 2:
            raise KeyboardInterrupt
        judged.append(args[4])
        return judge(*args)

    monkeypatch.setattr(layers, "_judge", stopping)
    kept = Journal(tmp_path).checkpoint
    with pytest.raises(KeyboardInterrupt):
        choose_layer(session, planted(4, p), EditSection(), probe(), checkpoint=kept)
    first = judged[:]
    monkeypatch.setattr(layers, "_judge", lambda *args: judged.append(args[4]) or judge(*args))
    assert choose_layer(session, planted(4, p), EditSection(), probe(), checkpoint=kept) == whole
    assert judged[:2] == first
    assert sorted(judged) == [1, 2, 3, 4, 5, 6]


def tried(layer: int, bypass: float, drift: float, in_bounds: bool = True, induced: float = 1.0) -> Candidate:
    return Candidate(layer, bypass, induced, drift, in_bounds)


def test_a_ruined_model_and_a_direction_that_induces_nothing_do_not_count_as_refusal_taken():
    good = tried(17, -1.0, 0.09)
    ruined, idle = tried(23, -9.0, 4.2), tried(5, -9.0, 0.01, induced=-0.1)
    assert best([ruined, good, idle], -0.1, "thrift") is good
    assert best([ruined, idle], -0.1, "thrift") is idle  # nothing better was tried


def test_thrift_takes_the_most_refusal_per_drift_among_those_that_remove_half():
    cheap, able, ruinous = tried(3, -0.6, 0.01), tried(16, -1.6, 0.1), tried(22, -2.2, 0.4)
    assert best([cheap, able, ruinous], -0.3, "thrift") is able
    assert best([cheap, ruinous], -0.3, "thrift") is ruinous


def test_a_drift_too_small_to_tell_apart_wins_nothing():
    less, more = tried(3, -1.5, 0.0001), tried(4, -2.0, 0.009)
    assert best([less, more], -0.3, "thrift") is more


def test_published_takes_the_least_refusal_within_bounds():
    inside, weaker, outside = tried(3, -1.0, 0.05), tried(4, -0.9, 0.01), tried(22, -2.2, 0.4, in_bounds=False)
    assert best([weaker, inside, outside], -0.3, "published") is inside


def test_with_none_in_the_published_bounds_thrift_decides():
    able, ruinous = tried(16, -1.6, 0.1, in_bounds=False), tried(22, -2.2, 0.4, in_bounds=False)
    assert best([ruinous, able], -0.3, "published") is able


def test_bounds_are_drift_induced_refusal_and_depth(refusing):
    session, p = refusing
    found = choose_layer(session, planted(4, p), EditSection(), probe(), rule="published")
    assert all(
        c.in_bounds == (c.drift <= MAX_DRIFT and c.induced > 0 and c.layer < DEEPEST * LAYERS) for c in found.candidates
    )
    assert not next(c for c in found.candidates if c.layer == 6).in_bounds


def test_trying_layers_leaves_the_model_as_it_was(refusing):
    session, p = refusing
    batch = next(session.batches(probe().targets, probe().refusals))
    before = session.logits(batch)
    choose_layer(session, planted(4, p), EditSection(), probe())
    assert torch.equal(session.logits(batch), before)


def test_a_vector_is_added_to_one_layer_inside_the_block_only(pico_dir):
    session, vector = session_on(pico_dir("llama")), torch.linspace(-1, 1, 32)
    targets = pair(3).target.prompts
    before = torch.cat(list(session.capture(targets)))
    with added(session, 1, vector):
        inside = torch.cat(list(session.capture(targets)))
    with pytest.raises(ValueError, match="half-way"), added(session, 1, vector):
        raise ValueError("half-way")
    assert torch.equal(torch.cat(list(session.capture(targets))), before)
    assert torch.equal(inside[:, 0], before[:, 0])
    assert torch.allclose(inside[:, 1], before[:, 1] + vector, atol=1e-5)
    assert not torch.allclose(inside[:, 2], before[:, 2] + vector, atol=1e-2)


def seen(label: Label, n: int) -> tuple[tuple[Reply, Label], ...]:
    return tuple((Reply("x", tuple(range(50)), True), label) for _ in range(n))


def test_a_probe_takes_the_first_consistent_prompts_and_cuts_their_replies():
    both = pair(5)
    refused = seen(Label.COMPLY, 1) + seen(Label.REFUSE, 4)
    found = Probe.of(Behaviour(both, refused, seen(Label.COMPLY, 5)), 3)
    assert found.targets == both.target.prompts[1:4]
    assert found.baselines == both.baseline.prompts[:3]
    assert {len(r) for r in found.refusals} == {REFUSAL_TOKENS}
    assert {len(r) for r in found.answers} == {DRIFT_TOKENS}


@pytest.mark.parametrize(("target", "baseline"), [(Label.COMPLY, Label.COMPLY), (Label.REFUSE, Label.BROKEN)])
def test_a_probe_without_a_class_is_an_error(target, baseline):
    with pytest.raises(RunFailed, match="select split"):
        Probe.of(Behaviour(pair(2), seen(target, 2), seen(baseline, 2)), 3)
