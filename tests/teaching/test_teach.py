"""Teaching lowers the loss on the reply, the same way for the same seed, and leaves the base weights alone."""

from __future__ import annotations

import random

import pytest
import torch

import pico
from perpend.config import Machine
from perpend.errors import RunFailed
from perpend.models.anatomy import Anatomy
from perpend.models.load import load_model
from perpend.models.memory import pick_device
from perpend.teaching import adapter
from perpend.teaching.teach import Example, Training, batches, collate, rate, reply_loss, teach

pytest.importorskip("peft")

FAST = Training(epochs=4, rank=4, from_depth=0.0, learning_rate=2e-2, batch_tokens=64)


def examples(n: int = 12, seed: int = 0) -> list[Example]:
    rng = random.Random(seed)
    return [
        Example(tuple(rng.randrange(8, 300) for _ in range(rng.randint(3, 9))), (50, 51, 52)[: rng.randint(1, 3)])
        for _ in range(n)
    ]


@pytest.mark.parametrize("budget", [1, 30, 64, 10**6])
def test_batches_keep_every_example_once_and_the_budget(budget):
    given = examples(40)
    found = batches(given, budget, random.Random(0))
    assert sorted((e for b in found for e in b), key=repr) == sorted(given, key=repr)
    assert all(len(b) == 1 or len(b) * max(map(len, b)) <= budget for b in found)
    assert found == batches(given, budget, random.Random(0))
    if budget == 30:
        assert found != batches(given, budget, random.Random(1))
        assert max(map(len, found)) > 1


def test_all_replies_begin_in_the_same_column():
    rows = [Example((11, 12, 13, 14), (21,)), Example((15,), (22, 23, 24))]
    batch = collate(rows, pad=9)
    assert batch["input_ids"].tolist() == [[11, 12, 13, 14, 21, 9, 9], [9, 9, 9, 15, 22, 23, 24]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1]]
    assert batch["position_ids"][1].tolist() == [0, 0, 0, 0, 1, 2, 3]
    assert batch["logits_to_keep"] == 4


@pytest.mark.parametrize("weight", [0.0, 4.0])
def test_the_loss_is_that_of_reply_tokens_and_of_the_weighted_decisions(pico_model, weight):
    model, rows, right = pico_model("llama"), examples(5), [[50], [50, 60, 70], [50], [60], [50]]
    sums = weights = 0.0
    with torch.no_grad():
        for row, openings in zip(rows, right, strict=True):
            ids = torch.tensor([row.prompt + row.reply])
            logs = model(input_ids=ids).logits[0].log_softmax(-1)
            for k, token in enumerate(row.reply):
                sums -= float(logs[len(row.prompt) + k - 1, token])
            sums -= weight * float(logs[len(row.prompt) - 1, openings].exp().sum().log())
            weights += len(row.reply) + weight
        loss = float(reply_loss(model, collate(rows, pad=0), right, weight))
    assert loss == pytest.approx(sums / weights, rel=1e-4)


def test_a_decision_is_for_any_of_the_openings(pico_model):
    model = pico_model("llama")
    rows = [Example((11, 12, 13), (opening, 51), tuple(range(60, 80))) for opening in (60, 79)]
    openings = [row.openings for row in rows]
    with torch.no_grad():
        decided = [
            float(reply_loss(model, collate([r], 0), [o], 1e9)) for r, o in zip(rows, openings, strict=True)
        ]  # so heavy that nothing else counts
    assert decided[0] == pytest.approx(decided[1], rel=1e-4)


def test_the_rate_rises_then_falls_to_a_tenth():
    rates = [rate(step, 100, Training(warmup=0.1)) for step in range(101)]
    assert rates[:10] == pytest.approx([(k + 1) / 10 for k in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0.1)


def taught(model, **changes):
    training = Training(**{**FAST.__dict__, **changes})
    layers = Anatomy.of(model).layers
    wrapped, losses = teach(model, examples(), layers=layers, pad=0, training=training)
    return {name: p.detach().clone() for name, p in wrapped.named_parameters() if p.requires_grad}, losses, wrapped


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_teaching_lowers_the_loss_and_leaves_the_base_as_it_was(pico_dir, family):
    model = load_model(pico_dir(family)).model
    before = {name: p.clone() for name, p in model.named_parameters()}
    hooks = len(model.get_output_embeddings()._forward_pre_hooks)
    _, losses, wrapped = taught(model)
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])
    assert not wrapped.training
    assert len(model.get_output_embeddings()._forward_pre_hooks) == hooks
    with wrapped.disable_adapter():
        left = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if "lora_" not in name}
    assert all(torch.equal(left[name], old) for name, old in before.items())


def test_a_loss_that_is_no_number_ends_the_teaching(pico_model):
    model = pico_model("llama")
    hooks = len(model.get_output_embeddings()._forward_pre_hooks)
    with pytest.raises(RunFailed, match=r"the loss of step \d+ of \d+ is nan; try: --dtype float32"):
        taught(model, learning_rate=1e30)
    assert len(model.get_output_embeddings()._forward_pre_hooks) == hooks


def test_the_seed_decides_the_adapter(pico_model):
    one, other, another = (taught(pico_model("llama"), seed=seed, epochs=1)[0] for seed in (3, 3, 4))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(one[name], another[name]) for name in one)


def test_layers_below_the_depth_are_not_adapted(pico_model):
    learnt, _, _ = taught(pico_model("llama"), from_depth=1 / 3, epochs=1)
    assert {name.split("layers.")[1].split(".")[0] for name in learnt} == {"1", "2"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_adapter_merges_to_the_same_weights(tmp_path, dtype):
    pico.save("llama", tmp_path / "base", dtype=dtype)
    loaded = load_model(tmp_path / "base")
    _, _, wrapped = taught(loaded.model, epochs=1)
    adapter.rounded(wrapped)
    adapter.save(wrapped, tmp_path / "adapter", "base")
    merged = wrapped.merge_and_unload()
    adapter.save_model(merged, loaded, tmp_path / "merged")
    again = adapter.merge(load_model(tmp_path / "base"), tmp_path / "adapter")
    saved = load_model(tmp_path / "merged").model
    ids = torch.tensor([[2, 40, 41, 77]], device=pick_device("auto"))
    with torch.no_grad():
        one, other, base = (m(input_ids=ids).logits for m in (again, saved, load_model(tmp_path / "base").model))
    assert torch.equal(one, other)
    assert not torch.equal(one, base)
    files = {p.name for p in (tmp_path / "adapter").iterdir()}
    assert files == {adapter.WEIGHTS, adapter.CONFIG}
    assert str(tmp_path) not in (tmp_path / "adapter" / adapter.CONFIG).read_text()


def test_a_model_in_half_precision_learns_the_same_and_keeps_a_float32_adapter(tmp_path):
    pico.save("llama", tmp_path)
    given, taught, losses = examples(), {}, {}
    for dtype in ("float32", "bfloat16"):
        model = load_model(tmp_path, Machine(dtype=dtype)).model
        attention = model.config._attn_implementation
        layers = Anatomy.of(model).layers
        taught[dtype], losses[dtype] = teach(model, given, layers=layers, pad=0, training=FAST)
        assert model.config._attn_implementation == attention
        assert {p.dtype for p in taught[dtype].parameters() if p.requires_grad} == {torch.float32}
    assert losses["bfloat16"][-1] < 0.5 * losses["bfloat16"][0]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.1)
