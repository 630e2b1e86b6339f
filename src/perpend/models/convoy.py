"""Functions that go through a model together: each in a thread, one running at a time, waiting at every unit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Loader(Protocol):
    """What puts a unit in memory."""

    device: torch.device

    def load(self, unit: Any) -> None:
        """Have a unit in memory."""


@dataclass
class Outcome(Generic[T]):
    """What a function returned, or the exception that it ended with."""

    value: T | None = None
    error: BaseException | None = None


class _Stopped(BaseException):
    """Ends a thread whose run was given up."""


@dataclass
class _Member(Generic[T]):
    """One function in its thread; of all threads, one runs at a time."""

    work: Callable[[], T]
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    at: object | None = None
    done: bool = False
    outcome: Outcome[T] = field(default_factory=Outcome)
    thread: threading.Thread | None = None


class Convoy(Generic[T]):
    """Functions that go through the units together."""

    def __init__(self, loader: Loader, units: Sequence[object], works: Sequence[Callable[[], T]]) -> None:
        """Prepare a thread per function.

        Args:
            loader: Puts a unit in memory.
            units: In the order in which they are met; of those that are waited for, the first is loaded.
            works: The functions.
        """
        self.loader = loader
        self._order = {id(unit): k for k, unit in enumerate(units)}
        self.members = [_Member(work) for work in works]
        self._back = threading.Semaphore(0)
        self._stopped = False
        self._grad = torch.is_grad_enabled()

    def run(self) -> list[Outcome[T]]:
        """Let all members go through all units."""
        rng = _random_state(self.loader.device)
        try:
            for member in self.members:
                member.thread = threading.Thread(target=self._live, args=(member,), daemon=True)
                member.thread.start()
                self._resume(member)
            while waiting := [m for m in self.members if not m.done]:
                unit = min((m.at for m in waiting if m.at is not None), key=lambda u: self._order[id(u)])
                self.loader.load(unit)
                for member in waiting:
                    if member.at is unit:
                        self._resume(member)
        finally:
            self._stopped = True
            for member in self.members:
                if member.thread is not None and not member.done:
                    self._resume(member)
            _set_random_state(rng, self.loader.device)
        return [member.outcome for member in self.members]

    def _resume(self, member: _Member[T]) -> None:
        """Let one member run until it waits or ends."""
        member.go.release()
        self._back.acquire()

    def _live(self, member: _Member[T]) -> None:
        member.go.acquire()
        try:
            if not self._stopped:
                with torch.set_grad_enabled(self._grad):
                    member.outcome.value = member.work()
        except _Stopped:
            pass
        except BaseException as error:
            member.outcome.error = error
        finally:
            member.done, member.at = True, None
            self._back.release()

    def wait(self, unit: object) -> bool:
        """Wait until the unit is loaded for everyone; False for a thread that is no member."""
        me = next((m for m in self.members if m.thread is threading.current_thread()), None)
        if me is None:
            return False
        me.at = unit
        rng = _random_state(self.loader.device)
        self._back.release()
        me.go.acquire()
        if self._stopped:
            raise _Stopped
        _set_random_state(rng, self.loader.device)
        return True


def _random_state(device: torch.device) -> list[Tensor]:
    """Return the states of the generators that a member may draw from, so that others draw nothing of its numbers."""
    own = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *own]


def _set_random_state(states: Sequence[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)
