"""Quantised to measure, exported from the weights as they are stored; needs bitsandbytes, which also runs on CPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from task_cases import MACHINE, a_recipe, contents, write_prompts

import perpend
import pico
from perpend.config import Machine
from perpend.data import Prompt
from perpend.errors import MissingExtra, UsageError
from perpend.models.load import load_model
from perpend.models.session import Session
from perpend.tasks.gate import MOVED

KINDS = {"8bit": "Linear8bitLt", "4bit": "Linear4bit"}
LEAST = {"8bit": 0.9, "4bit": 0.6}
"""Cosine of residuals with those of the stored weights, at least: random weights suffer more than trained ones."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 128 channels: bitsandbytes packs blocks of 64."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    pico.build("llama", **sizes).to(torch.bfloat16).save_pretrained(folder)
    pico.tokenizer().save_pretrained(folder)
    return folder


def quantised(kind: str) -> Machine:
    return MACHINE.model_copy(update={"quantization": kind})


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_measured_quantised(model: Path, kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    prompts = [Prompt(text) for text in ("bread and salt", "a river", "the village")]
    sessions = [Session(load_model(model, machine), machine) for machine in (MACHINE, quantised(kind))]
    assert type(sessions[1].anatomy.writers[0].weight(sessions[1].model)).__name__ != "Parameter"
    assert type(sessions[1].model.model.layers[0].mlp.down_proj).__name__ == KINDS[kind]
    assert sessions[0].anatomy == sessions[1].anatomy
    one, other = (torch.cat(list(session.capture(prompts))).flatten(1) for session in sessions)
    close = torch.cosine_similarity(one, other)
    assert bool((close > LEAST[kind]).all())
    assert not torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["plain", "column"])
def test_an_export_is_made_and_proven_on_the_stored_weights(model: Path, kind: str, mode: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    recipe = a_recipe(tmp_path, edit={"mode": mode})
    perpend.fit(str(model), output=tmp_path / "fit", recipe=recipe, machine=quantised(kind))
    edit = tmp_path / "fit"
    made = perpend.apply(str(model), edit=edit, output=tmp_path / "out", recipe=recipe, machine=quantised(kind))
    assert made.gate is not None
    assert (made.gate.prompts, made.gate.same_labels) == (4, 4)
    assert made.gate.worst < 0.05
    assert made.gate.likelihood[0] == pytest.approx(made.gate.likelihood[1], abs=MOVED)
    perpend.apply(str(model), edit=edit, output=tmp_path / "again", recipe=recipe, machine=MACHINE)
    one, two = (contents(tmp_path / name)["model.safetensors"] for name in ("out", "again"))
    assert one == two
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_what_bitsandbytes_warns_of_stays_off_the_terminal(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    target, baseline = write_prompts(tmp_path)
    words = ["fit", str(model), "-o", "out", "--target", target, "--baseline", baseline, "--limit", "4", "--no-filter"]
    line = [sys.executable, "-m", "perpend", *words, "--layer", "1", "--device", "cpu", "--quantization", "4bit", "-q"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "out\n", "")  # it warns when it is first imported


def test_without_bitsandbytes_the_line_to_type_is_said(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r'needs the package bitsandbytes; try: pip install "perpend\[bnb\]"'):
        load_model(model, quantised("4bit"))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "perpend fit THE-UNQUANTISED-MODEL, apply, then GPTQ"),
        ({"quantization_config": {"quant_method": "awq"}, "_name_or_path": "owner/base"}, "perpend fit owner/base"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "its weights are compressed-tensors"),
    ],
)
def test_what_cannot_be_edited_in_place_is_refused_with_the_way_round(
    model: Path, tmp_path: Path, config: dict[str, object], says: str
) -> None:
    for path in model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    own = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(own | config))
    with pytest.raises(UsageError, match=says):
        load_model(tmp_path, MACHINE)
