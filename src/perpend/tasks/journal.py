"""Partial results that outlive an interruption.

While a task works on OUT, what it has made so far lies in `OUT.resume`. The same command finds it there and goes on;
another recipe is refused it. It is removed when the task is done, and when it failed before it had made anything.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from perpend.errors import Interrupted, UsageError
from perpend.export.staging import alone
from perpend.models.replies import ReplyLog
from perpend.progress import note

KEY = "key.json"


class Journal:
    """The partial results of one task on one output."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def replies(self, name: str) -> ReplyLog:
        """Return the replies kept under `name`, and keep those that are added."""
        return ReplyLog(self.folder / f"{name}.jsonl")

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
        key: What decides the results: recipe hash, model, prompts, versions. Other results are not gone on with.
        command: What to type to go on after an interruption.

    Raises:
        UsageError: `OUT.resume` belongs to another recipe, is something else, or another process is working there.
        Interrupted: Ctrl-C inside the block.
    """
    folder = out.with_name(out.name + ".resume")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot be written: {error.strerror}", where=str(folder)) from None
    with alone(folder):
        _open(folder, json.dumps(key, sort_keys=True))
        try:
            yield Journal(folder)
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted; what was done is kept in {folder}", hint=command) from None
        except BaseException:
            if [path.name for path in folder.iterdir()] == [KEY]:
                shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)


def _open(folder: Path, key: str) -> None:
    """Label an empty folder, or check that what is in it was made with the same key."""
    label = folder / KEY
    if label.exists():
        if label.read_text(encoding="utf-8") != key:
            raise UsageError(
                "holds partial results of another recipe, model or prompts", where=str(folder), hint=f"rm -r {folder}"
            )
        note(f"going on with the partial results in {folder}")
        return
    try:
        if any(path.name != f"{KEY}.tmp" for path in folder.iterdir()):
            raise UsageError(
                "is not what an interrupted task left behind", where=str(folder), hint="another -o/--output"
            )
        label.with_suffix(".json.tmp").write_text(key, encoding="utf-8")
        os.replace(label.with_suffix(".json.tmp"), label)
    except OSError as error:
        raise UsageError(f"cannot be written: {error.strerror}", where=str(folder)) from None
