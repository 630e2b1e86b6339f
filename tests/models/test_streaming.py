"""Answers that grow side by side: each is what it would be alone, and nothing is left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from session_cases import PROMPTS

import pico
from perpend.core.edits import Edit, ModuleEdit
from perpend.data import Prompt
from perpend.errors import UsageError
from perpend.models import streaming
from perpend.models.load import load_model
from perpend.models.session import Sampling, Session
from perpend.models.streaming import Answers, Ask

Dirs = Callable[[str], Path]
SAMPLING = Sampling(temperature=0.9, seed=3)


def session(pico_dir: Dirs, family: str = "llama") -> Session:
    return Session(load_model(pico_dir(family)))


def an_edit(one: Session, mode="plain", weight: float = 1.0) -> Edit:
    direction = torch.randn(1, one.hidden_size, generator=torch.Generator().manual_seed(1))
    part = ModuleEdit(direction / direction.norm(), weight, mode)
    return Edit({writer.name: part for writer in one.anatomy.writers})


def turns(prompt: Prompt) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt.text}]


def made(answers: Answers) -> tuple[list[str], list[str], str]:
    """The whole texts, the same from the pieces, and the order in which tokens came."""
    pieces = [""] * len(answers.answers)
    order = ""
    for k, piece in answers:
        pieces[k] += piece
        order += str(k)
    return [answer.text for answer in answers.answers], pieces, order


@pytest.mark.parametrize(("family", "mode"), [("llama", "plain"), ("llama", "column"), ("mixtral", "column")])
@pytest.mark.parametrize("sampling", [None, SAMPLING], ids=["greedy", "sampled"])
def test_side_by_side_each_answer_is_what_it_is_alone(pico_dir, family, mode, sampling):
    one = session(pico_dir, family)
    edit = an_edit(one, mode)
    before = {name: tensor.clone() for name, tensor in one.model.state_dict().items()}
    asks = [Ask(turns(PROMPTS[0]), edit, sampling, 12), Ask(turns(PROMPTS[0]), None, sampling, 9)]
    alone = [made(one.answers([ask]))[0][0] for ask in asks]
    texts, pieces, order = made(one.answers(asks))
    assert texts == pieces == alone
    assert texts[0] != texts[1]
    if family == "llama":
        assert order.startswith("01010101")
    else:  # overwriting experts for every token would take longer than the token
        assert order == "".join(sorted(order))
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.model.state_dict().items())
    with one.edited(edit):  # nothing is in place any more
        assert made(one.answers([Ask(turns(PROMPTS[0]), None, sampling, 12)]))[0] == [alone[0]]


def test_greedy_answers_are_those_of_generate(pico_dir):
    one = session(pico_dir)
    edit = an_edit(one)
    with one.edited(edit):
        replies = [one.generate([prompt], max_new_tokens=24)[0] for prompt in PROMPTS]
    answers = one.answers([Ask(turns(prompt), edit, None, 24) for prompt in PROMPTS])
    assert made(answers)[0] == [reply.text for reply in replies]
    for answer, reply in zip(answers.answers, replies, strict=True):
        assert tuple(answer.tokens) == reply.tokens
        assert answer.finish == ("stop" if reply.finished else "length")
    assert [a.prompt_tokens for a in answers.answers] == [len(ids) for ids in one.chat.encode(PROMPTS)]


def test_sampling_leaves_the_random_numbers_of_others_alone(pico_dir):
    one = session(pico_dir)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    made(one.answers([Ask(turns(PROMPTS[0]), None, SAMPLING, 4), Ask(turns(PROMPTS[1]), None, SAMPLING, 7)]))
    assert torch.equal(torch.rand(3), expected)


def test_closing_stops_all_of_them(pico_dir):
    one = session(pico_dir)
    edit = an_edit(one)
    answers = one.answers([Ask(turns(PROMPTS[0]), edit, None, 400), Ask(turns(PROMPTS[1]), None, None, 400)])
    growing = iter(answers)
    for _ in range(3):
        next(growing)
    threads = threading.active_count()
    growing.close()
    assert threading.active_count() == threads - 2
    assert sum(len(answer.tokens) for answer in answers.answers) == 3
    with one.edited(edit):
        pass


def test_an_error_of_one_ends_all(pico_dir, monkeypatch):
    one = session(pico_dir)
    generate = one.model.generate

    def broken(**inputs):
        if inputs["input_ids"].shape[1] < 20:
            raise ValueError("broken")
        return generate(**inputs)

    monkeypatch.setattr(one.model, "generate", broken)
    asks = [Ask(turns(prompt), an_edit(one), None, 200) for prompt in PROMPTS[:2]]
    with pytest.raises(ValueError, match="broken"):
        made(one.answers(asks))
    with one.edited(an_edit(one)):
        pass


def test_what_cannot_be_answered_is_refused_before_a_token(pico_dir):
    one = session(pico_dir)
    with pytest.raises(UsageError, match="the model's context ends at 512"):
        one.answers([Ask(turns(Prompt("How do I bake? " * 200)))])
    with pytest.raises(UsageError, match="takes no images"):
        one.answers([Ask([{"role": "user", "content": [{"type": "image"}]}], images=(None,))])
    with pytest.raises(UsageError, match="no writer"):
        one.answers([Ask(turns(PROMPTS[0]), Edit({"nowhere": ModuleEdit(torch.eye(1, 32), 1.0)}))])
    with one.edited(an_edit(one)), pytest.raises(UsageError, match="in place already"):
        one.answers([Ask(turns(PROMPTS[0]), an_edit(one))])


class Spelled:
    """Tokens are characters."""

    def decode(self, ids) -> str:
        return "".join(map(chr, ids)).strip()


def shown(text: str, *stop: str) -> tuple[list[str], bool]:
    growing = streaming._Text(Spelled().decode, stop)
    pieces = []
    for character in text:
        piece, ended = growing.add(ord(character))
        pieces.append(piece)
        if ended:
            return pieces, True
    return [*pieces, growing.close()], False


@pytest.mark.parametrize("text", ["one STOP two", "STOP", "one\n\nSTOPSTOP", "a STO STOP b"])
def test_a_given_text_ends_the_answer_and_no_part_of_it_is_shown(text):
    pieces, ended = shown(text, "STOP", "never")
    assert ended
    assert "".join(pieces) == text[: text.index("STOP")].lstrip()


def test_what_may_become_a_mark_is_held_back_and_given_at_the_end():
    pieces, ended = shown("a ST <thin b STO", "STOP")
    assert not ended
    assert "".join(pieces) == "a ST <thin b STO"
    assert pieces[:6] == ["a", "", " ", "", "", "ST "]
    assert pieces[-1] == "STO"


def test_half_a_character_waits_for_the_other_half(pico_dir):
    one = session(pico_dir)
    ids = one.chat.tokenizer("naïve – 語 done", add_special_tokens=False).input_ids
    growing = streaming._Text(one.chat.decode, ())
    pieces = [growing.add(token)[0] for token in ids]
    assert "".join([*pieces, growing.close()]) == "naïve – 語 done"
    assert not any("�" in piece for piece in pieces)


def test_reasoning_is_not_shown(pico_dir):
    one = session(pico_dir)
    ids = one.chat.tokenizer("<think>well</think>Yes.", add_special_tokens=False).input_ids
    growing = streaming._Text(one.chat.decode, ())
    pieces = [growing.add(token)[0] for token in ids]
    assert "".join([*pieces, growing.close()]) == "Yes."


def test_a_conversation_may_hold_images_and_a_system_prompt(pico_dir):
    image = pytest.importorskip("PIL.Image").new("RGB", (30, 30), (200, 10, 10))
    one = session(pico_dir, "gemma3")
    asked = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": "Bread."},
        {"role": "user", "content": "Sure?"},
    ]
    with_image = one.chat.conversation(asked, [image])
    assert "pixel_values" in with_image
    assert with_image["input_ids"][0].tolist().count(pico.BOS) == 1
    assert made(one.answers([Ask(asked, an_edit(one), None, 4, (), (image,))]))[1]
    one.chat.system = "Be brief."
    brief, own = (
        one.chat.tokenizer.decode(one.chat.conversation(said)["input_ids"][0])
        for said in (turns(PROMPTS[1]), [{"role": "system", "content": "Be long."}, *turns(PROMPTS[1])])
    )
    assert "Be brief." in brief
    assert "Be brief." not in own
    assert "Be long." in own
