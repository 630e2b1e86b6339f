"""Export: the saved model is the edited model, everything else is the original, and it appears whole or not at all."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from export_cases import an_edit, hooked, load, logits, snapshot
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import pico
from perpend.core.edits import Edit, ModuleEdit, edit_weight
from perpend.errors import GateFailed, RunFailed, UsageError
from perpend.export import shards, staging
from perpend.export.checkpoint import INDEX, SINGLE, Checkpoint
from perpend.export.shards import bake
from perpend.models.anatomy import Anatomy
from perpend.progress import reporting
from steps import Steps

EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss", "llama4_text", "deepseek_v3")


class Case:
    """A checkpoint, its model in memory, and an edit."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32, **edit: object) -> None:
        self.source, self.model = folder, load(folder, dtype)
        self.anatomy = Anatomy.of(self.model)
        self.edit = an_edit(self.anatomy, **edit)

    def bake(self, out: Path, edit: Edit | None = None, **more: object) -> shards.ExportResult:
        return bake(self.source, self.edit if edit is None else edit, self.anatomy, out, self.model, **more)

    def hooked_logits(self) -> torch.Tensor:
        with hooked(self.model, self.anatomy, self.edit):
            return logits(self.model)


@pytest.fixture
def llama(pico_dir):
    return Case(pico_dir("llama"))


def untouched(source: Path, out: Path, edited: tuple[str, ...]) -> None:
    """Assert that nothing but the data of `edited` differs between two folders, down to the bytes of headers."""
    before, after = snapshot(source), snapshot(out)
    assert set(before) == set(after)
    checkpoint = Checkpoint(source)
    for name in edited:
        entry = checkpoint.tensors[name]
        for files in (before, after):
            whole = files[entry.shard]
            files[entry.shard] = whole[: entry.begin] + b"\0" * entry.nbytes + whole[entry.end :]
    assert before == after


@pytest.mark.parametrize("shape", ["single", "sharded"])
@pytest.mark.parametrize("family", [*pico.FAMILIES, *(f for f in EXPERTS if f not in pico.FAMILIES)])
def test_reloaded_export_answers_as_hooks_do(tmp_path, family, shape):
    size = {} if shape == "single" else {"max_shard_size": "60KB"}
    case = Case(pico.save(family, tmp_path / "source", **size))
    assert (case.source / INDEX).exists() == (shape == "sharded")
    result = case.bake(tmp_path / "out")
    expected = case.hooked_logits()
    found = logits(load(tmp_path / "out"))
    assert (found - logits(case.model)).abs().max() > 1e-2, "the edit does something"
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-5)
    untouched(case.source, tmp_path / "out", result.edited)
    assert not (tmp_path / "out.partial").exists()


def test_an_export_is_a_step_in_bytes_of_what_it_writes(llama, tmp_path):
    with reporting(Steps()) as told:
        llama.bake(tmp_path / "out")
    written = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert [(step.total, step.unit) for step in told.named("export")] == [(written, "B")]


@pytest.mark.parametrize("mode", ["plain", "column", "row"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gpt_oss", "mixtral"])
def test_every_mode_with_biases_and_two_directions(tmp_path, pico_dir, family, mode):
    directory = pico_dir(family) if family in pico.FAMILIES else pico.save(family, tmp_path / "source")
    case = Case(directory, mode=mode, rank=2, weight=1.5)
    case.bake(tmp_path / "out")
    expected = case.hooked_logits()
    torch.testing.assert_close(
        logits(load(tmp_path / "out")), expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-5
    )


@pytest.mark.parametrize("mode", ["plain", "column"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_one_rounding_to_the_tensors_own_dtype(tmp_path, dtype, mode):
    case = Case(pico.save("llama", tmp_path / "source", dtype=dtype), dtype, mode=mode)
    case.bake(tmp_path / "out")
    old, new = load_file(tmp_path / "source" / SINGLE), load_file(tmp_path / "out" / SINGLE)
    for name, part in case.edit.modules.items():
        expected = edit_weight(old[f"{name}.weight"].double(), part).to(dtype)
        found = new[f"{name}.weight"]
        assert found.dtype == dtype
        differing = (found != expected).double().mean()  # float64 to float32 to bfloat16 rounds a few ties twice
        assert differing < 1e-3
        torch.testing.assert_close(found, expected)


def test_bfloat16_logits(tmp_path):
    case = Case(pico.save("llama", tmp_path / "source", dtype=torch.bfloat16))
    case.bake(tmp_path / "out")
    expected, found, old = case.hooked_logits(), logits(load(tmp_path / "out")), logits(case.model)
    assert (found - expected).norm() < 0.02 * (old - expected).norm()


@pytest.mark.parametrize("mode", ["plain", "column", "row"])
def test_blocks_of_columns_are_the_whole_matrix(llama, tmp_path, monkeypatch, mode):
    llama.edit = an_edit(llama.anatomy, mode=mode)
    monkeypatch.setattr(shards, "BLOCK", 1 << 19)
    llama.bake(tmp_path / "whole")
    monkeypatch.setattr(shards, "BLOCK", 5)
    llama.bake(tmp_path / "blocks")
    whole, blocks = load_file(tmp_path / "whole" / SINGLE), load_file(tmp_path / "blocks" / SINGLE)
    for name, tensor in whole.items():
        torch.testing.assert_close(blocks[name], tensor, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
def test_weight_factor_zero_and_empty_edits_write_identical_files(pico_dir, tmp_path, family):
    case = Case(pico_dir(family))
    for name, edit in (("zero", case.edit.scaled(0.0)), ("empty", Edit({}))):
        result = case.bake(tmp_path / name, edit)
        assert result.edited == ()
        assert snapshot(tmp_path / name) == snapshot(case.source)


def test_modules_with_weight_factor_zero_are_left_alone(llama, tmp_path):
    name, part = next(iter(llama.edit.modules.items()))
    rest = {other: ModuleEdit(part.directions, 0.0) for other in llama.edit.modules if other != name}
    assert llama.bake(tmp_path / "out", Edit({name: part, **rest})).edited == (f"{name}.weight",)


def test_vision_tower_and_projector_are_byte_equal(pico_dir, tmp_path):
    case = Case(pico_dir("gemma3"))
    edited = case.bake(tmp_path / "out").edited
    seen = [n for n in Checkpoint(case.source).tensors if "vision" in n or "projector" in n]
    assert seen
    assert not set(edited) & set(seen)
    with safe_open(case.source / SINGLE, "pt") as old, safe_open(tmp_path / "out" / SINGLE, "pt") as new:
        for name in seen:
            assert old.get_tensor(name).numpy().tobytes() == new.get_tensor(name).numpy().tobytes()


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_tied_embeddings_are_not_touched(pico_dir, tmp_path, family):
    case = Case(pico_dir(family))
    assert case.model.get_input_embeddings().weight is case.model.get_output_embeddings().weight
    edited = case.bake(tmp_path / "out").edited
    assert not [name for name in edited if "embed" in name or "head" in name]
    reloaded = load(tmp_path / "out")
    assert torch.equal(reloaded.get_input_embeddings().weight, case.model.get_input_embeddings().weight)
    assert reloaded.get_input_embeddings().weight is reloaded.get_output_embeddings().weight


def _damage(folder: Path, how: str) -> None:
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    data = shard.read_bytes()
    if how == "missing":
        shard.unlink()
    elif how == "truncated":
        shard.write_bytes(data[:-10])
    else:
        shard.write_bytes(data[:8] + b"\xff" + data[9:])


@pytest.mark.parametrize("how", ["missing", "truncated", "corrupt"])
def test_damaged_shard_is_one_line_and_nothing_is_written(tmp_path, how):
    case = Case(pico.save("llama", tmp_path / "source", max_shard_size="60KB"))
    _damage(case.source, how)
    with pytest.raises(UsageError) as error:
        case.bake(tmp_path / "out")
    assert "\n" not in str(error.value)
    assert "model-00002-of-00004.safetensors" in str(error.value)
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize(("error", "left"), [(KeyboardInterrupt, []), (RuntimeError, ["out.partial"])])
def test_an_export_that_fails_leaves_only_the_partial_folder_and_ctrl_c_nothing(
    llama, tmp_path, monkeypatch, error, left
):
    calls = []

    def stop(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise error

    monkeypatch.setattr(shards, "edit_in_place", stop)
    with pytest.raises(error):
        llama.bake(tmp_path / "out")
    assert os.listdir(tmp_path) == left
    monkeypatch.undo()
    if left:
        with pytest.raises(UsageError) as caught:
            llama.bake(tmp_path / "out")
        assert f"try: rm -r {tmp_path / 'out.partial'}" in str(caught.value)
        shutil.rmtree(tmp_path / "out.partial")
    llama.bake(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_failed_check_keeps_the_partial_folder(llama, tmp_path):
    seen = []

    def check(folder, result, patches):
        assert result.changed == (SINGLE,)
        seen.append(sorted(os.listdir(folder)))
        raise GateFailed("a module misses its weight factor")

    with pytest.raises(GateFailed):
        llama.bake(tmp_path / "out", check=check)
    assert seen == [sorted(os.listdir(llama.source))]
    assert os.listdir(tmp_path) == ["out.partial"]


def test_files_that_the_check_adds_come_along(llama, tmp_path):
    llama.bake(tmp_path / "out", check=lambda folder, *_: (folder / "README.md").write_text("card") and None)
    assert (tmp_path / "out" / "README.md").read_text() == "card"


def test_full_disk_is_one_line_and_keeps_the_partial_folder(llama, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full, raising=False)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(RunFailed, match=r"out\.partial: cannot be written: No space left on device"):
        llama.bake(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out.partial"]


def test_free_disk_is_checked_first(llama, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UsageError, match="disk space"):
        llama.bake(tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_copy_without_kernel_support_is_the_same_copy(llama, tmp_path, monkeypatch):
    llama.bake(tmp_path / "fast")
    monkeypatch.delattr(os, "copy_file_range")
    llama.bake(tmp_path / "slow")
    assert snapshot(tmp_path / "fast") == snapshot(tmp_path / "slow")


def _writing(folder: Path, ready, done) -> None:
    with staging.staged(folder, 0):
        ready.set()
        done.wait(20)


def test_two_processes_on_one_output_are_kept_apart(llama, tmp_path):
    context = multiprocessing.get_context("spawn" if os.name == "nt" else "fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_writing, args=(tmp_path / "out", ready, done))
    other.start()
    try:
        assert ready.wait(20)
        with pytest.raises(UsageError, match="another process is writing this output"):
            llama.bake(tmp_path / "out")
    finally:
        done.set()
        other.join(20)
    assert other.exitcode == 0


def test_output_must_be_new_or_empty(llama, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        llama.bake(tmp_path / "out")
    assert snapshot(tmp_path) == {"out/notes.txt": b"mine"}
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        llama.bake(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    llama.bake(tmp_path / "empty")
    assert (tmp_path / "empty" / SINGLE).exists()


def test_output_in_or_around_the_source_is_refused(tmp_path):
    case = Case(pico.save("llama", tmp_path / "a" / "source"))
    for out in (case.source, case.source / "out", tmp_path / "a", tmp_path / "a" / "." / "source"):
        with pytest.raises(UsageError, match="in the source or around it"):
            case.bake(out)


def test_hub_snapshot_becomes_real_files(tmp_path, pico_dir):
    blobs, source = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    source.mkdir(parents=True)
    for number, path in enumerate(sorted(pico_dir("llama").iterdir())):
        shutil.copy(path, blobs / str(number))
        (blobs / str(number)).chmod(0o444)
        (source / path.name).symlink_to(Path("../../blobs") / str(number))
    before = snapshot(blobs)
    Case(source).bake(tmp_path / "out")
    assert not [p for p in (tmp_path / "out").iterdir() if p.is_symlink()]
    assert snapshot(blobs) == before


def test_quantised_checkpoints_are_refused_with_the_reason(tmp_path):
    case = Case(pico.save("llama", tmp_path / "source"))
    config = json.loads((case.source / "config.json").read_text())
    for method in ("fp8", "gptq", "awq", "bitsandbytes"):
        text = json.dumps({**config, "quantization_config": {"quant_method": method}})
        (case.source / "config.json").write_text(text)
        with pytest.raises(UsageError, match=rf"quantised \({method}\).*would undo or distort the edit"):
            case.bake(tmp_path / "out")
    (case.source / "config.json").write_text(json.dumps(config))
    tensors = load_file(case.source / SINGLE)
    packed = "model.layers.1.mlp.down_proj.weight"
    save_file({**tensors, packed: tensors[packed].to(torch.float8_e4m3fn)}, case.source / SINGLE)
    with pytest.raises(UsageError, match=r"layers\.1\.mlp\.down_proj\.weight' has dtype F8_E4M3"):
        case.bake(tmp_path / "out")
    assert os.listdir(tmp_path) == ["source"]


def test_no_unedited_copy_is_left_beside_the_edited_weights(tmp_path):
    case = Case(pico.save("llama", tmp_path / "source"))
    tensors = load_file(case.source / SINGLE)
    save_file({f"mirror.{n}": t for n, t in tensors.items()}, case.source / "consolidated.safetensors")
    save_file({"mtp.weight": torch.ones(3, 3)}, case.source / "mtp.safetensors")
    (case.source / "original").mkdir()
    (case.source / "original" / "consolidated.00.pth").write_bytes(b"pickle")
    (case.source / "pytorch_model.bin").write_bytes(b"pickle")
    (case.source / "training_args.bin").write_bytes(b"pickle")
    (case.source / INDEX).write_text("{}")
    result = case.bake(tmp_path / "out")
    assert set(result.left_out) == {
        "consolidated.safetensors",
        "original/consolidated.00.pth",
        "pytorch_model.bin",
        INDEX,
    }
    written = snapshot(tmp_path / "out")
    assert {"mtp.safetensors", "training_args.bin"} <= set(written)
    assert not set(written) & set(result.left_out)


def test_model_that_is_not_the_checkpoints_is_refused(pico_dir, tmp_path):
    case = Case(pico_dir("llama"))
    case.model = pico.build("llama", seed=1)
    with pytest.raises(UsageError, match="has another shape or other values"):
        case.bake(tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_unknown_writer_names_the_nearest(llama, tmp_path):
    part = next(iter(llama.edit.modules.values()))
    with pytest.raises(UsageError, match=r"did you mean 'model\.layers\.1\.mlp\.down_proj'"):
        llama.bake(tmp_path / "out", Edit({"model.layers.1.mlp.downproj": part}))


def test_overflow_of_the_tensors_dtype_fails_the_run(tmp_path):
    case = Case(pico.save("llama", tmp_path / "source", dtype=torch.float16), torch.float16)
    with pytest.raises(RunFailed, match="not finite"):
        case.bake(tmp_path / "out", case.edit.scaled(1e7))
    assert not (tmp_path / "out").exists()


def test_result_is_json(llama, tmp_path):
    result = llama.bake(tmp_path / "out")
    assert json.loads(json.dumps(result.to_json()))["files"] == len(os.listdir(llama.source))
    assert len(result.edited) == len(llama.edit)


@pytest.mark.parametrize(("room", "workers"), [(3.1, 2), (2.9, 1), (0.0, 1)])
def test_one_matrix_is_edited_at_a_time_where_memory_does_not_hold_two(llama, tmp_path, monkeypatch, room, workers):
    largest = max(llama.anatomy.writer(name).weight(llama.model).nbytes for name in llama.edit.modules)
    asked, running, most, both = [], [], [], threading.Barrier(2)
    inner = shards._overwrite

    def free(device, memory):
        asked.append((device.type, memory))
        return int(room * largest)

    def watched(*args):
        running.append(1)
        most.append(len(running))
        if workers == 2:
            both.wait(20)  # breaks, and fails the export, where the other is not let begin
        try:
            return inner(*args)
        finally:
            running.pop()

    llama.bake(tmp_path / "whole")
    monkeypatch.setattr(shards, "free_memory", free)
    monkeypatch.setattr(shards, "_overwrite", watched)
    with reporting(Steps()) as steps:
        llama.bake(tmp_path / "out", memory=7)
    assert asked == [("cpu", 7)]
    assert max(most) == workers
    assert any("memory is short" in line for line in steps.notes) == (workers == 1)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")
