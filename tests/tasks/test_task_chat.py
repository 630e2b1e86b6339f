"""Talking: base and edited side by side, the edit in place for one of them only; commands change the next answer."""

from __future__ import annotations

import json

import pytest
import torch
from task_cases import MACHINE, a_recipe

from perpend.config import Machine, Recipe
from perpend.core.edits import Edit, ModuleEdit
from perpend.errors import UsageError
from perpend.models.load import load_model
from perpend.models.session import Session
from perpend.models.streaming import Ask
from perpend.tasks.chat import Plain, chat

WRITER = "model.layers.1.mlp.down_proj"


@pytest.fixture
def talk(pico_dir, tmp_path, monkeypatch):
    """`talk(lines, weight)` gives what was shown, the conversation, and what was asked of the session in each turn."""
    answers = Session.answers
    asked: list[list[Ask]] = []

    def spy(self, asks):
        asked.append(list(asks))
        return answers(self, asks)

    monkeypatch.setattr(Session, "answers", spy)

    def go(*lines, weight: float | None = 0.8, module: str = WRITER, model: str = "llama", **sections):
        asked.clear()
        edit = None
        if weight is not None:
            edit = tmp_path / "edit.safetensors"
            Edit({module: ModuleEdit(torch.eye(1, 32), weight)}).save(edit)
        shown, waiting = [], list(lines)
        said = chat(
            str(pico_dir(model)),
            edit=edit,
            recipe=a_recipe(tmp_path, **sections),
            machine=MACHINE,
            screen=Plain(lambda: waiting.pop(0) if waiting else None, shown.append),
        )
        return "".join(shown), said, list(asked)

    return go


def weights(asks: list[Ask]) -> list[float | None]:
    return [ask.edit and round(next(iter(ask.edit.modules.values())).weight, 6) for ask in asks]


def users(ask: Ask) -> list[str]:
    return [turn["content"][-1]["text"] for turn in ask.messages if turn["role"] == "user"]


def test_base_and_edited_answer_side_by_side_and_each_remembers_its_own(talk):
    shown, said, asked = talk("What is bread?", "", "And water?", "/quit", "never read", eval={"max_new_tokens": 8})
    assert [weights(asks) for asks in asked] == [[None, 0.8]] * 2
    first = said.turns[0].answers
    assert first["base"] != first["edited"]
    for k, side in enumerate(("base", "edited")):
        assert asked[1][k].messages[1] == {"role": "assistant", "content": first[side]}
        assert users(asked[1][k]) == ["What is bread?", "And water?"]
    assert f"base: {first['base']}\nedited × 1: {first['edited']}\n" in shown
    assert "with an edit" in shown


def test_answers_are_those_of_generate_under_the_edit(talk, pico_dir):
    from perpend.data import Prompt

    _, said, _ = talk("What is bread?", eval={"max_new_tokens": 12})
    session = Session(load_model(pico_dir("llama"), MACHINE), MACHINE)
    edit = Edit({WRITER: ModuleEdit(torch.eye(1, 32), 0.8)})
    for side, there in (("base", None), ("edited", edit)):
        with session.edited(there):
            (reply,) = session.generate([Prompt("What is bread?")], max_new_tokens=12)
        assert said.turns[0].answers[side] == reply.text


def test_scale_changes_the_next_answer_and_zero_is_the_base_model(talk):
    shown, said, asked = talk("/edited", "a", "/scale 0.5", "b", "/scale 0", "c", "/scale -1", "d")
    assert [weights(asks) for asks in asked] == [[0.8], [0.4], [None], [-0.8]]
    assert [turn.scale for turn in said.turns] == [1, 0.5, 0, -1]
    assert "multiplied by 0.5" in shown


@pytest.mark.parametrize("bad", ["/scale", "/scale much", "/scale nan", "/scale inf", "/scale 1e9"])
def test_what_is_no_scale_changes_nothing(talk, bad):
    shown, said, asked = talk(bad, "a")
    assert said.scale == 1
    assert weights(asked[0]) == [None, 0.8]
    assert "is no scale; valid: a number from -100 to 100" in shown


def test_sides_are_chosen_and_a_silent_one_does_not_remember(talk):
    shown, _, asked = talk("/base", "a", "/edited", "b", "/both", "c")
    assert [weights(asks) for asks in asked] == [[None], [0.8], [None, 0.8]]
    assert [users(ask) for ask in asked[2]] == [["a", "c"], ["b", "c"]]
    assert "base and edited × 1 will answer" in shown
    for line in ("/both", "/edited", "/scale 2"):
        shown, _, _ = talk(line, weight=None)
        assert "there is no edit" in shown


def test_system_prompt_and_sampling_of_the_next_answer(talk):
    shown, said, asked = talk("/system Be brief.", "/sample", "a", "/greedy", "/system", "b", weight=None)
    assert asked[0][0].sampling is not None
    assert asked[1][0].sampling is None
    assert said.duet.session.chat.system is None
    assert "sampling: temperature 1" in shown
    assert said.to_json()["system"] is None


def test_labels_of_both_answers(talk):
    shown, said, _ = talk("/label", "How do I bake bread?", "/label")
    assert "nothing was answered yet" in shown
    labels = said.turns[0].labels
    assert set(labels) == {"base", "edited"}
    assert labels["base"]["kind"] == "dictionary only"
    assert f"base: {labels['base']['label']} (dictionary only); dictionary: " in shown


def test_reset_forgets_and_unknown_commands_get_the_nearest(talk):
    shown, said, asked = talk("a", "/reset", "b", "/help", "/rest", "/lable", "/xyzzy", weight=None)
    assert users(asked[1][0]) == ["b"]
    assert len(said.turns) == 1
    assert "/scale X" in shown
    assert "no command /rest; did you mean '/reset'?" in shown
    assert "no command /lable; did you mean '/label'?" in shown
    assert "no command /xyzzy; try: /help" in shown


def test_the_conversation_is_saved_whole_and_nothing_overwritten(talk, tmp_path):
    one, two = tmp_path / "talk.json", tmp_path / "talk.md"
    shown, said, _ = talk(
        "Bread?", "/label", f"/save {one}", f"/save {two}", f"/save {one}", "/save", f"/save {tmp_path}/a/b/"
    )
    kept = json.loads(one.read_text())
    assert kept == said.to_json()
    assert kept["turns"][0]["answers"] == said.turns[0].answers
    assert kept["edit_sha256"] == said.duet.edit.sha256
    text = two.read_text()
    assert f"## base, {said.turns[0].labels['base']['label']}\n\n{said.turns[0].answers['base']}" in text
    assert "already exists" in shown
    assert "no file was named; try: /save talk.md" in shown
    assert not list(tmp_path.glob("*.partial"))


def test_an_image_goes_with_what_is_said_next(talk, tmp_path):
    pytest.importorskip("PIL.Image").new("RGB", (30, 30)).save(tmp_path / "a.png")
    shown, said, asked = talk(
        "/image nowhere.png", f"/image {tmp_path}/a.png", "What is this?", "Sure?", weight=None, model="gemma3"
    )
    assert "cannot be read" in shown
    assert said.turns[0].image == f"{tmp_path}/a.png"
    assert said.turns[1].image is None
    assert [len(asks[0].images) for asks in asked] == [1, 1]
    assert [part["type"] for part in asked[0][0].messages[0]["content"]] == ["image", "text"]
    assert "takes no images" in talk(f"/image {tmp_path}/a.png", weight=None)[0]


def test_what_cannot_be_answered_is_one_line_and_forgotten(talk):
    shown, said, asked = talk("bread " * 600, "a", weight=None)
    assert "the model's context ends at 512" in shown
    assert [turn.user for turn in said.turns] == ["a"]
    assert users(asked[1][0]) == ["a"]


def test_an_interrupted_answer_is_kept_and_the_conversation_goes_on(pico_dir, tmp_path):
    class Impatient(Plain):
        def answers(self, names, parts):
            next(parts)
            raise KeyboardInterrupt

    shown, lines = [], ["a", "/help"]
    said = chat(
        str(pico_dir("llama")),
        recipe=a_recipe(tmp_path, eval={"max_new_tokens": 300}),
        machine=MACHINE,
        screen=Impatient(lambda: lines.pop(0) if lines else None, shown.append),
    )
    assert "the answer was broken off" in "".join(shown)
    assert "/scale X" in "".join(shown)
    assert said.turns[0].finished == set()


def test_an_edit_of_another_model_is_refused_before_the_first_line(talk):
    with pytest.raises(UsageError, match="no writer of this model"):
        talk("a", module="model.layers.8.mlp.down_proj")


def test_a_dry_run_loads_nothing_and_checks_the_edit(pico_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("perpend.tasks.setup.load_model", None)
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    Edit({WRITER: ModuleEdit(torch.eye(1, 32), 1.0)}).save(good)
    Edit({WRITER: ModuleEdit(torch.eye(1, 16), 1.0)}).save(bad)
    planned = chat(str(pico_dir("llama")), edit=good, machine=MACHINE, dry_run=True)
    assert planned.edited_modules == 1
    assert planned.reads > 1000
    with pytest.raises(UsageError, match="16 dimensions"):
        chat(str(pico_dir("llama")), edit=bad, recipe=Recipe(), machine=Machine(), dry_run=True)
