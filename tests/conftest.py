"""Fixtures shared by all tests: pico models, quiet libraries, one thread."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

import pico as pico_models

torch.set_num_threads(1)

_saved: dict[str, Path] = {}


def pico(name: str, factory: pytest.TempPathFactory) -> Path:
    """Return the checkpoint folder of a pico family, written once per session; treat it as read-only."""
    if name not in _saved:
        _saved[name] = pico_models.save(name, factory.mktemp(f"pico-{name}", numbered=True))
    return _saved[name]


@pytest.fixture(scope="session")
def pico_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`pico_dir("llama")` is a complete float32 checkpoint; copy it before changing anything in it."""
    return lambda name: pico(name, tmp_path_factory)


@pytest.fixture
def pico_model() -> Callable[..., torch.nn.Module]:
    """`pico_model("llama", hidden_size=64)` is a fresh model in memory, in evaluation mode."""
    return pico_models.build
