"""Logits of a reference that are asked for again and again: those of the first pass are kept, while there is room."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from perpend.models.session import Batch, Session

ROOM = 2**28
"""Bytes of logits that are kept; what does not fit is computed every time."""


class Recalled:
    """The logits of a model on the batches of one set of prompts and answers, whatever edits it is compared with.

    To be called like what it stands for, and with the same batches each time; another set needs one of its own.
    """

    def __init__(self, session: Session, room: int = ROOM) -> None:
        """Stand for a session without an edit.

        Args:
            session: The reference.
            room: Bytes of logits that are kept.
        """
        self._logits: Callable[[Batch], Tensor] = session.under(None)
        self._dtype: torch.dtype = session.loaded.dtype
        self._room = room
        self._kept: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, batch: Batch) -> Tensor:
        """Return `[B, T, V]` float32 on the session's device, as `Session.logits` does."""
        known = self._kept.get((*batch.index, batch.tokens.shape[1]))
        if known is not None:
            return known.float()
        logits = self._logits(batch)
        kept = logits.to(self._dtype)  # what the model gave, so that nothing is rounded
        if kept.nbytes <= self._room:
            self._room -= kept.nbytes
            self._kept[(*batch.index, batch.tokens.shape[1])] = kept
        return logits
