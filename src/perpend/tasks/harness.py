"""lm-eval's own bars and lines: what it does is a step of ours, what else it says stays off the terminal."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

from perpend.models.quiet import silenced
from perpend.progress import bars, track

STEPS = {
    "": "read questions",
    "Running loglikelihood requests": "score answers",
    "Running generate_until requests": "generate answers",
}
"""What we call the bars of lm-eval, by its own words; those that it opens with others take no time."""
ROLLING = "score texts"
"""What we call the likelihood of whole texts, for which it opens one bar per batch."""


@contextmanager
def followed(when: str) -> Iterator[type[Any]]:
    """Yield lm-eval's class for a model of transformers, whose progress is told to our reporter inside the block.

    Args:
        when: `before` or `after`, to be said with each step; may be empty.
    """
    import datasets

    places: list[Any] = [import_module(f"lm_eval.{name}") for name in ("models.huggingface", "api.model", "api.task")]
    log, tail, rolling = logging.getLogger("lm_eval"), f", {when}" if when else "", False

    def label(said: str) -> str:
        step = STEPS.get(said, "")
        return f"{step}{tail}" if step and not rolling else ""

    class Followed(places[0].HFLM):  # type: ignore[misc]
        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            nonlocal rolling
            size = max(1, int(self.batch_size))
            parts = [requests[k : k + size] for k in range(0, len(requests), size)]
            rolling, found = True, list[float]()
            try:
                for part in track(parts, f"{ROLLING}{tail}", total=len(requests), size=len):
                    found += super().loglikelihood_rolling(list(part), disable_tqdm)
            finally:
                rolling = False
            return found

    with ExitStack() as stack:
        stack.enter_context(silenced())
        if not datasets.are_progress_bars_disabled():
            datasets.disable_progress_bars()
            stack.callback(datasets.enable_progress_bars)
        opened = stack.enter_context(bars(label))
        for place in places:
            stack.callback(setattr, place, "tqdm", place.tqdm)
            place.tqdm = opened
        stack.callback(log.setLevel, log.level)
        log.setLevel(logging.CRITICAL)
        yield Followed
