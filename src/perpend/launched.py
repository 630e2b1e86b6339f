"""Which of several processes this is, as `torchrun` and `accelerate launch` say it in the environment."""

from __future__ import annotations

import os

from perpend.errors import UsageError


def rank() -> int:
    """Return which process this is; 0 for the first, or the only one."""
    return int(os.environ.get("RANK", "0"))


def size() -> int:
    """Return how many processes were started together; 1 for a program that was typed alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def first() -> bool:
    """Return whether this is the first process, or the only one: it alone writes and prints."""
    return size() == 1 or rank() == 0


def require_single(task: str, instead: str = "") -> None:
    """Refuse several processes for a task that none of them could share.

    Args:
        task: Its command.
        instead: Options with which what is typed once makes use of several devices, where there are any.

    Raises:
        UsageError: says which tasks can be shared, and what to type.
    """
    if size() > 1:
        raise UsageError(
            f"{task} runs in one process, and {size()} were started",
            where="torchrun, accelerate launch",
            valid="fit, eval",
            hint=f"perpend {task}, typed alone" + (f", with {instead} for several GPUs" if instead else ""),
        )
