"""Where the parts of a model go: the device it computes on, main memory, or the files they are read from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from perpend.config import Machine
from perpend.errors import UsageError
from perpend.models.memory import free_memory

READ = "disk"
"""What a device map says of a part that is read from the files when it is needed."""
ROOM = 640 << 20
"""Bytes that are left to what is computed, and to the libraries that generation loads."""
OFFLOAD = "--offload auto"
WHOLE = "a safetensors checkpoint of the model, whose layers can be read when they are needed"
"""What helps where the layers of a file cannot be: GGUF."""
MAPS = ("auto", "balanced", "sequential")


@dataclass(frozen=True)
class Part:
    """What is placed as a whole: a layer, an embedding, a norm.

    Attributes:
        name: Path of its module.
        bytes: Of its parameters, in the dtype they run in; 0 for those of a tied matrix that was counted before.
        kind: `layer` for an item of a list of modules, `words` for embeddings and the LM head, else `rest`.
    """

    name: str
    bytes: int
    kind: str


@dataclass(frozen=True)
class Plan:
    """Where the parts go.

    Attributes:
        map: Device map of transformers: one device, the name of a rule, or a device for every part.
        kept: Bytes on the devices.
        held: Bytes in main memory beside a GPU.
        read: Bytes that a pass reads from the files.
        unit: Bytes of the largest part that is read.
    """

    map: Any
    kept: int
    held: int = 0
    read: int = 0
    unit: int = 0


def parts(model: nn.Module, width: float) -> list[Part]:
    """Cut a model into parts, in its own order.

    Args:
        model: May be on the meta device.
        width: Bytes per parameter.
    """
    seen: set[int] = set()

    def size(module: nn.Module) -> int:
        own = [p for p in module.parameters() if id(p) not in seen]
        seen.update(id(p) for p in own)
        return round(width * sum(p.numel() for p in own))

    head = cast(Any, model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = []
    for name, module, inner in _walk(model, "", False):
        words = isinstance(module, nn.Embedding) or module is head
        found.append(Part(name, size(module), "words" if words else "layer" if inner else "rest"))
    return found


def _walk(module: nn.Module, name: str, inner: bool) -> Iterator[tuple[str, nn.Module, bool]]:
    direct = any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False))
    if name and (inner or direct or not list(module.children())):
        yield name, module, inner
        return
    for child, part in module.named_children():
        path = f"{name}.{child}" if name else child
        yield from _walk(part, path, isinstance(module, nn.ModuleList))


def plan(found: Sequence[Part], device: torch.device, machine: Machine, where: str, hint: str = OFFLOAD) -> Plan:
    """Decide where every part goes.

    Beside a GPU the layers that it cannot hold stay in main memory, and what that cannot hold is read from the files;
    on a CPU it is read from the files. Room is left for two of the largest parts that are read (one computes while the
    next is read) and for what is computed.

    Args:
        found: The parts.
        device: Where the model computes.
        machine: Memory, offloading, device map.
        where: For the message.
        hint: What to do about a model that does not fit and may not be offloaded.

    Raises:
        UsageError: the model does not fit and may not be offloaded, or not even single layers fit.
    """
    if machine.device_map not in MAPS:
        return _as_mapped(found, read_map(machine.device_map), device)
    total, free = sum(p.bytes for p in found), free_memory(device, machine.memory)
    if machine.offload != READ:
        if device.type == "mps" or total <= free:
            return Plan({"": device}, total)
        gpus = torch.cuda.device_count() if machine.device == "auto" else 1
        if gpus > 1 and total <= sum(free_memory(torch.device("cuda", k)) for k in range(gpus)):
            return Plan(machine.device_map, total)
        if machine.offload == "none":
            raise UsageError(
                f"the weights take {_gib(total)} and {_gib(free)} are free on {device}",
                where=where,
                hint=hint,
            )
    return _offloaded(found, device, machine, free, where)


def _as_mapped(found: Sequence[Part], places: dict[str, Any], device: torch.device) -> Plan:
    """Count what a device map reads from the files and what it leaves in main memory, a part that it divides whole."""

    def where(name: str) -> list[Any]:
        above = [key for key in places if not key or name == key or name.startswith(f"{key}.")]
        below = [place for key, place in places.items() if key.startswith(f"{name}.")]
        return [places[max(above, key=len)], *below] if above else below

    read = [p.bytes for p in found if READ in where(p.name)]
    held = [p.bytes for p in found if device.type != "cpu" and "cpu" in where(p.name) and READ not in where(p.name)]
    kept = sum(p.bytes for p in found) - sum(read) - sum(held)
    return Plan(places, kept, sum(held), sum(read), max([*read, *held], default=0))


def _offloaded(found: Sequence[Part], device: torch.device, machine: Machine, free: int, where: str) -> Plan:
    """Fill the device, then main memory, then leave the rest in the files."""
    unit = max((p.bytes for p in found if p.kind == "layer"), default=0)
    fixed = sum(p.bytes for p in found if p.kind == "rest")
    room = free - ROOM - 2 * unit - fixed
    if free < fixed + 2 * unit:
        need = fixed + 2 * unit
        raise UsageError(
            f"two layers and what is computed take {_gib(need)}, and {_gib(free)} are free on {device}", where=where
        )
    room = max(0, room) if machine.offload == "auto" else 0
    beside = 0
    if device.type != "cpu" and machine.offload == "auto":
        beside = max(0, free_memory(torch.device("cpu"), machine.memory) - ROOM - 2 * unit)
    words = sum(p.bytes for p in found if p.kind == "words")
    places: dict[str, Any] = {}
    first = device.type != "cpu" and words <= room
    room -= words if first else 0
    held = 0
    for part in (p for p in found if p.kind != "words"):
        if part.kind == "rest":
            places[part.name] = device
        elif part.bytes <= room:
            places[part.name], room = device, room - part.bytes
        elif part.bytes <= beside:
            places[part.name], beside, held = "cpu", beside - part.bytes, held + part.bytes
        else:
            places[part.name] = READ
    last = first or words <= room
    places = {p.name: places.get(p.name, device if last else READ) for p in found}
    read = sum(p.bytes for p in found if places[p.name] == READ)
    kept = sum(p.bytes for p in found) - read - held
    return Plan(places, kept, held, read, unit if read or held else 0)


def read_map(path: str) -> dict[str, Any]:
    """Read a device map: a JSON file of module paths and devices.

    Raises:
        UsageError: no such file, or no such mapping.
    """
    valid = f"{', '.join(MAPS)}, or a JSON file of modules and devices"
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError:
        raise UsageError(f"no device map '{path}'", where="--device-map", valid=valid) from None
    except ValueError as error:
        raise UsageError(f"not valid JSON: {error}", where=path) from None
    if not isinstance(data, dict) or not all(isinstance(v, str | int) for v in data.values()):
        raise UsageError("not a mapping of modules to devices", where=path, valid='{"model.layers.0": "cuda:0", ...}')
    return data


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
