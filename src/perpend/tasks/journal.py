"""Partial results that outlive an interruption.

While a task works on OUT, what it has made so far lies in `OUT.resume`. The same command finds it there and goes on;
another recipe is refused it. It is removed when the task is done.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from perpend.errors import Interrupted, UsageError
from perpend.models.session import Reply
from perpend.progress import note


class Replies(MutableMapping[str, Reply]):
    """Replies by prompt id, appended to a JSONL file as they are made; a line torn by a crash is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held: dict[str, Reply] = {}
        sound = 0
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
            try:
                row = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n"):
                break
            self._held[row["id"]] = Reply(row["text"], tuple(row["tokens"]), row["finished"])
            sound += len(line)
        if path.exists():
            os.truncate(path, sound)

    def __getitem__(self, key: str) -> Reply:
        return self._held[key]

    def __setitem__(self, key: str, reply: Reply) -> None:
        self._held[key] = reply
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"id": key, **asdict(reply)}, ensure_ascii=False) + "\n")

    def __delitem__(self, key: str) -> None:
        raise TypeError("a reply that was made is not taken back")

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


class Journal:
    """The partial results of one task on one output."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def replies(self, name: str) -> Replies:
        """Return the replies kept under `name`, and keep those that are added."""
        return Replies(self.folder / f"{name}.jsonl")

    def checkpoint(self, name: str, state: dict[str, Any] | None) -> dict[str, Any] | None:
        """Keep a state of tensors and numbers, or with None return the one that was kept, if any."""
        import torch

        path = self.folder / f"{name}.pt"
        if state is None:
            return torch.load(path, weights_only=True) if path.exists() else None
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
        return None


@contextmanager
def journal(out: Path, key: dict[str, Any], command: str) -> Iterator[Journal]:
    """Open the partial results of `out`, and remove them when the block ends well.

    Args:
        out: The output that is being made.
        key: What decides the results: recipe hash, model, versions. Other results are not gone on with.
        command: What to type to go on after an interruption.

    Raises:
        UsageError: `OUT.resume` belongs to another recipe.
        Interrupted: Ctrl-C inside the block.
    """
    folder = out.with_name(out.name + ".resume")
    label = folder / "key.json"
    text = json.dumps(key, sort_keys=True)
    if label.exists():
        if label.read_text(encoding="utf-8") != text:
            raise UsageError(
                "holds partial results of another recipe or model", where=str(folder), hint=f"rm -r {folder}"
            )
        note(f"going on with the partial results in {folder}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        label.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot be written: {error.strerror}", where=str(folder)) from None
    try:
        yield Journal(folder)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; what was done is kept in {folder}", hint=command) from None
    shutil.rmtree(folder)
