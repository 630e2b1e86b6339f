"""Rows that have ended leave the batch: the answers are those of the model's own `generate`, with less work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from session_cases import PROMPTS

import pico
from perpend.models import decode, load
from perpend.models.load import load_model
from perpend.models.session import Sampling, Session

Dirs = Callable[[str], Path]
APART = {
    "falcon_h1",
    "granitemoehybrid",
    "jamba",
    "lfm2",
    "lfm2_moe",
    "mamba2",
    "nemotron_h",
    "qwen2_5_vl",
    "qwen3_5",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_next",
    "qwen3_vl",
}
"""Families that keep more of a row than keys and values: states that do not grow, or a shift of their positions."""


def settings(one: Session, tokens: int) -> dict:
    """Return settings under which no token comes twice: a pico model would say one again and again."""
    return one.settings(tokens, None) | {"no_repeat_ngram_size": 1, "suppress_tokens": [one.chat.pad, pico.EOS]}


def bare(one: Session, index: int, **values) -> list[int]:
    """Return what the model's own `generate` answers to one prompt alone."""
    ids = torch.tensor(one.chat.encode([PROMPTS[index]]), device=one.device)
    with load.generation(one.model, **values) as config:
        made = one.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return decode._ended(made[0, ids.shape[1] :].tolist(), values["eos_token_id"])


def with_ends(one: Session, tokens: int) -> dict:
    """Return settings whose end tokens end rows at different times, and one of them never."""
    values = settings(one, tokens) | {"eos_token_id": [pico.EOS]}
    rows = [bare(one, k, **values) for k in range(len(PROMPTS))]
    ends = [row[3 * k + 1] for k, row in enumerate(rows[:-1])]
    return values | {"eos_token_id": ends}


def batch(one: Session) -> tuple[dict[str, torch.Tensor], int]:
    return one._inputs(range(len(PROMPTS)), PROMPTS, one.chat.encode(PROMPTS))


@pytest.mark.parametrize("family", [*pico.FAMILIES, *(pytest.param(f, marks=pytest.mark.slow) for f in pico.EXOTIC)])
def test_answers_are_those_of_each_prompt_alone(pico_dir: Dirs, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "STEP", 3)
    one = Session(load_model(pico_dir(family)))
    assert (load.growing_cache(one.model) == {}) == (family in APART)
    values, (inputs, start) = with_ends(one, 20), batch(one)
    with load.generation(one.model, **values) as config:
        answers = decode.answers(one.model, inputs, config, start)
    assert answers == [bare(one, k, **values) for k in range(len(PROMPTS))]
    assert len({len(answer) for answer in answers}) > 1


def test_a_row_that_has_ended_is_not_run(pico_dir: Dirs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "STEP", 3)
    one = Session(load_model(pico_dir("llama")))
    values, (inputs, start) = with_ends(one, 20), batch(one)
    run: list[int] = []
    handle = one.model.register_forward_pre_hook(
        lambda module, args, kwargs: run.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    with load.generation(one.model, **values) as config:
        answers = decode.answers(one.model, inputs, config, start)
    handle.remove()
    steps = [3 * -(-len(answer) // 3) for answer in answers]  # each runs to the look at which it is seen to have ended
    assert len(run) == max(map(len, answers))
    assert sum(run) == sum(min(n, len(run)) for n in steps)


def test_one_step_is_enough_when_all_have_ended(pico_dir: Dirs) -> None:
    one = Session(load_model(pico_dir("llama")))
    first = [reply.tokens[0] for reply in one.generate(PROMPTS, max_new_tokens=1)]
    one.model.generation_config.eos_token_id = sorted(set(first))
    assert [reply.tokens for reply in one.generate(PROMPTS, max_new_tokens=64)] == [(token,) for token in first]


def test_draws_are_repeatable_where_rows_leave(pico_dir: Dirs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "STEP", 2)
    one = Session(load_model(pico_dir("llama")))
    one.model.generation_config.eos_token_id = with_ends(one, 20)["eos_token_id"]
    sampling = Sampling(temperature=2.0, seed=4)
    once = one.generate(PROMPTS, max_new_tokens=20, sampling=sampling)
    torch.rand(3)
    assert one.generate(PROMPTS, max_new_tokens=20, sampling=sampling) == once
