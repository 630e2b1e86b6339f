"""The index of a checkpoint: whole files are indexed exactly, damaged or hostile ones give one line."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from perpend.errors import PerpendError, RunFailed, UsageError
from perpend.export.checkpoint import INDEX, SINGLE, Checkpoint, files
from perpend.models.headers import read_header, read_range

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def write(path: Path, header: object, data: bytes = b"\1" * 32) -> Path:
    """Write a safetensors file by hand; `header` may be anything that JSON or bytes can hold."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def sharded(folder: Path) -> Path:
    """Write two shards and their index."""
    save_file({"x": torch.arange(6.0).view(2, 3)}, folder / "model-00001-of-00002.safetensors")
    save_file({"y": torch.ones(3, dtype=torch.bfloat16)}, folder / "model-00002-of-00002.safetensors")
    mapping = {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": mapping}))
    return folder


def one_line(error: pytest.ExceptionInfo[PerpendError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
def test_ranges_hold_what_the_reference_reader_reads(pico_dir, family):
    checkpoint = Checkpoint(pico_dir(family))
    with safe_open(pico_dir(family) / SINGLE, "pt") as reference:
        assert set(reference.keys()) == set(checkpoint.tensors)
        for name, entry in checkpoint.tensors.items():
            tensor = reference.get_tensor(name)
            assert tuple(tensor.shape) == entry.shape
            assert bytes(checkpoint.read(entry)) == tensor.contiguous().numpy().tobytes()


def test_sharded(tmp_path):
    checkpoint = Checkpoint(sharded(tmp_path))
    assert checkpoint.shards == ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    assert checkpoint.tensors["y"].dtype == "BF16"
    assert struct.unpack("<2f", checkpoint.read(checkpoint.tensors["x"], 8, 16)) == (2.0, 3.0)


def test_single_file_comes_before_an_index(tmp_path):
    sharded(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / SINGLE)
    assert set(Checkpoint(tmp_path).tensors) == {"x"}


def test_missing_shard(tmp_path):
    (sharded(tmp_path) / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UsageError) as error:
        Checkpoint(tmp_path)
    assert "model-00002-of-00002.safetensors: missing file" in one_line(error)


@pytest.mark.parametrize("kept", [0, 7, 8, 20, -1])
def test_truncated_shard(tmp_path, kept):
    shard = sharded(tmp_path) / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:kept])
    with pytest.raises(UsageError) as error:
        Checkpoint(tmp_path)
    assert "model-00001-of-00002.safetensors: truncated" in one_line(error)


def _with(**changes: object) -> dict[str, object]:
    return {**GOOD, "a": {**GOOD["a"], **changes}}


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"null",
        b'{"a": 1}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 32]}}',
        b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 32]}}',
        b'{"a": {}, "a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}',
        {"__metadata__": {"format": 1}, **GOOD},
        {"__metadata__": [], **GOOD},
        _with(dtype="F31"),
        _with(dtype=["F32"]),
        _with(shape=[2, 4]),
        _with(shape=[2, -3]),
        _with(shape=[True, 6]),
        _with(shape=[2.0, 3]),
        _with(shape="23"),
        _with(shape=[2, 3] + [1] * 63),
        _with(shape=[1 << 62] * 64),
        _with(data_offsets=[0, 24, 24]),
        _with(data_offsets=[24, 0]),
        _with(data_offsets=[-8, 16]),
        _with(data_offsets=[8, 32]),
        _with(data_offsets=[1 << 70, (1 << 70) + 24]),
        _with(shape=[2, 2], data_offsets=[0, 16]),
        {"b": {"dtype": "U8", "shape": [31], "data_offsets": [0, 31]}},
    ],
)
def test_corrupt_header_is_one_line(tmp_path, header):
    with pytest.raises(UsageError) as error:
        read_header(write(tmp_path / SINGLE, header))
    assert str(tmp_path / SINGLE) in one_line(error)


def test_header_length_is_bounded_before_it_is_read(tmp_path):
    path = tmp_path / SINGLE
    for length in (100_000_001, 1 << 40, (1 << 64) - 1):
        path.write_bytes(struct.pack("<Q", length) + b"{}")
        with pytest.raises(UsageError, match="corrupt: claims a header"):
            read_header(path)


def test_something_that_is_no_file(tmp_path):
    (tmp_path / SINGLE).mkdir()
    with pytest.raises(UsageError, match="not a regular file"):
        Checkpoint(tmp_path)


def test_git_lfs_pointer_says_what_to_type(tmp_path):
    (tmp_path / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UsageError, match="try: git lfs pull"):
        Checkpoint(tmp_path)


def test_terminal_escapes_in_a_tensor_name_are_not_printed(tmp_path):
    header = {"\x1b[2J": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}}
    with pytest.raises(UsageError) as error:
        read_header(write(tmp_path / SINGLE, header, b"1234"))
    assert "\x1b" not in str(error.value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_damage_ends_in_anything_but_one_line(tmp_path, data):
    whole = bytearray(write(tmp_path / SINGLE, GOOD).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / SINGLE).write_bytes(bytes(whole))
    message, entries = "", []
    try:
        entries = read_header(tmp_path / SINGLE)
    except UsageError as error:
        message = str(error)
    assert "\n" not in message
    assert all(0 <= entry.begin <= entry.end <= len(whole) for entry in entries)


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "a\\b.safetensors", "model.bin", 3, ""]
)
def test_index_names_plain_files_only(tmp_path, shard):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(UsageError, match="not the name of a safetensors file"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', "{" * 20000])
def test_index_that_is_no_index(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(UsageError) as error:
        Checkpoint(tmp_path)
    assert INDEX in one_line(error)


def test_index_that_disagrees_with_the_shards(tmp_path):
    index = sharded(tmp_path) / INDEX
    mapping = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**mapping, "x": mapping["y"]}}))
    with pytest.raises(UsageError, match="tensor 'x' is not in"):
        Checkpoint(tmp_path)
    save_file({"y": torch.ones(3), "x": torch.ones(1)}, tmp_path / "model-00002-of-00002.safetensors")
    index.write_text(json.dumps({"weight_map": mapping}))
    with pytest.raises(UsageError, match="tensor 'x' is also in"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "reason"), [("pytorch_model.bin", "pickled"), ("m.gguf", "GGUF"), ("notes.txt", "no weights")]
)
def test_folder_without_safetensors(tmp_path, name, reason):
    (tmp_path / name).touch()
    with pytest.raises(UsageError, match=reason):
        Checkpoint(tmp_path)


def test_quantisation_is_found_where_configurations_put_it(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / SINGLE)
    assert Checkpoint(tmp_path).quantisation() is None
    for config in (
        {"quantization_config": {"quant_method": "gptq"}},
        {"text_config": {"quantization_config": {"quant_method": "gptq"}}},
        {"compression_config": {"quant_method": "gptq"}},
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert Checkpoint(tmp_path).quantisation() == "gptq"
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": None}))
    assert Checkpoint(tmp_path).quantisation() is None


def test_file_that_shrinks_after_the_check(tmp_path):
    with pytest.raises(RunFailed, match="changed while it was read"):
        read_range(write(tmp_path / SINGLE, GOOD), 0, 10_000)


def test_files_follow_a_hub_snapshot_and_refuse_what_would_hang(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    for folder in (blobs, snapshot, snapshot / "extra", snapshot / ".cache"):
        folder.mkdir()
    (blobs / "f00").write_text("{}")
    (snapshot / "config.json").symlink_to(blobs / "f00")
    (snapshot / "extra" / "a.txt").write_text("a")
    (snapshot / ".cache" / "b.txt").write_text("b")
    assert [str(f.relative_to(snapshot)) for f in files(snapshot)] == ["config.json", "extra/a.txt"]
    (blobs / "f00").unlink()
    with pytest.raises(UsageError, match="leads nowhere"):
        list(files(snapshot))
    (snapshot / "config.json").unlink()
    os.mkfifo(snapshot / "pipe")
    with pytest.raises(UsageError, match="not a regular file"):
        list(files(snapshot))
    (snapshot / "pipe").unlink()
    shutil.rmtree(snapshot / "extra")
    (snapshot / "extra").symlink_to(blobs)
    with pytest.raises(UsageError, match="symlink to a folder"):
        list(files(snapshot))
