"""Talking: the edit is in place while an answer is made and at no other time; commands change the next answer."""

from __future__ import annotations

import pytest
import torch
from task_cases import MACHINE, a_recipe

from perpend.core.edits import Edit, ModuleEdit
from perpend.errors import UsageError
from perpend.models.session import Session
from perpend.tasks.chat import chat


@pytest.fixture
def talk(pico_dir, tmp_path, monkeypatch):
    """`talk(lines, weight)` gives what was shown, the conversation, and (edited while answering, messages) per turn."""
    stream, edited = Session.stream, Session.edited
    now: list[Edit | None] = [None]

    def spy(self, messages, sampling=None, max_new_tokens=512):
        turns.append((now[0], self._edited, [dict(m) for m in messages]))
        yield from stream(self, messages, sampling, max_new_tokens)

    def noted(self, edit):
        now[0] = edit
        return edited(self, edit)

    monkeypatch.setattr(Session, "stream", spy)
    monkeypatch.setattr(Session, "edited", noted)
    turns: list[tuple] = []

    def go(*lines, weight: float | None = 0.8, module: str = "model.layers.1.mlp.down_proj"):
        turns.clear()
        edit = None
        if weight is not None:
            edit = tmp_path / "edit.safetensors"
            Edit({module: ModuleEdit(torch.eye(1, 32), weight)}).save(edit)
        shown, waiting = [], list(lines)
        said = chat(
            str(pico_dir("llama")),
            edit=edit,
            recipe=a_recipe(tmp_path),
            machine=MACHINE,
            read=lambda: waiting.pop(0) if waiting else None,
            write=shown.append,
        )
        return "".join(shown), said, list(turns)

    return go


def test_the_edit_is_in_place_while_an_answer_is_made(talk):
    shown, said, turns = talk("What is bread?", "", "And water?", "/quit", "never read")
    assert [in_place for _, in_place, _ in turns] == [True, True]
    assert [m["role"] for m in said.messages] == ["user", "assistant"] * 2
    assert said.messages[2]["content"] == "And water?"
    assert all(m["content"] in shown for m in said.messages if m["role"] == "assistant")
    assert turns[1][2] == said.messages[:3]  # the model sees what was said before
    assert "with an edit" in shown


def test_scale_changes_the_next_answer_and_zero_is_the_base_model(talk):
    shown, said, turns = talk("a", "/scale 0.5", "b", "/scale 0", "c", "/scale -1", "d")
    weights = [edit and round(next(iter(edit.modules.values())).weight, 6) for edit, _, _ in turns]
    assert weights == [0.8, 0.4, None, -0.8]
    assert [in_place for _, in_place, _ in turns] == [True, True, False, True]
    assert said.scale == -1
    assert "in place 0.5 times" in shown


@pytest.mark.parametrize("bad", ["/scale", "/scale much", "/scale nan", "/scale inf"])
def test_what_is_no_scale_changes_nothing(talk, bad):
    shown, said, turns = talk(bad, "a")
    assert said.scale == 1
    assert turns[0][1]
    assert "is no number" in shown


def test_reset_forgets_and_other_commands_say_what_there_is(talk):
    shown, said, turns = talk("a", "/reset", "b", "/help", "/rest", "/scale 2", weight=None)
    assert [m["content"] for m in turns[1][2]] == ["b"]
    assert len(said.messages) == 2
    assert "the conversation is forgotten" in shown
    assert "/scale X" in shown
    assert "no command /rest; valid: /scale, /reset, /help, /quit" in shown
    assert "there is no edit to scale" in shown
    assert not any(in_place for _, in_place, _ in turns)


def test_an_edit_of_another_model_is_refused_before_the_first_line(talk):
    with pytest.raises(UsageError, match="no writer of this model"):
        talk("a", module="model.layers.8.mlp.down_proj")
