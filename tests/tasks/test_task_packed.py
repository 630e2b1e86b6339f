"""FP8 and MXFP4 checkpoints, as DeepSeek V3 and gpt-oss are published: measured as they are, exported in bfloat16."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from task_cases import MACHINE, a_recipe, contents, names
from torch import Tensor

import packed
import perpend
import pico
from perpend.config import Machine
from perpend.core.edits import Edit, edit_weight
from perpend.data import Prompt
from perpend.errors import UsageError
from perpend.models import quantised
from perpend.models.load import load_model
from perpend.models.session import Session
from perpend.tasks.space import require_room

SAVERS = {"mxfp4": packed.save_mxfp4, "fp8": packed.save_fp8}
Case = tuple[str, Path, dict[str, Tensor]]
PROMPTS = [Prompt(text) for text in ("bread and salt", "a river", "the village")]


@pytest.fixture(scope="module", params=SAVERS)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, dict[str, Tensor]]:
    """A packed checkpoint and the numbers that it stands for, rounded once to bfloat16."""
    folder, plain = SAVERS[request.param](tmp_path_factory.mktemp("packed") / "model")
    return request.param, folder, {name: tensor.bfloat16() for name, tensor in plain.items()}


@pytest.fixture
def twin(case: Case, tmp_path: Path) -> Path:
    """The same model with plain weights."""
    _, folder, plain = case
    (tmp_path / "twin").mkdir()
    for path in folder.iterdir():
        (tmp_path / "twin" / path.name).write_bytes(path.read_bytes())
    save_file({k: v.contiguous() for k, v in plain.items()}, tmp_path / "twin" / packed.WEIGHTS, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "twin" / "config.json").write_text(json.dumps(config))
    return tmp_path / "twin"


@pytest.mark.parametrize("offload", ["none", "disk"])
def test_it_is_measured_as_the_numbers_it_stands_for(case: Case, twin: Path, offload: str) -> None:
    machine = MACHINE.model_copy(update={"offload": offload})
    own, other = (Session(load_model(path, machine), machine) for path in (case[1], twin))
    assert own.anatomy == other.anatomy
    assert torch.equal(torch.cat(list(own.capture(PROMPTS))), torch.cat(list(other.capture(PROMPTS))))


def test_memory_is_asked_for_what_it_takes_when_it_is_widened(case: Case, tmp_path: Path) -> None:
    method, folder, plain = case
    size = sum(tensor.nbytes for tensor in plain.values())
    assert quantised.wide_size(folder, method) == size > (folder / packed.WEIGHTS).stat().st_size
    asked = quantised.settings(Machine(), method, torch.device("cpu"), "m")
    assert quantised.in_memory(folder, 7, asked) == size
    assert quantised.in_memory(folder, 7, None) == 7
    asked = perpend.run(str(folder), output=tmp_path / "out", recipe=a_recipe(tmp_path), machine=MACHINE, dry_run=True)
    assert asked.forecast.reads < size
    assert (asked.forecast.memory, asked.forecast.writes) == (size, size)


def test_an_export_is_made_and_proven_in_bfloat16(case: Case, tmp_path: Path) -> None:
    method, folder, plain = case
    made = perpend.run(str(folder), output=tmp_path / "out", recipe=a_recipe(tmp_path), machine=MACHINE)
    assert (made.gate.prompts, made.gate.same_labels) == (4, 4)
    assert made.gate.worst < 0.05
    after, edit = load_file(tmp_path / "out" / packed.WEIGHTS), Edit.load(tmp_path / "out" / "edit.safetensors")
    assert set(after) == set(plain)
    edited = {name for name in plain if not torch.equal(after[name], plain[name])}
    assert edited == set(made.export.edited)
    layer1 = "model.layers.1.self_attn.o_proj"
    exact = edit_weight(plain[f"{layer1}.weight"].double(), edit.modules[layer1])
    assert torch.allclose(after[f"{layer1}.weight"].double(), exact, atol=0, rtol=2**-8)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    card = " ".join((tmp_path / "out" / "README.md").read_text().split())
    assert f"The weights of the base model are {quantised.WIDENED[method]}" in card
    assert names(tmp_path) == {"out", "target.txt", "baseline.txt"}
    assert (
        made.export.bytes
        == (tmp_path / "out" / packed.WEIGHTS).stat().st_size
        + sum(path.stat().st_size for path in folder.iterdir() if path.name not in (packed.WEIGHTS, "config.json"))
        + (tmp_path / "out" / "config.json").stat().st_size
    )
    wide = MACHINE.model_copy(update={"dtype": "float32"})  # the numbers of the codes, not yet rounded
    recipe = a_recipe(tmp_path, export={"gate_prompts": 0})
    perpend.apply(str(folder), edit=tmp_path / "out", output=tmp_path / "again", recipe=recipe, machine=wide)
    one, two = (contents(tmp_path / name)[packed.WEIGHTS] for name in ("out", "again"))
    assert one == two


def test_it_is_the_export_of_the_plain_twin(case: Case, twin: Path, tmp_path: Path) -> None:
    recipe = a_recipe(tmp_path)
    for name, source in (("own", case[1]), ("other", twin)):
        perpend.fit(str(source), output=tmp_path / f"{name}-fit", recipe=recipe, machine=MACHINE)
        perpend.apply(str(source), edit=tmp_path / f"{name}-fit", output=tmp_path / name, machine=MACHINE)
    own, other = (load_file(tmp_path / name / packed.WEIGHTS) for name in ("own", "other"))
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)
    assert load_model(tmp_path / "own", MACHINE).dtype == torch.bfloat16


def test_shards_and_what_lies_beside_them(tmp_path: Path) -> None:
    folder, plain = packed.save_mxfp4(tmp_path / "model")
    whole = load_file(folder / packed.WEIGHTS)
    (folder / packed.WEIGHTS).unlink()
    shards: dict[str, dict[str, Tensor]] = {"model-1.safetensors": {}, "model-2.safetensors": {}}
    for number, (name, tensor) in enumerate(sorted(whole.items())):
        shards[f"model-{1 + number % 2}.safetensors"][name] = tensor  # blocks in one, their scales in the other
    for shard, held in shards.items():
        save_file(held, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for beside in ("original/model.safetensors", "metal/model.bin"):
        (folder / beside).parent.mkdir()
        (folder / beside).write_bytes((folder / "model-1.safetensors").read_bytes())
    (folder / "LICENSE").write_text("a licence")
    made = perpend.run(str(folder), output=tmp_path / "out", recipe=a_recipe(tmp_path), machine=MACHINE)
    assert set(made.export.left_out) == {"original/model.safetensors", "metal/model.bin"}
    assert {"LICENSE", *shards} <= names(tmp_path / "out")
    assert not (tmp_path / "out" / "LICENSE").is_symlink()
    after = {name: t for shard in shards for name, t in load_file(tmp_path / "out" / shard).items()}
    assert set(after) == set(plain)
    written = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(written["weight_map"]) == set(plain)
    assert written["metadata"]["total_size"] == sum(t.nbytes for t in after.values())
    assert json.loads((tmp_path / "out" / "report.json").read_text())["export"]["left_out"] == made.export.left_out


@pytest.mark.parametrize("block", [(24, 20), (16, 16), (7, 300)])
def test_blocks_are_cut_short_as_the_configuration_has_them(tmp_path: Path, block: tuple[int, int]) -> None:
    folder, plain = packed.save_fp8(tmp_path / "model", block=block)
    model = load_model(folder, Machine(dtype="float32")).model.state_dict()
    found = [name for name in plain if name in model]
    assert len(found) > 10
    assert all(torch.equal(model[name], plain[name].float()) for name in found)


def test_what_no_export_can_be_made_from_is_refused_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pico.save("llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps({**config, "_name_or_path": "owner/base"}))
    monkeypatch.setattr("perpend.tasks.setup.load_model", lambda *given: pytest.fail("loaded"))
    for task in (perpend.run, perpend.search):
        with pytest.raises(UsageError, match=r"its weights are bitsandbytes.*perpend run owner/base --quantization"):
            task(str(folder), output=tmp_path / "out", recipe=a_recipe(tmp_path), machine=MACHINE)
    assert not (tmp_path / "out").exists()


def test_disk_for_the_wide_copy_is_asked_for_first(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("perpend.tasks.space.require_space", lambda out, need: asked.append(need))
    require_room(str(case[1]), tmp_path / "out", MACHINE)
    assert asked == [2 * sum(tensor.nbytes for tensor in case[2].values())]


def test_a_form_that_is_not_known_is_not_widened(tmp_path: Path) -> None:
    folder, _ = packed.save_fp8(tmp_path / "model")
    held = load_file(folder / packed.WEIGHTS)
    lost = "model.layers.1.self_attn.o_proj.weight"
    del held[f"{lost}_scale_inv"]
    save_file(held, folder / packed.WEIGHTS, metadata={"format": "pt"})
    from perpend.export.widen import widen

    with pytest.raises(UsageError, match=rf"'{lost}' of F8_E4M3 is packed in a form that is not known"):
        widen(folder, tmp_path / "wide", "fp8")
