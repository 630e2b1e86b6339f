"""The iterative strategy measures every batch of modules under the edits before it."""

from __future__ import annotations

import copy

import pytest
import torch
from fitting_cases import mean_difference, pair, session_on

import pico
from perpend.config import EditSection, FitSection
from perpend.core.edits import Edit
from perpend.core.schedule import Band, Constant
from perpend.fitting.accumulate import accumulate
from perpend.fitting.iterative import iterate

EVERYWHERE = EditSection(attention=Constant(weight=1.0), mlp=Constant(weight=1.0))


@pytest.mark.parametrize("layer", [None, 2.0])
@pytest.mark.parametrize("per_batch", [1, 4])
def test_each_batch_is_measured_under_the_edits_before_it(pico_dir, layer, per_batch):
    session, both = session_on(pico_dir("llama")), pair(5)
    section = FitSection(strategy="iterative", modules_per_batch=per_batch)
    first = accumulate(session, both, section)
    made = iterate(session, both, section, EVERYWHERE, first, layer)
    assert [len(step.modules) for step in made.steps] == [per_batch] * (6 // per_batch) + [6 % per_batch] * (
        per_batch == 4
    )
    done: dict = {}
    for step in made.steps:
        with session.edited(Edit(done) if done else None):
            now = mean_difference(session, both)
        for name in step.modules:
            place = session.anatomy.writer(name).layer if layer is None else int(layer)
            assert torch.allclose(made.edit.modules[name].directions[0].double(), now[place], atol=1e-4)
        done |= {name: made.edit.modules[name] for name in step.modules}
    assert set(done) == {w.name for w in session.anatomy.writers}
    assert made.steps[0].difference == 1.0
    last = made.edit.modules["model.layers.2.mlp.down_proj"].directions[0]
    assert abs(float(last @ first.vectors[2, 0])) < 0.99  # not what the untouched model would have given


def test_modules_without_weight_make_no_batch(pico_dir):
    session, both = session_on(pico_dir("llama")), pair(4)
    section = FitSection(modules_per_batch=1)
    edit = EditSection(attention=Band(peak_layer=1, spread=0.5), mlp=Constant(weight=0.0))
    made = iterate(session, both, section, edit, accumulate(session, both, section), None)
    assert [step.modules for step in made.steps] == [("model.layers.1.self_attn.o_proj",)]


def test_it_ends_when_nothing_is_left(tmp_path):
    model = pico.build("llama")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        u, a = torch.randn(32, generator=generator), torch.randn(32, generator=generator)
        model.model.layers[0].self_attn.o_proj.weight.copy_(torch.outer(u, a))
    model.save_pretrained(tmp_path)
    pico.tokenizer().save_pretrained(tmp_path)
    session, both, section = session_on(tmp_path), pair(4), FitSection(modules_per_batch=1)
    made = iterate(session, both, section, EVERYWHERE, accumulate(session, both, section), None)
    assert [step.modules for step in made.steps] == [("model.layers.0.self_attn.o_proj",)]
    assert torch.allclose(
        made.edit.modules[made.steps[0].modules[0]].directions[0].abs(), (u / u.norm()).abs(), atol=1e-5
    )


def test_an_interrupted_fit_goes_on_in_the_step_where_it_was(pico_dir, monkeypatch):
    session, both, kept, read = session_on(pico_dir("llama")), pair(5), {}, []
    section = FitSection(strategy="iterative", modules_per_batch=2)
    first = accumulate(session, both, section)
    whole = iterate(session, both, section, EVERYWHERE, first, None)

    def checkpoint(name, state):
        if state is not None:
            kept[name] = copy.deepcopy(state)
        return kept.get(name) if state is None else None

    def capture(prompts, **how):
        if len(read) == 3:  # the second step has read both classes, the third its targets
            raise KeyboardInterrupt
        read.append(len(prompts))
        return captured(prompts, **how)

    captured = session.capture
    monkeypatch.setattr(session, "capture", capture)
    with pytest.raises(KeyboardInterrupt):
        iterate(session, both, section, EVERYWHERE, first, None, checkpoint=checkpoint)
    assert read == [5, 5, 5]
    read[:] = []
    monkeypatch.setattr(
        session, "capture", lambda prompts, **how: read.append(len(prompts)) or captured(prompts, **how)
    )
    again = iterate(session, both, section, EVERYWHERE, first, None, checkpoint=checkpoint)
    assert read == [0, 0, 0, 5]
    assert again.edit.sha256 == whole.edit.sha256
    assert again.steps == whole.steps
