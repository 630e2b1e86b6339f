"""The main job writes everything or nothing, and what it writes is proven on the saved file."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from task_cases import MACHINE, a_recipe, contents, counting, names, stopping, tensors
from transformers.models.llama import modeling_llama

import perpend.tasks.apply
import perpend.tasks.gate
import perpend.tasks.run
import perpend.tasks.setup as setup
import pico
from perpend.config import Recipe, load
from perpend.core.edits import Edit
from perpend.core.maps import edit_weight
from perpend.errors import GateFailed, Interrupted, RunFailed, UsageError
from perpend.export import shards
from perpend.models.load import load_model
from perpend.models.memory import release
from perpend.models.session import Session
from perpend.refs import ModelRef, Resolved
from perpend.tasks.apply import apply
from perpend.tasks.card import card_facts
from perpend.tasks.fit import fit
from perpend.tasks.gate import Gate, require_same
from perpend.tasks.portable import without_folders
from perpend.tasks.recipes import pinned
from perpend.tasks.run import run

WRITTEN = {"edit.safetensors", "recipe.toml", "report.json", "report.html", "README.md"}


@pytest.fixture(scope="module")
def done(tmp_path_factory, pico_dir) -> tuple[Path, perpend.tasks.run.Run, dict]:
    """A folder with the output of a whole run in `out`, its result, and what it told on the way."""
    folder, told = tmp_path_factory.mktemp("run"), {}
    made = run(
        str(pico_dir("llama")), output=folder / "out", recipe=a_recipe(folder), machine=MACHINE, tell=told.__setitem__
    )
    return folder, made, told


def test_everything_is_written_and_nothing_is_left_behind(done, pico_dir):
    folder, made, told = done
    assert names(folder) == {"out", "target.txt", "baseline.txt"}
    assert names(folder / "out") == WRITTEN | names(pico_dir("llama"))
    data = json.loads((folder / "out" / "report.json").read_text())
    assert list(told) == ["model", "fit", "report", "gate"]
    for name in ("fit", "report", "gate"):
        assert data[name] == json.loads(json.dumps(told[name]))
    assert data["gate"]["prompts"] == 4
    assert made.gate.worst < 0.01
    assert not made.gate.untouched.differing
    assert 0 < made.gate.kl < 1e-5  # hooks and weights round differently in float32, and no more than that


def test_the_card_names_no_folder_and_the_recipe_says_what_was_typed(done, pico_dir):
    out = done[0] / "out"
    card, written = (out / "README.md").read_text(), load(out / "recipe.toml")
    assert str(done[0]) not in card
    assert str(pico_dir("llama").parent) not in card
    assert 'target = "target.txt"' in card
    assert f'id = "{pico_dir("llama").name}"' in card
    assert "between the two prompt sets" in " ".join(card.split())
    assert "pipeline_tag: text-generation" in card.split("---")[1]
    assert (written.model.id, written.prompts.target) == (str(pico_dir("llama")), str(done[0] / "target.txt"))


@pytest.mark.parametrize(("family", "sees"), [("gemma3", True), ("gemma3_text", False)])
def test_the_card_is_told_whether_the_model_sees(pico_dir, tmp_path, family, sees):
    session = Session(load_model(pico_dir(family)), MACHINE)
    gate, export = SimpleNamespace(worst=0.0, leak=()), SimpleNamespace(changed=())
    facts = card_facts(session, Edit({}), Recipe(), gate, export, tmp_path / "out")
    assert facts.sees == sees


@pytest.fixture
def gated(pico_dir, monkeypatch) -> Path:
    """A Llama whose second layer passes its MLP through a gate, which no edit of the matrix can account for."""
    plain = modeling_llama.LlamaDecoderLayer.__init__

    def gate(self, config, layer_idx):
        plain(self, config, layer_idx)
        if layer_idx == 1:
            self.mlp.register_forward_hook(lambda module, given, made: made * torch.sigmoid(given[0]))

    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "__init__", gate)
    return pico_dir("llama")


def test_the_card_of_a_partial_edit_names_what_was_left_as_it_was(gated, tmp_path):
    recipe = a_recipe(tmp_path)
    with pytest.raises(UsageError, match=r"not every writer can be edited: layer 1 mlp.*--allow-partial"):
        run(str(gated), output=tmp_path / "out", recipe=recipe, machine=MACHINE)
    assert names(tmp_path) == {"target.txt", "baseline.txt"}
    made = run(str(gated), output=tmp_path / "out", recipe=recipe, machine=MACHINE, allow_partial=True)
    apply(str(tmp_path / "out" / "recipe.toml"), output=tmp_path / "again", machine=MACHINE)
    assert len(made.fitted.edit.modules) == 5
    before, after = (load_file(folder / "model.safetensors") for folder in (gated, tmp_path / "out"))
    down = "model.layers.{}.mlp.down_proj.weight"
    assert [torch.equal(before[down.format(k)], after[down.format(k)]) for k in range(3)] == [False, True, False]
    for name in ("out", "again"):
        card = (tmp_path / name / "README.md").read_text()
        said = card.partition("**The edit is partial.**")[2].partition("Modified files")[0]
        assert "- layer 1 mlp: " in said, card
        assert said.count("\n- ") == said.count("\n- layer 1 mlp: ") == 2
        assert "| attention | 3 of 3 | 0-2 |" in card
        assert "| mlp | 2 of 4 | 0, 2 |" in card  # as `inspect` counts: two lines tell of the gap
        assert "allow_partial = true" in card


def test_paths_lose_their_folders_and_references_stay(tmp_path):
    (tmp_path / "chat.jinja").write_text("x")
    given = a_recipe(tmp_path).prompts
    prompts = {
        "target": f"{given.target}#column=text",
        "target_report": given.baseline,
        "chat_template": str(tmp_path / "chat.jinja"),
    }
    asked = Recipe.model_validate({"prompts": prompts, "eval": {"classifier": str(tmp_path)}}).for_model("org/x@0123")
    found = without_folders(asked)
    assert found.prompts.model_dump(exclude_none=True) == {
        "target": "target.txt#column=text",
        "baseline": "perpend:baseline",
        "target_report": "baseline.txt",
        "chat_template": "chat.jinja",
    }
    assert (found.model.id, found.eval.classifier) == ("org/x@0123", tmp_path.name)


def test_the_saved_weights_are_the_edit(done, pico_dir):
    folder, made, _ = done
    before, after = (load_file(p / "model.safetensors") for p in (pico_dir("llama"), folder / "out"))
    edit = Edit.load(folder / "out" / "edit.safetensors")
    assert edit.sha256 == made.fitted.edit.sha256
    edited = {f"{name}.weight" for name in edit.modules}
    assert len(edited) == 6
    for name, tensor in after.items():
        asked = (
            edit_weight(before[name], edit.modules[name.removesuffix(".weight")]) if name in edited else before[name]
        )
        assert torch.equal(tensor, asked), name


def test_the_memory_that_was_allowed_bounds_the_export(done, tmp_path, monkeypatch):
    asked, at_once = [], shards.at_once
    monkeypatch.setattr(shards, "at_once", lambda patches, memory: asked.append(memory) or at_once(patches, memory))
    machine = MACHINE.model_copy(update={"memory": 10**12})
    apply(str(done[0] / "out" / "recipe.toml"), output=tmp_path / "again", machine=machine)
    assert asked == [10**12]


def test_the_recipe_makes_the_same_files_again(done):
    folder = done[0]
    made = apply(str(folder / "out" / "recipe.toml"), output=folder / "again", machine=MACHINE)
    one, other = contents(folder / "out"), contents(folder / "again")
    assert set(one) == set(other)
    assert {name for name in other if other[name] != one[name]} <= {"README.md", "report.json", "report.html"}
    assert made.gate.same_replies == made.gate.prompts == 4


def test_the_edit_of_a_fit_makes_the_same_weights(done, pico_dir, tmp_path):
    recipe = a_recipe(tmp_path, edit={"mode": "plain"}, fit={"method": "mean"})
    fit(str(pico_dir("llama")), output=tmp_path / "fit", recipe=recipe, machine=MACHINE)
    given = Recipe.model_validate({"export": {"allow_leak": True, "gate_prompts": 1}})
    made = apply(str(pico_dir("llama")), edit=tmp_path / "fit", output=tmp_path / "out", recipe=given, machine=MACHINE)
    assert made.gate.prompts == 2
    weights = "model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (done[0] / "out" / weights).read_bytes()
    written = load(tmp_path / "out" / "recipe.toml")  # how the edit was made, not the defaults
    assert (written.prompts, written.fit, written.edit, written.eval) == (
        recipe.prompts,
        recipe.fit,
        recipe.edit,
        recipe.eval,
    )
    assert written.export == given.export
    with pytest.raises(UsageError, match="two edits"):
        apply(str(tmp_path / "fit" / "recipe.toml"), edit=tmp_path / "fit", output=tmp_path / "b", machine=MACHINE)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"edit": {"mode": "column"}}, r"is fixed.*edit\.mode.*perpend run --config"),
        ({"fit": {"method": "projected"}}, r"is fixed.*fit\.method.*perpend run --config"),
        ({"model": {"id": "org/other"}}, r"is fixed.*model\.id.*perpend run --config"),
    ],
)
def test_an_edit_that_is_written_is_not_asked_for_otherwise(done, tmp_path, monkeypatch, changed, says):
    monkeypatch.setattr(setup, "load_model", None)
    path = done[0] / "out" / "recipe.toml"
    data = load(path).model_dump()
    asked = Recipe.model_validate(data | {name: data[name] | part for name, part in changed.items()})
    with pytest.raises(UsageError, match=says):
        apply(str(path), recipe=asked, output=tmp_path / "out", machine=MACHINE)


def test_an_edit_with_its_recipe_beside_it_keeps_its_prompts(done, pico_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "load_model", None)
    given = {"edit": done[0] / "out", "output": tmp_path / "out", "machine": MACHINE}
    for changed, says in (({"prompts": {"limit": 3}}, r"prompts\.limit"), ({"seed": 7}, "another seed")):
        with pytest.raises(UsageError, match=says):
            apply(str(pico_dir("llama")), recipe=Recipe.model_validate(changed), **given)


def test_a_model_of_the_hub_is_written_with_its_commit(tmp_path):
    def loaded(ref, revision):
        return SimpleNamespace(ref=ModelRef.parse(ref), source=Resolved(Path(), revision))

    asked = Recipe().for_model("org/name@main")
    assert pinned(asked, loaded("org/name@main", "0123abc")).model.id == "org/name@0123abc"
    assert pinned(asked, loaded("org/name", None)) == asked
    local = Recipe().for_model(str(tmp_path))
    assert pinned(local, loaded(str(tmp_path), None)) == local


STAGES = {
    "load": (perpend.tasks.run, "open_session"),
    "fit": (perpend.tasks.run, "fit_edit"),
    "measure": (perpend.tasks.run, "report"),
    "reference": (perpend.tasks.apply, "reference"),
    "bake": (shards, "_overwrite"),
    "leak": (perpend.tasks.gate, "leak_gate"),
    "reload": (perpend.tasks.gate, "load_model"),
    "card": (perpend.tasks.apply, "write_card"),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("error", [RunFailed, KeyboardInterrupt])
def test_what_stops_at_any_stage_leaves_no_output(pico_dir, tmp_path, stage, error):
    given = {"output": tmp_path / "out", "recipe": a_recipe(tmp_path), "machine": MACHINE}
    with stopping(*STAGES[stage], 0, error), pytest.raises(RunFailed if error is RunFailed else Interrupted):
        run(str(pico_dir("llama")), **given)
    late = stage in {"bake", "leak", "reload", "card"} and error is RunFailed
    assert (tmp_path / "out.partial").exists() == late
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("stage", "generated"), [("measure", 12), ("bake", 4), ("card", 4)])
def test_the_same_call_goes_on_after_an_interruption(done, pico_dir, tmp_path, stage, generated):
    """Reference and gate make two batches each every time; the eight of the report are kept once made."""
    given = {"output": tmp_path / "out", "recipe": a_recipe(tmp_path), "machine": MACHINE}
    with stopping(*STAGES[stage], 0), pytest.raises(Interrupted):
        run(str(pico_dir("llama")), **given)
    with counting(Session, "_replies") as calls:
        made = run(str(pico_dir("llama")), **given)
    assert len(calls) == generated
    folder, whole, _ = done
    assert made.fitted.edit.sha256 == whole.fitted.edit.sha256
    weights = "model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (folder / "out" / weights).read_bytes()
    assert names(tmp_path) == {"out", "target.txt", "baseline.txt"}


TAMPERED = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(("tensor", "message"), [(TAMPERED, "miss"), ("lm_head.weight", "bytes differ.*lm_head")])
def test_a_saved_file_that_was_tampered_with_does_not_pass(pico_dir, tmp_path, monkeypatch, tensor, message):
    source = pico_dir("llama")
    prove = perpend.tasks.apply.pass_gate

    def tampered(asked, seen, original, folder, *rest):
        begin, end = tensors(folder / "model.safetensors")[tensor]
        data = bytearray((folder / "model.safetensors").read_bytes())
        old = (source / "model.safetensors").read_bytes()
        data[begin:end] = old[begin:end] if tensor == TAMPERED else bytes(end - begin)
        (folder / "model.safetensors").write_bytes(data)
        return prove(asked, seen, original, folder, *rest)

    monkeypatch.setattr(perpend.tasks.apply, "pass_gate", tampered)
    given = {"output": tmp_path / "out", "recipe": a_recipe(tmp_path), "machine": MACHINE}
    with pytest.raises(GateFailed, match=message):
        run(str(source), **given)
    assert names(tmp_path) == {"out.partial", "out.resume", "target.txt", "baseline.txt"}
    monkeypatch.setattr(setup, "load_model", None)
    with pytest.raises(UsageError, match="inspect it"):  # said at once, and never overwritten
        run(str(source), **given)


def test_what_was_measured_is_not_measured_again_to_let_a_leak_pass(pico_dir, tmp_path):
    given = {"output": tmp_path / "out", "machine": MACHINE}
    with stopping(perpend.tasks.gate, "leak_gate", 0, GateFailed), pytest.raises(GateFailed):
        run(str(pico_dir("llama")), recipe=a_recipe(tmp_path), **given)
    for path in (tmp_path / "out.partial").iterdir():
        path.unlink()
    (tmp_path / "out.partial").rmdir()
    allowed = a_recipe(tmp_path, export={"allow_leak": True})
    with counting(Session, "_replies") as calls:
        run(str(pico_dir("llama")), recipe=allowed, **given)
    assert len(calls) == 4
    assert not (tmp_path / "out.resume").exists()


def gate(labels: int, likelihood: float, kl: float = 0.0) -> Gate:
    return Gate((), None, 16, labels, 0, (-1.0, likelihood), kl)


def test_a_file_that_does_not_do_what_was_measured_does_not_pass(tmp_path):
    require_same(gate(16, -1.0), tmp_path)
    require_same(gate(12, -1.04), tmp_path)
    nan = float("nan")
    for bad in (gate(11, -1), gate(16, -0.9), gate(16, -1.1), gate(16, -1, 0.11), gate(16, nan), gate(16, -1, nan)):
        with pytest.raises(GateFailed, match=r"labels differ.*nats per token"):
            require_same(bad, tmp_path)
        with pytest.raises(GateFailed, match="without --for q4_0, which weights need that lie on its lattice"):
            require_same(bad, tmp_path, "q4_0")


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_first_model_is_out_of_memory_before_the_second_comes(pico_dir, tmp_path, monkeypatch, family):
    kept: list[weakref.ref] = []
    left: list[int] = []
    open_session, load = perpend.tasks.run.open_session, perpend.tasks.gate.load_model

    def opened(*args):
        session = open_session(*args)
        kept.extend(weakref.ref(p) for p in session.model.parameters())
        return session

    def loaded(*args, **kwargs):
        gc.collect()
        left.append(sum(p() is not None for p in kept))
        return load(*args, **kwargs)

    monkeypatch.setattr(perpend.tasks.run, "open_session", opened)
    monkeypatch.setattr(perpend.tasks.gate, "load_model", loaded)
    run(str(pico_dir(family)), output=tmp_path / "out", recipe=a_recipe(tmp_path), machine=MACHINE)
    assert kept
    assert left == [0]


def test_tied_weights_are_released_too(pico_dir):
    model = load_model(pico_dir("gemma3_text")).model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    release(model)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_a_dry_run_writes_nothing(pico_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "load_model", None)
    recipe, model = a_recipe(tmp_path), str(pico_dir("llama"))
    before = contents(tmp_path)
    made = run(model, output=tmp_path / "out", recipe=recipe, machine=MACHINE, dry_run=True)
    assert made.to_json()["prompts"] == {
        f"{c}.{s}": 4 for s in ("fit", "select", "report") for c in ("target", "baseline")
    }
    assert contents(tmp_path) == before


def test_a_dry_apply_writes_nothing(done, monkeypatch):
    monkeypatch.setattr(setup, "load_model", None)
    folder = done[0]
    before = contents(folder)
    made = apply(str(folder / "out" / "recipe.toml"), output=folder / "dry", machine=MACHINE, dry_run=True)
    assert made.modules == 6
    assert contents(folder) == before


def test_what_cannot_work_is_said_before_anything_is_loaded(done, pico_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "load_model", None)
    recipe, model, out = a_recipe(tmp_path), str(pico_dir("llama")), tmp_path / "out"
    with pytest.raises(UsageError, match="not empty"):
        run(model, output=tmp_path, recipe=recipe)
    with pytest.raises(UsageError, match="no such file or directory"):
        run("./nowhere", output=out, recipe=recipe, dry_run=True)
    with pytest.raises(UsageError, match="no edit given"):
        apply(model, output=out)
    with pytest.raises(UsageError, match="no such file"):
        apply(model, edit=tmp_path / "none.safetensors", output=out)
    (tmp_path / "recipe.toml").write_text("seed = 1\n")
    with pytest.raises(UsageError, match="names no edit"):
        apply(str(tmp_path / "recipe.toml"), output=out)
    text = (done[0] / "out" / "recipe.toml").read_text()
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(UsageError, match="no such file"):
        apply(str(tmp_path / "recipe.toml"), output=out)
    edit = Edit.load(done[0] / "out" / "edit.safetensors")
    edit.scaled(0.5).save(tmp_path / "edit.safetensors")
    with pytest.raises(UsageError, match="not the one it was written with"):
        apply(str(tmp_path / "recipe.toml"), output=out)
    assert not out.exists()


def image_recipe(folder: Path) -> Recipe:
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (28, 28), (200, 10, 10)).save(folder / "red.png")
    refs = {}
    for kind, lead in (("target", "How do I harm"), ("baseline", "Tell me about")):
        rows = [{"text": f"{lead} this {k}?", "image": "red.png" if k % 2 else None} for k in range(30)]
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        refs[kind] = f"{folder / kind}.jsonl#column=text,image=image"
    return a_recipe(folder, prompts=refs)


def test_prompts_with_images_go_the_whole_way(pico_dir, tmp_path):
    made = run(str(pico_dir("gemma3")), output=tmp_path / "out", recipe=image_recipe(tmp_path), machine=MACHINE)
    assert any(p.image for p in made.report.before.target.prompts)
    assert made.gate.worst < 0.05
    assert (tmp_path / "out" / "preprocessor_config.json").exists() or (
        tmp_path / "out" / "processor_config.json"
    ).exists()


def test_images_for_a_model_without_eyes_are_refused(pico_dir, tmp_path):
    with pytest.raises(UsageError, match="image"):
        run(str(pico_dir("llama")), output=tmp_path / "out", recipe=image_recipe(tmp_path), machine=MACHINE)
    assert not (tmp_path / "out").exists()


def test_bfloat16_weights_pass_the_gate(tmp_path):
    pico.save("llama", tmp_path / "model", dtype=torch.bfloat16)
    made = run(str(tmp_path / "model"), output=tmp_path / "out", recipe=a_recipe(tmp_path), machine=MACHINE)
    assert load_file(tmp_path / "out" / "model.safetensors")[TAMPERED].dtype == torch.bfloat16
    assert made.gate.worst < 0.05
