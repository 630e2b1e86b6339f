"""Talking: base and edited side by side, the edit in place for one of them only; commands change the next answer."""

from __future__ import annotations

import json

import pytest
import torch
from task_cases import MACHINE, a_recipe

from perpend.config import Machine, Recipe
from perpend.core.edits import Edit, ModuleEdit
from perpend.errors import UsageError
from perpend.escape import printable
from perpend.models.load import load_model
from perpend.models.session import Session
from perpend.models.streaming import Ask
from perpend.tasks.chat import Plain, chat
from perpend.tasks.talk import COMMANDS, Command, Conversation
from perpend.tasks.transcript import fenced, quoted

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

    def go(*lines, weight: float | None = 0.8, module: str = WRITER, model: str = "llama", seed: int = 0, **sections):
        asked.clear()
        edit = None
        if weight is not None:
            edit = tmp_path / "edit.safetensors"
            Edit({module: ModuleEdit(torch.eye(1, 32), weight)}).save(edit)
        shown, waiting = [], list(lines)
        said = chat(
            str(pico_dir(model)),
            edit=edit,
            recipe=a_recipe(tmp_path, **sections).model_copy(update={"seed": seed}),
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
    assert said.to_json()["turns"][1]["system"] is None


def test_a_saved_turn_says_what_it_was_answered_under_whatever_was_changed_since(talk, tmp_path):
    one, two = tmp_path / "talk.json", tmp_path / "talk.md"
    _, _, asked = talk(
        "/system Be brief.", "/sample", "a", "/greedy", "/system Be long.", "b", "/system", "/sample", "/scale 2",
        f"/save {one}", f"/save {two}", seed=12345678,
    )  # fmt: skip
    turns = json.loads(one.read_text())["turns"]
    sampled = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 12345678}
    assert [turn["system"] for turn in turns] == ["Be brief.", "Be long."]
    assert [turn["sampling"] for turn in turns] == [sampled, None]
    assert [asks[0].sampling and vars(asks[0].sampling) for asks in asked] == [sampled, None]
    first, second = two.read_text().split("## user")[1:]
    for part, there, elsewhere in (
        (first, ("System prompt:\n\n```text\nBe brief.\n```", "seed 12345678", "edited × 1"), "Greedy decoding"),
        (second, ("System prompt:\n\n```text\nBe long.\n```", "Greedy decoding.", "edited × 1"), "Sampled"),
    ):
        assert all(words in part for words in there)
        assert elsewhere not in part


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no system role') if messages[0]['role'] == 'system' }}", ""],
    ids=["refuses it", "leaves it out"],
)
def test_a_system_prompt_that_the_template_does_not_take_is_refused_at_once(talk, tmp_path, template):
    (tmp_path / "t.jinja").write_text(template + "{{ messages[-1]['content'] }}")
    shown, said, asked = talk(
        "/system Be brief.", "a", weight=None, prompts={"chat_template": str(tmp_path / "t.jinja")}
    )
    assert "takes no system prompt" in shown
    assert said.turns[0].system is None
    assert len(asked) == 1


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
    answer, label = said.turns[0].answers["base"], said.turns[0].labels["base"]["label"]
    assert f"## base, {label}, not ended by the model\n\n{fenced(answer)}\n" in two.read_text()
    assert f"{one}: already exists, and nothing is overwritten; try: /save {tmp_path}/talk-2.json" in shown
    assert "no file was named; try: /save talk.md" in shown
    assert "--output" not in shown
    assert sorted(path.name for path in tmp_path.glob("talk*")) == ["talk.json", "talk.md"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("c.xyz", "a conversation is not saved so; valid: .md or .json; try: /save talk.md"),
        ("c", "valid: .md or .json"),
        ("a/b/", "valid: .md or .json"),
        ("nodir/c.md", "nodir; try: /save c.md"),
        ("n" * 300 + ".md", "cannot be written"),
    ],
)
def test_what_cannot_be_saved_is_one_line_and_makes_nothing(talk, tmp_path, name, reason):
    talk("a")
    before = sorted(tmp_path.rglob("*"))
    shown, _, _ = talk("a", f"/save {tmp_path}/{name}", "/save ~nobody-of-that-name/c.md")
    assert reason in shown
    assert "~nobody-of-that-name/c.md: " in shown
    assert sorted(tmp_path.rglob("*")) == before


def test_what_a_model_wrote_is_text_in_what_is_saved(talk, tmp_path, monkeypatch):
    from markdown_it import MarkdownIt

    said_so = "a\x1b]0;title\x07\x9b31m\u202eb\r\n```\n</code><script>alert(1)</script>\n````` [x](http://x)\nend\ud800"
    one, two = tmp_path / "talk.json", tmp_path / "talk.md"

    def written(self: Conversation, rest: str) -> str:
        self.turns[0].answers = dict.fromkeys(self.turns[0].answers, said_so)
        return ""

    monkeypatch.setitem(COMMANDS, "/written", Command(written, "", ""))
    talk("# heading\x1b[2J", "/written", f"/save {one}", f"/save {two}")
    assert json.loads(one.read_text())["turns"][0]["answers"] == {"base": said_so, "edited": said_so}
    for path in (one, two):
        assert printable(path.read_text()) == path.read_text(), path
    found = MarkdownIt("commonmark").parse(two.read_text())
    assert {token.type for token in found} <= {
        "heading_open", "heading_close", "inline", "bullet_list_open", "bullet_list_close", "list_item_open",
        "list_item_close", "paragraph_open", "paragraph_close", "fence",
    }  # fmt: skip
    blocks = [token.content for token in found if token.type == "fence"]
    assert blocks == [f"{printable(text)}\n" for text in ("# heading\x1b[2J", said_so, said_so)]
    headings = [found[k + 1].content for k, token in enumerate(found) if token.type == "heading_open"]
    assert headings == ["Conversation", "user", "base, not ended by the model", "edited × 1, not ended by the model"]


def test_a_fence_is_longer_than_any_run_of_backticks_in_its_text():
    for text, fence in (("a", "```"), ("`a` ``b``", "```"), ("```", "````"), ("a\n``````\n", "```````")):
        assert fenced(text) == f"{fence}text\n{text}\n{fence}"
    assert quoted("a`b``c\n\x1bd") == "``` a`b``c \\x1bd ```"
    assert quoted("a/b") == "`a/b`"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("/sample 0.7", "/sample takes nothing after it, not '0.7'; try: /sample"),
        ("/both x", "/both takes nothing after it, not 'x'; try: /both"),
        ("/reset now", "/reset takes nothing after it, not 'now'; try: /reset"),
        ("/scale", "'' is no scale; valid: a number from -100 to 100, 0 for the model as it is; try: /scale 0.5"),
        ("/scale 1 2", "'1 2' is no scale"),
        ("/qiut", "no command /qiut; did you mean '/quit'?"),
        ("/image", "takes no images"),
        ("  /scale 0,5", "'0,5' is no scale"),
    ],
)
def test_a_command_typed_wrongly_is_one_line_and_changes_nothing(talk, line, reason):
    shown, said, asked = talk("a", line, "b")
    assert [text for text in shown.splitlines() if reason in text]
    assert [turn.user for turn in said.turns] == ["a", "b"]
    assert [weights(asks) for asks in asked] == [[None, 0.8]] * 2
    assert asked[1][0].sampling is None


@pytest.mark.parametrize("line", ["/quit", " /quit", "/quit now", "/quit\tplease"])
def test_quit_ends_the_conversation_whatever_follows_it(talk, line):
    _, said, asked = talk("/scale\t0.5", line, "a")
    assert (said.turns, asked, said.scale) == ([], [], 0.5)


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


def test_a_command_that_is_interrupted_does_not_end_the_conversation(talk, monkeypatch):
    def interrupted(self: Conversation, rest: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "/label", Command(interrupted, "", ""))
    shown, said, _ = talk("a", "/label", "b")
    assert "the command was broken off" in shown
    assert [turn.user for turn in said.turns] == ["a", "b"]


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
