"""Batches through a model: one after the other, together through an offloaded one, shared among processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

from perpend.errors import RunFailed
from perpend.models.batching import out_of_memory
from perpend.models.convoy import Outcome
from perpend.models.memory import reclaim
from perpend.models.offload import Shelf
from perpend.models.parallel import World
from perpend.progress import note

T = TypeVar("T")
Group = list[int]
Work = Callable[[Group], T]


def every(
    groups: Sequence[Group],
    work: Work[T],
    *,
    shelf: Shelf | None = None,
    world: World | None = None,
    tokens: Callable[[Group], int] = len,
    most: int = 1 << 20,
) -> Iterator[tuple[Group, T]]:
    """Yield each group with what `work` makes of it; a group that does not fit into memory is halved.

    Args:
        groups: Rows that run together, each in one group.
        work: Runs one group through the model.
        shelf: Of an offloaded model: groups go through its units together.
        world: Processes that take every so many-th group each; all get the results of all.
        tokens: Padded tokens of a group.
        most: Of groups that go together.

    Raises:
        RunFailed: a single row does not fit into memory, or another process failed.
    """
    world = world or World()
    if world.size == 1:
        yield from _own(groups, work, shelf, tokens, most)
        return
    step = world.size if shelf is None else max(1, len(groups))
    for first in range(0, len(groups), step):
        found: list[tuple[Group, T]] = []
        error: BaseException | None = None
        try:
            found = list(_own(groups[first : first + step][world.rank :: world.size], work, shelf, tokens, most))
        except Exception as problem:
            error = problem
        for part in world.exchange(found, error):
            yield from part


def _own(
    groups: Sequence[Group], work: Work[T], shelf: Shelf | None, tokens: Callable[[Group], int], most: int
) -> Iterator[tuple[Group, T]]:
    pending = list(groups)[::-1]
    while pending:
        wave = [pending.pop()]
        while shelf is not None and pending and sum(map(tokens, wave)) + tokens(pending[-1]) <= most:
            wave.append(pending.pop())
        halves: list[Group] = []
        for group, outcome in zip(wave, _outcomes(wave, work, shelf), strict=True):
            if _fits(group, outcome):
                yield group, outcome.value  # type: ignore[misc]
                continue
            half = len(group) // 2
            halves += [group[half:], group[:half]]
        pending += halves


def _outcomes(wave: Sequence[Group], work: Work[T], shelf: Shelf | None) -> list[Outcome[T]]:
    if shelf is not None:
        return shelf.together([partial(work, group) for group in wave])
    try:
        return [Outcome(work(wave[0]))]
    except (RuntimeError, MemoryError) as error:
        return [Outcome(error=error)]


def _fits(group: Group, outcome: Outcome[T]) -> bool:
    if outcome.error is None:
        return True
    if not out_of_memory(outcome.error):
        raise outcome.error
    outcome.error = None  # and with it what the traceback holds
    if len(group) == 1:
        raise RunFailed("out of memory on a single prompt", hint="shorter replies or a smaller dtype")
    note(f"out of memory with {len(group)} rows: going on with {len(group) // 2}")
    reclaim()
    return False
