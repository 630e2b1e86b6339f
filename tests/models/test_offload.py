"""A model whose layers are read when they are needed does what it does in memory, and reads the files once per pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from session_cases import PROMPTS

import pico
from perpend.config import Machine
from perpend.core.edits import Edit, ModuleEdit
from perpend.errors import RunFailed, UsageError
from perpend.models import memory, offload, places
from perpend.models.load import load_model
from perpend.models.memory import release
from perpend.models.offload import Unit
from perpend.models.session import Sampling, Session

Dirs = Callable[[str], Path]
IN_MEMORY, ON_DISK = Machine(device="cpu", batch_size=2), Machine(device="cpu", batch_size=2, offload="disk")
FAMILIES = ("llama", "gemma3", "mixtral", "gpt2", "gpt_oss")
TAILS = [[7, 8, 9], [10], [11, 12], [13, 14, 15, 16], [17]]


@pytest.fixture
def both(pico_dir: Dirs) -> Callable[[str], list[Session]]:
    return lambda family: [Session(load_model(pico_dir(family), m), m) for m in (IN_MEMORY, ON_DISK)]


def some_edit(one: Session, mode: str) -> Edit:
    generator = torch.Generator().manual_seed(0)
    v = torch.nn.functional.normalize(torch.randn(1, one.hidden_size, generator=generator))
    return Edit({writer.name: ModuleEdit(v, 0.8, mode) for writer in one.anatomy.writers})


@pytest.mark.parametrize("family", FAMILIES)
def test_an_offloaded_model_does_what_it_does_in_memory(both, family: str) -> None:
    here, away = both(family)
    layers = away.anatomy.layer_modules(away.model)
    assert away.shelf is not None
    assert here.shelf is None
    assert away.anatomy == here.anatomy
    assert all(p.is_meta for p in layers[0].parameters())
    for edit in (None, some_edit(here, "plain"), some_edit(here, "column")):
        with here.edited(edit), away.edited(edit):
            assert torch.equal(*(torch.cat(list(one.capture(PROMPTS))) for one in (here, away)))
            for a, b in zip(*(one.log_likelihood(PROMPTS, TAILS) for one in (here, away)), strict=True):
                assert torch.equal(a, b)
            assert here.generate(PROMPTS, max_new_tokens=5) == away.generate(PROMPTS, max_new_tokens=5)
    again = torch.cat(list(away.capture(PROMPTS)))  # no edit is left behind
    assert torch.equal(again, torch.cat(list(here.capture(PROMPTS))))


def test_experts_that_happen_to_be_in_memory_are_edited_like_those_that_are_not(both) -> None:
    here, away = both("mixtral")
    edit = some_edit(here, "column")
    for unit in away.shelf.units:
        if not isinstance(unit, Unit):
            continue
        away.shelf.enter(unit)
        with here.edited(edit), away.edited(edit):
            assert here.generate(PROMPTS, max_new_tokens=5) == away.generate(PROMPTS, max_new_tokens=5)


def test_all_batches_share_one_reading_of_the_files(both) -> None:
    away = both("llama")[1]
    size = sum(p.nbytes for layer in away.anatomy.layer_modules(away.model) for p in layer.parameters())
    counts = []
    for prompts in (PROMPTS[:2], PROMPTS * 4):
        before = away.shelf.pages.bytes_read
        list(away.capture(prompts))
        counts.append(away.shelf.pages.bytes_read - before)
    assert size <= counts[0] < 2 * size
    assert size <= counts[1] < 2 * size  # ten batches of two; beside the layers, the rows of the embedding
    assert sum(any(not p.is_meta for p in u.module.parameters()) for u in away.shelf.units if isinstance(u, Unit)) <= 1


def test_garbage_is_collected_only_where_a_graph_may_hold_a_layer(both, monkeypatch: pytest.MonkeyPatch) -> None:
    away, calls = both("llama")[1], list[int]()
    list(away.capture(PROMPTS))  # the first looks into the model, with gradients
    monkeypatch.setattr(offload, "gc", SimpleNamespace(collect=lambda: calls.append(1)))
    away.generate(PROMPTS, max_new_tokens=4)
    list(away.capture(PROMPTS))
    away.log_likelihood(PROMPTS, TAILS)
    assert not calls  # on a small model each would take as long as hundreds of layers
    for batch in away.batches(PROMPTS, TAILS):
        away.logits(batch)
    assert calls


def test_drawing_depends_on_the_seed_and_not_on_who_travels_along(both) -> None:
    here, away = both("llama")
    drawn = Sampling(temperature=1.0, seed=5)
    assert here.generate(PROMPTS, max_new_tokens=6, sampling=drawn) == away.generate(
        PROMPTS, max_new_tokens=6, sampling=drawn
    )


def test_what_fails_in_one_batch_fails_the_pass_and_nothing_hangs(both, monkeypatch: pytest.MonkeyPatch) -> None:
    away = both("llama")[1]
    inner = away._residuals

    def broken(rows, *args):
        if 1 in rows:
            raise RuntimeError("no")
        return inner(rows, *args)

    monkeypatch.setattr(away, "_residuals", broken)
    with pytest.raises(RuntimeError, match="no"):
        list(away.capture(PROMPTS))
    monkeypatch.undo()
    assert len(torch.cat(list(away.capture(PROMPTS)))) == len(PROMPTS)


def test_a_batch_that_does_not_fit_is_halved_while_the_others_go_on(both, monkeypatch: pytest.MonkeyPatch) -> None:
    here, away = both("llama")
    inner = away._residuals

    def tight(rows, *args):
        if len(rows) > 1:
            raise MemoryError
        return inner(rows, *args)

    monkeypatch.setattr(away, "_residuals", tight)
    found = [torch.cat(list(one.capture(PROMPTS))) for one in (here, away)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_a_layer_that_is_not_finite_is_named_when_it_is_read(tmp_path: Path) -> None:
    folder = pico.save("llama", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RunFailed, match=r"model.layers.1: mlp.down_proj.weight holds NaN"):
        Session(load_model(folder, ON_DISK), ON_DISK).log_likelihood(PROMPTS, TAILS)


def test_a_released_model_holds_nothing(both) -> None:
    away = both("llama")[1]
    list(away.capture(PROMPTS))
    release(away.model)
    assert all(p.is_meta for p in away.model.parameters())


# --------------------------------------------------------------------------------------------------------- the plan


def some_parts(layers: int = 14, size: int = 100 << 20) -> list[places.Part]:
    words = [places.Part("embed", 300 << 20, "words"), places.Part("head", 0, "words")]
    return [
        words[0],
        *(places.Part(f"layers.{k}", size, "layer") for k in range(layers)),
        places.Part("norm", 9, "rest"),
        words[1],
    ]


@pytest.mark.parametrize(("free", "kept"), [(2 << 30, 1301), (1650, 8), (520, 0)])
def test_what_fits_is_kept_and_the_rest_is_read(monkeypatch: pytest.MonkeyPatch, free: int, kept: int) -> None:
    free = free if free > 1 << 20 else free << 20
    monkeypatch.setattr(places, "free_memory", lambda device, most=None: free)
    found = places.plan(some_parts(), torch.device("cpu"), Machine(device="cpu"), "m")
    if kept == 1301:
        assert (found.map, found.read) == ({"": torch.device("cpu")}, 0)
        return
    here = [name for name, place in found.map.items() if place != places.READ]
    assert sum(name.startswith("layers") for name in here) == kept
    assert "norm" in here
    assert found.kept + found.read == 1700 * (1 << 20) + 9
    assert found.unit == 100 << 20


def test_what_cannot_be_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "free_memory", lambda device, most=None: 150 << 20)
    with pytest.raises(UsageError, match="two layers"):
        places.plan(some_parts(), torch.device("cpu"), Machine(), "m")
    with pytest.raises(UsageError, match="--offload auto"):
        places.plan(some_parts(), torch.device("cpu"), Machine(offload="none"), "m")


def test_free_memory_knows_the_limits_of_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    cpu, used = torch.device("cpu"), psutil.Process().memory_info().rss
    assert abs(memory.free_memory(cpu, used + (64 << 20)) - (64 << 20)) < 16 << 20
    for name, value in (
        ("memory.max", "900"),
        ("memory.current", "500"),
        ("memory.stat", "active_file 60\ninactive_file 40"),
    ):
        (tmp_path / name).write_text(value)
    monkeypatch.setattr(memory, "_ROOT", tmp_path)
    assert memory._walk(tmp_path, "/", "memory.max", "memory.current", "inactive_file") == [500]


@pytest.mark.parametrize(("text", "size"), [("3GB", 3 * 10**9), ("1.5 GiB", 3 << 29), ("1000", 1000)])
def test_sizes_are_read(text: str, size: int) -> None:
    assert Machine.model_validate({"memory": text}).memory == size


def test_a_device_map_may_leave_layers_in_the_files(pico_dir: Dirs, tmp_path: Path) -> None:
    own = load_model(pico_dir("llama"), IN_MEMORY)
    found = places.parts(own.model, 4)
    layer = next(part for part in found if part.kind == "layer")
    file = tmp_path / "places.json"
    file.write_text(json.dumps({part.name: "disk" if part == layer else "cpu" for part in found}))
    machine = Machine(device="cpu", batch_size=2, device_map=str(file), offload_folder=tmp_path)
    away = Session(load_model(pico_dir("llama"), machine), machine)
    assert away.shelf is not None
    assert all(p.is_meta for p in away.model.get_submodule(layer.name).parameters())
    here = Session(own, IN_MEMORY)
    assert torch.equal(*(torch.cat(list(one.capture(PROMPTS))) for one in (here, away)))


def test_what_a_device_map_reads_and_holds_is_counted(tmp_path: Path) -> None:
    found = [places.Part("a.words", 100, "words"), *(places.Part(f"a.layers.{k}", 10, "layer") for k in range(11))]
    file = tmp_path / "places.json"
    file.write_text(json.dumps({"a": 0, "a.layers.1": "disk", "a.layers.2": "cpu", "a.layers.3.mlp": "disk"}))
    machine = Machine(device_map=str(file))
    on_gpu = places.plan(found, torch.device("cuda"), machine, "m")
    assert (on_gpu.kept, on_gpu.held, on_gpu.read, on_gpu.unit) == (180, 10, 20, 10)
    on_cpu = places.plan(found, torch.device("cpu"), machine, "m")
    assert (on_cpu.kept, on_cpu.held, on_cpu.read) == (190, 0, 20)
    file.write_text('{"": "cpu"}')
    assert places.plan(found, torch.device("cpu"), machine, "m") == places.Plan({"": "cpu"}, 210)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no device map '.*'; valid: auto, balanced, sequential, or a JSON file"),
        ("{'a': 0}", "not valid JSON"),
        ("[0, 1]", "not a mapping of modules to devices"),
        ('{"a": 0.5}', "not a mapping of modules to devices"),
    ],
)
def test_what_is_no_device_map_is_one_line(tmp_path: Path, text: str | None, said: str) -> None:
    file = tmp_path / "places.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UsageError, match=said) as caught:
        places.plan([], torch.device("cpu"), Machine(device_map=str(file)), "m")
    assert "\n" not in str(caught.value)
