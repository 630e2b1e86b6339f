"""Every family that Perpend knows goes through everything that it promises, on a model of its own small size.

One table, one model per row: full coverage; hooks and weights agree; every weight factor is realised, 0 to the byte; at
1 nothing of the direction is left; what was not edited is byte-equal; the saved file, read back, is what was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import pico
from perpend.core.edits import Edit, ModuleEdit
from perpend.core.linear import orthonormalise
from perpend.export.checkpoint import Checkpoint
from perpend.export.names import Locator
from perpend.export.shards import bake
from perpend.export.verify import leak_gate, untouched_equal
from perpend.models.hooks import in_place, prepare
from perpend.models.load import load_model
from perpend.models.session import Session

Dirs = Callable[[str], Path]

ROWS: dict[str, tuple[str, ...]] = {
    "Llama 3": ("llama",),
    "Llama 4": ("llama4_text", "llama4"),
    "Mistral": ("mistral",),
    "Mixtral": ("mixtral",),
    "Mistral 3": ("mistral3",),
    "Qwen 2.5": ("qwen2", "qwen2_5_vl", "qwen2_moe"),
    "Qwen 3": ("qwen3", "qwen3_moe", "qwen3_vl"),
    "Qwen 3 Next, 3.5": ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_5"),
    "Gemma 2": ("gemma2",),
    "Gemma 3": ("gemma3_text", "gemma3"),
    "Gemma 3n": ("gemma3n_text",),
    "Gemma 4": ("gemma4_text", "gemma4_moe", "gemma4"),
    "Phi": ("phi3", "phimoe"),
    "GPT-2": ("gpt2",),
    "GPT-NeoX": ("gpt_neox",),
    "OLMo 2": ("olmo2",),
    "gpt-oss": ("gpt_oss",),
    "DeepSeek V3": ("deepseek_v3",),
    "GLM 4": ("glm4_moe",),
    "Granite": ("granitemoehybrid",),
    "LFM2": ("lfm2", "lfm2_moe"),
    "Mamba hybrids": ("falcon_h1", "nemotron_h", "jamba", "mamba2"),
    "Cohere": ("cohere", "cohere2"),
    "OPT": ("opt",),
}
FAMILIES = [family for row in ROWS.values() for family in row]
FACTORS = (1.0, 0.25, 0.0, -0.5, 1.5)
TOKENS = torch.tensor([[2, 40, 41, 42, 200, 77, 5, 13]])


@pytest.fixture(scope="module")
def made(pico_dir: Dirs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., SimpleNamespace]]:
    """`made("llama", "plain")` is a model, an edit of every writer, the edited checkpoint, and what both answer."""

    @cache
    def make(family: str, mode: str) -> SimpleNamespace:
        source, out = pico_dir(family), tmp_path_factory.mktemp(f"{family}-{mode}") / "out"
        loaded = load_model(source)
        session = Session(loaded)
        anatomy, model = session.anatomy, loaded.model
        edit = an_edit(session, mode)
        before = logits(model)
        with in_place(prepare(model, [anatomy.writer(name) for name in edit.modules], edit)):
            hooked = logits(model)
        restored = logits(model)
        result = bake(source, edit, anatomy, out, model)
        saved = load_model(out).model
        return SimpleNamespace(
            family=family,
            source=source,
            out=out,
            model=model,
            anatomy=anatomy,
            edit=edit,
            result=result,
            saved=saved,
            answers=SimpleNamespace(before=before, hooked=hooked, restored=restored, saved=logits(saved)),
        )

    yield make
    make.cache_clear()


def an_edit(session: Session, mode: str) -> Edit:
    """Give every kind of writer every factor in turn; two directions, so that more than one is the usual case."""
    turns: dict[str, Iterator[float]] = {}
    parts = {}
    for writer in session.anatomy.writers:
        factor = next(turns.setdefault(f"{mode}{writer.role}", cycle(FACTORS)))
        generator = torch.Generator().manual_seed(len(parts))
        directions = orthonormalise(torch.randn(2, session.hidden_size, generator=generator)).float()
        parts[writer.name] = ModuleEdit(directions, factor, mode)
    return Edit(parts)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=TOKENS.to(model.device), use_cache=False).logits.float().cpu()


def matrices(folder: Path, case: SimpleNamespace, name: str) -> list[torch.Tensor]:
    """The matrices of a writer as a file has them, one per expert, found by name in the untouched file."""
    checkpoint = Checkpoint(folder)
    pieces = Locator(Checkpoint(case.source), case.model, case.anatomy).matrices(case.anatomy.writer(name))
    return [piece.view(checkpoint.read(piece.entry, piece.begin, piece.end)) for piece in pieces]


def test_the_table_is_complete():
    assert sorted(FAMILIES) == sorted((*pico.FAMILIES, *pico.EXOTIC, *pico.UNRUN))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_writer_is_found(made, family):
    anatomy = made(family, "plain").anatomy
    assert anatomy.gaps == ()
    assert {row.layer for row in anatomy.coverage()} == set(range(anatomy.n_layers))
    assert all(row.matched == row.total > 0 and row.parameters > 0 for row in anatomy.coverage())


@pytest.mark.parametrize("mode", ["plain", "column", "row"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_are_the_saved_weights_and_leave_no_trace(made, family, mode):
    answers = made(family, mode).answers
    scale = answers.before.abs().max()
    assert (answers.hooked - answers.before).abs().max() > 1e-2 * scale, "the edit does something"
    torch.testing.assert_close(answers.saved, answers.hooked, rtol=1e-4, atol=1e-5 * scale.item())
    assert torch.equal(answers.restored, answers.before)


@pytest.mark.parametrize("mode", ["plain", "column", "row"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_factor_is_realised(made, family, mode):
    case = made(family, mode)
    rows = leak_gate(case.source, case.out, case.edit, case.anatomy, case.model)
    asked = {name: part.weight for name, part in case.edit.modules.items() if part.weight}
    assert {row.module: row.asked for row in rows} == asked
    assert max(row.miss for row in rows) < 1e-5
    assert max(row.noise for row in rows) < 1e-5
    for name in (name for name, part in case.edit.modules.items() if part.weight == 0):
        pairs = zip(matrices(case.source, case, name), matrices(case.out, case, name), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("mode", ["plain", "column"])
@pytest.mark.parametrize("family", FAMILIES)
def test_at_one_nothing_is_left_of_the_directions(made, family, mode):
    case = made(family, mode)
    whole = [(name, part) for name, part in case.edit.modules.items() if part.weight == 1]
    assert whole
    for name, part in whole:
        for old, new in zip(matrices(case.source, case, name), matrices(case.out, case, name), strict=True):
            assert (part.directions @ new).norm() < 1e-6 * (part.directions @ old).norm()
            if mode == "column":
                torch.testing.assert_close(new.norm(dim=0), old.norm(dim=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("mode", ["plain", "column", "row"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_rest_is_the_original_byte_for_byte(made, family, mode):
    case = made(family, mode)
    same = untouched_equal(case.source, case.out, case.result.edited)
    assert same.differing == ()
    tensors = Checkpoint(case.source).tensors
    assert same.tensors == len(tensors) - len(case.result.edited)
    assert not [n for n in case.result.edited if "vision" in n or "visual" in n or "embed" in n or "head" in n]
