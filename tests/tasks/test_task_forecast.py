"""A dry run says what a task would read, write and take, and is quick about it whatever the size of the model."""

from __future__ import annotations

import json
import os
import re
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from task_cases import MACHINE, a_recipe, contents
from torch import nn

import perpend
import pico
from perpend.config import Machine
from perpend.models import offload, places
from perpend.models.anatomy import Anatomy
from perpend.models.load import skeleton
from perpend.models.stand_in import in_memory
from perpend.refs import ModelRef
from perpend.tasks import forecast as module
from perpend.tasks.forecast import Forecast

Dirs = Callable[[str], Path]

TEXT_27B = {
    "model_type": "gemma3_text",
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "num_hidden_layers": 62,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "query_pre_attn_scalar": 168,
    "sliding_window": 1024,
    "vocab_size": 262208,
}
SIGHT_27B = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "image_size": 896,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
    "vision_use_head": False,
}
SHAPE_27B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "dtype": "bfloat16",
    "text_config": TEXT_27B,
    "vision_config": SIGHT_27B,
}
PARAMETERS_27B = 27_432_406_640
GB = 10**9


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the shape of Gemma 3 27B whose file has the right size and holds nothing."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "config.json").write_text(json.dumps(SHAPE_27B))
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(2 * PARAMETERS_27B)
    return folder


def storage(model: nn.Module) -> int:
    """Bytes that the parameters of a model take, those that are shared once."""
    found = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(found.values())


def planned(task: str, *args: Any, **kwargs: Any) -> Forecast:
    """The forecast of a dry run."""
    found = getattr(perpend, task)(*args, **kwargs, dry_run=True).forecast
    assert found is not None
    return found


def test_a_27b_is_planned_in_seconds_and_in_little_memory(large: Path, tmp_path: Path) -> None:
    bare = skeleton(ModelRef.parse(str(large)).resolve(), str(large))
    assert sum(p.numel() for p in bare.parameters()) == PARAMETERS_27B
    assert storage(in_memory(bare)) < 0.2 * GB, "of 110 GB in float32"
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    anatomy = Anatomy.of(bare)
    assert time.process_time() - began < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20, "KiB"
    assert (anatomy.n_layers, len(anatomy.writers), anatomy.gaps) == (62, 124, ())


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with 1 TB free."""
    for one in (module, places):
        monkeypatch.setattr(one, "free_memory", lambda device, most=None: most or 1000 * GB)


def test_the_plan_for_a_27b_keeps_to_the_memory_it_is_given(roomy: None, large: Path, tmp_path: Path) -> None:
    machine = Machine(device="cpu", memory="24GB")
    found = planned("run", str(large), output=tmp_path / "out", recipe=a_recipe(tmp_path), machine=machine)
    size = 2 * PARAMETERS_27B + (large / "config.json").stat().st_size
    assert (found.reads, found.writes, found.parameters) == (size, size, PARAMETERS_27B)
    assert found.peak_memory is not None
    assert 20 * GB < found.peak_memory <= 24 * GB
    assert found.peak_memory + found.read_when_needed > size, "what is not kept is read"
    assert found.bytes_read == found.read_when_needed * found.passes + 4 * size
    assert (found.edited_modules, found.edited_parameters) == (124, 62 * (5376 * 4096 + 5376 * 21504))


def test_what_fits_is_read_once(roomy: None, large: Path, tmp_path: Path) -> None:
    size = 2 * PARAMETERS_27B + (large / "config.json").stat().st_size
    whole = planned("fit", str(large), output=tmp_path / "out", recipe=a_recipe(tmp_path), machine=MACHINE)
    assert (whole.read_when_needed, whole.passes, whole.bytes_read) == (0, 0, size)


def test_what_does_not_fit_is_said(
    roomy: None, large: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from perpend.cli.main import main

    line = ["fit", str(large), "-o", str(tmp_path / "out"), "--dry-run", "--device", "cpu", "--no-filter"]
    assert main([*line, "--memory", "1GB"]) == 0
    said = capsys.readouterr()
    assert "would be refused: two layers and what is computed take" in said.err
    assert main([*line, "--memory", "24GB"]) == 0
    assert "read when needed" in capsys.readouterr().out


def test_the_time_is_that_of_reading_and_of_computing_as_measured_now(
    pico_dir: Dirs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = MACHINE.model_copy(update={"offload": "disk"})
    monkeypatch.setattr(module, "_seconds", lambda parameters, tokens, device: 100.0)
    for rate in (1e5, 1e4):
        monkeypatch.setattr(module, "reading_rate", lambda ref, rate=rate: rate)
        model, out = str(pico_dir("llama")), tmp_path / "out"
        found = planned("fit", model, output=out, recipe=a_recipe(tmp_path), machine=machine)
        assert found.bytes_read is not None
        assert found.bytes_read > found.reads
        assert found.seconds == pytest.approx(100 + found.bytes_read / rate, abs=0.1)


def test_the_time_of_a_checkpoint_is_that_of_writing_as_measured_now(
    pico_dir: Dirs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_seconds", lambda parameters, tokens, device: 100.0)
    monkeypatch.setattr(module, "reading_rate", lambda ref: 1e12)
    where = []
    monkeypatch.setattr(module, "writing_rate", lambda output, size: where.append(output) or 1e3)
    asked = {"output": tmp_path / "out", "recipe": a_recipe(tmp_path), "machine": MACHINE}
    found = planned("run", str(pico_dir("llama")), **asked)
    assert found.writes is not None
    assert found.seconds == pytest.approx(100 + found.writes / 1e3, abs=0.1)
    assert planned("fit", str(pico_dir("llama")), **asked).seconds == pytest.approx(100, abs=0.1)
    assert where == [tmp_path / "out"]


def test_a_rate_of_writing_is_of_flushed_bytes_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def slow(descriptor: int) -> None:
        written.append(os.fstat(descriptor))
        time.sleep(0.1)

    monkeypatch.setattr(os, "fsync", slow)
    for size, most in ((1000, 1000), (1 << 40, 64 << 20)):
        assert 0 < module.writing_rate(tmp_path / "deep" / "out", size) <= most / 0.1
        assert written[-1].st_size == most
        assert written[-1].st_dev == tmp_path.stat().st_dev
    assert not list(tmp_path.iterdir())


def test_of_a_model_that_is_not_here_all_sizes_are_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from perpend.cli.main import main
    from perpend.cli.views import UNKNOWN

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert main(["run", "org/none", "-o", str(tmp_path / "out"), "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["forecast"]
    assert (found["reads"], found["writes"], found["seconds"]) == (None, None, None)
    assert main(["run", "org/none", "-o", str(tmp_path / "out"), "--dry-run"]) == 0
    assert re.search(rf"writes {UNKNOWN}, .* free", " ".join(capsys.readouterr().out.split()))


def test_a_plan_is_what_is_then_done(pico_dir: Dirs, tmp_path: Path) -> None:
    model, recipe = str(pico_dir("llama")), a_recipe(tmp_path)
    fit = planned("fit", model, output=tmp_path / "fit", recipe=recipe, machine=MACHINE)
    assert not (tmp_path / "fit").exists()
    made = perpend.fit(model, output=tmp_path / "fit", recipe=recipe, machine=MACHINE)
    assert made.fitted is not None
    assert fit.edited_modules == len(made.fitted.edit)
    apply = planned("apply", model, edit=tmp_path / "fit", output=tmp_path / "out", recipe=recipe, machine=MACHINE)
    assert apply.edited_modules == len(made.fitted.edit)
    assert not (tmp_path / "out").exists()
    perpend.apply(model, edit=tmp_path / "fit", output=tmp_path / "out", recipe=recipe, machine=MACHINE)
    source, out = contents(Path(model)), contents(tmp_path / "out")
    assert apply.reads == sum(map(len, source.values()))
    assert apply.writes == sum(len(out[name]) for name in source)


def test_the_bytes_that_are_read_when_needed_are_counted_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"  # most of which is layers, as of a large one
    pico.build("llama", num_hidden_layers=8).save_pretrained(model)
    pico.tokenizer().save_pretrained(model)
    opened: list[offload.Pages] = []

    class Counted(offload.Pages):
        def __init__(self, loader: Any) -> None:
            super().__init__(loader)
            opened.append(self)

    monkeypatch.setattr(offload, "Pages", Counted)
    machine = MACHINE.model_copy(update={"offload": "disk"})
    recipe = a_recipe(tmp_path)
    asked = planned("fit", str(model), output=tmp_path / "fit", recipe=recipe, machine=machine)
    perpend.fit(str(model), output=tmp_path / "fit", recipe=recipe, machine=machine)
    read = sum(pages.bytes_read for pages in opened)
    assert asked.bytes_read is not None
    assert 0.6 * asked.bytes_read <= read <= 1.1 * asked.bytes_read
