"""Which files of an output leave this machine, and whether its card says what it must."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perpend.config import Recipe, load, read_toml, to_toml
from perpend.errors import UsageError
from perpend.export.beside import is_report
from perpend.export.card import CARD
from perpend.refs import ModelRef
from perpend.tasks.portable import without_folders
from perpend.tasks.recipes import RECIPE

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

REPLIES = ("before.jsonl", "after.jsonl")
"""Files that hold prompts and replies, as reports do."""
PARTS = (
    CARD,
    RECIPE,
    "*.safetensors",
    "original.undo",
    "*config.json",
    "*.index.json",
    "tokenizer*.json",
    "vocab*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "params.json",
    "merges.txt",
    "vocab.txt",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "*.py",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""Files that a model is made of, by name; anything else stays here."""
WEIGHTS = ("config.json", "adapter_config.json")
"""Files of which a model or an adapter has one."""


@dataclass(frozen=True)
class Sent:
    """A file that is sent.

    Attributes:
        name: Path in the repository, and in the output.
        size: In bytes.
        data: What is sent instead of the file's own bytes; None for those.
    """

    name: str
    size: int
    data: bytes | None = None


@dataclass(frozen=True)
class Kept:
    """A file that is not sent, and why."""

    name: str
    why: str


def choose(folder: Path, with_replies: bool) -> tuple[list[Sent], list[Kept]]:
    """Sort the files of an output into those that are sent and those that stay, each by name.

    The recipe is sent without local folders, and reports and replies only when they are asked for.

    Args:
        folder: The output.
        with_replies: Send what holds prompts and replies too.

    Raises:
        UsageError: no such output, or none with a card and weights.
    """
    if not folder.is_dir():
        raise UsageError("no such folder", where=str(folder), valid="what perpend run, apply or adapter made")
    if not (folder / CARD).is_file() or not any((folder / name).is_file() for name in WEIGHTS):
        missing = CARD if not (folder / CARD).is_file() else WEIGHTS[0]
        raise UsageError(
            f"no {missing}: not a model to push", where=str(folder), valid="what perpend run, apply or adapter made"
        )
    sent, kept = [], []
    for path, name in _files(folder):
        replies = path.name in REPLIES or is_report(path.name)
        if replies and not with_replies:
            kept.append(Kept(name, "holds prompts and replies: --with-replies"))
        elif not replies and not any(fnmatchcase(path.name, pattern) for pattern in PARTS):
            kept.append(Kept(name, "no part of a model"))
        else:
            data = _recipe(path) if path.name == RECIPE else None
            sent.append(Sent(name, path.stat().st_size if data is None else len(data), data))
    return sent, kept


def _files(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield every file below a folder with its relative name, without hidden ones."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            yield path, name.as_posix()


def _recipe(path: Path) -> bytes:
    """Return the recipe as it is sent: with the names of local files instead of their folders."""
    written = without_folders(load(path)).model_dump(mode="json")
    return to_toml({**written, "result": read_toml(path).get("result") or {}}).encode()


def require_card(folder: Path) -> ModelCard:
    """Read the card of an output and check that it names licence and base model.

    Raises:
        UsageError: no front matter that can be read, no licence, another base model than the recipe's, or no NOTICE
            where Gemma's terms ask for one.
    """
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    path = folder / CARD
    try:
        card: ModelCard = ModelCard.load(path)
    except (YAMLError, ValueError, OSError, RecursionError) as error:
        raise UsageError(f"no valid front matter: {str(error).splitlines()[0]}", where=str(path)) from None
    front: Any = card.data
    if not front.license:
        raise UsageError(
            "names no licence, which is the base model's",
            where=str(path),
            hint="license: NAME in its front matter; license: other also takes license_name and license_link",
        )
    base = _hub_base(folder)
    named = front.base_model or []
    listed = [named] if isinstance(named, str) else list(named)
    if base is not None and base not in listed:
        said = ", ".join(listed) or "none"
        raise UsageError(f"names base model {said}, and the recipe {base}", where=str(path), hint=f"base_model: {base}")
    if str(front.license).lower() == "gemma" and not (folder / "NOTICE").is_file():
        raise UsageError("its licence asks for a NOTICE file beside it, and there is none", where=str(path))
    return card


def _hub_base(folder: Path) -> str | None:
    """Return the hub id of the model that was edited, as the recipe says; None for a local one or no recipe."""
    path = folder / RECIPE
    if not path.is_file():
        return None
    recipe: Recipe = load(path)
    try:
        ref = ModelRef.parse(recipe.model.id)
    except UsageError:  # a folder that is gone by now
        return None
    return ref.name if ref.kind == "hub" and "/" in ref.name else None
