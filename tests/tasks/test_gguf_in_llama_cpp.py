"""Edited GGUF files in llama.cpp itself: loaded, in one file or in parts, they compute what transformers does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from task_cases import MACHINE, a_recipe

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")
sys.path.insert(0, str(Path(__file__).parents[1] / "export"))
sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

from export_cases import an_edit, load
from gguf_cases import save_wide, write_gguf
from llama_cpp_greedy import greedy

import perpend
from perpend.models.anatomy import Anatomy
from perpend.models.load import load_model

TOKENS = [[2, 40, 41, 42, 200, 77, 5, 13], [2, 30, 31]]


@torch.no_grad()
def gap(model, replies: list[list[int]]) -> float:
    """How far below its first choice a model in transformers puts the tokens of replies, at most."""
    worst = 0.0
    for prompt, reply in zip(TOKENS, replies, strict=True):
        ids = torch.tensor([prompt + reply], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().cpu()
        chosen = logits.gather(-1, torch.tensor(reply)[:, None])[:, 0]
        worst = max(worst, float((logits.amax(-1) - chosen).max()))
    return worst


@pytest.mark.parametrize(("family", "parts"), [("llama", 1), ("qwen2", 1), ("llama", 2)])
def test_an_edited_file_says_in_llama_cpp_what_it_says_in_transformers(tmp_path, family, parts):
    model = load(save_wide(family, tmp_path / "hf"))
    source = write_gguf(family, model, tmp_path / "model.gguf", parts=parts)
    an_edit(Anatomy.of(model), 0.9).save(tmp_path / "edit.safetensors")
    recipe = a_recipe(tmp_path, export={"gate_prompts": 0})
    given = {"edit": tmp_path / "edit.safetensors", "recipe": recipe, "machine": MACHINE}
    perpend.apply(str(source), output=tmp_path / "out.gguf", **given)
    perpend.apply(str(tmp_path / "hf"), output=tmp_path / "out", **given)
    written = sorted(tmp_path.glob("out*.gguf"))
    assert len(written) == parts
    edited = load_model(str(tmp_path / "out"), MACHINE).model
    replies, before = (greedy(str(path), TOKENS, [], tokens=8) for path in (written[0], source))
    assert gap(edited, replies) < 0.1 < gap(model, replies)
    assert gap(model, before) < 0.1 < gap(edited, before)
