"""`perpend export gguf`: an edited checkpoint as a GGUF file, by the base's file or by llama.cpp's converter."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from task_cases import MACHINE, a_recipe

pytest.importorskip("gguf")
sys.path.extend(str(Path(__file__).parent.parent / name) for name in ("export", "report"))

import gguf
from beside import sound
from export_cases import an_edit, load, logits
from gguf_cases import save_wide, write_gguf

import perpend
import perpend.export.llama_cpp as tools
from perpend.cli.main import main
from perpend.core.quant import simulate
from perpend.errors import GateFailed, RunFailed, UsageError
from perpend.export.gguf import values
from perpend.models.anatomy import Anatomy
from perpend.models.gguf import layout
from perpend.models.load import load_model
from perpend.progress import reporting
from steps import Steps

CONVERTER = """
import pathlib, shutil, sys
assert sys.argv[2] == "--outfile" and sys.argv[4] == "--outtype"
shutil.copy(pathlib.Path(__file__).with_name(sys.argv[5] + ".gguf"), sys.argv[3])
"""
"""A stand-in for llama.cpp's converter: its arguments, and files that were made before."""


PAGES = ["out.gguf.report.html", "out.gguf.report.json"]


class Case:
    """A model, an edited output of it, and a recipe."""

    def __init__(self, folder: Path, family: str = "llama", kind: str = "Q4_0", mode: str = "plain") -> None:
        self.folder, self.family = folder, family
        self.model = load(save_wide(family, folder / "hf"))
        self.base = write_gguf(family, self.model, folder / "base.gguf", kind)
        an_edit(Anatomy.of(self.model), 0.7, mode).save(folder / "edit.safetensors")
        recipe = a_recipe(folder, export={"gate_prompts": 0})
        perpend.apply(
            str(folder / "hf"),
            edit=folder / "edit.safetensors",
            output=folder / "out",
            recipe=recipe,
            machine=MACHINE,
        )

    def llama_cpp(self, of: str = "out") -> Path:
        """Make a folder with a converter in it that gives a checkpoint as it is."""
        folder = self.folder / "llama.cpp"
        folder.mkdir()
        for kind in ("bf16", "q8_0"):
            write_gguf(self.family, load(self.folder / of), folder / f"{kind}.gguf", kind.upper())
        (folder / tools.CONVERTER).write_text(CONVERTER, encoding="utf-8")
        return folder


@pytest.fixture
def case(tmp_path):
    return Case(tmp_path)


@pytest.mark.parametrize(("family", "kind", "mode"), [("llama", "F32", "column"), ("qwen3_moe", "F32", "plain")])
def test_a_copy_of_the_bases_file_answers_as_the_edited_checkpoint(tmp_path, family, kind, mode):
    case = Case(tmp_path, family, kind, mode)
    made = perpend.export_gguf(tmp_path / "out", output=tmp_path / "out.gguf", base=case.base)
    wanted, before = logits(load(tmp_path / "out")), logits(case.model)
    ours = load_model(str(tmp_path / "out.gguf"), MACHINE.model_copy(update={"dtype": "float32"}))
    found = logits(ours.model)
    assert (found - wanted).abs().max() < 1e-3
    assert (before - wanted).abs().max() > 0.01
    assert max(row.miss for row in made.leak) < 0.02
    assert not made.untouched.differing
    assert made.types[kind] > 6


def test_the_types_of_the_base_stay_and_the_edit_is_kept_on_its_lattice(case, tmp_path):
    made = perpend.export_gguf(tmp_path / "out", output=tmp_path / "out.gguf", base=case.base)
    old, new = gguf.GGUFReader(case.base), gguf.GGUFReader(tmp_path / "out.gguf")
    assert [(t.name, t.tensor_type) for t in old.tensors] == [(t.name, t.tensor_type) for t in new.tensors]
    assert max(row.miss for row in made.leak) < 0.02
    assert made.rounding["type"] == "q4_0"
    assert new.fields["perpend.base"].contents() == "hf"
    assert sorted(p.name for p in tmp_path.glob("*.gguf*")) == ["base.gguf", "out.gguf", *PAGES]


def test_the_report_of_a_copy_says_its_types_its_base_and_every_weight_factor(case, tmp_path, capsys):
    asked = ["export", "gguf", str(tmp_path / "out"), "-o", str(tmp_path / "out.gguf"), "--base", str(case.base)]
    assert main([*asked, "--dry-run", "--json"]) == 0
    pages = [str(tmp_path / f"out.gguf.report.{kind}") for kind in ("json", "html")]
    assert json.loads(capsys.readouterr().out)["pages"] == pages
    assert not list(tmp_path.glob("out.gguf*"))
    assert main([*asked, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    data, page = sound(tmp_path / "out.gguf")
    assert data["gate"]["leak"] == made["leak"]
    assert data["gate"]["untouched"] == made["untouched"]
    assert data["file"]["types"] == made["types"]
    assert data["file"]["rounding"] == made["rounding"]
    assert (data["file"]["base"], data["file"]["names"]) == ("base.gguf", ["out.gguf"])
    assert data["file"]["bytes"] == (tmp_path / "out.gguf").stat().st_size
    assert data["about"]["command"] == "perpend export gguf out -o out.gguf --base base.gguf"
    assert (data["about"]["model"]["id"], data["about"]["model"]["dtype"]) == ("hf", "Q4_0")
    assert page.count("<tr><td><code>model.layers.") == len(made["leak"])
    for said in ("Proven by its weights alone", "everything else from</dt><dd>base.gguf", "so that the edit is kept"):
        assert said in page
    assert f"{made['untouched']['tensors']} other tensors and all metadata are byte-equal to the base’s" in page
    (tmp_path / "out.gguf").unlink()
    assert main(asked) == 2
    assert "out.gguf.report.json: already exists" in capsys.readouterr().err


def test_a_report_goes_on_with_what_the_output_said_of_its_fit_and_its_replies(pico_dir, tmp_path):
    recipe = a_recipe(tmp_path, export={"gate_prompts": 0})
    model = write_gguf("llama", load(save_wide("llama", tmp_path / "hf")), tmp_path / "base.gguf", "F32")
    run = perpend.run(str(tmp_path / "hf"), output=tmp_path / "out", recipe=recipe, machine=MACHINE)
    given = {"edit": tmp_path / "out", "recipe": recipe, "machine": MACHINE}
    perpend.export_gguf(tmp_path / "out", output=tmp_path / "one.gguf", base=model)
    perpend.apply(str(model), output=tmp_path / "two.gguf", **given)
    perpend.apply(str(tmp_path / "hf"), output=tmp_path / "three", **given)
    perpend.export_gguf(tmp_path / "three", output=tmp_path / "four.gguf", base=model)
    whole = json.loads((tmp_path / "out" / "report.json").read_text())
    for name in ("one.gguf", "two.gguf", "three", "four.gguf"):
        data, page = sound(tmp_path / name)
        assert data["earlier"]["accepted"] == whole["report"]["accepted"], name
        assert data["earlier"]["drift"]["mean"] == run.report.drift.mean
        assert (data["earlier"]["task"], data["earlier"]["model"]) == ("run", "hf")
        assert data["fit"]["diagnostics"] == whole["fit"]["diagnostics"]
        assert "It was not measured again here" in page
        assert "Separation by layer" in page
        assert "prompt" not in json.dumps(data["earlier"])
    (tmp_path / "out" / "report.json").write_text("{")
    perpend.export_gguf(tmp_path / "out", output=tmp_path / "five.gguf", base=model)
    assert "earlier" not in sound(tmp_path / "five.gguf")[0]


def test_the_file_of_another_model_is_no_base(case, tmp_path):
    other = write_gguf("llama", load(save_wide("llama", tmp_path / "other", seed=1)), tmp_path / "other.gguf", "Q8_0")
    with pytest.raises(UsageError, match="was before the edit"):
        perpend.export_gguf(tmp_path / "out", output=tmp_path / "out.gguf", base=other)
    assert not list(tmp_path.glob("out.gguf*"))


def test_the_converter_is_called_and_its_file_proven(case, tmp_path, capsys):
    folder = case.llama_cpp()
    asked = ["export", "gguf", str(tmp_path / "out"), "-o", str(tmp_path / "out.gguf"), "--llama-cpp", str(folder)]
    assert main([*asked, "--type", "q8_0", "--dry-run", "--json"]) == 0
    step = shlex.split(json.loads(capsys.readouterr().out)["commands"][0])
    assert step[1:3] == [str(folder / tools.CONVERTER), str(tmp_path / "out")]
    assert step[-2:] == ["--outtype", "q8_0"]
    assert not (tmp_path / "out.gguf").exists()
    assert main([*asked, "--type", "q8_0"]) == 0
    shown = capsys.readouterr()
    assert "--outtype q8_0" in " ".join(shown.out.split())
    assert "Weight factors on the saved file" in shown.out
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert "perpend.recipe" in fields
    assert sorted(p.name for p in tmp_path.iterdir() if "gguf" in p.name) == ["base.gguf", "out.gguf", *PAGES]


def test_a_converted_file_that_is_not_the_edit_stays_partial(case, tmp_path):
    with pytest.raises(GateFailed, match="miss their weight factor"):
        perpend.export_gguf(tmp_path / "out", output=tmp_path / "out.gguf", llama_cpp=case.llama_cpp(of="hf"))
    assert sorted(p.name for p in tmp_path.glob("*out.gguf*")) == ["out.gguf.partial"]


def test_q4_0_is_made_by_the_quantiser_from_bf16(case, tmp_path):
    folder = case.llama_cpp()
    binary = folder / "build" / "bin" / tools.QUANTISER
    binary.parent.mkdir(parents=True)
    binary.write_text(f'#!/bin/sh\ncp "$1" "$2" && echo $3 > {folder}/asked\n')
    binary.chmod(0o755)
    made = perpend.export_gguf(tmp_path / "out", output=tmp_path / "out.gguf", type="q4_0", llama_cpp=folder)
    assert len(made.commands) == 2
    data, page = sound(tmp_path / "out.gguf")
    assert data["file"]["commands"][1] == f"{tools.QUANTISER} .out.gguf.converted.bf16 .out.gguf.converted q4_0"
    assert f"{tools.QUANTISER} .out" in page
    assert "untouched" not in data["gate"]
    assert "Nothing else changed" not in page
    assert (folder / "asked").read_text() == "q4_0\n"
    assert made.leak
    binary.write_text("#!/bin/sh\necho it is broken >&2\nexit 3\n")
    with pytest.raises(RunFailed, match="exit code 3: it is broken"):
        perpend.export_gguf(tmp_path / "out", output=tmp_path / "again.gguf", type="q4_0", llama_cpp=folder)
    assert not list(tmp_path.glob("*again*"))


BAR = """
import os, sys, time
assert "TQDM_DISABLE" not in os.environ
print("INFO: reading", flush=True)
for part in (10, 55, 100):
    print(f"\\rWriting: {part:3}%|###   | 1/2 [00:01<00:01]", end="", file=sys.stderr, flush=True)
    time.sleep(0.05)
"""
COUNT = """
print("main: quantising")
for k in range(1, 5):
    print(f"[{k:4}/   4]  blk.{k}.weight - [ 128, 128], type = bf16, size = 1 MB", flush=True)
"""


def test_what_the_converter_and_the_quantiser_say_of_their_progress_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    (tmp_path / tools.CONVERTER).write_text(BAR)
    (tmp_path / "count.py").write_text(COUNT)
    with reporting(Steps()) as told:
        tools.call([[sys.executable, str(tmp_path / name)] for name in (tools.CONVERTER, "count.py")])
    assert [(step.label, step.total, sum(step.moves)) for step in told.steps] == [
        ("convert", None, 0),
        ("convert", 100, 100),
        ("quantise", None, 0),
        ("quantise", 4, 4),
    ]
    assert told.steps[1].moves[0] == 10
    assert len(told.notes) == 2


def test_a_converter_that_is_interrupted_is_ended(tmp_path):
    """It would go on writing a file that nobody wants."""
    (tmp_path / tools.CONVERTER).write_text("import time; print('5%|', flush=True); time.sleep(60)")
    started = time.monotonic()

    class Interrupting(Steps):
        def advance(self, task, amount=1):
            raise KeyboardInterrupt

    with reporting(Interrupting()), pytest.raises(KeyboardInterrupt):
        tools.call([[sys.executable, str(tmp_path / tools.CONVERTER)]])
    assert time.monotonic() - started < 30


def test_without_a_converter_the_commands_are_said(case, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"convert_hf_to_gguf.py is not here.*try: python convert_hf_to_gguf.py .*"):
        perpend.export_gguf(tmp_path / "out", output=tmp_path / "out.gguf")
    with pytest.raises(UsageError, match="a checkout of llama"):
        perpend.export_gguf(tmp_path / "out", output=tmp_path / "out.gguf", llama_cpp=tmp_path)


def test_a_missing_original_leaves_the_weight_factors_unmeasured(case, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("perpend.tasks.export_gguf.note", told.append)
    (tmp_path / "hf").rename(tmp_path / "elsewhere")
    made = perpend.export_gguf(tmp_path / "out", output=tmp_path / "out.gguf", llama_cpp=case.llama_cpp())
    assert made.leak == ()
    assert "the original is not here" in told[-1]
    data, page = sound(tmp_path / "out.gguf")
    assert "gate" not in data
    assert "The weight factors were not measured" in page


def test_what_cannot_be_is_refused(case, tmp_path):
    for asked, said in (
        ({"output": "out2"}, "not the name of a GGUF file"),
        ({"type": "q3_k"}, "unknown type"),
        ({"type": "q8_0", "base": "base.gguf"}, "types are those of the base"),
        ({"source": "hf"}, "not an output of perpend"),
    ):
        given = {"source": "out", "output": "o.gguf", **asked}
        source = tmp_path / given.pop("source")
        given = {k: v if k == "type" else tmp_path / v for k, v in given.items()}
        with pytest.raises(UsageError, match=said):
            perpend.export_gguf(source, **given)


@pytest.mark.parametrize("kind", ["q4_0", "q8_0"])
def test_the_library_quantises_as_it_is_simulated(tmp_path, kind):
    """Against llama.cpp's own `llama_model_quantize`, where the package llama-cpp-python is installed."""
    pytest.importorskip("llama_cpp")
    model = load(save_wide("llama", tmp_path / "hf"))
    source = write_gguf("llama", model, tmp_path / "a.gguf", "BF16")
    step = [sys.executable, "-c", tools.PROGRAM, str(source), str(tmp_path / "b.gguf"), kind]
    subprocess.run(step, check=True, capture_output=True)
    before, after = layout(source), layout(tmp_path / "b.gguf")
    quantised = [name for name, tensor in after.tensors.items() if tensor.type == kind.upper()]
    assert "blk.0.ffn_down.weight" in quantised
    for name in quantised:
        expected = simulate(values(source, before.tensors[name]), kind)
        assert torch.equal(values(tmp_path / "b.gguf", after.tensors[name]), expected), name
