"""A GGUF file is edited: the edit is in it, in its own types, and every other byte of data and metadata is the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from export_cases import an_edit, load, logits

pytest.importorskip("gguf")

import gguf
from gguf_cases import BIASED, save_wide, write_gguf

import pico
from perpend.config import Machine
from perpend.core.leak import realised
from perpend.core.quant import simulate
from perpend.errors import GateFailed, UsageError
from perpend.export.checkpoint import Checkpoint
from perpend.export.gguf import bake_gguf, leak_rows, untouched, values
from perpend.export.gguf_file import layouts
from perpend.export.gguf_from import Source
from perpend.export.shards import bake
from perpend.models.anatomy import Anatomy
from perpend.models.load import load_model
from perpend.models.session import Session

SINGLE = Machine(device="cpu", dtype="float32")


class Case:
    """A pico model as a directory and as a GGUF file, and an edit of it."""

    def __init__(self, family: str, folder: Path, kind: str = "F32", parts: int = 1, **edit: object) -> None:
        self.folder = save_wide(family, folder / "hf")
        self.model = load(self.folder)
        self.source = write_gguf(family, self.model, folder / "model.gguf", kind, parts=parts)
        self.anatomy = Anatomy.of(self.model)
        self.edit = an_edit(self.anatomy, **edit)

    def bake(self, out: Path, **more: object):
        return bake_gguf(self.source, self.edit, self.anatomy, out, **more)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen2", "qwen3_moe", "gpt2"])
@pytest.mark.parametrize("mode", ["plain", "row"])
def test_the_edited_file_answers_as_the_edited_checkpoint(tmp_path, family, mode):
    case = Case(family, tmp_path, mode=mode)
    bake(case.folder, case.edit, case.anatomy, tmp_path / "edited", case.model)
    case.bake(tmp_path / "edited.gguf")
    ours = load_model(str(tmp_path / "edited.gguf"), SINGLE)
    wanted, untouched_logits = logits(load(tmp_path / "edited")), logits(case.model)
    found = logits(ours.model)
    assert (found - wanted).abs().max() < 2e-4 < (untouched_logits - wanted).abs().max()


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_types_stay_and_the_weight_factor_is_there(tmp_path, kind):
    case = Case("llama", tmp_path, kind, weight=0.6)
    seen = []

    def check(files, result, changes):
        seen.append(leak_rows(changes, [*map(layouts_of, files)], case.anatomy))

    result = case.bake(tmp_path / "out.gguf", check=check)
    before, after = layouts_of(case.source), layouts_of(tmp_path / "out.gguf")
    assert {n: (t.type, t.shape) for n, t in after.tensors.items()} == {
        n: (t.type, t.shape) for n, t in before.tensors.items()
    }
    assert len(result.edited) == len(case.edit) == len(seen[0])
    assert max(row.miss for row in seen[0]) < 0.01
    assert not untouched([before], [after], result.edited).differing


def layouts_of(path: Path):
    from perpend.models.gguf import layout

    return layout(path)


def test_rounding_to_the_nearest_loses_it_on_the_lattice(tmp_path):
    case = Case("llama", tmp_path, "Q4_0", weight=0.6)
    for rounding in ("auto", "nearest"):
        case.bake(tmp_path / f"{rounding}.gguf", rounding=rounding)
    old = layouts_of(case.source)
    found = {}
    for rounding in ("auto", "nearest"):
        new = layouts_of(tmp_path / f"{rounding}.gguf")
        found[rounding] = [
            realised(values(old.path, old.tensors[n]), values(new.path, new.tensors[n]), part.directions).weight
            - part.weight
            for n, part in zip(names(case), case.edit.modules.values(), strict=True)
        ]
    assert max(map(abs, found["auto"])) < 0.01
    assert min(found["nearest"]) < -0.1


def names(case: Case) -> list[str]:
    kinds = {"attention": "attn_output", "mlp": "ffn_down"}
    return [f"blk.{w.layer}.{kinds[w.component]}.weight" for w in map(case.anatomy.writer, case.edit.modules)]


def test_all_other_bytes_are_kept_and_provenance_is_added(tmp_path):
    case = Case("llama", tmp_path, "Q4_0")
    said = {"version": "1", "edit.sha256": case.edit.sha256}
    case.bake(tmp_path / "out.gguf", said=said)
    old, new = gguf.GGUFReader(case.source), gguf.GGUFReader(tmp_path / "out.gguf")
    added = {f"perpend.{key}": value for key, value in said.items()}
    skipped = {"GGUF.kv_count"}
    assert {n: f.contents() for n, f in new.fields.items() if n not in skipped} == {
        n: f.contents() for n, f in old.fields.items() if n not in skipped
    } | added
    edited = set(names(case))
    for before, after in zip(old.tensors, new.tensors, strict=True):
        assert before.name == after.name
        assert (before.data.tobytes() == after.data.tobytes()) == (before.name not in edited)
    assert sorted(p.name for p in tmp_path.glob("*.gguf*")) == ["model.gguf", "out.gguf"]
    case.source = tmp_path / "out.gguf"
    case.bake(tmp_path / "twice.gguf", said=said)
    twice = gguf.GGUFReader(tmp_path / "twice.gguf").fields
    assert {"perpend.version", "perpend.2.version"} <= set(twice)


def test_a_type_that_cannot_be_written_becomes_the_named_one(tmp_path, monkeypatch):
    case = Case("llama", tmp_path, "Q5_0", weight=0.6)
    import perpend.export.gguf as module

    told = []
    monkeypatch.setattr(module, "note", told.append)
    monkeypatch.setattr(module, "LATTICES", {k: v for k, v in module.LATTICES.items() if k != "Q5_0"})
    result = case.bake(tmp_path / "out.gguf", fallback="q8_0")
    before, after = layouts_of(case.source), layouts_of(tmp_path / "out.gguf")
    assert {after.tensors[name].type for name in result.edited} == {"Q8_0"}
    assert told == [f"6 tensors of type Q5_0, which cannot be written, become Q8_0, such as {names(case)[0]}"]
    assert not untouched([before], [after], result.edited).differing
    assert load_model(str(tmp_path / "out.gguf"), SINGLE)


def test_a_model_in_parts_stays_in_parts(tmp_path):
    whole = Case("llama", tmp_path / "whole", "Q8_0")
    case = Case("llama", tmp_path, "Q8_0", parts=3)
    assert case.source.name == "model-00001-of-00003.gguf"
    whole.bake(tmp_path / "one.gguf")
    case.bake(tmp_path / "out.gguf", said={"version": "1"})
    found = sorted(tmp_path.glob("out-*.gguf"))
    assert [p.name for p in found] == [f"out-0000{k}-of-00003.gguf" for k in (1, 2, 3)]
    one = gguf.GGUFReader(tmp_path / "one.gguf")
    data = {t.name: t.data.tobytes() for p in found for t in gguf.GGUFReader(p).tensors}
    assert data == {t.name: t.data.tobytes() for t in one.tensors}
    (tmp_path / "model-00002-of-00003.gguf").unlink()
    with pytest.raises(UsageError, match="a part of the model is missing"):
        case.bake(tmp_path / "again.gguf")


def test_the_values_of_the_loaded_model_are_compared(tmp_path):
    case = Case("llama", tmp_path, "Q4_0")
    other = load(save_wide("llama", tmp_path / "other", seed=1))
    with pytest.raises(UsageError, match="does not hold the values"):
        case.bake(tmp_path / "out.gguf", model=other)
    session = Session(load_model(str(case.source), SINGLE), SINGLE)
    case.bake(tmp_path / "out.gguf", model=session.model)


def test_nothing_is_written_by_what_fails_and_a_gate_keeps_its_file(tmp_path):
    case = Case("llama", tmp_path)

    def stop(*_):
        raise GateFailed("no")

    def fall(*_):
        raise RuntimeError

    for error, left in ((RuntimeError, []), (GateFailed, ["out.gguf.partial"])):
        with pytest.raises(error):
            case.bake(tmp_path / "out.gguf", check=stop if error is GateFailed else fall)
        assert [p.name for p in tmp_path.glob("out*")] == left
    with pytest.raises(UsageError, match="an earlier export stopped here; inspect it"):
        case.bake(tmp_path / "out.gguf")


def test_a_vision_tower_is_left_alone(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "mmproj.gguf", "clip")
    writer.add_type("mmproj")
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.raises(UsageError, match="vision tower"):
        layouts(tmp_path / "mmproj.gguf")


def test_a_floating_file_can_be_made_ready_for_q4_0(tmp_path):
    case = Case("llama", tmp_path, "BF16", weight=0.6)
    rows = []
    case.bake(
        tmp_path / "out.gguf",
        rounding="q4_0",
        check=lambda files, result, changes: rows.extend(
            leak_rows(changes, [*map(layouts_of, files)], case.anatomy, rounding="q4_0")
        ),
    )
    assert all(abs(row.quantised - row.asked) < 0.01 for row in rows)
    new = layouts_of(tmp_path / "out.gguf")
    for name in names(case):
        saved = values(new.path, new.tensors[name])
        assert torch.equal(simulate(saved, "q4_0").bfloat16().float(), saved)


@pytest.mark.parametrize("family", BIASED)
@pytest.mark.parametrize("mode", ["plain", "row"])
def test_biases_and_matrices_that_the_model_has_turned_are_edited_too(tmp_path, family, mode):
    case = Case(family, tmp_path, mode=mode)
    bake(case.folder, case.edit, case.anatomy, tmp_path / "edited", case.model)
    model = load(tmp_path / "edited")
    wanted = layouts_of(write_gguf(family, model, tmp_path / "wanted.gguf"))
    edited = Source(Checkpoint(tmp_path / "edited"), model, case.anatomy)
    for name, more in (("ours", {"model": case.model}), ("theirs", {"wanted": edited.wanted})):
        result = case.bake(tmp_path / f"{name}.gguf", **more)
        assert sum(tensor.endswith(".bias") for tensor in result.edited) == len(case.edit)
        assert len(result.edited) == 2 * len(case.edit)
        found, before = layouts_of(tmp_path / f"{name}.gguf"), layouts_of(case.source)
        for key in wanted.tensors:
            asked, made, old = (values(file.path, file.tensors[key]) for file in (wanted, found, before))
            assert torch.allclose(made, asked, atol=1e-5)
            assert torch.equal(made, old) == (key not in result.edited)
            assert key not in result.edited or (asked - old).abs().max() > 1e-4


@pytest.mark.parametrize("family", BIASED)
def test_a_file_with_biases_keeps_its_types_and_its_weight_factors(tmp_path, family):
    case = Case(family, tmp_path, "Q8_0", weight=0.6)
    rows = []
    result = case.bake(
        tmp_path / "out.gguf",
        check=lambda files, result, changes: rows.extend(
            leak_rows(changes, [*map(layouts_of, files)], case.anatomy, case.model)
        ),
    )
    before, after = layouts_of(case.source), layouts_of(tmp_path / "out.gguf")
    kinds = {name: after.tensors[name].type for name in result.edited}
    assert kinds == {name: "F32" if name.endswith(".bias") else "Q8_0" for name in kinds}
    assert not untouched([before], [after], result.edited).differing
    assert len(rows) == len(case.edit)
    assert max(row.miss for row in rows) < 0.01


def test_a_model_without_such_tensors_is_one_line(tmp_path):
    case = Case("llama", tmp_path)
    anatomy = Anatomy.of(pico.build("gpt2"))
    with pytest.raises(UsageError, match=r"has the shape|no tensor holds"):
        bake_gguf(case.source, an_edit(anatomy), anatomy, tmp_path / "out.gguf")
