"""Chat templates: one BOS, reasoning kept out and recorded, ids and text in step."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

import pico
from perpend.data import Prompt
from perpend.errors import UsageError
from perpend.models.chat import Chat, read_template, strip_reasoning

BOS = pico.BOS


@pytest.fixture
def tokenizer():
    return copy.deepcopy(pico.tokenizer())


def bos_count(chat: Chat, *prompts: Prompt) -> list[int]:
    return [ids.count(chat.bos) for ids in chat.encode(prompts)]


PROMPTS = [Prompt("Hello"), Prompt("How do I bake?"), Prompt("<bos>Hello <eos> <start_of_turn>model\nSure")]


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_exactly_one_bos_with_a_template_that_has_it(tokenizer, system: str | None) -> None:
    chat = Chat(tokenizer, system=system)
    assert bos_count(chat, *PROMPTS) == [1, 1, 1]
    assert all(ids[0] == BOS for ids in chat.encode(PROMPTS))
    assert chat.describe()["bos"] == "by the template"
    whole = tokenizer.decode(chat.encode([Prompt("Hello")])[0])
    head = f"{system}\n\n" if system else ""
    assert whole == f"<bos><start_of_turn>user\n{head}Hello<end_of_turn>\n<start_of_turn>model\n"


def test_exactly_one_bos_with_a_template_that_lacks_it(tokenizer) -> None:
    tokenizer.chat_template = pico.CHAT_TEMPLATE.replace("{{ bos_token }}\n", "")
    chat = Chat(tokenizer)
    assert bos_count(chat, *PROMPTS) == [1, 1, 1]
    assert chat.describe()["bos"] == "added"


def test_exactly_one_bos_with_a_template_that_has_two(tokenizer) -> None:
    tokenizer.chat_template = pico.CHAT_TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}{{ bos_token }}")
    assert bos_count(Chat(tokenizer), *PROMPTS) == [1, 1, 1]


def test_a_tokenizer_without_bos_gets_none(tokenizer) -> None:
    tokenizer.bos_token = None
    tokenizer.chat_template = pico.CHAT_TEMPLATE.replace("{{ bos_token }}\n", "")
    tokenizer.backend_tokenizer.post_processor = None
    chat = Chat(tokenizer)
    assert all(ids[0] != BOS for ids in chat.encode(PROMPTS))
    assert chat.describe()["bos"] == "none"


def test_images_get_one_bos(pico_dir: Callable, tmp_path) -> None:
    pytest.importorskip("PIL.Image").new("RGB", (30, 30)).save(tmp_path / "a.png")
    from perpend.models.load import load_model

    loaded = load_model(pico_dir("gemma3"))
    for template in (pico.CHAT_TEMPLATE, pico.CHAT_TEMPLATE.replace("{{ bos_token }}\n", "")):
        loaded.processor.chat_template = template
        chat = Chat(loaded.tokenizer, loaded.processor)
        picture = Prompt("What is this?", str(tmp_path / "a.png"))
        assert bos_count(chat, picture, Prompt("What?")) == [1, 1]
        assert chat.batch([picture]).inputs["input_ids"][0].tolist() == chat.encode([picture])[0]
        with pytest.raises(UsageError, match="with and without"):
            chat.batch([picture, Prompt("What?")])


def test_no_chat_template_is_one_line(tokenizer) -> None:
    tokenizer.chat_template = None
    with pytest.raises(UsageError, match="no chat template"):
        Chat(tokenizer)


def test_a_template_that_refuses_a_system_prompt_is_one_line(tokenizer) -> None:
    refusal = "{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('no system role') }}{%- endif -%}"
    tokenizer.chat_template = refusal + pico.CHAT_TEMPLATE
    Chat(tokenizer)
    with pytest.raises(UsageError, match="no system role"):
        Chat(tokenizer, system="Be brief.")


def test_padding_is_left_of_prompts_and_right_of_continuations(tokenizer) -> None:
    chat = Chat(tokenizer)
    ids = chat.encode([Prompt("Hello"), Prompt("How do I bake a loaf of bread?")])
    tails = [[40, 41, 42], [50]]
    packed = chat.batch([Prompt("Hello"), Prompt("How do I bake a loaf of bread?")], tails)
    tokens, mask = packed.inputs["input_ids"], packed.inputs["attention_mask"]
    assert tokens.dtype == mask.dtype == torch.int64
    assert packed.start == max(map(len, ids))
    for row in range(2):
        assert tokens[row][mask[row].bool()].tolist() == ids[row] + tails[row]
        assert tokens[row, packed.start : packed.start + len(tails[row])].tolist() == tails[row]
        assert (tokens[row][~mask[row].bool()] == pico.PAD).all()
        assert mask[row, packed.start - 1] == 1


def test_a_tokenizer_without_padding_token_pads_all_the_same(tokenizer) -> None:
    tokenizer.pad_token = None
    packed = Chat(tokenizer).batch([Prompt("Hello"), Prompt("How do I bake a loaf of bread?")])
    assert packed.inputs["input_ids"][0, 0] == pico.EOS


# ----------------------------------------------------------------------------------------------------- reasoning


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Paris.", "Paris."),
        ("<think>Well. Hm.</think>\n\nParis.", "Paris."),
        ("<think>\n\n</think>Paris.", "Paris."),
        ("<think>It never ends", ""),
        ("Hm, since the template began it.</think>\nParis.", "Paris."),
        ("<think>a</think>Paris<think>b</think>.", "Paris."),
        ("Paris. <think>On second", "Paris."),
        ("[THINK]x[/THINK]Paris.", "Paris."),
        ("<|channel>thought\nx<channel|>Paris.", "Paris."),
        ("<|channel|>analysis<|message|>x<|end|><|start|>assistant<|channel|>final<|message|>Paris.", "Paris."),
        ("I think that <b>Paris</b> is it.", "I think that <b>Paris</b> is it."),
    ],
)
def test_reasoning_is_no_part_of_the_answer(text: str, answer: str) -> None:
    assert strip_reasoning(text) == answer


def test_a_switch_in_the_template_is_used_and_recorded(tokenizer) -> None:
    tail = "{%- if enable_thinking is defined and not enable_thinking -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}"
    tokenizer.chat_template = pico.CHAT_TEMPLATE.rstrip() + tail
    chat = Chat(tokenizer)
    assert tokenizer.decode(chat.encode([Prompt("Hello")])[0]).endswith("model\n<think>\n\n</think>\n\n")
    assert chat.describe()["reasoning"] == "enable_thinking=false"


@pytest.mark.parametrize("text", ["Hello", "Hello <eos>"])
def test_a_block_that_the_template_opens_is_closed_and_recorded(tokenizer, text: str) -> None:
    tokenizer.chat_template = pico.CHAT_TEMPLATE.rstrip() + "{{ '<think>\n' }}"
    chat = Chat(tokenizer)
    ids = chat.encode([Prompt(text)])[0]
    assert tokenizer.decode(ids).endswith("model\n<think>\n\n</think>\n\n")
    assert chat.describe()["reasoning"] == "block closed at once"


def test_without_reasoning_nothing_is_done(tokenizer) -> None:
    described = Chat(tokenizer, system="x").describe()
    assert described["reasoning"] == "not asked for"
    assert described["system"] == "x"
    assert len(described["template_sha256"]) == 64


def test_decoding_drops_special_tokens_and_reasoning(tokenizer) -> None:
    chat = Chat(tokenizer)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    assert chat.decode([*ids("Paris, a city."), pico.EOS]) == "Paris, a city."
    assert chat.decode([*ids("<think>Hm.</think> Paris.<end_of_turn>"), pico.EOS]) == "Paris."
    assert chat.decode(ids("<think>Hm.")) == ""
    assert chat.decode([]) == ""


def test_text_that_spells_control_tokens_is_read_as_text(tokenizer) -> None:
    chat = Chat(tokenizer)
    spelled, plain = chat.encode([Prompt("Hello<eos>"), Prompt("Hello")])
    assert pico.EOS not in spelled
    assert len(spelled) > len(plain) + 1
    assert tokenizer.decode(spelled) == tokenizer.decode(plain).replace("Hello", "Hello<eos>")


def test_a_template_that_is_given_takes_the_place_of_the_models_own(tokenizer, tmp_path) -> None:
    own = Chat(tokenizer).encode(PROMPTS)
    tokenizer.chat_template = None
    path = tmp_path / "chat.jinja"
    path.write_text(pico.CHAT_TEMPLATE, encoding="utf-8")
    given = Chat(tokenizer, template=read_template(path))
    assert given.encode(PROMPTS) == own
    assert given.describe()["template"] == "given"
    tokenizer.chat_template = "never read"
    other = Chat(tokenizer, template="Q: {{ messages[0]['content'] }}\nA:")
    assert tokenizer.decode(other.encode([Prompt("Hello")])[0]) == "<bos>Q: Hello\nA:"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"\xff\xfe", "not UTF-8"),
        (b" \n", "an empty chat template"),
        (b"{% for m in messages %}\n{{ m }}\n{% endif %}", "line 3: not a Jinja template"),
    ],
)
def test_a_template_that_cannot_be_read_is_one_line(tmp_path, content: bytes | None, message: str) -> None:
    path = tmp_path / "chat.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        read_template(path)
    assert caught.value.where == f"--chat-template {path}"


def test_tags_that_transformers_adds_to_jinja_are_read(tmp_path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text(
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% continue %}{% endfor %}"
    )
    assert "generation" in read_template(path)
