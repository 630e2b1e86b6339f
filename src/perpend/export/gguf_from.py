"""The matrices of a safetensors checkpoint as a GGUF file has them, to be put in one or compared with one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from perpend.errors import UsageError
from perpend.export.checkpoint import Checkpoint
from perpend.export.gguf import Change, by_edit
from perpend.export.names import Locator, TensorSlice

if TYPE_CHECKING:
    from perpend.models.anatomy import Anatomy

APART = 0.5
"""How far the edit of what a GGUF file holds may lie from the edited matrix, relative to it: rounding to four bits
makes 0.1, and matrices of different models lie 1.4 apart."""


class Source:
    """The writers of a checkpoint, read one matrix at a time."""

    def __init__(self, checkpoint: Checkpoint, model: nn.Module, anatomy: Anatomy) -> None:
        """Find them.

        Args:
            checkpoint: Of the model.
            model: Its skeleton.
            anatomy: Its writers.
        """
        self._checkpoint, self._locator = checkpoint, Locator(checkpoint, model, anatomy)

    def _read(self, piece: TensorSlice) -> Tensor:
        return piece.view(self._checkpoint.read(piece.entry, piece.begin, piece.end)).double()

    def whole(self, change: Change) -> Tensor:
        """Return all that a tensor of the GGUF file stands for: `[d_out, d_in]`, or `[E, d_out, d_in]`; float64."""
        found = [self._read(piece) for piece in self._locator.matrices(change.writer)]
        return found[0] if change.writer.experts is None else torch.stack(found)

    def wanted(self, change: Change, before: Tensor, expert: int | None) -> Tensor:
        """Return what an edited matrix or bias is to be: the one of this checkpoint, float64.

        Args:
            change: A tensor of the GGUF file of the base model.
            before: What that file holds, `[d_out, d_in]` or `[d_out]`.
            expert: Which expert.

        Raises:
            UsageError: the file is of another model.
        """
        bias = change.matrix is not None
        pieces = self._locator.biases(change.writer) if bias else self._locator.matrices(change.writer)
        made = self._read(pieces[expert or 0])
        apart = float((by_edit(change, before, expert) - made).norm() / made.norm().clamp(min=1e-12))
        if apart > APART and not bias:
            raise UsageError(
                f"{change.tensor.name} is not what {change.writer.name} was before the edit ({apart:.2f} apart)",
                where=str(change.file.path),
                valid="a GGUF file of the base model",
            )
        return made
