"""What a GPU computes is what the CPU computes; skipped where there is none."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from perpend.config import FitSection, Machine
from perpend.core.edits import Edit, ModuleEdit
from perpend.core.linear import orthonormalise
from perpend.data import Prompt, PromptPair, PromptSet
from perpend.export.shards import bake
from perpend.fitting.accumulate import accumulate
from perpend.models.load import load_model
from perpend.models.session import Session

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")

Dirs = Callable[[str], Path]
FAMILIES = ("llama", "gemma3", "gemma3_text", "qwen3_moe", "gpt_oss", "deepseek_v3", "falcon_h1", "mamba2")
PROMPTS = [Prompt(f"Tell me {'again and ' * (k % 5)}about village {k}.") for k in range(24)]


def on(device: str, folder: Path, **machine) -> Session:
    settings = Machine(device=device, dtype="float32", **machine)
    return Session(load_model(folder, settings), settings)


def pair() -> PromptPair:
    targets = tuple(Prompt(f"How do I harm bread {k}?") for k in range(24))
    return PromptPair(PromptSet("target", targets, "target.txt"), PromptSet("baseline", tuple(PROMPTS), "baseline.txt"))


def an_edit(one: Session, mode: str) -> Edit:
    generator = torch.Generator().manual_seed(0)
    v = orthonormalise(torch.randn(2, one.hidden_size, generator=generator)).float()
    return Edit({writer.name: ModuleEdit(v, 0.9, mode) for writer in one.anatomy.writers})


@pytest.fixture
def little_memory() -> Iterator[Callable[[int], None]]:
    """`little_memory(bytes)` leaves this process so many more on the GPU."""
    total = torch.cuda.mem_get_info()[1]

    def leave(more: int) -> None:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more) / total)

    yield leave
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_directions_are_those_of_the_cpu(pico_dir: Dirs, family: str) -> None:
    found = [accumulate(on(device, pico_dir(family)), pair(), FitSection()) for device in ("cpu", "cuda")]
    cosine = (found[0].vectors * found[1].vectors).sum(-1).abs()
    assert cosine.min() > 0.9999
    torch.testing.assert_close(found[1].raw_norm, found[0].raw_norm, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("mode", ["plain", "column", "row"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_does_there_what_it_does_on_the_cpu(pico_dir: Dirs, family: str, mode: str) -> None:
    likely = []
    for device in ("cpu", "cuda"):
        one = on(device, pico_dir(family))
        tails = [[40 + k, 60, 80] for k in range(len(PROMPTS))]
        before = torch.stack(one.log_likelihood(PROMPTS, tails))
        with one.edited(an_edit(one, mode)):
            edited = torch.stack(one.log_likelihood(PROMPTS, tails))
        assert torch.equal(torch.stack(one.log_likelihood(PROMPTS, tails)), before)
        likely.append((before, edited))
    assert (likely[0][1] - likely[0][0]).abs().max() > 0.05
    for cpu, gpu in zip(*likely, strict=True):
        torch.testing.assert_close(gpu, cpu, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe"])
def test_the_saved_file_is_that_of_the_cpu(pico_dir: Dirs, tmp_path: Path, family: str) -> None:
    for device in ("cpu", "cuda"):
        one = on(device, pico_dir(family))
        bake(pico_dir(family), an_edit(one, "column"), one.anatomy, tmp_path / device, one.model)
    for file in sorted((tmp_path / "cpu").glob("*.safetensors")):
        cpu, gpu = load_file(file), load_file(tmp_path / "cuda" / file.name)
        assert list(cpu) == list(gpu)
        for name, tensor in cpu.items():
            torch.testing.assert_close(gpu[name], tensor, rtol=0, atol=1e-6)


def test_memory_that_runs_out_halves_the_batch(pico_dir: Dirs, little_memory: Callable[[int], None]) -> None:
    many = [Prompt(f"{PROMPTS[k % 24].text} {k}") for k in range(512)]
    expected = torch.cat(list(on("cuda", pico_dir("llama"), batch_size=32).capture(many)))
    one = on("cuda", pico_dir("llama"), batch_size=512)
    sizes: list[int] = []
    one.model.model.register_forward_pre_hook(
        lambda m, a, values: sizes.append(len(values["input_ids"])), with_kwargs=True
    )
    little_memory(12 << 20)
    found = torch.cat(list(one.capture(many)))
    assert max(sizes) == 512 > max(sizes[-2:]), "all at once did not fit"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_model_may_lie_partly_on_the_cpu(pico_dir: Dirs, tmp_path: Path, family: str) -> None:
    whole = on("cuda", pico_dir(family))
    layers = whole.anatomy.layers
    rest = {name for name, _ in whole.model.named_modules() if name} | {n for n, _ in whole.model.named_parameters()}
    tops = sorted(n for n in rest if not layers.startswith(n) and not n.startswith(layers + ".") and n != layers)
    places = {name: 0 for name in tops if not any(name.startswith(other + ".") for other in tops)}
    places |= {f"{layers}.{k}": ("cpu" if k == 1 else 0) for k in range(whole.n_layers)}
    (tmp_path / "places.json").write_text(json.dumps(places))
    parted = on("cuda", pico_dir(family), device_map=str(tmp_path / "places.json"))
    mine, theirs = (torch.cat(list(one.capture(PROMPTS))) for one in (parted, whole))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
