"""A session: residuals where they are said to be, results that batches do not change, edits that leave no trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from session_cases import PROMPTS

import pico
from perpend.config import Machine
from perpend.core.edits import Edit, ModuleEdit, edit_bias, edit_weight
from perpend.data import Prompt
from perpend.errors import RunFailed, UsageError
from perpend.models import load
from perpend.models.load import load_model
from perpend.models.session import Reply, ReplyLog, Sampling, Session
from perpend.progress import reporting

SINGLY = Machine(batch_size=1)
QUICK = ("llama", "gemma2", "gemma3", "gpt2", "mixtral", "gpt_oss")
FAMILIES = [
    family if family in QUICK else pytest.param(family, marks=pytest.mark.slow)
    for family in (*pico.FAMILIES, *pico.EXOTIC)
]

Dirs = Callable[[str], Path]


def session(pico_dir: Dirs, family: str = "llama", machine: Machine | None = None, **kwargs) -> Session:
    return Session(load_model(pico_dir(family)), machine, **kwargs)


def captured(one: Session, prompts=PROMPTS, **kwargs) -> torch.Tensor:
    return torch.cat(list(one.capture(prompts, **kwargs)))


def an_edit(one: Session, weight: float = 1.0, mode="plain", rank: int = 1, seed: int = 0) -> Edit:
    """Edit every writer of a model along its own random directions."""
    generator = torch.Generator().manual_seed(seed)

    def part() -> ModuleEdit:
        v = torch.linalg.qr(torch.randn(one.hidden_size, rank, generator=generator)).Q.T
        return ModuleEdit(v.contiguous(), weight, mode)

    return Edit({writer.name: part() for writer in one.anatomy.writers})


def some_logits(one: Session) -> list[torch.Tensor]:
    tails = [[7, 8, 9], [10], [11, 12], [13, 14, 15, 16], [17]]
    return [one.logits(batch) for batch in one.batches(PROMPTS, tails)]


# ---------------------------------------------------------------------------------------------------- residuals


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_residual_is_that_of_the_layer_and_not_of_the_final_norm(pico_dir: Dirs, family: str) -> None:
    one = session(pico_dir, family)
    found = captured(one, PROMPTS[:1])[0]
    ids = torch.tensor(one.chat.encode(PROMPTS[:1]), device=one.device)
    with torch.no_grad():
        states = [x.cpu() for x in one.model(input_ids=ids, output_hidden_states=True).hidden_states]
        by_hand = one.model.model.norm(found[-1].to(one.device)).cpu()
    assert found.shape == (one.n_layers, one.hidden_size)
    assert found.dtype == torch.float32
    for layer in range(one.n_layers - 1):
        torch.testing.assert_close(found[layer], states[layer + 1][0, -1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(by_hand, states[-1][0, -1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[-1], states[-1][0, -1], rtol=0.05)


def test_residual_is_the_sum_of_what_was_written(pico_dir: Dirs) -> None:
    one = session(pico_dir)
    ids = torch.tensor(one.chat.encode(PROMPTS[:1]), device=one.device)
    written: list[torch.Tensor] = []
    hooks = [
        one.model.get_submodule(writer.name).register_forward_hook(lambda m, a, y: written.append(y[0, -1].cpu()))
        for writer in one.anatomy.writers
    ]
    with torch.no_grad():
        one.model(input_ids=ids)
        start = one.model.get_input_embeddings()(ids)[0, -1].cpu()
    for hook in hooks:
        hook.remove()
    found = captured(one, PROMPTS[:1])[0]
    for layer in range(one.n_layers):
        torch.testing.assert_close(found[layer], start + sum(written[: 2 * layer + 2]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_change_nothing(pico_dir: Dirs, family: str) -> None:
    loaded = load_model(pico_dir(family))
    together, singly = Session(loaded), Session(loaded, SINGLY)
    tails = [[7, 8, 9], [10], [11, 12], [13, 14, 15, 16], [17]]
    for position in (-1, -3):
        a, b = captured(together, position=position), captured(singly, position=position)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
    for a, b in zip(together.log_likelihood(PROMPTS, tails), singly.log_likelihood(PROMPTS, tails), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    a, b = (one.generate(PROMPTS, max_new_tokens=6) for one in (together, singly))
    assert a == b


def test_capture_position_counts_from_the_end_of_the_prompt(pico_dir: Dirs) -> None:
    one = session(pico_dir)
    longer = captured(one, [Prompt("What is the capital")], position=-1)
    assert longer.shape[0] == 1
    shortest = min(map(len, one.chat.encode(PROMPTS)))
    captured(one, position=1 - shortest)
    with pytest.raises(UsageError, match="never the first"):
        captured(one, position=-shortest)
    with pytest.raises(UsageError, match="position 0"):
        captured(one, position=0)


def test_capture_computes_no_logits(pico_dir: Dirs) -> None:
    one = session(pico_dir)
    assert one.n_layers == 3  # found before the head is watched
    calls: list[int] = []
    one.model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    captured(one)
    assert not calls


def test_capture_keeps_prompt_order_across_windows(pico_dir: Dirs, monkeypatch: pytest.MonkeyPatch) -> None:
    one = session(pico_dir)
    whole = captured(one)
    monkeypatch.setattr("perpend.models.session.WINDOW", 2)
    parts = list(one.capture(PROMPTS))
    assert [len(part) for part in parts] == [2, 2, 1]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-4)


def test_prompts_beyond_the_context_are_refused(pico_dir: Dirs) -> None:
    one = session(pico_dir)
    long = [Prompt("How do I bake? " * 200)]
    for call in (lambda: captured(one, long), lambda: one.log_likelihood(long, [[7]])):
        with pytest.raises(UsageError, match="context ends at 512"):
            call()
    with pytest.raises(UsageError, match="and 500 tokens after it"):
        one.generate(PROMPTS, max_new_tokens=500)
    assert list(one.stream([{"role": "user", "content": "Sure?"}], max_new_tokens=4000))


def test_nothing_asked_gives_nothing(pico_dir: Dirs) -> None:
    one = session(pico_dir)
    assert list(one.capture([])) == []
    assert one.generate([]) == []
    assert list(one.batches([], [])) == []


# -------------------------------------------------------------------------------------------------------- edits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["plain", "column", "row"])
def test_hooks_are_the_edited_weights(pico_dir: Dirs, family: str, mode: str) -> None:
    one, other = session(pico_dir, family), session(pico_dir, family)
    edit = an_edit(one, 0.7, mode, rank=2)
    with torch.no_grad():
        for name, part in edit.modules.items():
            writer = other.anatomy.writer(name)
            weight, bias = writer.weight(other.model), writer.bias_of(other.model)
            old = weight.clone()
            for expert in range(writer.experts or 1):
                matrix = writer.matrix(old, expert)
                writer.assign(weight, edit_weight(matrix, part), expert)
                if bias is not None:
                    where = bias[expert] if writer.experts else bias
                    where.copy_(edit_bias(where, part, matrix))
    with one.edited(edit):
        hooked = captured(one)
        scores = one.log_likelihood(PROMPTS, [[5, 6]] * 5)
    baked = captured(other)
    assert (hooked - captured(one)).abs().max() > 0.1, "the edit does something"
    torch.testing.assert_close(hooked, baked, rtol=1e-4, atol=1e-5 * baked.abs().max().item())
    for a, b in zip(scores, other.log_likelihood(PROMPTS, [[5, 6]] * 5), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_nothing_is_written_along_a_removed_direction(pico_dir: Dirs) -> None:
    one = session(pico_dir)
    v = torch.nn.functional.normalize(torch.randn(1, one.hidden_size, generator=torch.Generator().manual_seed(1)))
    edit = Edit({writer.name: ModuleEdit(v, 1.0) for writer in one.anatomy.writers})
    with one.edited(edit):
        found = captured(one)
    components = found @ v[0]
    torch.testing.assert_close(components, components[:, :1].expand_as(components), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("mode", ["plain", "column", "row"])
def test_leaving_an_edit_restores_bit_equal_logits(pico_dir: Dirs, family: str, mode: str) -> None:
    one = session(pico_dir, family)
    before = some_logits(one)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in one.model.modules())
    edit = an_edit(one, 1.0, mode)
    with one.edited(edit):
        assert not all(torch.equal(a, b) for a, b in zip(before, some_logits(one), strict=True))
    with pytest.raises(RuntimeError, match="inside"), one.edited(edit):
        raise RuntimeError("inside")
    assert all(torch.equal(a, b) for a, b in zip(before, some_logits(one), strict=True))
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in one.model.modules())


def test_no_edit_and_weight_factor_zero_change_nothing(pico_dir: Dirs) -> None:
    one = session(pico_dir)
    before = some_logits(one)
    for edit in (None, an_edit(one, 0.0)):
        with one.edited(edit):
            assert all(torch.equal(a, b) for a, b in zip(before, some_logits(one), strict=True))


def test_nested_edits_are_refused_and_the_outer_one_survives(pico_dir: Dirs) -> None:
    one = session(pico_dir)
    with one.edited(an_edit(one)):
        inside = captured(one)
        with pytest.raises(UsageError, match="already"), one.edited(an_edit(one, seed=1)):
            pass
        with one.edited(None):
            pass
        assert torch.equal(inside, captured(one))
    with one.edited(an_edit(one)):
        assert torch.equal(inside, captured(one))


@pytest.mark.parametrize("mode", ["plain", "column"])
def test_logits_under_an_edit(pico_dir: Dirs, mode: str) -> None:
    one = session(pico_dir)
    edit, before = an_edit(one, 0.8, mode), some_logits(one)
    batches = list(one.batches(PROMPTS, [[7], [8], [9, 10], [11], [12]]))
    under = one.under(edit)
    with one.edited(edit):
        expected = [one.logits(batch) for batch in batches]
        with pytest.raises(UsageError, match="already"):
            under(batches[0])
        with pytest.raises(UsageError, match="already"):
            one.under(edit)
    assert all(torch.equal(a, under(batch)) for a, batch in zip(expected, batches, strict=True))
    assert all(torch.equal(one.logits(batch), one.under(None)(batch)) for batch in batches)
    assert all(torch.equal(a, b) for a, b in zip(before, some_logits(one), strict=True))


def test_an_edit_of_an_unknown_module_leaves_no_hook(pico_dir: Dirs) -> None:
    one = session(pico_dir)
    edit = an_edit(one)
    wrong = Edit({**edit.modules, "model.layers.0.mlp.dwn_proj": next(iter(edit.modules.values()))})
    before = some_logits(one)
    with pytest.raises(UsageError, match="down_proj"), one.edited(wrong):
        pass
    assert all(torch.equal(a, b) for a, b in zip(before, some_logits(one), strict=True))
    with one.edited(edit):
        pass


def test_bfloat16_edits_compute_in_float32(pico_dir: Dirs) -> None:
    one = Session(load_model(pico_dir("llama"), Machine(dtype="bfloat16")))
    name = one.anatomy.writers[0].name
    v = torch.nn.functional.normalize(torch.randn(1, one.hidden_size, generator=torch.Generator().manual_seed(2)))
    outputs: list[torch.Tensor] = []
    module = one.model.get_submodule(name)
    for edit in (None, Edit({name: ModuleEdit(v, 0.5)})):
        with one.edited(edit):
            handle = module.register_forward_hook(lambda m, a, y: outputs.append(y))
            captured(one, PROMPTS[:1])
            handle.remove()
    y, edited = outputs
    exact = y.double() - 0.5 * (y.double() @ v.T.double()) @ v.double()
    assert torch.equal(edited, exact.to(torch.bfloat16))


# ------------------------------------------------------------------------------------------------------ generate


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_greedy_replies_are_those_of_the_library(pico_dir: Dirs, family: str) -> None:
    one = session(pico_dir, family)
    replies = one.generate(PROMPTS, max_new_tokens=8)
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        ids = torch.tensor(one.chat.encode([prompt]), device=one.device)
        bare = one.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert tuple(bare[0, ids.shape[1] :].tolist()) == reply.tokens


def test_a_reply_ends_with_the_end_token_when_it_is_finished(pico_dir: Dirs) -> None:
    one = session(pico_dir)
    (free,) = one.generate(PROMPTS[:1], max_new_tokens=6)
    assert not free.finished
    assert len(free.tokens) == 6
    one.model.generation_config.eos_token_id = [1, free.tokens[3]]
    first = free.tokens.index(free.tokens[3]) + 1
    (ended,) = one.generate(PROMPTS[:1], max_new_tokens=6)
    assert ended == Reply(one.chat.decode(free.tokens[:first]), free.tokens[:first], True)


def test_the_models_own_penalties_do_not_reach_greedy_decoding(pico_dir: Dirs) -> None:
    one = session(pico_dir)
    plain = one.generate(PROMPTS, max_new_tokens=12)
    own = one.model.generation_config
    own.repetition_penalty, own.no_repeat_ngram_size, own.max_length, own.do_sample = 5.0, 1, 5, True
    assert one.generate(PROMPTS, max_new_tokens=12) == plain
    assert one.model.generation_config is own


def test_a_resumed_run_gives_the_same_replies(pico_dir: Dirs, tmp_path: Path) -> None:
    one = session(pico_dir, machine=Machine(batch_size=2))
    for sampling in (None, Sampling(temperature=0.8, top_k=20, seed=3)):
        whole = one.generate(PROMPTS, max_new_tokens=8, sampling=sampling)
        log = ReplyLog(tmp_path / f"{sampling is None}.jsonl", {"seed": 3})
        for prompt in (PROMPTS[1], PROMPTS[2]):
            log[prompt.id] = whole[PROMPTS.index(prompt)]
        with log.path.open("ab") as file:
            file.write(b'{"id": "cut off by a cra')
        again = ReplyLog(log.path, {"seed": 3})
        assert len(again) == 2
        assert one.generate(PROMPTS, max_new_tokens=8, sampling=sampling, store=again) == whole
        assert len(ReplyLog(log.path, {"seed": 3})) == len(PROMPTS)


def test_stored_replies_are_not_made_again(pico_dir: Dirs, monkeypatch: pytest.MonkeyPatch) -> None:
    one = session(pico_dir)
    store: dict[str, Reply] = {}
    whole = one.generate(PROMPTS, max_new_tokens=4, store=store)
    assert set(store) == {prompt.id for prompt in PROMPTS}
    monkeypatch.setattr(one.model, "generate", lambda **_: pytest.fail("made again"))
    assert one.generate(PROMPTS[::-1], max_new_tokens=4, store=store) == whole[::-1]


def test_a_log_of_something_else_is_refused(tmp_path: Path) -> None:
    ReplyLog(tmp_path / "a.jsonl", {"edit": "x"})
    with pytest.raises(UsageError, match="another model"):
        ReplyLog(tmp_path / "a.jsonl", {"edit": "y"})
    (tmp_path / "b.jsonl").write_text("hello\nworld\n")
    with pytest.raises(UsageError, match="not a log"):
        ReplyLog(tmp_path / "b.jsonl")


def test_sampling_is_repeatable_and_leaves_the_global_generator_alone(pico_dir: Dirs) -> None:
    one = session(pico_dir)
    hot = Sampling(temperature=2.0, seed=1)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first = one.generate(PROMPTS, max_new_tokens=8, sampling=hot)
    assert torch.equal(torch.rand(1), expected)
    assert one.generate(PROMPTS, max_new_tokens=8, sampling=hot) == first
    assert one.generate(PROMPTS, max_new_tokens=8, sampling=Sampling(temperature=2.0, seed=2)) != first
    with pytest.raises(UsageError, match="greedy"):
        Sampling(temperature=0.0)


class Notes:
    def __init__(self) -> None:
        self.said: list[str] = []
        self.done = 0

    def start(self, label: str, total: int | None, unit: str = "") -> int:
        return 0

    def advance(self, task: int, amount: int = 1) -> None:
        self.done += amount

    def finish(self, task: int) -> None: ...

    def note(self, message: str) -> None:
        self.said.append(message)


def test_out_of_memory_halves_the_batch_and_says_so(pico_dir: Dirs, monkeypatch: pytest.MonkeyPatch) -> None:
    one = session(pico_dir)
    expected = one.generate(PROMPTS, max_new_tokens=4), captured(one)
    generate, body, most = one.model.generate, load.body, 2

    def small(call):
        def run(**kwargs):
            if len(kwargs["input_ids"]) > most:
                raise torch.OutOfMemoryError("out of memory")
            return call(**kwargs)

        return run

    monkeypatch.setattr(one.model, "generate", small(generate))
    monkeypatch.setattr(load, "body", lambda model: small(body(model)))
    with reporting(Notes()) as notes:
        assert one.generate(PROMPTS, max_new_tokens=4) == expected[0]
        torch.testing.assert_close(captured(one), expected[1], rtol=1e-4, atol=1e-4)
    assert any("out of memory with 5 rows: going on with 2" in line for line in notes.said)
    assert notes.done == 2 * len(PROMPTS)
    most = 0
    with pytest.raises(RunFailed, match="single prompt"):
        one.generate(PROMPTS, max_new_tokens=4)


def test_stream_gives_the_generated_text(pico_dir: Dirs) -> None:
    one = session(pico_dir)
    (reply,) = one.generate(PROMPTS[:1], max_new_tokens=8)
    turns = [{"role": "user", "content": PROMPTS[0].text}]
    pieces = list(one.stream(turns, max_new_tokens=8))
    assert "".join(pieces).strip() == reply.text
    early = one.stream(turns, max_new_tokens=400)
    next(early)
    early.close()
    with one.edited(an_edit(one)):
        assert "".join(one.stream(turns, max_new_tokens=8)).strip() != reply.text


def test_stream_raises_what_generation_raises(pico_dir: Dirs, monkeypatch: pytest.MonkeyPatch) -> None:
    one = session(pico_dir)

    def broken(**kwargs):
        raise ValueError("broken")

    monkeypatch.setattr(one.model, "generate", broken)
    with pytest.raises(ValueError, match="broken"):
        list(one.stream([{"role": "user", "content": "a"}]))


# --------------------------------------------------------------------------------------------------------- score


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_logits_are_those_of_the_whole_sequence(pico_dir: Dirs, family: str) -> None:
    """Only some positions reach the LM head, soft cap (Gemma 2) included."""
    one = session(pico_dir, family)
    tails = [[7, 8, 9], [], [11, 12], [13, 14, 15, 16], [17]]
    seen: list[int] = []
    for batch in one.batches(PROMPTS, tails):
        logits = one.logits(batch)
        assert logits.dtype == torch.float32
        assert logits.shape[:2] == batch.tokens.shape
        for row, k in enumerate(batch.index):
            seen.append(k)
            n = len(tails[k])
            ids = one.chat.encode(PROMPTS[k : k + 1])[0]
            with torch.no_grad():
                every = one.model(input_ids=torch.tensor([ids + tails[k]], device=one.device)).logits[0]
            assert batch.tokens[row][batch.mask[row]].tolist() == tails[k]
            torch.testing.assert_close(logits[row, :n], every[len(ids) - 1 : -1], rtol=1e-4, atol=1e-3)
            expected = every[len(ids) - 1 : -1].log_softmax(-1)[range(n), tails[k]]
            torch.testing.assert_close(one.log_likelihood(PROMPTS, tails)[k], expected.cpu(), rtol=1e-4, atol=1e-3)
    assert sorted(seen) == [0, 2, 3, 4]


def test_continuations_can_be_cut(pico_dir: Dirs) -> None:
    one = session(pico_dir)
    cut = list(one.batches(PROMPTS, [[7, 8, 9]] * 5, max_tokens=2))
    assert all(batch.tokens.shape[1] == 2 for batch in cut)


def test_logits_are_differentiable_in_an_edit(pico_dir: Dirs) -> None:
    one = session(pico_dir)
    factor = torch.tensor(0.5, requires_grad=True)
    name = one.anatomy.writers[0].name
    v = torch.ones(one.hidden_size) / one.hidden_size**0.5
    handle = one.model.get_submodule(name).register_forward_hook(lambda m, a, y: y - factor * (y @ v)[..., None] * v)
    (batch,) = one.batches(PROMPTS[:1], [[7]])
    one.logits(batch).sum().backward()
    handle.remove()
    assert factor.grad is not None
    assert factor.grad.abs() > 0


# -------------------------------------------------------------------------------------------------------- images


@pytest.fixture
def pictures(tmp_path: Path) -> list[Prompt]:
    image = pytest.importorskip("PIL.Image")
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        image.new("RGB", (40, 40), colour).save(tmp_path / f"{name}.png")
    red, blue = (str(tmp_path / f"{name}.png") for name in ("red", "blue"))
    return [
        Prompt("What is this?", red),
        Prompt("What?"),
        Prompt("What is this?", blue),
        Prompt("Write a short story.", red),
    ]


def test_images_reach_the_model_and_batches_change_nothing(pico_dir: Dirs, pictures: list[Prompt]) -> None:
    loaded = load_model(pico_dir("gemma3"))
    together, singly = Session(loaded), Session(loaded, SINGLY)
    residuals = captured(together, pictures)
    torch.testing.assert_close(
        residuals, captured(singly, pictures), rtol=1e-3, atol=1e-3 * residuals.abs().max().item()
    )
    assert not torch.allclose(residuals[0], residuals[2], rtol=1e-2), "the picture matters"
    tails = [[27, 28], [29], [27, 28], [30, 31, 32]]
    scores = [one.log_likelihood(pictures, tails) for one in (together, singly)]
    for a, b in zip(*scores, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-2)
    replies = together.generate(pictures, max_new_tokens=5)
    assert replies == singly.generate(pictures, max_new_tokens=5)
    (found,) = [one for one in together.log_likelihood(pictures[:1], [replies[0].tokens])]
    assert len(found) == len(replies[0].tokens)


def test_images_are_read_as_the_processor_reads_them(pico_dir: Dirs, pictures: list[Prompt]) -> None:
    one = session(pico_dir, "gemma3")
    turns = [
        {
            "role": "user",
            "content": [{"type": "image", "url": pictures[0].image}, {"type": "text", "text": "What is this?"}],
        }
    ]
    own = one.chat.processor.apply_chat_template(
        turns, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    ours = one.chat.batch(pictures[:1]).inputs
    assert set(ours) == set(own)
    for key, value in own.items():
        torch.testing.assert_close(ours[key], value)


def test_a_model_without_eyes_refuses_images(pico_dir: Dirs, pictures: list[Prompt], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="takes no images"):
        session(pico_dir).generate(pictures)
    with pytest.raises(UsageError, match="cannot be read"):
        session(pico_dir, "gemma3").generate([Prompt("What?", str(tmp_path / "none.png"))])
