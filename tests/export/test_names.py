"""Writers are found in files that name, split and turn their tensors otherwise than the loaded model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from export_cases import load
from safetensors.torch import load_file, save_file

import pico
from perpend.errors import UsageError
from perpend.export.checkpoint import SINGLE, Checkpoint
from perpend.export.names import Locator
from perpend.models.anatomy import Anatomy


def matrices(folder: Path, model: torch.nn.Module) -> dict[str, list[torch.Tensor]]:
    """Every writer's matrices and biases as the located bytes say, after comparing them with the model."""
    checkpoint, anatomy = Checkpoint(folder), Anatomy.of(model)
    locator, found = Locator(checkpoint, model, anatomy), {}
    for writer in anatomy.writers:
        pieces = locator.matrices(writer)
        views = [p.view(checkpoint.read(p.entry, p.begin, p.end)) for p in pieces]
        experts = [None] if writer.experts is None else list(range(writer.experts))
        assert [p.expert for p in pieces] == experts
        for view, expert in zip(views, experts, strict=True):
            assert torch.equal(view, writer.matrix(writer.weight(model), expert))
        bias = writer.bias_of(model)
        for piece in locator.biases(writer):
            own = bias if piece.expert is None else bias[piece.expert]
            assert torch.equal(piece.view(checkpoint.read(piece.entry, piece.begin, piece.end)), own)
        assert len(locator.biases(writer)) == (0 if bias is None else len(pieces))
        found[writer.name] = views
    return found


@pytest.mark.parametrize("family", [*pico.FAMILIES, *pico.EXOTIC])
def test_every_family(tmp_path, family):
    assert matrices(pico.save(family, tmp_path), pico.build(family))


def rewritten(family: str, folder: Path, change, **config: object) -> tuple[Path, torch.nn.Module]:
    """Save a pico model with its tensors renamed or reshaped by `change(name, tensor) -> (name, tensor)`."""
    model = pico.build(family, **config)
    folder.mkdir(exist_ok=True)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    save_file(dict(change(name, tensor) for name, tensor in state.items()), folder / SINGLE)
    return folder, model


def test_fused_experts_in_the_file_as_in_memory_when_square(tmp_path):
    folder, model = rewritten("mixtral", tmp_path, lambda n, t: (n, t), intermediate_size=pico.HIDDEN)
    assert matrices(folder, model)


def test_fused_square_experts_the_other_way_round_are_told_by_their_values(tmp_path):
    def turn(name, tensor):
        return name, tensor.transpose(1, 2).contiguous() if name.endswith("experts.down_proj") else tensor

    folder, model = rewritten("mixtral", tmp_path, turn, intermediate_size=pico.HIDDEN)
    assert matrices(folder, model)


def test_names_without_the_prefix_of_the_task(tmp_path):
    folder, model = rewritten("gpt2", tmp_path, lambda n, t: (n.removeprefix("transformer."), t))
    assert matrices(folder, model)


def test_names_that_agree_from_the_layer_on(tmp_path):
    folder, model = rewritten("llama", tmp_path, lambda n, t: (f"other.tower.{n.removeprefix('model.')}", t))
    assert matrices(folder, model)


def test_two_towers_with_the_same_names_are_told_by_their_values(tmp_path):
    model = pico.build("llama")
    towers = {"talker": pico.build("llama", seed=5), "thinker": model}
    state = {f"{t}.{n.removeprefix('model.')}": v.clone() for t, m in towers.items() for n, v in m.state_dict().items()}
    save_file(state, tmp_path / SINGLE)
    locator = Locator(Checkpoint(tmp_path), model, anatomy := Anatomy.of(model))
    assert all(locator.matrices(w)[0].entry.name.startswith("thinker.") for w in anatomy.writers)


def test_ten_experts_and_more_keep_their_order(tmp_path):
    folder = tmp_path / "m"
    model = pico.build("mixtral", num_local_experts=12)
    model.save_pretrained(folder)
    locator = Locator(Checkpoint(folder), model, anatomy := Anatomy.of(model))
    writer = next(w for w in anatomy.writers if w.experts)
    assert [p.entry.name.split(".")[-3] for p in locator.matrices(writer)] == [str(e) for e in range(12)]


def test_a_model_loaded_in_another_dtype_is_still_recognised(tmp_path):
    folder = pico.save("gemma3", tmp_path / "m")
    model = load(folder, torch.bfloat16)
    locator = Locator(Checkpoint(folder), model, anatomy := Anatomy.of(model))
    assert all(locator.matrices(w)[0].entry.dtype == "F32" for w in anatomy.writers)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_a_model_without_values_is_matched_by_name_and_shape(pico_dir, family):
    model, checkpoint = load(pico_dir(family)), Checkpoint(pico_dir(family))
    anatomy = Anatomy.of(model)
    known = [Locator(checkpoint, model, anatomy).matrices(w) for w in anatomy.writers]
    blind = Locator(checkpoint, model.to("meta"), anatomy)
    assert [blind.matrices(w) for w in anatomy.writers] == known


def test_missing_tensor_is_named(tmp_path):
    folder = pico.save("llama", tmp_path)
    tensors = load_file(folder / SINGLE)
    gone = "model.layers.2.self_attn.o_proj.weight"
    del tensors[gone]
    save_file(tensors, folder / SINGLE)
    with pytest.raises(UsageError, match=f"no tensor holds the parameter '{gone}'"):
        matrices(folder, pico.build("llama"))
