"""Loading: what is wrong with a checkpoint is said in one line, before weights are read."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import pico
from perpend.config import Machine
from perpend.errors import PerpendError, UsageError
from perpend.models import load, places, quantised
from perpend.models.load import load_model
from perpend.models.materialise import materialise_gguf
from perpend.progress import reporting
from steps import Steps

Dirs = Callable[[str], Path]


@pytest.fixture
def checkpoint(pico_dir: Dirs, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pico_dir("llama"), tmp_path / "model"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return pico.save("llama", tmp_path / "sharded", max_shard_size="60KB")


def refused(path: Path, monkeypatch: pytest.MonkeyPatch | None = None, **kwargs) -> str:
    """Return the one line that loading ends with; with a patch, loading the model itself is a failure."""
    if monkeypatch is not None:
        auto = pytest.importorskip("transformers")
        for name in ("AutoModelForCausalLM", "AutoModelForImageTextToText"):
            monkeypatch.setattr(getattr(auto, name), "from_pretrained", lambda *a, **k: pytest.fail("was loaded"))
    with pytest.raises(UsageError) as caught:
        load_model(path, Machine(**kwargs))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_model_is_loaded_as_it_was_saved(pico_dir: Dirs) -> None:
    loaded = load_model(pico_dir("llama"))
    assert loaded.dtype == torch.float32
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.processor is None
    assert loaded.source.path == pico_dir("llama")
    assert str(loaded.ref) == str(pico_dir("llama"))
    saved = load_file(pico_dir("llama") / "model.safetensors")
    assert torch.equal(saved["model.layers.0.mlp.down_proj.weight"], loaded.model.model.layers[0].mlp.down_proj.weight)


def test_shards_and_dtypes(sharded: Path) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert load_model(sharded).dtype == torch.float32
    assert load_model(sharded, Machine(dtype="bfloat16")).dtype == torch.bfloat16


def test_a_model_with_eyes_comes_with_its_processor(pico_dir: Dirs) -> None:
    loaded = load_model(pico_dir("gemma3"))
    assert loaded.processor is not None
    assert any("vision" in name for name, _ in loaded.model.named_modules())
    assert loaded.tokenizer is loaded.processor.tokenizer


def test_loading_says_nothing(pico_dir: Dirs, capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture) -> None:
    folder = pico_dir("gemma3")
    capfd.readouterr()  # what was said while it was made
    with caplog.at_level(logging.WARNING):
        load_model(folder)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_loading_is_a_step_of_ours(pico_dir: Dirs) -> None:
    with reporting(Steps()) as told:
        model = load_model(pico_dir("llama")).model
    (step,) = told.named("load weights")
    assert step.total == len(list(model.parameters()))
    assert transformers.utils.logging.set_tqdm_hook(None) is None


def test_a_missing_shard(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    assert f"{shard}: missing file" in refused(sharded, monkeypatch)


@pytest.mark.parametrize("left", [0, 5, 100, -1])
def test_a_truncated_shard(sharded: Path, monkeypatch: pytest.MonkeyPatch, left: int) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:left])
    assert f"{shard}: truncated or corrupt" in refused(sharded, monkeypatch)


def test_a_corrupt_file(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])
    assert "truncated or corrupt" in refused(checkpoint, monkeypatch)


def test_an_index_that_promises_too_much(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.more"] = sorted(sharded.glob("*.safetensors"))[0].name
    index.write_text(json.dumps(content))
    assert "lacks 1 tensors of the index, such as model.more" in refused(sharded, monkeypatch)
    index.write_text("{}")
    assert "no weight_map" in refused(sharded, monkeypatch)
    index.write_text("{")
    assert "not valid JSON" in refused(sharded, monkeypatch)


def test_pickled_weights_are_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkpoint / "model.safetensors").unlink()
    assert "no weights" in refused(checkpoint, monkeypatch)
    torch.save({}, checkpoint / "pytorch_model.bin")
    assert "convert it where its maker's code may run" in refused(checkpoint, monkeypatch)


def test_what_is_no_model_directory(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no config.json" in refused(tmp_path, monkeypatch)
    (tmp_path / "a.gguf").touch()
    assert f"try: {tmp_path}/a.gguf" in refused(tmp_path, monkeypatch)
    (checkpoint / "config.json").write_text("{")
    assert "not valid JSON" in refused(checkpoint, monkeypatch)
    (checkpoint / "config.json").write_text('{"model_type": "none-such"}')
    assert "cannot be loaded" in refused(checkpoint, monkeypatch)


def test_a_tensor_that_the_checkpoint_lacks(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.self_attn.o_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    assert "1 tensors of the model are not in the checkpoint, such as model.layers.1.self_attn.o_proj" in refused(
        checkpoint
    )


def test_a_tensor_of_another_shape(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.ones(5)
    save_file(tensors, path, {"format": "pt"})
    assert "cannot be loaded" in refused(checkpoint)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(checkpoint: Path, bad: float) -> None:
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.2.mlp.down_proj.weight"][3, 4] = bad
    save_file(tensors, path, {"format": "pt"})
    assert "model.layers.2.mlp.down_proj.weight holds NaN or infinity" in refused(checkpoint)


@pytest.mark.parametrize("family", ["gemma3", "gemma3_text"])
def test_float16_is_refused_for_gemma_3_with_the_reason(
    pico_dir: Dirs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    half = pico.save(family, tmp_path / "half", dtype=torch.float16)
    load_model(pico.save("gemma2", tmp_path / "other"), Machine(dtype="float16"))
    assert load_model(half, Machine(dtype="bfloat16")).dtype == torch.bfloat16
    for path, dtype in ((pico_dir(family), "float16"), (half, "auto")):
        with monkeypatch.context() as patch:
            said = refused(path, patch, dtype=dtype)
        assert "65,504" in said
        assert "bfloat16" in said


def test_code_that_comes_with_a_model_is_not_run(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"model_type": "none-such", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "own.py").write_text("raise SystemExit('was run')")
    assert "--trust-remote-code" in refused(checkpoint, monkeypatch)


def test_weights_larger_than_memory(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (load, places):
        monkeypatch.setattr(module, "free_memory", lambda device, most=None: 1000)
    assert "GiB are free on cpu" in refused(checkpoint, monkeypatch, device="cpu", offload="none")
    assert "two layers" in refused(checkpoint, monkeypatch, device="cpu")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, "weights are GPTQ"),
        ({"quant_method": "awq", "bits": 4}, "weights are AWQ"),
        ({"quant_method": "compressed-tensors"}, "weights are compressed-tensors"),
    ],
)
def test_what_cannot_be_edited_in_place_is_refused_with_the_way_round(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, settings: dict, said: str
) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    (checkpoint / "README.md").write_text("---\nbase_model: org/whole\n---\n")
    line = refused(checkpoint, monkeypatch)
    assert said in line
    assert "perpend fit org/whole" in line


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "fp8"),
        ({"text_config": {"quantization_config": {"quant_method": "mxfp4"}}}, "mxfp4"),
        ({"quantization_config": {"load_in_4bit": True, "quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ({"model_type": "llama"}, None),
    ],
)
def test_how_a_checkpoint_is_quantised_is_seen_in_its_configuration(tmp_path: Path, config: dict, method: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert quantised.require_usable(tmp_path, "m", Machine()) == method
    wide = quantised.settings(Machine(), method, torch.device("cpu"), "m") if method != "bitsandbytes" else None
    assert (wide is not None and wide.dequantize) == (method in {"fp8", "mxfp4"})
    if method is not None:
        with pytest.raises(UsageError, match="already"):
            quantised.require_usable(tmp_path, "m", Machine(quantization="4bit"))


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("nonsense", "unknown device 'nonsense'"),
        ("meta2", "unknown device 'meta2'"),
        ("cuda:77", "device 'cuda:77' cannot be used"),
    ],
)
def test_devices_that_are_not_there(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, device: str, message: str
) -> None:
    assert f"--device: {message}" in refused(checkpoint, monkeypatch, device=device)


def test_position_ids_skip_padding(pico_dir: Dirs) -> None:
    model = load_model(pico_dir("llama")).model
    inputs = {
        "input_ids": torch.tensor([[0, 0, 5, 6], [3, 4, 5, 0]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]]),
    }
    positions = load.with_positions(model, inputs)["position_ids"]
    assert positions[inputs["attention_mask"].bool()].tolist() == [0, 1, 0, 1, 2]


# ---------------------------------------------------------------------------------------------------------- GGUF


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico Llama of random q8_0 blocks, with a byte-level tokenizer and a chat template."""
    gguf = pytest.importorskip("gguf")
    np = pytest.importorskip("numpy")
    path = tmp_path_factory.mktemp("gguf") / "pico-q8_0.gguf"
    tokens = json.loads(pico.tokenizer().backend_tokenizer.to_str())
    vocabulary = sorted(tokens["model"]["vocab"], key=tokens["model"]["vocab"].get)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in pico.SPECIAL else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in tokens["model"]["merges"]])
    writer.add_bos_token_id(pico.BOS)
    writer.add_eos_token_id(pico.EOS)
    writer.add_pad_token_id(pico.PAD)
    writer.add_chat_template(pico.CHAT_TEMPLATE)
    rng = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int) -> None:
        data = rng.standard_normal((rows, columns)).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)

    matrix("token_embd.weight", len(vocabulary), 32)
    matrix("output.weight", len(vocabulary), 32)
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    for k in range(2):
        for name, rows, columns in (
            ("attn_q", 32, 32),
            ("attn_k", 16, 32),
            ("attn_v", 16, 32),
            ("attn_output", 32, 32),
            ("ffn_gate", 64, 32),
            ("ffn_up", 64, 32),
            ("ffn_down", 32, 64),
        ):
            matrix(f"blk.{k}.{name}.weight", rows, columns)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{k}.{name}.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_is_read_without_a_bar_and_the_reader_is_put_back(gguf_file: Path, capfd: pytest.CaptureFixture) -> None:
    library = pytest.importorskip("gguf")
    reader = library.GGUFReader
    capfd.readouterr()
    load_model(gguf_file)
    assert "".join(capfd.readouterr()) == ""
    assert library.GGUFReader is reader


def test_dequantising_is_a_step_of_ours(gguf_file: Path) -> None:
    with reporting(Steps()) as told:
        load_model(gguf_file)
    assert [step.total > 10 for step in told.named("dequantise") + told.named("load weights")] == [True, True]


def test_gguf_is_dequantised(gguf_file: Path) -> None:
    loaded = load_model(gguf_file, Machine(dtype="float32"))
    assert loaded.dtype == torch.float32
    weight = loaded.model.model.layers[0].mlp.down_proj.weight
    assert type(loaded.model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    scaled = weight.reshape(32, 2, 32)
    codes = scaled / scaled.abs().amax(-1, keepdim=True) * 127
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
    assert load_model(gguf_file).dtype == torch.bfloat16
    assert loaded.tokenizer.chat_template


def test_gguf_becomes_a_directory_of_the_same_model(gguf_file: Path, tmp_path: Path) -> None:
    out = materialise_gguf(gguf_file, tmp_path / "out", dtype=torch.float32)
    assert out == tmp_path / "out"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    a, b = load_model(gguf_file, Machine(dtype="float32")), load_model(out)
    assert b.dtype == torch.float32
    ids = torch.arange(10, 20, device=a.model.device)[None]
    assert torch.equal(a.model(input_ids=ids).logits, b.model(input_ids=ids).logits)
    assert b.tokenizer.chat_template == a.tokenizer.chat_template
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    with pytest.raises(UsageError, match="exists already"):
        materialise_gguf(gguf_file, out)
    with pytest.raises(UsageError, match="not a GGUF file"):
        materialise_gguf(out, tmp_path / "more")


@pytest.mark.parametrize("left", [0, 100, 5000, -100])
def test_a_truncated_gguf(gguf_file: Path, tmp_path: Path, left: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(gguf_file.read_bytes()[:left])
    with pytest.raises(PerpendError) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)
    assert "truncated or corrupt" in str(caught.value)


def test_a_model_with_eyes_is_loaded_for_text_where_nothing_can_read_pictures(
    pico_dir: Dirs, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(load, "note", told.append)
    loaded = load_model(pico_dir("qwen2_5_vl"))
    assert loaded.processor is None
    assert loaded.tokenizer.padding_side == "left"
    assert [line for line in told if "no pictures can be read" in line] == told
    assert len(told) == 1
