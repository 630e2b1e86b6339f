"""Layers that are read when they are needed, and batches that travel through them together.

A model larger than memory is placed by accelerate: what does not fit is on the meta device, and its values lie in the
original files (or, beside a GPU, in the memory of the computer). Here these parts become units, a decoder layer each,
of which one is in memory at a time and the next is being read. Reading is what such a pass costs, so batches do not go
through the model one after the other: each runs in a thread of its own, only one of them at a time, and waits at the
entry of every unit until all others have come there too. A pass over any number of batches thus reads the files once,
and so does every token of all replies together; the model's own code runs unchanged.
"""

from __future__ import annotations

import gc
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from perpend.errors import RunFailed, UsageError
from perpend.models.convoy import Convoy, Outcome
from perpend.models.headers import REPAIR, read_header, read_into

T = TypeVar("T")

SLICE = 256 << 20
"""Bytes of an LM head that are in memory at a time."""
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""The dtypes of safetensors files."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: file, first byte, shape, dtype there."""

    path: Path
    begin: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, rows: tuple[int, int] | None = None) -> Tensor:
        """Return the tensor, or rows `[begin, end)` of it, in memory of its own on the CPU.

        Raises:
            RunFailed: the file cannot be read or ends early.
        """
        first, last = rows or (0, self.shape[0] if self.shape else 1)
        shape = (last - first, *self.shape[1:]) if self.shape else ()
        size = math.prod(shape) * self.dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=self.dtype)
        memory = mmap(-1, size)  # goes back to the system at once, which what malloc gives need not
        tensor = torch.frombuffer(memory, dtype=self.dtype).view(shape)
        read_into(self.path, self.begin + first * (size // max(1, last - first)), memoryview(memory))
        return tensor


def places(path: Path) -> dict[str, Place]:
    """Return where the tensors of a safetensors file lie, from its header."""
    return {entry.name: Place(path, entry.begin, entry.shape, DTYPES[entry.dtype]) for entry in read_header(path)}


class Pages(Mapping[str, Tensor]):
    """The offloaded parameters by name, read from the files without mapping them into memory.

    Attributes:
        bytes_read: So far.
    """

    def __init__(self, loader: Any) -> None:
        """Take the place of an `OffloadedWeightsLoader` of accelerate, whose index says where parameters lie."""
        self.loader = loader
        self.bytes_read = 0
        self._files: dict[str, dict[str, Place]] = {}
        self._ahead: dict[str, Tensor] = {}
        self._lock = threading.Lock()

    def place(self, name: str) -> tuple[Place, torch.dtype] | None:
        """Return where a parameter lies and the dtype it has in the model; None when it is in memory."""
        entry = self.loader.index.get(name)
        if entry is None:
            return None
        file = str(entry["safetensors_file"])
        with self._lock:
            if file not in self._files:
                self._files[file] = places(Path(file))
        found = self._files[file][entry.get("weight_name", name)]
        return found, getattr(torch, entry["dtype"]) if "dtype" in entry else found.dtype

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Return a parameter, or some rows of it, in the model's dtype on the CPU."""
        found = self.place(name)
        if found is None:
            held: Tensor = self.loader.state_dict[name]
            return held if rows is None else held[rows[0] : rows[1]]
        tensor = found[0].read(rows)
        self.bytes_read += tensor.nbytes
        return tensor.to(found[1])

    def fetch(self, names: Sequence[str]) -> None:
        """Read parameters ahead of their use."""
        for name in names:
            if self.place(name) is not None:
                self._ahead[name] = self.read(name)

    def __getitem__(self, name: str) -> Tensor:
        return self._ahead.pop(name) if name in self._ahead else self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)


class Unit:
    """What is in memory as a whole or not at all: the offloaded parameters of a decoder layer."""

    def __init__(self, name: str, module: nn.Module, pages: Pages) -> None:
        self.name, self.module, self.pages = name, module, pages
        self.parts = [(part, hook) for part in module.modules() for hook in aligned(part) if hook.offload]
        self.changes: list[Callable[[], object]] = []
        self.checked = False

    def names(self) -> list[str]:
        """Return the names of its parameters in the model."""
        return [f"{self.name}.{name}" for name, _ in self.module.named_parameters()]

    def load(self) -> None:
        """Put the parameters in place.

        Raises:
            RunFailed: names the first that holds NaN or infinity; looked for once.
        """
        for part, hook in self.parts:
            hook.pre_forward(part)
            hook.offload = False
        if not self.checked:
            require_finite(self.module, self.name, begun=True)
            self.checked = True
        for change in self.changes:
            change()

    def drop(self) -> None:
        """Give the memory back."""
        for part, hook in self.parts:
            hook.offload = True
            hook.post_forward(part, None)


class Slice:
    """Some rows of an LM head."""

    def __init__(self, name: str, rows: tuple[int, int], pages: Pages, device: torch.device) -> None:
        self.name, self.rows, self.pages, self.device = name, rows, pages, device
        self.weight = torch.empty(0)
        self.changes: list[Callable[[], object]] = []

    def names(self) -> list[str]:
        """Return nothing: a slice is not read ahead."""
        return []

    def load(self) -> None:
        """Read the rows."""
        self.weight = self.pages.read(self.name, self.rows).to(self.device)

    def drop(self) -> None:
        """Give the memory back."""
        self.weight = torch.empty(0)


def aligned(module: nn.Module) -> list[Any]:
    """Return the hooks of accelerate that put a module's parameters in place."""
    from accelerate.hooks import AlignDevicesHook

    hook = getattr(module, "_hf_hook", None)
    return [one for one in getattr(hook, "hooks", [hook]) if isinstance(one, AlignDevicesHook)]


@torch.no_grad()
def require_finite(module: nn.Module, where: str, *, begun: bool = False) -> None:
    """Check all parameters that are in memory.

    Args:
        module: Whose parameters are looked at.
        where: For the message.
        begun: Whether the work has begun: the layers of a model that is read piece by piece are met when they are used.

    Raises:
        UsageError: names the first parameter that holds NaN or infinity; RunFailed where the work has begun.
    """
    for name, parameter in module.named_parameters():
        plain = parameter.is_floating_point() and parameter.element_size() > 1 and not parameter.is_meta
        if plain and parameter.numel():
            low, high = torch.aminmax(parameter)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise (RunFailed if begun else UsageError)(f"{name} holds NaN or infinity", where=where, hint=REPAIR)


def device_of(module: nn.Module, parameter: Tensor) -> torch.device:
    """Return the device on which a module computes, be its parameter in memory or not."""
    if not parameter.is_meta:
        return parameter.device
    device = next((hook.execution_device for hook in aligned(module)), None)
    return torch.device("cpu" if device is None else device)


def value_of(module: nn.Module, name: str) -> Tensor:
    """Return the value of a module's parameter, read from where it lies if it is offloaded."""
    parameter: Tensor = getattr(module, name)
    maps = [hook.weights_map for hook in aligned(module) if hook.weights_map is not None]
    return cast(Tensor, maps[0][name]) if parameter.is_meta and maps else parameter.detach()


class Shelf:
    """The units of an offloaded model, at most one of them in memory.

    Attributes:
        units: In the order of the model.
        pages: What they are read from.
    """

    def __init__(
        self, model: nn.Module, placed: Mapping[str, Any], device: torch.device, *, ahead: bool = True
    ) -> None:
        """Take over what accelerate has placed.

        Args:
            model: As `from_pretrained` returns it with a device map.
            placed: That device map.
            device: Where the model computes.
            ahead: Read the next unit while one computes, which takes the memory of one unit more.
        """
        self.device, self.units = device, list[Unit | Slice]()
        self._convoy: Convoy[Any] | None = None
        self._reader = ThreadPoolExecutor(1) if ahead else None
        self._reading: Future[None] | None = None
        self._at: Unit | Slice | None = None
        self.pages = self._take_over(model)
        head = cast(Any, model).get_output_embeddings()
        slices: list[Slice] = []
        for name in placed:
            module = model.get_submodule(name)
            if not any(hook.offload for part in module.modules() for hook in aligned(part)):
                continue
            if isinstance(module, nn.Embedding):
                self._by_rows(module, f"{name}.weight")
            elif module is head and isinstance(module, nn.Linear) and module.bias is None:
                slices = self._by_slices(module, f"{name}.weight")
            else:
                self._whole(name, module)
        self.units += slices

    def _take_over(self, model: nn.Module) -> Pages:
        maps = [hook.weights_map for part in model.modules() for hook in aligned(part) if hook.offload]
        pages = Pages(maps[0].dataset)
        for one in maps:
            one.dataset = pages
        return pages

    def _whole(self, name: str, module: nn.Module) -> None:
        unit = Unit(name, module, self.pages)
        self.units.append(unit)
        module.register_forward_pre_hook(lambda module, args: self.enter(unit))

    def _by_rows(self, module: nn.Embedding, name: str) -> None:
        """Let an embedding read the rows that it is asked for, and nothing else."""
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(module)
        own, away = cast(Any, module.forward), module.weight

        def forward(ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            wanted, places = torch.unique(ids, return_inverse=True)
            rows = torch.cat([self.pages.read(name, (k, k + 1)) for k in wanted.tolist()])
            padding, module.padding_idx = module.padding_idx, None
            module._parameters["weight"] = nn.Parameter(rows.to(self.device), requires_grad=False)
            try:
                found: Tensor = own(places.to(self.device), *args, **kwargs)
                return found
            finally:
                module._parameters["weight"] = cast(nn.Parameter, away)
                module.padding_idx = padding

        module.forward = forward  # type: ignore[method-assign,assignment]

    def _by_slices(self, module: nn.Linear, name: str) -> list[Slice]:
        """Let an LM head compute its words slice by slice."""
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(module)
        width = max(1, SLICE // max(1, module.in_features * module.weight.element_size()))
        edges = range(0, module.out_features, width)
        cut = [Slice(name, (k, min(k + width, module.out_features)), self.pages, self.device) for k in edges]

        def forward(hidden: Tensor) -> Tensor:
            hidden, found = hidden.to(self.device), []
            for one in cut:
                self.enter(one)
                found.append(functional.linear(hidden, one.weight))
            return torch.cat(found, dim=-1)

        module.forward = forward  # type: ignore[method-assign,assignment]
        return cut

    def enter(self, unit: Unit | Slice) -> None:
        """Have a unit in memory; a batch that travels with others waits for them first."""
        if self._convoy is not None and self._convoy.wait(unit):
            return
        self.load(unit)

    def load(self, unit: Unit | Slice) -> None:
        """Have a unit in memory and no other, and begin to read the one after it."""
        if self._at is unit:
            return
        self.clear()
        if self._reading is not None:
            reading, self._reading = self._reading, None
            reading.result()
        unit.load()
        self._at = unit
        k = self.units.index(unit) + 1
        if self._reader is not None and k < len(self.units) and self.units[k].names():
            self._reading = self._reader.submit(self.pages.fetch, self.units[k].names())

    def clear(self) -> None:
        """Have no unit in memory."""
        if self._at is not None:
            self._at.drop()
            self._at = None
            if torch.is_grad_enabled():  # a graph that lies in a cycle of references holds the weights it went through
                gc.collect()

    def close(self) -> None:
        """Give everything back."""
        self.clear()
        if self._reader is not None:
            self._reader.shutdown()
        self.pages._ahead.clear()

    def unit_of(self, module: nn.Module) -> Unit | None:
        """Return the unit that a module is loaded and dropped with; None for one that is always in memory."""
        units = (unit for unit in self.units if isinstance(unit, Unit))
        return next((unit for unit in units if any(part is module for part in unit.module.modules())), None)

    def change(self, module: nn.Module, change: Callable[[], object]) -> Callable[[], None]:
        """Have `change` called whenever the unit of a module has been loaded; returns what ends that."""
        unit = self.unit_of(module)
        if unit is None:
            raise ValueError("the module is always in memory")
        self.clear()
        unit.changes.append(change)

        def undo() -> None:
            unit.changes.remove(change)
            self.clear()

        return undo

    def together(self, works: Sequence[Callable[[], T]]) -> list[Outcome[T]]:
        """Run functions that call the model, all of them unit by unit, so that each unit is loaded once for all.

        Args:
            works: Must not wait for one another.

        Returns:
            What each returned or raised, in order.
        """
        convoy: Convoy[T] = Convoy(self, self.units, works)
        self._convoy = convoy
        try:
            return convoy.run()
        finally:
            self._convoy = None
