from __future__ import annotations

import math
import random
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from perpend.core.edits import Edit, ModuleEdit
from perpend.drift import Drift, Likeliest, PromptDrift, equal_drift, measure, repetition, rotated
from perpend.errors import RunFailed, UsageError

V = 37
LENGTHS = (5, 1, 8, 0, 3, 8)


@dataclass
class Batch:
    index: list[int]
    tokens: Tensor
    mask: Tensor


def answers() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return tokens, reference logits and candidate logits of each prompt, without padding."""
    g = torch.Generator().manual_seed(0)
    tokens = [torch.randint(0, V, (n,), generator=g) for n in LENGTHS]
    ours = [3 * torch.randn(n, V, generator=g) for n in LENGTHS]
    theirs = [x + torch.randn(x.shape, generator=g) for x in ours]
    return tokens, ours, theirs


TOKENS, OURS, THEIRS = answers()


def batches(groups: list[list[int]]) -> list[Batch]:
    found = []
    for group in groups:
        width = max(LENGTHS[i] for i in group)
        tokens, mask = (
            torch.zeros(len(group), width, dtype=torch.long),
            torch.zeros(len(group), width, dtype=torch.bool),
        )
        for row, i in enumerate(group):
            tokens[row, : LENGTHS[i]] = TOKENS[i]
            mask[row, : LENGTHS[i]] = True
        found.append(Batch(group, tokens, mask))
    return found


def model(rows: list[Tensor]):
    """Return a model that gives these logits and garbage where there is no token."""

    def logits(batch: Batch) -> Tensor:
        out = torch.full((*batch.tokens.shape, V), math.nan)
        for row, i in enumerate(batch.index):
            out[row, : LENGTHS[i]] = rows[i]
        return out

    return logits


ALONE = [[i] for i in range(len(LENGTHS))]


def kl_by_hand(ours: Tensor, theirs: Tensor) -> list[float]:
    found = []
    for a, b in zip(ours.tolist(), theirs.tolist(), strict=True):
        za, zb = (math.log(math.fsum(math.exp(x) for x in row)) for row in (a, b))
        found.append(math.fsum(math.exp(x - za) * ((x - za) - (y - zb)) for x, y in zip(a, b, strict=True)))
    return found


def test_a_model_has_no_drift_from_itself():
    found = measure(model(OURS), model(OURS), batches(ALONE))
    assert (found.mean, found.median, found.p95, found.first, found.flip_rate) == (0, 0, 0, 0, 0)
    assert found.interval == (0, 0)
    assert found.cross_entropy_ratio == 1
    shifted = [x + 7 for x in OURS]
    assert measure(model(OURS), model(shifted), batches(ALONE)).mean == pytest.approx(0, abs=1e-6)


def test_every_figure_agrees_with_a_computation_by_hand():
    found = measure(model(OURS), model(THEIRS), batches(ALONE))
    kept = [i for i, n in enumerate(LENGTHS) if n]
    by_hand = [kl_by_hand(OURS[i], THEIRS[i]) for i in kept]
    per_prompt = [math.fsum(k) / len(k) for k in by_hand]
    assert [p.index for p in found.prompts] == kept
    assert (found.n, found.tokens, found.empty) == (5, sum(LENGTHS), 1)
    assert [p.kl for p in found.prompts] == pytest.approx(per_prompt, rel=1e-5)
    assert found.mean == pytest.approx(sum(per_prompt) / 5, rel=1e-5)
    assert found.median == pytest.approx(sorted(per_prompt)[2], rel=1e-5)
    assert found.first == pytest.approx(sum(k[0] for k in by_hand) / 5, rel=1e-5)
    assert sorted(per_prompt)[3] < found.p95 <= sorted(per_prompt)[4] * (1 + 1e-5)
    assert found.interval[0] < found.mean < found.interval[1]
    losses = [
        sum(torch.nn.functional.cross_entropy(rows[i].double(), TOKENS[i], reduction="sum").item() for i in kept)
        for rows in (OURS, THEIRS)
    ]
    assert found.cross_entropy_ratio == pytest.approx(losses[1] / losses[0], rel=1e-5)
    flips = [(OURS[i].argmax(-1) != THEIRS[i].argmax(-1)).double().mean().item() for i in kept]
    assert found.flip_rate == pytest.approx(sum(flips) / 5)
    assert 0 < found.flip_rate < 1


def test_the_direction_is_reference_then_candidate():
    one_way, other = (measure(model(a), model(b), batches(ALONE)).mean for a, b in ((OURS, THEIRS), (THEIRS, OURS)))
    assert one_way != pytest.approx(other, rel=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_batches_and_their_order_do_not_matter(seed):
    order = list(range(len(LENGTHS)))
    rng = random.Random(seed)
    rng.shuffle(order)
    cuts = sorted(rng.sample(range(1, len(order)), 2))
    groups = [order[: cuts[0]], order[cuts[0] : cuts[1]], order[cuts[1] :]]
    one_by_one = measure(model(OURS), model(THEIRS), batches(ALONE))
    grouped = measure(model(OURS), model(THEIRS), batches(groups))
    for a, b in zip(one_by_one.prompts, grouped.prompts, strict=True):
        assert a.index == b.index
        assert (b.kl, b.first, b.candidate_loss, b.flips) == pytest.approx((a.kl, a.first, a.candidate_loss, a.flips))
    assert grouped.to_json() == measure(model(OURS), model(THEIRS), batches(groups)).to_json()


def test_bfloat16_logits_are_compared_in_float32():
    low = [x.bfloat16() for x in OURS]
    found = measure(model(low), model(THEIRS), batches(ALONE))
    again = measure(model([x.float() for x in low]), model(THEIRS), batches(ALONE))
    assert found.mean == again.mean


def test_tokens_that_neither_model_can_say_do_not_count():
    def without(rows: list[Tensor]) -> list[Tensor]:
        kept = [x.clone() for x in rows]
        for x, t in zip(kept, TOKENS, strict=True):
            if len(t):
                x[:, next(v for v in range(V) if v not in t.tolist())] = -math.inf
        return kept

    assert math.isfinite(measure(model(without(OURS)), model(without(THEIRS)), batches(ALONE)).mean)


def test_what_cannot_be_measured_is_an_error():
    broken = [x.clone() for x in THEIRS]
    broken[2][4, 3] = math.nan
    with pytest.raises(RunFailed, match="prompt 2 are not finite"):
        measure(model(OURS), model(broken), batches(ALONE))
    with pytest.raises(UsageError, match="prompt 1 is in two batches"):
        measure(model(OURS), model(THEIRS), batches([[0, 1], [1]]))
    with pytest.raises(UsageError, match="one vocabulary"):
        measure(model(OURS), lambda b: model(THEIRS)(b)[..., :-1], batches(ALONE))
    with pytest.raises(UsageError, match="no answer"):
        measure(model(OURS), model(THEIRS), batches([[3]]))


def test_json_has_every_figure_with_its_interval():
    found = measure(model(OURS), model(THEIRS), batches(ALONE)).to_json()
    assert {"mean", "interval", "median", "p95", "first_token", "cross_entropy_ratio", "flip_rate", "n"} <= set(found)
    assert [p["index"] for p in found["per_prompt"]] == [0, 1, 2, 4, 5]
    certain = Drift((PromptDrift(0, 1, 0.1, 0.1, 0.0, 0.5, 0.0),))
    assert certain.to_json()["cross_entropy_ratio"] is None


def test_a_real_model_drifts_only_under_an_edit(pico_dir):
    from perpend.config import Machine
    from perpend.core.edits import Edit, ModuleEdit
    from perpend.data import Prompt
    from perpend.models.load import load_model
    from perpend.models.session import Session

    session = Session(load_model(str(pico_dir("llama")), Machine(device="cpu")), Machine(device="cpu"))
    prompts = [Prompt("Hello!"), Prompt("How do I bake a loaf of bread?"), Prompt("Tell me a story about a fox.")]
    replies = [r.tokens for r in session.generate(prompts, max_new_tokens=6)]
    direction = torch.nn.functional.normalize(torch.ones(1, session.hidden_size), dim=-1)
    writer = "model.layers.1.mlp.down_proj"
    edit = Edit({writer: ModuleEdit(direction, 1.0, "plain")}, {})

    def edited(batch):
        with session.edited(edit):
            return session.logits(batch)

    def read():
        return session.batches(prompts, replies)

    assert measure(session.logits, session.logits, read()).mean == 0
    moved = measure(session.logits, edited, read())
    assert moved.n == 3
    assert moved.mean > 1e-4
    assert measure(session.logits, session.logits, read()).mean == 0


def test_repetition_by_hand():
    replies = ["a b a b", "one two three four", "", "<think>never ends"]
    found = repetition(replies, [True, False, True, False], ["a b", "c d", "e f", "g h"])
    assert found.n == 4
    assert found.distinct_2 == pytest.approx((2 / 3 + 1) / 2)
    assert found.distinct_3 == pytest.approx(1.0)
    assert found.longest_repeat == pytest.approx((0.5 + 0) / 2)
    assert found.words == 4
    assert found.length_ratio == 1.0
    assert (found.unfinished, found.unfinished_reasoning) == (2, 1)
    assert found.to_json()["unfinished"]["share"] == 0.5


def test_repetition_of_nothing_is_zero_and_other_lengths_are_an_error():
    assert repetition([]).to_json()["words"] == 0.0
    assert repetition(["a"]).length_ratio is None
    with pytest.raises(UsageError, match="one entry per reply"):
        repetition(["a"], [True, False])
    with pytest.raises(UsageError, match="one entry per reply"):
        repetition(["a"], [True], [])


def test_a_rotated_edit_keeps_everything_but_the_place_of_its_directions():
    g = torch.Generator().manual_seed(3)
    first = torch.linalg.qr(torch.randn(64, 2, generator=g))[0].mT
    second = torch.nn.functional.normalize(first[:1] + 0.3 * torch.randn(1, 64, generator=g), dim=-1)
    edit = Edit({"a": ModuleEdit(first, 0.4, "column"), "b": ModuleEdit(second, -1.2), "c": ModuleEdit(first, 1.0)})
    turned, other = rotated(edit, 1), rotated(edit, 2)
    assert {k: (m.weight, m.mode) for k, m in turned.modules.items()} == {
        k: (m.weight, m.mode) for k, m in edit.modules.items()
    }
    old, new = (torch.cat([x.modules[k].directions for k in "abc"]) for x in (edit, turned))
    assert torch.allclose(old @ old.mT, new @ new.mT, atol=1e-5)
    assert float((old @ new.mT).abs().max()) < 0.6
    assert turned.sha256 == rotated(edit, 1).sha256 != other.sha256


@pytest.mark.parametrize("aim", [1e-4, 0.05, 0.3, 5.0])
def test_the_factor_of_equal_drift_is_found(aim):
    found = equal_drift(lambda factor: 0.1 * factor**2 / (1 + 0.01 * factor**2), aim)
    assert found.matched
    assert found.drift == pytest.approx(aim, rel=0.05)


@pytest.mark.parametrize("power", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("aim", [0.01, 0.17, 4.0])
def test_equal_drift_takes_few_measurements(aim, power):
    tried = []

    def cost(factor: float) -> float:
        tried.append(factor)
        return 0.1 * factor**power

    assert equal_drift(cost, aim).matched
    assert len(tried) <= 5


def test_a_drift_out_of_reach_gives_the_largest_and_says_so():
    found = equal_drift(lambda factor: 0.2 * math.tanh(factor), 3.0)
    assert not found.matched
    assert found.drift == pytest.approx(0.2, rel=1e-3)

    def breaks(factor: float) -> float:
        if factor > 2:
            raise RunFailed("not finite")
        return 0.1 * factor

    near = equal_drift(breaks, 3.0)
    assert not near.matched
    assert 1.5 < near.factor <= 2
    with pytest.raises(UsageError, match="more than 0"):
        equal_drift(breaks, 0.0)


def test_the_interval_of_the_cross_entropy_ratio_holds_the_ratio():
    found = measure(model(OURS), model(THEIRS), batches(ALONE))
    low, high = found.cross_entropy_ratio_interval
    assert low < found.cross_entropy_ratio < high
    assert found.cross_entropy[1] / found.cross_entropy[0] == pytest.approx(found.cross_entropy_ratio)


def test_what_is_kept_of_a_model_gives_a_lower_bound_of_its_divergence():
    _, ours, theirs = answers()
    for a, b in zip(ours, theirs, strict=True):
        p, q = a.log_softmax(-1), b.log_softmax(-1)
        exact = (p.exp() * (p - q)).sum(-1).double()
        bounds = [Likeliest.of(p, k).kl(q) for k in (1, 4, 16, V)]
        for low, high in pairwise([*bounds, exact + 1e-5]):
            assert (low <= high + 1e-9).all()
        torch.testing.assert_close(bounds[-1], exact, atol=1e-5, rtol=1e-4)
        assert (Likeliest.of(p, 4).kl(p) < 1e-6).all()
