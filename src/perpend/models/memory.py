"""How much memory there is: of the machine, and of what this process is allowed."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from pathlib import Path

import torch
from torch import nn

from perpend.errors import UsageError, nearest

OPTION, DEVICES = "--device", "auto, cpu, cuda, cuda:N, mps"

_ROOT = Path("/sys/fs/cgroup")
_NO_LIMIT = 1 << 60


def pick_device(name: str) -> torch.device:
    """Return the device that `name` stands for; `auto` takes a GPU where there is one.

    Raises:
        UsageError: no such device on this machine.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:  # which lists all the devices that torch has ever had
        near = nearest(name, ("auto", "cpu", "cuda", "mps"))
        raise UsageError(f"unknown device '{name}'", where=OPTION, valid=DEVICES, hint=near) from None
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device '{name}' cannot be used: {reason}", where=OPTION, valid=DEVICES) from None
    return device


def reclaim() -> None:
    """Give back what nothing refers to any more, to the system where the C library can, on the GPU too."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # musl has no such function
            ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def release(model: nn.Module) -> None:
    """Give back the memory of a model's weights; it is of no use afterwards."""
    shelf = getattr(model, "shelf", None)
    if shelf is not None:
        shelf.close()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                gone = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")  # whatever its own class
                module._parameters[name] = nn.Parameter(gone, requires_grad=False)
    reclaim()


def free_memory(device: torch.device, most: int | None = None) -> int:
    """Return the bytes that can still be allocated on a device.

    On a CPU that is the least of what the machine has free, what the control group of this process leaves it (a
    container, a batch system), what `ulimit` leaves it, and what is left of `most`.

    Args:
        device: Where.
        most: Bytes that this process may hold altogether, on the CPU; None for as many as there are.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    import psutil

    me = psutil.Process().memory_info()
    left = [int(psutil.virtual_memory().available), *_group(), *_limits(me)]
    if most is not None:
        left.append(most - me.rss)
    return max(0, min(left))


def _limits(me: object) -> list[int]:
    """Return what the limits on address space and data leave."""
    try:
        import resource
    except ImportError:
        return []
    found = []
    for kind, used in ((resource.RLIMIT_AS, "vms"), (resource.RLIMIT_DATA, "data")):
        soft = resource.getrlimit(kind)[0]
        if soft != resource.RLIM_INFINITY and hasattr(me, used):
            found.append(soft - int(getattr(me, used)))
    return found


def _group() -> list[int]:
    """Return what the control group and those above it leave; pages of files do not count as used."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            found += _walk(_ROOT, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            found += _walk(_ROOT / "memory", path, *names)
    return found


def _walk(root: Path, path: str, limit: str, usage: str, cache: str) -> list[int]:
    found = []
    folder = root / path.strip("/")
    for place in (folder, *folder.parents):
        most, used = _number(place / limit), _number(place / usage)
        if most is not None and used is not None and most < _NO_LIMIT:
            pages = sum(
                _statistic(place / "memory.stat", name) for name in (cache, cache.replace("inactive", "active"))
            )
            found.append(most - used + pages)
        if place == root:
            break
    return found


def _number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _statistic(path: Path, name: str) -> int:
    try:
        rows = dict(line.split(" ", 1) for line in path.read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError):
        return 0
    return int(rows.get(name, 0))
