"""References to models and data: parsed from one string, printed back as the same string, resolved to fixed files.

A model is `org/name`, `org/name@revision`, a directory, or a GGUF file. Data is `perpend:target`, a file such as
`prompts.jsonl#column=text`, or `hub/id@revision#split=train[:400],column=text`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from perpend.errors import UsageError, nearest

ModelKind = Literal["hub", "dir", "gguf"]
DataKind = Literal["builtin", "file", "hub"]

BUILTIN = ("target", "baseline")
SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")
OPTIONS = ("split", "column", "image", "topic", "config")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[\w.\-]+)?")
_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py")


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


@dataclass(frozen=True)
class ModelRef:
    """Which model: `name` is a hub id or a path; `str()` prints what was parsed."""

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
            raise UsageError("no model given", valid="org/name, org/name@revision, a directory, a .gguf file")
        path = Path(given).expanduser()
        if path.is_dir():
            return cls("dir", given)
        if given.lower().endswith(".gguf"):
            if not path.is_file():
                raise UsageError("no such file", where=given)
            return cls("gguf", given)
        if path.is_file():
            raise UsageError("a file, but not a GGUF file", where=given, valid="a directory or a .gguf file")
        name, sign, revision = given.partition("@")
        if given.startswith((".", "/", "~")) or (given.count("/") > 1 and not sign):
            raise UsageError("no such directory", where=given)
        if not _HUB_ID.fullmatch(name) or (sign and not revision):
            raise UsageError(
                f"'{given}' is no model reference", valid="org/name, org/name@revision, a directory, a .gguf file"
            )
        return cls("hub", name, revision or None)

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name

    def resolve(self) -> Resolved:
        """Return the files, downloaded from the hub first where they are not local; offline mode is honoured.

        Raises:
            UsageError: no such repository or revision, no access, or not in the cache while offline.
        """
        if self.kind == "hub":
            return _snapshot(self.name, self.revision)
        path = Path(self.name).expanduser().resolve()
        if self.kind == "gguf":
            return Resolved(path.parent, gguf_file=path.name)
        return Resolved(path)


def _snapshot(name: str, revision: str | None) -> Resolved:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"{name}@{revision}" if revision else name
    try:
        path = Path(snapshot_download(name, revision=revision, allow_patterns=list(_MODEL_FILES)))
    except GatedRepoError:
        raise UsageError("access to this repository must be granted first", where=where, hint="hf auth login") from None
    except RevisionNotFoundError:
        raise UsageError(f"no revision '{revision}'", where=name) from None
    except RepositoryNotFoundError:
        raise UsageError("no such repository on the hub, or no access", where=where, hint="hf auth login") from None
    except LocalEntryNotFoundError:
        raise UsageError("not in the local cache and the hub cannot be reached", where=where) from None
    except (HfHubHTTPError, OSError) as error:
        raise UsageError(f"cannot be downloaded: {str(error).splitlines()[0]}", where=where) from None
    return Resolved(path, revision=path.name)


@dataclass(frozen=True)
class DataRef:
    """Which prompts: `str()` prints what was parsed.

    Attributes:
        kind: builtin (`perpend:target`), file, or hub.
        name: Name after `perpend:`, path, or hub id.
        revision: Hub revision.
        split: Hub split with an optional slice, such as `train[:400]`.
        column: Column that holds the prompt text; None takes `text`, `prompt`, `instruction`, `question` or `goal`.
        image: Column that holds an image path or URL.
        topic: Column that holds the topic.
        config: Hub configuration name.
    """

    kind: DataKind
    name: str
    revision: str | None = None
    split: str | None = None
    column: str | None = None
    image: str | None = None
    topic: str | None = None
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
            builtin = name.removeprefix("perpend:")
            if builtin not in BUILTIN:
                valid = [f"perpend:{b}" for b in BUILTIN]
                raise UsageError(f"unknown prompts '{name}'", valid=", ".join(valid), hint=nearest(name, valid))
            return cls("builtin", builtin, **options)
        if name.lower().endswith(SUFFIXES):
            if not Path(name).expanduser().is_file():
                raise UsageError("no such file", where=name)
            return cls("file", name, **options)
        if Path(name).expanduser().exists():
            raise UsageError("not a prompt file", where=name, valid=", ".join(SUFFIXES))
        hub, sign, revision = name.partition("@")
        if not _HUB_ID.fullmatch(hub) or (sign and not revision):
            raise UsageError(
                f"'{given}' is no data reference",
                valid="perpend:target, FILE#column=text, hub/id@revision#split=train[:400],column=text",
            )
        return cls("hub", hub, revision or None, **options)

    def __str__(self) -> str:
        base = f"perpend:{self.name}" if self.kind == "builtin" else self.name
        base += f"@{self.revision}" if self.revision else ""
        options = [f"{key}={getattr(self, key)}" for key in OPTIONS if getattr(self, key) is not None]
        return base + ("#" + ",".join(options) if options else "")


def _options(tail: str, given: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for item in tail.split(",") if tail else ():
        key, sign, value = item.partition("=")
        if key not in OPTIONS:
            raise UsageError(
                f"unknown option '{key}'", where=given, valid=", ".join(OPTIONS), hint=nearest(key, OPTIONS)
            )
        if not sign or not value:
            raise UsageError(f"option '{key}' has no value", where=given)
        options[key] = value
    return options
