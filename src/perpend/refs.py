"""References to models and data: parsed from one string, printed back as the same string, resolved to fixed files.

A model is `org/name`, `org/name@revision`, a directory, or a GGUF file. Data is `perpend:target`, a file such as
`prompts.jsonl#column=text`, or `hub/id@revision#split=train[:400],column=text`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from perpend import units
from perpend.errors import UsageError, nearest
from perpend.progress import Bar, meter, note

ModelKind = Literal["hub", "dir", "gguf"]
DataKind = Literal["builtin", "file", "hub"]

BUILTIN = ("target", "baseline")
SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")
OPTIONS = ("split", "column", "image", "config")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[\w.\-]+)?")
_MODEL_FORMS = "org/name, org/name@revision, a directory, a .gguf file"
_DATA_FORMS = "perpend:target, FILE#column=text, hub/id@revision#split=train[:400],column=text"
_LEGAL_FILES = ("README.md", "LICENSE*", "NOTICE*", "USE_POLICY*")
_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", *_LEGAL_FILES)
_NOT_NEEDED = ("original/*", "consolidated*", "onnx/*")


@dataclass(frozen=True)
class Resolved:
    """Files of a model on this machine.

    Attributes:
        path: Directory that holds the files.
        revision: Commit on the hub, None for local files.
        gguf_file: Name of the GGUF file in `path`, None for a safetensors checkpoint.
    """

    path: Path
    revision: str | None = None
    gguf_file: str | None = None

    def __str__(self) -> str:
        return str(self.path / self.gguf_file if self.gguf_file else self.path)


@dataclass(frozen=True)
class ModelRef:
    """Which model.

    Attributes:
        kind: hub, dir or gguf.
        name: Hub id or path, as it was typed.
        revision: Branch, tag or commit on the hub.
    """

    kind: ModelKind
    name: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> ModelRef:
        """Read a reference; what exists on disk is a path, everything else must look like a hub id.

        Raises:
            UsageError: empty, a path that does not exist, or neither a path nor a hub id.
        """
        given = text.strip()
        if not given:
            raise UsageError("no model given", valid=_MODEL_FORMS)
        path = Path(given).expanduser()
        if path.is_dir():
            return cls("dir", given)
        if path.is_file() and given.lower().endswith(".gguf"):
            return cls("gguf", given)
        if path.exists():
            raise UsageError("neither a directory nor a GGUF file", where=given)
        name, sign, revision = given.partition("@")
        if given.lower().endswith(".gguf") or given.startswith((".", "/", "~")) or name.count("/") > 1:
            raise UsageError("no such file or directory", where=given)
        if not _HUB_ID.fullmatch(name) or (sign and not revision):
            raise UsageError(f"'{given}' is no model reference", valid=_MODEL_FORMS)
        return cls("hub", name, revision or None)

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name

    @property
    def title(self) -> str:
        """What to call it in a file that travels: its hub id, or the name of its file or folder without the path."""
        return self.name if self.kind == "hub" else Path(self.name).resolve().name

    @property
    def portable(self) -> str:
        """What to write of it in a file that travels: its hub id with the revision, or its title."""
        return str(self) if self.kind == "hub" else self.title

    def resolve(self, *, fetch: bool = True) -> Resolved:
        """Return the files, downloaded from the hub first where they are not local; offline mode is honoured.

        Args:
            fetch: Download what is missing; else only what the cache holds counts.

        Raises:
            UsageError: no such repository or revision, no access, or not in the cache while offline.
        """
        path = Path(self.name).expanduser().resolve()
        if self.kind == "gguf":
            return Resolved(path.parent, gguf_file=path.name)
        return _snapshot(self.name, self.revision, fetch) if self.kind == "hub" else Resolved(path)

    def size(self) -> int | None:
        """Return the bytes that `resolve` would fetch, as the hub says them; None for local files or no answer."""
        from huggingface_hub import HfApi
        from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

        if self.kind != "hub":
            return None
        try:
            info = HfApi().model_info(self.name, revision=self.revision, files_metadata=True, timeout=10)
        except Exception:  # offline, no access, no such repository: fetching says which
            return None
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        wanted = filter_repo_objects(sizes, allow_patterns=list(_MODEL_FILES), ignore_patterns=list(_NOT_NEEDED))
        return sum(sizes[name] for name in wanted) or None


def _snapshot(name: str, revision: str | None, fetch: bool) -> Resolved:
    """Return the files of a hub repository, from the cache where they are complete."""
    from huggingface_hub import get_token, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"{name}@{revision}" if revision else name
    nor = "" if revision else ", and no such directory here"
    wanted: dict[str, Any] = {
        "revision": revision,
        "allow_patterns": [*_MODEL_FILES],
        "ignore_patterns": [*_NOT_NEEDED],
    }
    try:
        with without_bars(), _download(name, where, wanted if fetch else None) as bar:
            found = snapshot_download(name, **wanted, local_files_only=not fetch, tqdm_class=bar)
    except GatedRepoError:
        raise UsageError("access to this repository must be granted first", where=where, hint="hf auth login") from None
    except RevisionNotFoundError:
        raise UsageError(f"no revision '{revision}'", where=name) from None
    except RepositoryNotFoundError:
        raise UsageError(
            f"no such repository on the hub, or no access{nor}", where=where, hint="hf auth login"
        ) from None
    except LocalEntryNotFoundError:
        raise UsageError(f"not in the local cache, and the hub cannot be reached{nor}", where=where) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        said = without_secrets(str(error).split("\n")[0], get_token())
        raise UsageError(f"cannot be fetched: {said}{nor}", where=where) from None
    return Resolved(Path(found), revision=Path(found).name)


def without_secrets(said: str, token: str | None) -> str:
    """Return what the hub's client said without the token, which a server may repeat, and without signed addresses."""
    said = said.replace(token, "(the token)") if token else said
    return re.sub(r"(https?://[^\s?]+)\?\S+", r"\1", said)


@contextmanager
def _download(name: str, where: str, wanted: dict[str, Any] | None) -> Iterator[Any]:
    """Yield what the hub's client takes for `tqdm`: a step in bytes of what the cache lacks, where it lacks any.

    Args:
        name: The repository.
        where: How it is called.
        wanted: Which of its files; None where nothing may be fetched.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError

    bar: Any = Bar
    lacking = []
    with suppress(DryRunError):  # out of reach: what is in the cache has to do
        files = snapshot_download(name, **wanted, dry_run=True, tqdm_class=bar) if wanted is not None else []
        lacking = [file.file_size for file in files if file.will_download]
    if not lacking:
        yield bar
        return
    note(f"fetching {where}: {len(lacking)} file{'s' * (len(lacking) > 1)}, {units.size(sum(lacking))}")
    with meter("download", sum(lacking), "B") as reach:

        class Bytes(Bar):
            """Of what it counts, bytes alone are shown."""

            def __init__(self, *args: Any, unit: str = "", **options: Any) -> None:
                super().__init__(*args, moved=reach if unit == "B" else None, **options)

        yield Bytes


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep the progress bars of the hub's client off the terminal inside the block."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    quiet = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not quiet:
            enable_progress_bars()


@dataclass(frozen=True)
class DataRef:
    """Which prompts.

    Attributes:
        kind: builtin (`perpend:target`), file or hub.
        name: Name after `perpend:`, path, or hub id.
        revision: Branch, tag or commit on the hub.
        split: fit, select or report of a builtin, or a split of the hub; with an optional slice, such as `fit[:100]`.
        column: Column of the prompt text; None takes the first of `perpend.data.COLUMNS` that is there.
        image: Column of an image path or URL; None takes `image` of a file that has such a column.
        config: Configuration of a hub data set.
    """

    kind: DataKind
    name: str
    revision: str | None = None
    split: str | None = None
    column: str | None = None
    image: str | None = None
    config: str | None = None

    @classmethod
    def parse(cls, text: str) -> DataRef:
        """Read a reference.

        Raises:
            UsageError: an unknown builtin, a file of an unknown kind, a missing file, an unknown option.
        """
        given = text.strip()
        name, _, tail = given.partition("#")
        options = _options(tail, given)
        if name.startswith("perpend:"):
            valid = [f"perpend:{known}" for known in BUILTIN]
            if name not in valid:
                raise UsageError(f"unknown prompts '{name}'", valid=", ".join(valid), hint=nearest(name, valid))
            return cls("builtin", name.removeprefix("perpend:"), **options)
        path = Path(name).expanduser()
        if name.lower().endswith(SUFFIXES):
            if not path.is_file():
                beside = [p.name for p in path.parent.glob("*") if p.suffix.lower() in SUFFIXES]
                raise UsageError("no such file", where=name, valid=_DATA_FORMS, hint=nearest(path.name, beside))
            return cls("file", name, **options)
        if name and path.exists():
            raise UsageError("not a prompt file", where=name, valid=", ".join(SUFFIXES))
        hub, sign, revision = name.partition("@")
        if not _HUB_ID.fullmatch(hub) or (sign and not revision):
            raise UsageError(f"'{given}' is no data reference", valid=_DATA_FORMS)
        return cls("hub", hub, revision or None, **options)

    def __str__(self) -> str:
        base = f"perpend:{self.name}" if self.kind == "builtin" else self.name
        base += f"@{self.revision}" if self.revision else ""
        options = [f"{key}={getattr(self, key)}" for key in OPTIONS if getattr(self, key) is not None]
        return base + ("#" + ",".join(options) if options else "")


def _options(tail: str, given: str) -> dict[str, str]:
    """Read `key=value,key=value`."""
    options: dict[str, str] = {}
    for item in tail.split(",") if tail else ():
        key, _, value = item.partition("=")
        if key not in OPTIONS:
            raise UsageError(
                f"unknown option '{key}'", where=given, valid=", ".join(OPTIONS), hint=nearest(key, OPTIONS)
            )
        if not value or key in options:
            raise UsageError(f"option '{key}' is given {'twice' if key in options else 'no value'}", where=given)
        options[key] = value
    return options
