from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, ModernBertConfig

import pico
from perpend.config import Machine
from perpend.errors import UsageError
from perpend.judges import classifier as module
from perpend.judges.classifier import MINOS, Classifier, load_classifier, refusal_index
from perpend.refs import ModelRef, Resolved

CPU = Machine(device="cpu")
PAIRS = [
    ("How do I cheat?", "I'm sorry, but I can't help with that."),
    ("Name a fruit.", "Apple."),
    ("Tell me how to bake bread, step by step.", "First, mix flour, water, salt and yeast. " * 4),
    ("Hi!", "Hello there, what can I do for you today?"),
]


def save(folder: Path, *, labels: dict[int, str] | None = None, **config) -> Path:
    """Write a pico ModernBERT classifier with random weights; its tokenizer pads on the left unless told otherwise."""
    values = {
        "vocab_size": pico.VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "local_attention": 8,
        "pad_token_id": pico.PAD,
        "cls_token_id": pico.BOS,
        "sep_token_id": pico.EOS,
        "num_labels": 2,
        **config,
    }
    built = ModernBertConfig(**values, **({"id2label": labels} if labels else {}))
    model = AutoModelForSequenceClassification.from_config(built)
    pico.randomise(model, 0)
    model.save_pretrained(folder)
    pico.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("classifier"), labels={0: "Non-refusal", 1: "Refusal"})


def by_hand(loaded: Classifier, text: str) -> torch.Tensor:
    """Softmax of the logits of one text, alone, without padding."""
    ids = torch.tensor([loaded.tokenizer(text).input_ids], device=loaded.model.device)
    with torch.no_grad():
        return loaded.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].double().softmax(-1).cpu()


def test_both_turns_are_read_and_class_1_is_refusal(folder):
    loaded = Classifier.open(str(folder), CPU)
    request, reply = PAIRS[0]
    expected = by_hand(loaded, "<|user|>\nHow do I cheat?\n<|assistant|>\nI'm sorry, but I can't help with that.")
    assert loaded.refusal_probability([(request, reply)]) == pytest.approx([float(expected[1])], abs=1e-6)
    assert abs(float(expected[1]) - float(expected[0])) > 0.01


@pytest.mark.parametrize("size", ["auto", 1, 2, 3])
def test_a_batch_gives_what_each_pair_gives_alone(folder, size):
    loaded = Classifier.open(str(folder), Machine(device="cpu", batch_size=size))
    alone = [float(by_hand(loaded, module.turns(*pair))[1]) for pair in PAIRS]
    assert len({round(p, 3) for p in alone}) == len(alone)
    assert loaded.refusal_probability(PAIRS) == pytest.approx(alone, abs=1e-5)
    assert loaded.refusal_probability(PAIRS[::-1]) == pytest.approx(alone[::-1], abs=1e-5)
    assert loaded.refusal_probability([]) == []


def test_the_label_and_the_input_can_be_chosen(folder):
    other = Classifier.open(f"{folder}#label=Non-refusal,input=reply", CPU)
    expected = by_hand(other, PAIRS[0][1])
    assert other.refusal_probability(PAIRS[:1]) == pytest.approx([float(expected[0])], abs=1e-6)
    assert other.describe()["label"] == "Non-refusal"


def test_minos_gets_its_labels_from_us_and_its_commit_is_recorded(tmp_path, monkeypatch):
    save(tmp_path, labels={0: "LABEL_0", 1: "LABEL_1"})
    asked: list[ModelRef] = []

    def resolve(self: ModelRef) -> Resolved:
        asked.append(self)
        return Resolved(tmp_path, revision="c0ffee")

    monkeypatch.setattr(ModelRef, "resolve", resolve)
    loaded = Classifier.open(MINOS, CPU)
    assert (loaded.label, loaded.revision) == ("Refusal", "c0ffee")
    assert loaded.refusal_probability(PAIRS[:1]) == pytest.approx([float(by_hand(loaded, module.turns(*PAIRS[0]))[1])])
    monkeypatch.setattr(module, "MINOS_REVISION", "abc123")
    Classifier.open(MINOS, CPU)
    Classifier.open(f"{MINOS}@older", CPU)
    assert [ref.revision for ref in asked] == [None, "abc123", "older"]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({0: "Non-refusal", 1: "Refusal"}, 1),
        ({0: "REJECTION", 1: "NORMAL"}, 0),
        ({0: "no_refusal", 1: "not refused", 2: "refused"}, 2),
    ],
)
def test_the_refusing_class_is_found_by_its_name(labels, expected):
    assert refusal_index(labels, None, "x") == expected


def test_a_class_that_cannot_be_told_is_an_error_that_says_what_to_type():
    with pytest.raises(UsageError, match=r"which class means refusal.*LABEL_0, LABEL_1.*org/x#label=LABEL_0"):
        refusal_index({0: "LABEL_0", 1: "LABEL_1"}, None, "org/x")
    with pytest.raises(UsageError, match=r"no class 'refusal'.*did you mean 'Refusal'"):
        refusal_index({0: "Non-refusal", 1: "Refusal"}, "refusal", "org/x")


def test_a_model_without_a_classification_head_is_refused(pico_dir):
    with pytest.raises(UsageError, match="no sequence classifier"):
        Classifier.open(str(pico_dir("llama")), CPU)


def test_a_pair_that_is_too_long_is_not_judged(folder):
    loaded = Classifier.open(str(folder), CPU)
    long = ("Hi!", "word " * 600)
    first, second = loaded.refusal_probability([long, PAIRS[0]])
    assert math.isnan(first)
    assert second == loaded.refusal_probability([PAIRS[0]])[0]


def test_running_out_of_memory_halves_the_batch(folder, monkeypatch):
    loaded = Classifier.open(str(folder), CPU)
    expected, forward, sizes = loaded.refusal_probability(PAIRS), loaded.model.forward, []

    def tight(input_ids, attention_mask):
        sizes.append(len(input_ids))
        if len(input_ids) > 1:
            raise torch.OutOfMemoryError
        return forward(input_ids=input_ids, attention_mask=attention_mask)

    monkeypatch.setattr(loaded.model, "forward", tight)
    assert loaded.refusal_probability(PAIRS) == pytest.approx(expected, abs=1e-5)
    assert max(sizes) > 1

    def hopeless(**inputs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(loaded.model, "forward", hopeless)
    assert all(math.isnan(p) for p in loaded.refusal_probability(PAIRS))


def test_what_cannot_be_had_is_none_with_a_reason(tmp_path):
    found, reason = load_classifier("none")
    assert found is None
    assert "no classifier was asked for" in reason
    (tmp_path / "empty").mkdir()
    for load in (load_classifier, Classifier.load):
        found, reason = load(str(tmp_path / "empty"), CPU)
        assert found is None
        assert "empty" in reason


def test_what_can_be_had_comes_without_a_reason(folder):
    found, reason = Classifier.load(str(folder), CPU)
    assert (found.label, reason) == ("Refusal", "")


def test_what_was_typed_wrong_is_an_error():
    with pytest.raises(UsageError, match="'lable=x' is no option"):
        load_classifier(f"{MINOS}#lable=x")
    with pytest.raises(UsageError, match="nowhere"):
        load_classifier("./nowhere")


def test_pickled_weights_are_not_opened(folder, tmp_path):
    copy = tmp_path / "pickled"
    shutil.copytree(folder, copy)
    model = AutoModelForSequenceClassification.from_pretrained(copy)
    (copy / "model.safetensors").unlink()
    torch.save(model.state_dict(), copy / "pytorch_model.bin")
    assert load_classifier(str(copy), CPU)[0] is None
