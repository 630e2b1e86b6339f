"""Facts of a GGUF header that transformers leaves out, and files that are not whole."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig
from transformers.models.gemma3 import Gemma3TextConfig

import pico
from perpend.errors import UsageError
from perpend.models import gguf

GEMMA_4B = {
    "general.architecture": "gemma3",
    "gemma3.rope.scaling.type": "linear",
    "gemma3.rope.scaling.factor": 8.0,
    "gemma3.context_length": 131072,
}


def header(path: Path, *, tensors: bool = True) -> Path:
    """Write a small file with a value of every kind that is read or skipped."""
    library = pytest.importorskip("gguf")
    np = pytest.importorskip("numpy")
    writer = library.GGUFWriter(path, "gemma3")
    writer.add_context_length(131072)
    writer.add_rope_scaling_type(library.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(8.0)
    writer.add_license("gemma")
    writer.add_license_link("https://ai.google.dev/gemma/terms")
    writer.add_token_list(["<pad>", "ü", ""])
    writer.add_token_scores([0.0, -1.0, 2.5])
    writer.add_array("gemma3.nested", [[1, 2], [3]])
    writer.add_add_bos_token(True)
    writer.add_eos_token_id(1)
    if tensors:
        data = np.ones((4, 64), np.float32)
        kind = library.GGMLQuantizationType.Q4_0
        writer.add_tensor("a.weight", library.quants.quantize(data, kind), raw_dtype=kind)
        writer.add_tensor("b.weight", np.ones(5, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_numbers_and_texts_of_a_header_are_read_and_arrays_skipped(tmp_path: Path) -> None:
    facts = gguf.metadata(header(tmp_path / "a.gguf"))
    assert facts["general.architecture"] == "gemma3"
    assert facts["gemma3.rope.scaling.factor"] == 8.0
    assert facts["tokenizer.ggml.add_bos_token"] is True
    assert facts["tokenizer.ggml.eos_token_id"] == 1
    assert "tokenizer.ggml.tokens" not in facts


def test_elements_are_counted_and_a_cut_file_is_one_line(tmp_path: Path) -> None:
    path = header(tmp_path / "a.gguf")
    assert gguf.elements(path) == 4 * 64 + 5
    whole = path.read_bytes()
    for left in (0, 3, 20, 200, len(whole) - 40):
        path.write_bytes(whole[:left])
        with pytest.raises(UsageError, match="truncated or corrupt") as caught:
            gguf.elements(path)
        assert caught.value.where == str(path)
    path.write_bytes(b"NOPE" + whole[4:])
    with pytest.raises(UsageError, match="not a GGUF file"):
        gguf.metadata(path)


def test_positions_of_gemma_3_keep_their_scaling(tmp_path: Path) -> None:
    config = Gemma3TextConfig(num_hidden_layers=6)
    before = copy.deepcopy(config.rope_parameters)
    gguf.complete(config, gguf.metadata(header(tmp_path / "a.gguf")))
    full = config.rope_parameters["full_attention"]
    assert (full["rope_type"], full["factor"]) == ("linear", 8.0)
    assert full["rope_theta"] == before["full_attention"]["rope_theta"]
    assert config.rope_parameters["sliding_attention"] == before["sliding_attention"]


def test_models_without_scaling_and_of_other_families_are_left_alone() -> None:
    for config, facts in ((Gemma3TextConfig(num_hidden_layers=6), {}), (pico.config("llama"), GEMMA_4B)):
        before = config.to_dict()
        gguf.complete(config, facts)
        assert config.to_dict() == before


@pytest.mark.parametrize(
    ("layers", "hidden", "heads", "wanted"), [(34, 2560, 8, 256), (48, 3840, 16, 256), (62, 5376, 32, 168)]
)
def test_queries_of_the_largest_gemma_3_are_scaled_by_its_width(
    layers: int, hidden: int, heads: int, wanted: int
) -> None:
    config = Gemma3TextConfig(num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads)
    gguf.complete(config, GEMMA_4B)
    assert config.query_pre_attn_scalar == wanted


@pytest.mark.parametrize(
    ("facts", "ends", "drawn"),
    [
        ({"tokenizer.ggml.eos_token_id": 1}, [1, 4], None),
        ({"tokenizer.ggml.eos_token_id": 4, "tokenizer.ggml.eot_token_id": 1}, [4, 1], None),
        ({"general.sampling.temp": 1.0, "general.sampling.top_k": 64, "general.sampling.top_p": 0.95}, [4], (64, 0.95)),
    ],
)
def test_turns_end_and_sampling_is_the_files_own(facts: dict[str, Any], ends: list[int], drawn: Any) -> None:
    settings = GenerationConfig()
    gguf.complete_generation(settings, facts, pico.tokenizer())
    assert settings.eos_token_id == ends
    assert (drawn is None) or (settings.top_k, settings.top_p) == drawn


def test_the_licence_of_a_file_is_passed_on(tmp_path: Path) -> None:
    from perpend.export.card import base_front_matter

    text = gguf.front_matter(gguf.metadata(header(tmp_path / "a.gguf")))
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert base_front_matter(tmp_path) == {"license": "gemma", "license_link": "https://ai.google.dev/gemma/terms"}
    assert gguf.front_matter({}) == ""
