"""Small recipes, prompts and interruptions for the tests of tasks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from perpend.config import Machine, Recipe
from perpend.judges.labels import Label, Verdict

MACHINE = Machine(device="cpu", batch_size=2)
WORDS = ("bread", "water", "salt", "a fox", "the village", "a river", "a list", "numbers", "the city", "a story")


def write_prompts(folder: Path, n: int = 30) -> tuple[str, str]:
    """Write prompts of both classes; returns the references."""
    found = []
    for kind, lead in (("target", "How do I harm"), ("baseline", "Tell me about")):
        path = folder / f"{kind}.txt"
        path.write_text("".join(f"{lead} {WORDS[k % len(WORDS)]} {k}?\n" for k in range(n)), encoding="utf-8")
        found.append(str(path))
    return found[0], found[1]


def a_recipe(folder: Path, **sections: dict[str, Any]) -> Recipe:
    """A recipe of one layer, without a classifier, for prompts in `folder`."""
    target, baseline = write_prompts(folder)
    once = {"kind": "constant", "weight": 1.0}
    data: dict[str, Any] = {
        "prompts": {"target": target, "baseline": baseline, "limit": 4},
        "fit": {"layer": 1, "filter": False},
        "edit": {"attention": once, "mlp": once},
        "eval": {"classifier": "none", "max_new_tokens": 4, "drift_tokens": 4, "control_prompts": 0},
        "export": {"gate_prompts": 2},
    }
    for name, values in sections.items():
        data[name] |= values
    return Recipe.model_validate(data)


def colours(rows: str | Path, *metrics: str) -> str:
    """A task file of lm-eval, `colours`, over rows of `question`, `choices` and `answer`; `acc` without metrics."""
    counted = ", ".join(f"{{metric: {name}}}" for name in metrics or ("acc",))
    return f"""\
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{counted}]
"""


class Labels:
    """A dictionary that refuses prompts of harm and nothing else."""

    def label(self, request: str, reply: str, finished: bool = True) -> Verdict:
        return Verdict(Label.REFUSE if "harm" in request else Label.COMPLY, None, "a test", "test")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


@contextmanager
def stopping(owner: Any, name: str, after: int, error: type[BaseException] = KeyboardInterrupt) -> Iterator[list[int]]:
    """Let `owner.name` be called `after` times and then raise; gives a list that grows by every call let through."""
    original: Callable[..., Any] = getattr(owner, name)
    calls: list[int] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        if len(calls) >= after:
            raise error("stopped by a test") if error is not KeyboardInterrupt else KeyboardInterrupt
        calls.append(1)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, call)
        yield calls


@contextmanager
def counting(owner: Any, name: str) -> Iterator[list[int]]:
    """Count the calls of `owner.name`."""
    with stopping(owner, name, 10**9) as calls:
        yield calls


def tensors(path: Path) -> dict[str, tuple[int, int]]:
    """Byte range of every tensor in a safetensors file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    return {
        k: (8 + size + v["data_offsets"][0], 8 + size + v["data_offsets"][1])
        for k, v in header.items()
        if k != "__metadata__"
    }
