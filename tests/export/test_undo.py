"""What an edit took is given back: bit for bit from what was kept, to rounding without it, and never by guesswork."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from export_cases import an_edit, load, snapshot
from safetensors import safe_open
from safetensors.torch import save_file

import pico
from perpend.core.edits import edit_weight
from perpend.core.linear import orthonormalise
from perpend.core.maps import ModuleEdit
from perpend.errors import RunFailed, UsageError
from perpend.export.checkpoint import Checkpoint
from perpend.export.shards import bake, plan
from perpend.export.undo import UNDO, _squeezed, invert, keep, require_invertible, restore
from perpend.models.anatomy import Anatomy

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def edited(tmp_path: Path, family: str, dtype: torch.dtype, edit=None, **how) -> tuple[Path, Path, object]:
    """Save a model, edit it, keep its original; returns both folders and what was kept."""
    source, out = pico.save(family, tmp_path / "source", dtype=dtype, max_shard_size="60KB"), tmp_path / "edited"
    (source / "README.md").write_text("# A base card\n", encoding="utf-8")
    model = load(source, dtype)
    anatomy = Anatomy.of(model)
    edit = edit or an_edit(anatomy, **how)
    patches = plan(Checkpoint(source), edit, anatomy, model)
    result = bake(source, edit, anatomy, out, model)
    kept = keep(source, out, patches, result)
    (out / "README.md").write_text("# The card of an edit\n", encoding="utf-8")
    return source, out, kept


@pytest.mark.parametrize("mode", ["plain", "column", "row"])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gpt2"])
def test_every_file_is_the_original_again(tmp_path, family, dtype, mode):
    source, out, kept = edited(tmp_path, family, DTYPES[dtype], weight=1.0, mode=mode, rank=2)
    assert snapshot(out) != snapshot(source)
    target = tmp_path / "again"
    target.mkdir()
    tensors, missing = restore(out, target)
    assert missing == {}
    assert tensors >= 2 * pico.LAYERS
    assert snapshot(target) == snapshot(source)
    assert kept.corrected < 0.2 * kept.entries or dtype == "float32"


def test_what_is_kept_is_small(tmp_path):
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert UNDO not in {p.name for p in tmp_path.iterdir()}
    part = ModuleEdit(orthonormalise(torch.randn(1, 256, generator=torch.Generator().manual_seed(1))).float(), 1.0)
    from perpend.export.undo import _corrections, _guess, _numbers

    new = edit_weight(weight, part).bfloat16()
    own = _numbers(weight, part, None, bias=False, dtype="BF16")
    fix, count = _corrections(weight, _guess(new, own))
    size = sum(t.numel() * t.element_size() for t in own.values()) + fix.numel()
    assert count < 0.05 * weight.numel()
    assert size < 0.08 * weight.numel() * 2


def test_other_weights_than_those_that_were_kept_with_it_are_refused(tmp_path):
    _, out, _ = edited(tmp_path, "llama", torch.bfloat16)
    shard = next(p for p in sorted(out.glob("model-*.safetensors")))
    for name, entry in Checkpoint(out).tensors.items():
        if name.endswith("o_proj.weight"):
            shard = out / entry.shard
            data = bytearray(shard.read_bytes())
            data[entry.begin] ^= 1
            shard.write_bytes(bytes(data))
            break
    (tmp_path / "again").mkdir()
    with pytest.raises(RunFailed, match="does not come out as the original was"):
        restore(out, tmp_path / "again")


def test_an_edited_folder_that_is_not_whole_is_refused(tmp_path):
    _, out, _ = edited(tmp_path, "llama", torch.bfloat16)
    (out / "tokenizer.json").unlink()
    (tmp_path / "again").mkdir()
    with pytest.raises(RunFailed, match="not whole"):
        restore(out, tmp_path / "again")
    shutil.copyfile(next(out.glob("model-*.safetensors")), out / UNDO)
    with pytest.raises(UsageError, match="not a file that Perpend kept"):
        restore(out, tmp_path / "again")


@pytest.mark.parametrize("mode", ["plain", "column"])
@pytest.mark.parametrize("weight", [-0.5, 0.6, 1.5])
def test_without_it_an_edit_is_inverted_to_rounding(mode, weight):
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(48, 20, generator=generator, dtype=torch.float64)
    old[:, 3] = 0
    part = ModuleEdit(orthonormalise(torch.randn(2, 48, generator=generator)).float(), weight, mode)
    torch.testing.assert_close(invert(edit_weight(old, part), part), old, rtol=1e-10, atol=1e-10)
    single = edit_weight(old.float(), part)
    growth = require_invertible({"m": part})
    assert growth == pytest.approx(1 / abs(1 - weight))
    assert (invert(single, part) - old).norm() < 1e-6 * max(1, growth) * old.norm()


def test_what_cannot_be_inverted_is_named():
    v = torch.eye(4)[:1]
    with pytest.raises(UsageError, match=r"a\.b: a row-wise edit.*--reversible"):
        require_invertible({"a.b": ModuleEdit(v, 0.5, "row")})
    with pytest.raises(UsageError, match=r"weight factor 1: nothing of the direction is left"):
        require_invertible({"a.b": ModuleEdit(v, 1.0)})


def kept_as(folder: Path, change) -> None:
    """Change what is kept in an edited folder."""
    with safe_open(folder / UNDO, framework="pt") as file:
        content = json.loads(file.metadata()["undo"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(content, tensors)
    save_file(tensors, folder / UNDO, metadata={"undo": json.dumps(content)})


HOSTILE = {
    "a file above": lambda content, _: content["files"].append("../stolen"),
    "a file from the root": lambda content, _: content["files"].append("/stolen"),
    "a file further above": lambda content, _: content["files"].append("a/../../stolen"),
    "a file that is no name": lambda content, _: content["files"].append(7),
    "a piece of another file": lambda content, _: content["pieces"][0].update(shard="../stolen"),
    "a piece of no file": lambda content, _: content["pieces"][0].pop("shard"),
    "a piece beyond the end": lambda content, _: content["pieces"][0].update(end=1 << 60),
    "a piece before the beginning": lambda content, _: content["pieces"][0].update(begin=-1),
    "a piece of another shape": lambda content, _: content["pieces"][0].update(shape=[1 << 40, 3]),
    "a piece of unknown numbers": lambda content, _: content["pieces"][0].update(dtype="X9"),
    "a hash of another file": lambda content, _: content["sha256"].update({"../stolen": "00"}),
    "no pieces": lambda content, _: content.pop("pieces"),
    "a list for files": lambda content, _: content.update(files=7),
    "no numbers": lambda _, tensors: tensors.pop("0.fix"),
    "other numbers": lambda _, tensors: tensors.update({"0.fix": torch.zeros(9, dtype=torch.uint8)}),
    "a file that swells": lambda _, tensors: tensors.update({"file.README.md": _squeezed(bytes(65 << 20))}),
    "corrections that swell": lambda _, tensors: tensors.update({"0.fix": _squeezed(bytes(65 << 20))}),
    "a file cut short": lambda _, tensors: tensors.update({"file.README.md": _squeezed(b"text")[:-3].clone()}),
}


def test_kept_numbers_of_a_stranger_are_one_line_and_write_nothing_elsewhere(tmp_path):
    _, out, _ = edited(tmp_path, "llama", torch.bfloat16)
    sound = (out / UNDO).read_bytes()
    (tmp_path / "stolen").write_text("not ours")
    for name, change in HOSTILE.items():
        (out / UNDO).write_bytes(sound)
        kept_as(out, change)
        target = tmp_path / name / "again"
        target.mkdir(parents=True)
        with pytest.raises(UsageError, match=r"original\.undo: not what Perpend kept") as caught:
            restore(out, target)
        assert len(str(caught.value)) < 1000, name
        assert [p.name for p in (tmp_path / name).iterdir()] == ["again"], name
    assert (tmp_path / "stolen").read_text() == "not ours"
