"""Fixtures shared by all tests: pico models, quiet libraries, one thread."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

import pico as pico_models
import postgres as postgres_server
from perpend.errors import MissingExtra
from perpend.teaching import shipped

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


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a PostgreSQL server of its own; the test is skipped where that is not installed."""
    with postgres_server.running(tmp_path_factory.mktemp("postgres")) as url:
        yield url


@pytest.fixture
def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct; the test is skipped where its package is not installed."""
    try:
        return shipped.base()  # the package cannot be imported: it is installed without what it imports
    except MissingExtra as missing:
        pytest.skip(str(missing))


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """A real headless Chromium, with all that it complains of and fetches on record."""
    webdriver = pytest.importorskip("selenium.webdriver")
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("no Chromium with its driver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    for flag in (
        *flags.split(),
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path / 'user'}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()


@pytest.fixture
def look(browser: Any) -> Callable[[int, str], None]:
    """`look(390, "dark")` gives the browser a width and a colour scheme."""

    def emulate(width: int, scheme: str) -> None:
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    return emulate
