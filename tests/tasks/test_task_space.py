"""A disk without room for the output is met before a model is loaded, fetched or answered by."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from task_cases import MACHINE, a_recipe, contents

import perpend
from perpend.config import Machine
from perpend.core.edits import Edit, ModuleEdit
from perpend.errors import UsageError
from perpend.export.staging import HEADROOM
from perpend.models import load
from perpend.tasks import space
from perpend.tasks.output import require_free
from perpend.tasks.space import require_room
from perpend.teaching import shipped

Free = Callable[[int], None]


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Free:
    """Set how many bytes are free on every disk, beside what card and report take."""
    return lambda count: monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=HEADROOM + count))


def size(folder: Path) -> int:
    return sum(map(len, contents(folder).values()))


@pytest.fixture
def asked(tmp_path: Path, pico_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Call a task on a pico model, with an output two folders deep; a model that is read ends the test."""
    model, recipe, edit = pico_dir("llama"), a_recipe(tmp_path), tmp_path / "edit.safetensors"
    Edit({"model.layers.0.mlp.down_proj": ModuleEdit(torch.eye(1, 32), 0.7, "plain")}).save(edit)
    monkeypatch.setattr(shipped, "require", lambda: None)
    monkeypatch.setattr(shipped, "base", lambda: model)
    monkeypatch.setattr(load, "check_files", lambda source, where: pytest.fail("the model is read"))

    def call(task: str) -> Any:
        own = {"apply": {"edit": edit}}.get(task, {})
        given = {"output": tmp_path / "deep" / "out", "recipe": recipe, "machine": MACHINE, **own}
        return getattr(perpend, task)(*([] if task == "demo" else [str(model)]), **given)

    return call


@pytest.mark.parametrize("task", ["run", "search", "apply", "demo", "organism"])
def test_room_for_the_output_is_looked_for_before_anything_is_read(task, asked, free, pico_dir, tmp_path):
    before = contents(tmp_path)
    free((3 if task == "demo" else 1) * size(pico_dir("llama")) - 1)
    with pytest.raises(UsageError, match=r"needs .* of disk space, .* are free; try: .*-o/--output") as caught:
        asked(task)
    assert caught.value.where == str(tmp_path)
    assert contents(tmp_path) == before
    free((3 if task == "demo" else 1) * size(pico_dir("llama")))
    with pytest.raises(pytest.fail.Exception, match="the model is read"):
        asked(task)


@pytest.mark.parametrize("task", ["fit", "eval"])
def test_a_full_disk_is_met_by_tasks_that_copy_no_model(task, asked, free, tmp_path):
    before = contents(tmp_path)
    free(-1)
    with pytest.raises(UsageError, match=r"needs 67\.1 MB of disk space, 67\.1 MB are free"):
        asked(task)
    assert contents(tmp_path) == before


def test_an_original_is_restored_only_where_it_has_room(free, pico_dir, tmp_path):
    free(size(pico_dir("llama")) - 1)
    with pytest.raises(UsageError, match="of disk space"):
        perpend.apply(str(pico_dir("llama")), output=tmp_path / "out", machine=MACHINE, undo=True)


def test_a_gguf_file_is_written_out_before_it_is_edited_or_copied_as_it_is(smollm2, free, tmp_path):
    written = 2 * space.elements(smollm2)
    for output, machine, need in (
        ("out", Machine(), 2 * written),
        ("out", Machine(dtype="float32"), 4 * written),
        ("out.gguf", Machine(), smollm2.stat().st_size),
    ):
        free(need)
        require_room(str(smollm2), tmp_path / output, machine)
        free(need - 1)
        with pytest.raises(UsageError, match="of disk space"):
            require_room(str(smollm2), tmp_path / output, machine)


def sibling(name: str, size: int | None) -> SimpleNamespace:
    return SimpleNamespace(rfilename=name, size=size)


def test_what_is_not_here_yet_needs_room_in_the_cache_too(free, tmp_path, monkeypatch):
    asked = []

    def info(self: Any, name: str, *, revision: str | None, files_metadata: bool, timeout: float) -> SimpleNamespace:
        asked.append((name, revision, files_metadata))
        wanted = [sibling("model-1.safetensors", 5000), sibling("config.json", 7), sibling("tokenizer.model", None)]
        return SimpleNamespace(siblings=[*wanted, sibling("original/model.safetensors", 9000), sibling("x.bin", 9000)])

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    free(2 * 5007)
    require_room("owner/m@v1", tmp_path / "out", MACHINE)
    assert asked == [("owner/m", "v1", True)]
    free(2 * 5007 - 1)
    with pytest.raises(UsageError, match="of disk space"):
        require_room("owner/m@v1", tmp_path / "out", MACHINE)
    assert contents(tmp_path) == {}


def test_nothing_is_refused_where_nobody_says_how_large_a_model_is(free, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    free(0)
    require_room("owner/m", tmp_path / "out", MACHINE)


def test_the_nearest_folder_that_is_there_is_asked_for_its_disk(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: seen.append(path) or SimpleNamespace(free=1 << 40))
    require_free(tmp_path / "a" / "b" / "out")
    (tmp_path / "out").mkdir()
    require_free(tmp_path / "out")
    assert seen == [tmp_path, tmp_path / "out"]
