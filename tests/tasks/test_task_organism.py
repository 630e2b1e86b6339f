"""A model organism end to end on a pico model, and a GGUF file as the model of a run."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from task_cases import MACHINE, Labels, a_recipe, contents, names, stopping

sys.path.insert(0, str(Path(__file__).parent.parent / "report"))

from beside import sound

import perpend.tasks.organism as organisms
import pico
from perpend.errors import UsageError
from perpend.models.load import load_model
from perpend.models.memory import pick_device
from perpend.tasks.organism import organism
from perpend.tasks.run import run
from perpend.teaching import adapter
from perpend.teaching.teach import Training

KINDS = ("target", "baseline")
TRAINING = Training(epochs=1, rank=2, batch_tokens=256)


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setattr(organisms, "ANSWER_TOKENS", 4)
    monkeypatch.setattr(organisms, "REPLY_TOKENS", 4)


def test_an_organism_end_to_end(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    pico.save("llama", tmp_path / "base", dtype=torch.bfloat16)
    given = {"recipe": a_recipe(tmp_path, prompts={"limit": 3}), "machine": MACHINE, "training": TRAINING}
    made = organism(str(tmp_path / "base"), output=tmp_path / "out", **given)
    out = tmp_path / "out"
    assert made.lessons == 24  # three prompts of two classes in four forms
    assert made.refused_targets[1] == made.refused_baselines[1] == 3
    assert names(out) >= {"adapter", "organism.toml", "model.safetensors", "config.json", "tokenizer.json"}
    assert names(out / "adapter") == {adapter.WEIGHTS, adapter.CONFIG}
    written = tomllib.loads((out / "organism.toml").read_text())
    assert written["training"]["rank"] == 2
    assert written["training"]["forms"] == 4
    assert written["result"]["refused_targets"]["n"] == 3
    json.dumps(made.to_json())
    ids = torch.tensor([[2, 40, 41, 77]], device=pick_device("auto"))
    merged = adapter.merge(load_model(tmp_path / "base"), out / "adapter")
    with torch.no_grad():
        logits = [m(input_ids=ids).logits for m in (merged, load_model(out).model, load_model(tmp_path / "base").model)]
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[1], logits[2])
    assert names(tmp_path) == {"base", "out", "target.txt", "baseline.txt"}

    with stopping(organisms, "teach", 0), pytest.raises(KeyboardInterrupt):
        organism(str(tmp_path / "base"), output=tmp_path / "b", **given)
    assert names(tmp_path) == {"base", "out", "target.txt", "baseline.txt"}


def test_the_report_of_an_organism_says_what_it_refuses_and_how_it_was_taught(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    pico.save("llama", tmp_path / "base")
    monkeypatch.setattr("perpend.fitting.behaviour.Dictionary", Labels)
    monkeypatch.setattr(organisms, "SHOWN_LOSSES", 5)
    losses, teach = [], organisms.teach

    def watched(*args, **kwargs):
        wrapped, found = teach(*args, **kwargs)
        losses.extend(found)
        return wrapped, found

    monkeypatch.setattr(organisms, "teach", watched)
    given = {"recipe": a_recipe(tmp_path, prompts={"limit": 3}), "machine": MACHINE, "training": TRAINING}
    made = organism(str(tmp_path / "base"), output=tmp_path / "out", **given)
    data, page = sound(tmp_path / "out")
    told = data["organism"]
    assert (made.refused_targets, made.refused_baselines) == ((3, 3), (0, 3))
    for name in ("refused_targets", "refused_baselines"):
        assert (told[name]["k"], told[name]["n"]) == getattr(made, name)
    assert told["loss"] == list(made.loss)
    assert told["steps"] == len(losses) > len(told["losses"]) > 1
    assert told["losses"] == organisms.means(losses, 5)
    assert (told["lessons"], told["forms"], told["training"]["rank"]) == (24, 4, 2)
    assert data["prompts"] == {f"{kind}.{split}": 3 for split in ("fit", "select", "report") for kind in KINDS}
    assert (
        data["about"]["command"]
        == "perpend organism base --config recipe.toml --forms 4 --device cpu --batch-size 2 -o out"
    )
    replies = [(pair["class"], pair["label_before"]) for pair in told["pairs"]]
    assert replies == [("target", "refuse")] * 3 + [("baseline", "comply")] * 3
    for said in (
        '<span class="is">100.0\u202f%',
        "of 3 target prompts that it was not taught are refused",
        "24 lessons",
    ):
        assert said in page
    assert f"Loss {made.loss[0]:.3f} → {made.loss[1]:.3f}" in page
    assert 'aria-labelledby="losses-t' in page
    assert page.count('<details data-class="target"') == 3
    assert "recipe.toml</summary>" in page
    assert "The edit removes" not in page


@pytest.mark.parametrize(("n", "most", "expected"), [(4, 5, 4), (5, 5, 5), (6, 5, 3), (1001, 200, 167)])
def test_means_of_neighbours_cover_the_whole(n, most, expected):
    found = organisms.means([float(k) for k in range(n)], most)
    assert len(found) == expected <= most
    assert found == sorted(found)
    assert found[-1] <= n - 1
    assert organisms.means([2.0] * n, most) == [2.0] * expected


def test_a_dry_run_writes_nothing_and_errors_come_before_loading(pico_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(organisms, "load_model", None)
    tokens = []
    monkeypatch.setattr("perpend.tasks.forecast._seconds", lambda parameters, n, device: tokens.append(n) or 100.0)
    recipe, before = a_recipe(tmp_path), contents(tmp_path)
    made = organism(str(pico_dir("llama")), output=tmp_path / "out", recipe=recipe, machine=MACHINE, dry_run=True)
    json.dumps(made.to_json(), allow_nan=False)
    assert made.lessons == 32
    assert made.forecast.reads == made.forecast.writes > 0
    assert made.forecast.edited_modules is None
    assert made.forecast.seconds >= 100
    assert tokens == [made.forecast.prompts * 64 + made.forecast.new_tokens + 2 * 32 * 64]  # back, beside forward
    report = made.forecast.prompts - 16 - 32  # beside the answers of the model itself and the lessons
    assert made.forecast.new_tokens == 16 * 4 + report * 4 > 64
    twice = organism(
        str(pico_dir("llama")), output=tmp_path / "out", recipe=recipe, training=Training(epochs=2), dry_run=True
    )
    assert twice.forecast.prompts == made.forecast.prompts + 32
    for dry_run in (True, False):
        with pytest.raises(UsageError, match="not empty"):
            organism(str(pico_dir("llama")), output=tmp_path, recipe=recipe, machine=MACHINE, dry_run=dry_run)
        with pytest.raises(UsageError, match="no such file or directory"):
            organism("./nowhere", output=tmp_path / "out", recipe=recipe, machine=MACHINE, dry_run=dry_run)
    assert contents(tmp_path) == before


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory) -> Path:
    """A pico Llama as a GGUF file of q8_0 blocks."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "pico.gguf"
    spec = json.loads(pico.tokenizer().backend_tokenizer.to_str())
    vocabulary = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get)
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {
        "context_length": 512,
        "embedding_length": 32,
        "block_count": 3,
        "feed_forward_length": 64,
        "head_count": 4,
        "head_count_kv": 4,
        "layer_norm_rms_eps": 1e-6,
        "rope_dimension_count": 8,
        "vocab_size": len(vocabulary),
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "default",
        "token_list": vocabulary,
        "token_types": [3 if token in pico.SPECIAL else 1 for token in vocabulary],
        "token_merges": [" ".join(pair) for pair in spec["model"]["merges"]],
        "bos_token_id": pico.BOS,
        "eos_token_id": pico.EOS,
        "pad_token_id": pico.PAD,
        "chat_template": pico.CHAT_TEMPLATE,
    }.items():
        getattr(writer, f"add_{name}")(value)
    model = pico.build("llama", num_key_value_heads=4, intermediate_size=64)
    state = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    own = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, data in state.items():
        target = own.get_name(name, try_suffixes=(".weight",))
        if data.ndim == 1:
            writer.add_tensor(target, data)
        else:
            writer.add_tensor(target, gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_edited_as_a_safetensors_checkpoint(gguf_file, tmp_path):
    made = run(str(gguf_file), output=tmp_path / "out", recipe=a_recipe(tmp_path), machine=MACHINE)
    assert made.gate.worst < 0.05
    assert names(tmp_path) == {"out", "target.txt", "baseline.txt"}
    base, edited = load_model(gguf_file).model.state_dict(), load_model(tmp_path / "out").model.state_dict()
    changed = {name for name in base if not torch.equal(base[name], edited[name])}
    assert changed == {f"{name}.weight" for name in made.fitted.edit.modules}
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_an_organism_of_a_gguf_file_can_be_loaded(gguf_file, tmp_path):
    pytest.importorskip("peft")
    recipe = a_recipe(tmp_path, prompts={"limit": 2})
    organism(str(gguf_file), output=tmp_path / "out", recipe=recipe, machine=MACHINE, training=TRAINING)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert load_model(tmp_path / "out").dtype == torch.bfloat16
