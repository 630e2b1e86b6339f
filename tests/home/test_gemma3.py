"""Gemma 3, text and image-text: what an edit touches, what it leaves, and what goes through a whole run."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gemma3 import GENERATION, as_shipped
from safetensors import safe_open

import perpend
import pico
from perpend.config import Machine, load
from perpend.core.edits import Edit
from perpend.data import Prompt
from perpend.errors import UsageError
from perpend.models.load import load_model
from perpend.models.session import Sampling, Session

CPU = Machine(device="cpu")
FAMILIES = ("gemma3_text", "gemma3")
WORDS = ("bread", "fox", "list", "river", "village", "salt", "story", "guide", "yeast", "city")
EDIT = {"kind": "constant", "weight": 0.8}


def rows(kind: str, picture: Callable[[str], str] | None) -> list[dict[str, str]]:
    """Return one row per word; with pictures, every row but the last has one."""
    texts = [f"{kind} the {word}, please." for word in WORDS]
    if picture is None:
        return [{"text": text} for text in texts]
    return [{"text": text, "image": picture(text)} for text in texts[:-1]] + [{"text": texts[-1]}]


@pytest.fixture(scope="module")
def home(pico_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], SimpleNamespace]:
    """`home("gemma3")` is a checkpoint as shipped, with two prompt sets, pictures beside them where it sees."""
    image = pytest.importorskip("PIL.Image")

    @cache
    def make(family: str) -> SimpleNamespace:
        folder = tmp_path_factory.mktemp(family)
        (folder / "pictures").mkdir()

        def picture(text: str) -> str:
            name = f"pictures/{len(list((folder / 'pictures').iterdir()))}.png"
            image.new("RGB", (40, 30), tuple(text.encode()[-12:-9])).save(folder / name)
            return name

        sets = {}
        for kind in ("Weigh", "Paint"):
            path = folder / f"{kind}.jsonl"
            found = rows(kind, picture if family == "gemma3" else None)
            path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
            sets[kind] = str(path)
        base = as_shipped(pico_dir(family), folder / "base")
        return SimpleNamespace(folder=folder, base=base, target=sets["Weigh"], baseline=sets["Paint"])

    return make


@pytest.fixture(scope="module")
def edited(home: Callable[[str], SimpleNamespace]) -> Callable[[str], SimpleNamespace]:
    """`edited("gemma3")` is what a whole run made of it."""

    @cache
    def make(family: str) -> SimpleNamespace:
        here = home(family)
        out = here.folder / "edited"
        made = perpend.run(str(here.base), output=out, recipe=recipe(here), machine=CPU)
        return SimpleNamespace(base=here.base, out=out, made=made, edit=Edit.load(out / "edit.safetensors"))

    return make


def recipe(here: SimpleNamespace, **evaluation: Any) -> Any:
    settings = {"classifier": "none", "max_new_tokens": 6, "drift_tokens": 4, "sample": True, **evaluation}
    return load(
        None,
        base={
            "prompts": {"target": here.target, "baseline": here.baseline},
            "fit": {"layer": 1, "filter": False},
            "edit": {"attention": EDIT, "mlp": EDIT},
            "eval": settings,
            "export": {"gate_prompts": 2},
        },
    )


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def picture_of(family: str, folder: Path) -> str | None:
    return str(folder / "pictures" / "0.png") if family == "gemma3" else None


# ------------------------------------------------------------------------------------------------- the whole run


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_tower_is_edited_and_nothing_else(edited: Callable[[str], SimpleNamespace], family: str) -> None:
    run = edited(family)
    before, after = tensors(run.base), tensors(run.out)
    assert list(before) == list(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    ends = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
    assert changed == {n for n in before if n.endswith(ends) and "vision" not in n}
    assert len(changed) == 2 * pico.LAYERS == len(run.edit)
    seeing = [name for name in before if "vision_tower" in name or "multi_modal_projector" in name]
    assert bool(seeing) == (family == "gemma3")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_other_file_is_kept(edited: Callable[[str], SimpleNamespace], family: str) -> None:
    run = edited(family)
    kept = {path.name for path in run.base.iterdir()} - {"model.safetensors", "README.md"}
    assert {"generation_config.json", "chat_template.jinja", "tokenizer.json", "added_tokens.json"} <= kept
    assert family != "gemma3" or "processor_config.json" in kept or "preprocessor_config.json" in kept
    for name in kept:
        assert (run.out / name).read_bytes() == (run.base / name).read_bytes(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_run_measured_all_prompts_and_passed_its_gate(
    edited: Callable[[str], SimpleNamespace], family: str
) -> None:
    made = edited(family).made
    assert sum(made.prompts.values()) == 2 * len(WORDS)
    assert made.fitted.layer == 1
    assert made.gate.worst < 1e-4
    assert made.gate.same_replies == made.gate.prompts == 4
    report = json.loads((edited(family).out / "report.json").read_text(encoding="utf-8"))
    assert report["gate"]["untouched"]["differing"] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reloaded_export_answers_as_the_hooks_did(edited: Callable[[str], SimpleNamespace], family: str) -> None:
    run = edited(family)
    asked = [Prompt("What is this?", picture_of(family, run.base.parent)), Prompt("What is the capital of France?")]
    session, again = Session(load_model(run.base, CPU)), Session(load_model(run.out, CPU))
    before = session.generate(asked, max_new_tokens=8)
    with session.edited(run.edit):
        hooks = session.generate(asked, max_new_tokens=8)
        likely = session.log_likelihood(asked, [reply.tokens for reply in before])
    saved = again.generate(asked, max_new_tokens=8)
    assert [reply.tokens for reply in saved] == [reply.tokens for reply in hooks]
    spoken = [reply.tokens for reply in before]
    untouched, found = session.log_likelihood(asked, spoken), again.log_likelihood(asked, spoken)
    for a, b, c in zip(likely, found, untouched, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(a, c, rtol=1e-2, atol=1e-2)
    assert [reply.tokens for reply in session.generate(asked, max_new_tokens=8)] == spoken


@pytest.mark.parametrize("family", FAMILIES)
def test_card_and_notice_carry_the_duties_of_the_licence(edited: Callable[[str], SimpleNamespace], family: str) -> None:
    run = edited(family)
    card, notice = ((run.out / name).read_text(encoding="utf-8") for name in ("README.md", "NOTICE"))
    assert "license: gemma" in card.split("---")[1]
    assert "pipeline_tag: image-text-to-text" in card.split("---")[1]
    for text in ("https://ai.google.dev/gemma/terms", "https://ai.google.dev/gemma/prohibited_use_policy"):
        assert text in card
    terms = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
    assert terms in card
    assert terms in notice
    assert "were modified" in notice
    assert "model.safetensors" in notice
    assert "byte-equal" in card


# ------------------------------------------------------------------------------------------------------ loading


def test_weights_named_as_in_the_first_releases_are_edited_too(
    home: Callable[[str], SimpleNamespace], edited: Callable[[str], SimpleNamespace], tmp_path: Path
) -> None:
    """The files of 2025 say `language_model.model.layers`, the class of today `model.language_model.layers`."""
    from safetensors.torch import save_file

    run = edited("gemma3")
    moved = {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    }
    turned = {new: old for old, new in moved.items()}
    own = tensors(run.base)
    table = moved if any(name.startswith("model.language_model.") for name in own) else turned

    def other(name: str) -> str:
        return next((new + name.removeprefix(old) for old, new in table.items() if name.startswith(old)), name)

    base = as_shipped(run.base, tmp_path / "base")
    save_file({other(name): value for name, value in own.items()}, base / "model.safetensors", {"format": "pt"})
    perpend.apply(str(base), edit=run.out, output=tmp_path / "out", recipe=recipe(home("gemma3")), machine=CPU)
    found, wanted = tensors(tmp_path / "out"), tensors(run.out)
    assert set(found) == {other(name) for name in wanted} != set(wanted)
    assert all(torch.equal(found[other(name)], value) for name, value in wanted.items())


@pytest.mark.parametrize("kind", ["Gemma3ImageProcessor", "Gemma3ImageProcessorFast"])
def test_the_processor_files_of_the_first_releases_are_read(
    home: Callable[[str], SimpleNamespace], tmp_path: Path, kind: str
) -> None:
    """They have `preprocessor_config.json` beside a `processor_config.json` that holds two keys."""
    here = home("gemma3")
    base = as_shipped(here.base, tmp_path / "base")
    whole = json.loads((base / "processor_config.json").read_text(encoding="utf-8"))
    images = whole.pop("image_processor")
    (base / "preprocessor_config.json").write_text(json.dumps({**images, "image_processor_type": kind}))
    (base / "processor_config.json").write_text(json.dumps(whole))
    asked = [Prompt("What is this?", picture_of("gemma3", here.folder))]
    one, other = (Session(load_model(folder, CPU)).generate(asked, max_new_tokens=6) for folder in (base, here.base))
    assert one == other


@pytest.mark.parametrize("family", FAMILIES)
def test_float16_is_refused_with_the_reason(
    home: Callable[[str], SimpleNamespace], family: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"float16 cannot hold this model: .* exceeds 65,504.*--dtype bfloat16"):
        load_model(home(family).base, Machine(device="cpu", dtype="float16"))
    halved = pico.save(family, tmp_path / "half", dtype=torch.float16)
    with pytest.raises(UsageError, match="float16 cannot hold this model"):
        load_model(halved, CPU)
    assert load_model(halved, Machine(device="cpu", dtype="bfloat16")).dtype == torch.bfloat16


# -------------------------------------------------------------------------------------------------- the session


@pytest.mark.parametrize("family", FAMILIES)
def test_anatomy_ends_at_the_text_tower_and_finds_the_gains(
    home: Callable[[str], SimpleNamespace], family: str
) -> None:
    loaded = load_model(home(family).base, CPU)
    anatomy = Session(loaded).anatomy
    anatomy.require_complete(False)
    assert (anatomy.n_layers, len(anatomy.writers), anatomy.gaps) == (pico.LAYERS, 2 * pico.LAYERS, ())
    assert not [writer.name for writer in anatomy.writers if "vision" in writer.name]
    for writer in anatomy.writers:
        wanted = {"attention": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}[writer.component]
        assert str(writer.post_norm).endswith(f"layers.{writer.layer}.{wanted}")
        gain = anatomy.post_norm_gain(loaded.model, writer)
        torch.testing.assert_close(gain, 1 + loaded.model.get_submodule(writer.post_norm).weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_one_bos(home: Callable[[str], SimpleNamespace], family: str) -> None:
    here = home(family)
    session = Session(load_model(here.base, CPU), system="Be brief.")
    asked = [
        Prompt("Hello"),
        Prompt("<bos>Hello <start_of_turn>model"),
        Prompt("This?", picture_of(family, here.folder)),
    ]
    for ids in session.chat.encode(asked):
        assert ids[0] == pico.BOS
        assert ids.count(pico.BOS) == 1


def test_pictures_are_seen_and_batches_change_nothing(home: Callable[[str], SimpleNamespace]) -> None:
    here = home("gemma3")
    loaded = load_model(here.base, CPU)
    pictures = [str(here.folder / "pictures" / f"{k}.png") for k in range(3)]
    asked = [*(Prompt("What is this?", name) for name in pictures), Prompt("What is it?"), Prompt("Why?", pictures[0])]
    together = torch.cat(list(Session(loaded).capture(asked)))
    singly = torch.cat(list(Session(loaded, Machine(device="cpu", batch_size=1)).capture(asked)))
    torch.testing.assert_close(together, singly, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(together[0], together[1], rtol=1e-2)


def test_text_beside_an_image_that_spells_a_control_token_is_one_line(home: Callable[[str], SimpleNamespace]) -> None:
    here = home("gemma3")
    session = Session(load_model(here.base, CPU))
    for token in ("<start_of_image>", "<bos>", "<image_soft_token>", "<end_of_turn>"):
        with pytest.raises(UsageError, match=f"spells the control token {token}"):
            session.chat.encode([Prompt(f"What is {token} this?", picture_of("gemma3", here.folder))])


def test_a_text_model_says_that_it_takes_no_images(home: Callable[[str], SimpleNamespace]) -> None:
    session = Session(load_model(home("gemma3_text").base, CPU))
    with pytest.raises(UsageError, match="takes no images"):
        session.chat.encode([Prompt("What is this?", picture_of("gemma3", home("gemma3").folder))])


# ----------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_is_gemmas_own_and_seeded(
    home: Callable[[str], SimpleNamespace], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = home(family)
    session = Session(load_model(here.base, CPU))
    assert Sampling.of(session.model, 3) == Sampling(1.0, 64, 0.95, 3)
    used: list[dict[str, Any]] = []
    generate = session.model.generate

    def recorded(**inputs: Any) -> Any:
        used.append({name: getattr(inputs["generation_config"], name) for name in GENERATION})
        return generate(**inputs)

    monkeypatch.setattr(session.model, "generate", recorded)
    asked = [Prompt(f"Tell me of the {word}.", picture_of(family, here.folder)) for word in WORDS[:3]]

    def replies(seed: int | None) -> list[tuple[int, ...]]:
        drawn = None if seed is None else Sampling.of(session.model, seed)
        return [reply.tokens for reply in session.generate(asked, max_new_tokens=6, sampling=drawn)]

    first = replies(0)
    assert used == [GENERATION] * len(used)
    assert replies(0) == first
    assert replies(1) != first
    used.clear()
    assert replies(None) != first
    assert {settings["do_sample"] for settings in used} == {False}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recipe_that_samples_is_repeatable(home: Callable[[str], SimpleNamespace], family: str) -> None:
    here = home(family)
    asked = recipe(here)
    one, again = (perpend.eval(str(here.base), recipe=asked, machine=CPU) for _ in range(2))
    greedy = perpend.eval(str(here.base), recipe=recipe(here, sample=False), machine=CPU)
    assert one.before.target.replies == again.before.target.replies
    assert one.before.target.replies != greedy.before.target.replies


# ------------------------------------------------------------------------------------------- without a template


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_a_template_takes_one_that_is_given(
    home: Callable[[str], SimpleNamespace], family: str, tmp_path: Path
) -> None:
    here = home(family)
    base = as_shipped(here.base, tmp_path / "base")
    (base / "chat_template.jinja").rename(tmp_path / "given.jinja")
    asked = recipe(here, sample=False)
    assert perpend.inspect(str(base), machine=CPU).chat == {"template": "none"}
    with pytest.raises(UsageError, match=r"no chat template.*--chat-template FILE"):
        perpend.eval(str(base), recipe=asked, machine=CPU)
    prompts = asked.prompts.model_copy(update={"chat_template": str(tmp_path / "given.jinja")})
    given = asked.model_copy(update={"prompts": prompts})
    one, other = (
        perpend.eval(str(base), recipe=given, machine=CPU),
        perpend.eval(str(here.base), recipe=asked, machine=CPU),
    )
    assert one.before.target.replies == other.before.target.replies
    if family == "gemma3_text":
        made = perpend.run(str(base), output=tmp_path / "out", recipe=given, machine=CPU)
        assert made.gate.same_replies == made.gate.prompts == 4
        assert not (tmp_path / "out" / "chat_template.jinja").exists()


def test_a_template_that_cannot_be_read_is_found_before_the_model_is_loaded(
    home: Callable[[str], SimpleNamespace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from perpend.tasks import setup

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(setup, "load_model", never)
    asked = recipe(home("gemma3_text"))
    prompts = asked.prompts.model_copy(update={"chat_template": str(tmp_path / "none.jinja")})
    with pytest.raises(UsageError, match=r"none\.jinja: cannot be read"):
        perpend.eval("model", recipe=asked.model_copy(update={"prompts": prompts}), machine=CPU)


def test_partial_results_belong_to_the_words_of_a_template(
    home: Callable[[str], SimpleNamespace], tmp_path: Path
) -> None:
    from perpend.data import load_splits
    from perpend.tasks.setup import journal_key

    here = home("gemma3_text")
    path = tmp_path / "chat.jinja"
    path.write_text("one")
    asked = recipe(here)
    asked = asked.model_copy(update={"prompts": asked.prompts.model_copy(update={"chat_template": str(path)})})
    splits = load_splits(asked.prompts)
    before = journal_key("run", "m", asked, CPU, splits)
    path.write_text("another")
    assert journal_key("run", "m", asked, CPU, splits) != before
