"""The card: front matter that the hub can read, every promise of the text, nothing claimed that was not measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from huggingface_hub import ModelCard

import pico
from perpend.core.edits import Edit, ModuleEdit
from perpend.export.card import (
    GEMMA_NOTICE,
    GEMMA_POLICY,
    CardFacts,
    Component,
    Count,
    Measure,
    Quantity,
    describe,
    spans,
    write_card,
)
from perpend.models.anatomy import Anatomy

FACTS = CardFacts(
    base="google/gemma-3-4b-it",
    on_hub=True,
    revision="0123abc",
    components=(
        Component("attention", 23, 34, "7-29", 0.05, 0.55, 18),
        Component("mlp", 34, 34, "0-33", -0.2, 1.5, 20),
    ),
    n_layers=34,
    mode="plain",
    method="mean difference",
    direction="layer 18 of 34",
    schedule={"attention": "normal kernel, peak 0.55 at layer 18, spread 5"},
    measures=(
        Measure("accepted target prompts", Count(5, 60), Count(55, 60)),
        Measure("refused | hedged", Count(0, 60), None),
    ),
    judge="hybrid",
    judge_detail="Classifier NousResearch/Minos-v1, agreement 0.95, Cohen's κ 0.90.",
    drift=(Quantity("KL, nats per token", 0.0612, 0.05, 0.07), Quantity("first-token KL", 0.02)),
    command="perpend run google/gemma-3-4b-it@0123abc --recipe recipe.toml",
    recipe='[edit]\nmode = "plain"',
    versions={"torch": "2.13.0", "transformers": "5.24.0"},
    leak=0.0123,
    modified=("model-00001-of-00001.safetensors",),
)

GEMMA = """\
---
license: gemma
license_link: https://ai.google.dev/gemma/terms
library_name: transformers
pipeline_tag: image-text-to-text
language: [en, de]
tags: [vision, gemma, vision]
extra_gated_heading: Access Gemma on Hugging Face
base_model: google/gemma-3-4b-pt
datasets: [a/b]
---
# Gemma
"""


def card(tmp_path, base: str | None, facts: CardFacts = FACTS) -> tuple[ModelCard, str]:
    source, out = tmp_path / "base", tmp_path / "edited.partial"
    source.mkdir()
    out.mkdir()
    if base is not None:
        (source / "README.md").write_text(base, encoding="utf-8")
    write_card(out, source, facts)
    return ModelCard.load(out / "README.md"), (out / "README.md").read_text(encoding="utf-8")


def test_front_matter_passes_on_what_the_base_says_and_nothing_else(tmp_path):
    loaded, _ = card(tmp_path, GEMMA)
    assert loaded.data.to_dict() == {
        "base_model": ["google/gemma-3-4b-it"],
        "license": "gemma",
        "license_link": "https://ai.google.dev/gemma/terms",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "language": ["en", "de"],
        "tags": ["vision", "gemma", "directional-ablation", "perpend"],
    }


def test_text_says_what_was_done_and_what_was_found(tmp_path):
    _, text = card(tmp_path, GEMMA)
    for promise in (
        "# edited\n",
        "[google/gemma-3-4b-it](https://huggingface.co/google/gemma-3-4b-it) at revision `0123abc`",
        "**This edit removes a safety behaviour.**",
        "| attention | 23 of 34 | 7-29 | 0.05 to 0.55 | 18 |",
        "| mlp | 34 of 34 | 0-33 | -0.20 to 1.50 | 20 |",
        "layer 18 of 34",
        "normal kernel, peak 0.55 at layer 18, spread 5",
        "| accepted target prompts | 5/60, 8.3 % [3.6, 18.1] | 55/60, 91.7 % [81.9, 96.4] |",
        "| refused \\| hedged | 0/60, 0.0 % [0.0, 6.0] | not measured |",
        "hybrid of a dictionary and a classifier",
        "Cohen's κ 0.90",
        "| KL, nats per token | 0.0612 [0.05, 0.07] |",
        "| first-token KL | 0.02 |",
        "at most 0.012",
        "- general ability: no knowledge, mathematics or coding benchmark was run",
        "```sh\nperpend run google/gemma-3-4b-it@0123abc --recipe recipe.toml\n```",
        '```toml\n[edit]\nmode = "plain"\n```',
        "torch 2.13.0, transformers 5.24.0",
        "`model-00001-of-00001.safetensors`",
    ):
        assert promise in text
    assert "kept on request" not in text
    assert "could not be edited" not in text
    assert "\n\n\n" not in text


def test_gemma_carries_notice_terms_and_policy(tmp_path):
    _, text = card(tmp_path, GEMMA)
    notice = (tmp_path / "edited.partial" / "NOTICE").read_text()
    assert GEMMA_NOTICE in notice
    assert "modified" in notice
    assert "model-00001-of-00001.safetensors" in notice
    assert GEMMA_NOTICE in text
    assert GEMMA_POLICY in text
    assert "weights in the files named above were modified" in text


def test_other_licences_carry_no_gemma_terms(tmp_path):
    base = "---\nlicense: other\nlicense_name: some-terms\nlicense_link: LICENSE\n---\n"
    loaded, text = card(tmp_path, base)
    assert loaded.data.license_link == "https://huggingface.co/google/gemma-3-4b-it/blob/main/LICENSE"
    assert "Gemma" not in text.replace("google/gemma", "")
    assert "some-terms, applies to these weights; they were modified" in text
    assert not (tmp_path / "edited.partial" / "NOTICE").exists()


def test_licence_file_that_was_copied_keeps_its_link(tmp_path):
    (tmp_path / "edited.partial").mkdir()
    (tmp_path / "edited.partial" / "LICENSE").write_text("terms")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text("---\nlicense: other\nlicense_link: LICENSE\n---\n")
    write_card(tmp_path / "edited.partial", tmp_path / "base", FACTS)
    assert ModelCard.load(tmp_path / "edited.partial" / "README.md").data.license_link == "LICENSE"


@pytest.mark.parametrize(
    "base",
    [None, "", "no front matter", "---\n: [\n---\n", "---\n- a\n- b\n---\n"],
)
def test_base_card_that_cannot_be_read_gives_a_card_without_a_licence(tmp_path, base):
    loaded, text = card(tmp_path, base)
    assert loaded.data.license is None
    assert "names no licence" in text
    assert loaded.data.tags == ["directional-ablation", "perpend"]


@pytest.mark.parametrize(("sees", "tag"), [(False, "text-generation"), (True, "image-text-to-text")])
def test_a_base_that_names_no_pipeline_gets_the_one_that_it_has(tmp_path, sees, tag):
    loaded, _ = card(tmp_path, "---\nlicense: mit\n---\n", replace(FACTS, sees=sees))
    assert loaded.data.pipeline_tag == tag
    (tmp_path / "other").mkdir()
    loaded, _ = card(tmp_path / "other", "---\npipeline_tag: summarization\n---\n", replace(FACTS, sees=sees))
    assert loaded.data.pipeline_tag == "summarization"


def test_hostile_front_matter_stays_data(tmp_path):
    base = '---\nlicense: "mit\\n---\\n# not yours"\ntags: {a: b}\nlanguage: "{{ 7 * 7 }}"\n---\n'
    loaded, text = card(tmp_path, base)
    assert loaded.data.license == "mit\n---\n# not yours"
    assert loaded.data.language == "{{ 7 * 7 }}"
    assert text.count("# edited") == 1
    assert "\n# not yours" not in text.split("## Licence")[1]


def test_local_base_is_not_linked(tmp_path):
    loaded, text = card(tmp_path, None, replace(FACTS, base="my-model", on_hub=False, revision=None))
    assert loaded.data.base_model is None
    assert "This is my-model with" in text
    assert "huggingface.co" not in text


def test_what_was_not_measured_is_not_claimed(tmp_path):
    _, text = card(tmp_path, None, replace(FACTS, measures=(), drift=(), not_measured=("images",), leak=None))
    assert "Replies were not judged." in text
    assert "Drift from the base model was not measured." in text
    assert "- images" in text
    assert "realised weight factor" not in text


def test_dictionary_alone_gaps_and_leaks_are_said_plainly(tmp_path):
    facts = replace(FACTS, judge="dictionary only", judge_detail="No classifier could be loaded.", leak_allowed=True)
    _, text = card(tmp_path, None, replace(facts, gaps=("layer 3 mlp: no matrix found",), rank=2, mode="row"))
    for promise in (
        "**dictionary only.**",
        "No classifier could be loaded.",
        "- layer 3 mlp: no matrix found",
        "kept on request",
        "2 directions of its residual stream",
        "part of the direction comes back",
    ):
        assert promise in text


def test_a_recipe_with_a_fence_in_it_stays_inside_its_block(tmp_path):
    _, text = card(tmp_path, None, replace(FACTS, recipe='system = "```"'))
    assert '````toml\nsystem = "```"\n````' in text


def test_describe_counts_edited_modules_by_component():
    anatomy = Anatomy.of(pico.build("llama"))
    v = torch.eye(pico.HIDDEN)[:1]
    factors = {(0, "mlp"): 0.0, (1, "mlp"): 0.4, (2, "mlp"): 1.1, (1, "attention"): -0.3}
    edit = Edit(
        {w.name: ModuleEdit(v, f) for w in anatomy.writers if (f := factors.get((w.layer, w.component))) is not None}
    )
    assert describe(edit, anatomy) == (
        Component("attention", 1, 3, "1", -0.3, -0.3, 1),
        Component("mlp", 2, 3, "1-2", 0.4, 1.1, 2),
    )


def test_the_peak_is_the_weight_factor_that_is_largest_in_size():
    anatomy = Anatomy.of(pico.build("llama"))
    v = torch.eye(pico.HIDDEN)[:1]
    for factors, expected in (
        ({0: -0.1, 1: -0.9, 2: -0.3}, (-0.1, -0.9, 1)),
        ({0: 0.2, 1: 0.5, 2: -0.8}, (0.5, -0.8, 2)),
        ({0: 0.2, 1: -0.1, 2: 0.8}, (-0.1, 0.8, 2)),
    ):
        own = [w for w in anatomy.writers if w.component == "mlp"]
        (part,) = describe(Edit({w.name: ModuleEdit(v, factors[w.layer]) for w in own}), anatomy)
        assert (part.weakest, part.strongest, part.peak) == expected


STRONGER = (Component("mlp", 34, 34, "0-33", -0.2, -1.5, 20),)


@pytest.mark.parametrize(
    ("changed", "said", "unsaid"),
    [
        ({}, ("taken out of the weights", "removes a safety behaviour", "prompts that it refuses"), ("strengthened",)),
        (
            {"components": STRONGER},
            ("strengthened in the weights", "strengthens a safety behaviour", "prompts that it refuses"),
            ("taken out", "removes a safety"),
        ),
        (
            {"refusal": False},
            ("taken out of the weights", "between the two prompt sets", "changes how the model behaves"),
            ("safety behaviour", "refuses"),
        ),
        (
            {"refusal": False, "components": STRONGER},
            ("strengthened in the weights", "between the two prompt sets"),
            ("taken out", "safety behaviour", "refuses"),
        ),
    ],
)
def test_what_the_edit_does_depends_on_its_sign_and_its_prompts(tmp_path, changed, said, unsaid):
    _, text = card(tmp_path, None, replace(FACTS, **changed))
    lead = " ".join(text.split("## What was changed")[0].split())
    assert all(promise in lead for promise in said)
    assert not any(claim in lead for claim in unsaid)
    assert "\n\n\n" not in text


def test_spans():
    assert spans([]) == ""
    assert spans([7, 1, 2, 3, 9, 10]) == "1-3, 7, 9-10"
