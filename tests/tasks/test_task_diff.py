"""`perpend diff` and `perpend audit` at the surface: what a person reads, what a program gets, what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from markupsafe import escape

sys.path.insert(0, str(Path(__file__).parent.parent / "report"))

from beside import sound

import perpend
import suspects
from perpend.cli.main import main
from perpend.core.edits import Edit
from perpend.errors import UsageError
from perpend.export.checkpoint import Checkpoint


@pytest.fixture
def pair(tmp_path):
    before = suspects.base()
    weights = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 0.8, 0.6, 0.4, 0.2]
    after = suspects.ablated(before, weights, "column")
    return str(suspects.write(tmp_path / "before", before)), str(suspects.write(tmp_path / "after", after))


def test_a_person_reads_what_was_done_and_how_sure_it_is(pair, capsys):
    assert main(["diff", *pair]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("a directional ablation", "confidence 0.8", "one for all layers", "the norms of columns", "tent"):
        assert words in shown


@pytest.mark.parametrize("kind", ["unrelated", "fine-tune"])
def test_a_remainder_and_a_stranger_are_not_said_to_be_predicted(tmp_path, capsys, kind):
    before = suspects.base()
    after = suspects.base(seed=1) if kind == "unrelated" else suspects.trained(before)
    folders = [str(suspects.write(tmp_path / name, x)) for name, x in (("before", before), ("after", after))]
    out = tmp_path / "found.safetensors"
    assert main(["diff", *folders, "-o", str(out)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    words = "41 of 41 changed matrices have no more in common" if kind == "unrelated" else "no account predicts half"
    assert words in shown
    assert "and predicts" not in shown
    assert not out.exists()


def test_json_holds_the_verdict_the_kernel_and_every_matrix(pair, capsys):
    assert main(["diff", *pair, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["verdict"]["name"] == "ablation"
    assert data["ablation"]["mode"] == "column"
    assert data["kernels"]["mlp.down_proj"]["peak_layer"] == pytest.approx(5, abs=0.1)
    assert {change["layer"] for change in data["changes"]} == set(range(1, 10))


def test_the_recovered_edit_does_to_the_base_what_was_done(pair, tmp_path):
    out = tmp_path / "found.safetensors"
    found = perpend.diff(*pair, output=out)
    assert found.output == str(out)
    edit = Edit.load(out)
    assert len(edit) == 18
    part = edit.modules["model.layers.5.self_attn.o_proj"]
    assert (part.mode, round(part.weight, 2)) == ("column", 1.0)
    assert abs(float(part.directions[0] @ suspects.directions()[0])) > 0.999
    with pytest.raises(UsageError, match="already"):
        perpend.diff(*pair, output=out)


def test_the_report_of_a_recovered_edit_says_what_the_command_says(pair, tmp_path, capsys):
    out = tmp_path / "found.safetensors"
    assert main(["diff", *pair, "-o", str(out)]) == 0
    said = capsys.readouterr().out
    pages = [str(tmp_path / f"found.safetensors.report.{kind}") for kind in ("json", "html")]
    assert [line.partition(" ")[2] for line in said.splitlines() if line.startswith("wrote ")][1:] == pages
    assert main(["diff", *pair, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    data, page = sound(out)
    for part in ("verdict", "tensors", "ablation", "kernels", "changes"):
        assert data["diff"][part] == found[part], part
    assert (data["model"], data["diff"]["other"]) == ("before", "after")
    assert data["about"]["command"] == "perpend diff before after -o found.safetensors"
    edit = Edit.load(out)
    assert data["edit"]["sha256"] == edit.sha256
    assert {m["module"]: m["weight"] for m in data["edit"]["modules"]} == {n: p.weight for n, p in edit.modules.items()}
    verdict = found["verdict"]
    assert f"Confidence {verdict['confidence']:.2f}" in page
    assert f"Passes on {verdict['passed']} of {verdict['told']} changed matrices" in page
    for ground in (*verdict["grounds"], found["ablation"]["scope"], "A directional ablation"):
        assert str(escape(ground)) in page
    for kind, kernel in found["kernels"].items():
        row = (
            f'<td class="name">{kind} <span class="ci">{kernel["kind"]}</span></td><td>{kernel["peak_weight"]:.3g}</td>'
        )
        assert row in page
    assert page.count('<td class="name"><code>') == len(found["changes"])
    assert 'aria-labelledby="schedule-t' in page
    assert "Weight factor λ" in page
    assert "Make it again" in page
    assert "recipe.toml" not in page


@pytest.mark.parametrize("taken", ["found.safetensors.report.json", "found.safetensors.report.html"])
def test_a_report_that_is_there_already_stays(pair, tmp_path, taken, monkeypatch):
    (tmp_path / taken).write_text("mine")
    monkeypatch.setattr("perpend.tasks.diff.examine", lambda *_: pytest.fail("weights were read"))
    for dry_run in (True, False):
        with pytest.raises(UsageError, match=f"{taken}: already exists"):
            perpend.diff(*pair, output=tmp_path / "found.safetensors", dry_run=dry_run)
    assert (tmp_path / taken).read_text() == "mine"


def test_nothing_is_recovered_from_what_is_no_ablation(tmp_path, capsys):
    before = suspects.base()
    folders = [
        str(suspects.write(tmp_path / name, tensors))
        for name, tensors in (("before", before), ("after", suspects.noisy(before)))
    ]
    found = perpend.diff(*folders, output=tmp_path / "found.safetensors")
    assert found.output is None
    assert found.pages == ()
    assert not list(tmp_path.glob("found*"))
    assert main(["diff", *folders, "-o", str(tmp_path / "found.safetensors")]) == 0
    assert "was not written" in capsys.readouterr().err


def test_a_gguf_file_and_a_damaged_checkpoint_are_refused_in_one_line(pair, tmp_path, capsys):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert main(["diff", pair[0], str(tmp_path / "model.gguf")]) == 2
    assert "only safetensors" in capsys.readouterr().err
    weights = Path(pair[1]) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert main(["diff", *pair]) == 2
    assert "truncated" in capsys.readouterr().err


def test_audit_says_what_is_missing(pico_dir, tmp_path, capsys):
    torch.manual_seed(0)
    assert main(["audit", str(pico_dir("llama"))]) == 0
    assert "no direction is avoided" in capsys.readouterr().out


def test_a_dry_run_says_what_would_be_read_and_reads_no_weights(pair, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("perpend.tasks.diff.examine", lambda *_: pytest.fail("weights were read"))
    out = tmp_path / "found.safetensors"
    assert main(["diff", *pair, "-o", str(out), "--dry-run", "--json"]) == 0
    asked = json.loads(capsys.readouterr().out)
    sizes = [sum(t.nbytes for t in Checkpoint(folder).tensors.values()) for folder in pair]
    assert asked["forecast"]["reads"] == asked["forecast"]["bytes_read"] == sum(sizes)
    assert asked["dry_run"]
    assert asked["pages"] == [f"{out}.report.json", f"{out}.report.html"]
    assert not out.exists()
    assert main(["diff", pair[0], str(tmp_path / "none"), "--dry-run"]) == 2
    assert main(["audit", pair[0], "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["forecast"]["reads"] == sizes[0]
