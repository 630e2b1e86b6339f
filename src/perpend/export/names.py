"""Which bytes of a checkpoint hold the matrix of a writer.

A loaded model and its checkpoint often disagree: names (`model.language_model.layers` in memory,
`language_model.model.layers` in the file), experts (one fused tensor in memory, one tensor per expert in the file),
orientation. A match is looked for by exact name, then by the mapping with which transformers loaded the file, then by
the unique name that agrees from the layer index on; whatever is found must have the right shape and the values that
the loaded model has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from mmap import mmap
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from perpend.errors import UsageError
from perpend.export.checkpoint import Checkpoint
from perpend.models.headers import TensorEntry

if TYPE_CHECKING:
    from perpend.models.anatomy import Anatomy, Writer

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes that can be edited: plain floating point."""

_SAMPLE_ROWS, _SAMPLE_COLUMNS = 8, 512


@dataclass(frozen=True)
class TensorSlice:
    """One matrix (or one bias vector) of a writer as a range of bytes.

    Attributes:
        entry: The tensor that it is, or is a part of.
        expert: Which expert of the writer; None for a writer without experts.
        begin: First byte, counted from the start of the tensor.
        end: One past the last byte.
        shape: (rows, columns) as the file has them; (d_out,) for a bias.
        transposed: The file has the matrix as [d_in, d_out], not as [d_out, d_in].
    """

    entry: TensorEntry
    expert: int | None
    begin: int
    end: int
    shape: tuple[int, ...]
    transposed: bool = False

    def view(self, data: bytearray | mmap) -> Tensor:
        """Return the bytes of this slice as a tensor that shares their memory.

        Returns:
            [d_out, d_in], or [d_out] for a bias, in the file's own dtype, on the CPU.
        """
        tensor = torch.frombuffer(data, dtype=TORCH_DTYPES[self.entry.dtype]).view(self.shape)
        return tensor.T if self.transposed else tensor


class Locator:
    """Finds the byte ranges of writers; reads a few rows of each to compare them with the loaded model.

    Args:
        checkpoint: The files.
        model: What was loaded from them. Parameters that are not in memory as plain numbers (meta device, packed) are
            matched by name and shape alone.
        anatomy: Of that model.
    """

    def __init__(self, checkpoint: Checkpoint, model: nn.Module, anatomy: Anatomy) -> None:
        self.checkpoint, self.model, self.anatomy = checkpoint, model, anatomy
        self._parameters = dict(model.named_parameters(remove_duplicate=False))

    def matrices(self, writer: Writer) -> list[TensorSlice]:
        """Return the slices of a writer's matrix, one per expert in their order, else one.

        Raises:
            UsageError: not found, not plain floating point, or not what the loaded model holds.
        """
        kept = writer.shape if writer.experts is None else writer.shape[1:]
        turned = writer.out_axis != (0 if writer.experts is None else 1)
        shape = (kept[1], kept[0]) if turned else (kept[0], kept[1])
        return self._find(writer, writer.key, shape, turned)

    def biases(self, writer: Writer) -> list[TensorSlice]:
        """Return the slices of a writer's bias like `matrices`; empty when it has none."""
        return self._find(writer, writer.bias_key, (writer.d_out,), False) if writer.bias_key else []

    @cached_property
    def _mapped(self) -> dict[str, list[str]]:
        """Parameter name → names in the file, as transformers maps them when it loads, experts in order."""
        return checkpoint_names(self.model, self.checkpoint.tensors)

    def _find(self, writer: Writer, name: str, shape: tuple[int, ...], turned: bool) -> list[TensorSlice]:
        """Find a parameter of canonical `shape`; `turned` says that it is in memory as [d_in, d_out]."""
        refused = ""
        for keys in self._candidates(name):
            entries = [self.checkpoint.tensors[key] for key in keys]
            packed = next((entry for entry in entries if entry.dtype not in TORCH_DTYPES), None)
            if packed:
                raise UsageError(
                    f"tensor {packed.name!r} has dtype {packed.dtype}: rounding to it would undo or distort the edit",
                    where=str(self.checkpoint.path / packed.shard),
                    valid=", ".join(TORCH_DTYPES),
                    hint="edit the unquantised checkpoint and quantise the result",
                )
            for transposed in (turned, not turned) if len(shape) == 2 else (False,):
                slices = _fit(entries, shape, writer.experts, transposed)
                if slices and self._agrees(slices, writer, name):
                    return slices
            refused = refused or f"; {entries[0].name!r} has another shape or other values"
        raise UsageError(f"no tensor holds the parameter '{name}'{refused}", where=str(self.checkpoint.path))

    def _candidates(self, name: str) -> Iterable[list[str]]:
        """Yield groups of tensor names that may hold a parameter, most certain first."""
        if name in self.checkpoint.tensors:
            yield [name]
        if self._mapped.get(name):
            yield self._mapped[name]
        stem = self.anatomy.layers.rpartition(".")[0]
        tail = name.removeprefix(stem + "." if stem else "")
        if tail != name or not stem:
            yield from ([key] for key in self.checkpoint.tensors if key.endswith(f".{tail}") or key == tail)

    def _agrees(self, slices: list[TensorSlice], writer: Writer, name: str) -> bool:
        """Compare some rows of every slice with the loaded parameter, in the parameter's own dtype."""
        parameter = self._parameters[name].detach()
        is_matrix = name == writer.key
        if parameter.is_meta or not parameter.is_floating_point() or (is_matrix and parameter.shape != writer.shape):
            return True
        for piece in slices:
            own = parameter if piece.expert is None else parameter[piece.expert]
            if is_matrix:
                own = writer.matrix(parameter, piece.expert)
                own = own.T if piece.transposed else own
            if not self._same(piece, own.reshape(-1, piece.shape[-1])):
                return False
        return True

    def _same(self, piece: TensorSlice, loaded: Tensor) -> bool:
        """Compare rows spread over a slice with those of `loaded` [rows, columns], which lies as the file does."""
        dtype = TORCH_DTYPES[piece.entry.dtype]
        rows, columns = loaded.shape
        width = min(columns, _SAMPLE_COLUMNS)
        for row in sorted({i * (rows - 1) // (_SAMPLE_ROWS - 1) for i in range(_SAMPLE_ROWS)}):
            begin = piece.begin + row * columns * dtype.itemsize
            data = self.checkpoint.read(piece.entry, begin, begin + width * dtype.itemsize)
            if not torch.equal(torch.frombuffer(data, dtype=dtype).to(loaded.dtype), loaded[row, :width].cpu()):
                return False
        return True


def _fit(entries: list[TensorEntry], shape: tuple[int, ...], experts: int | None, flip: bool) -> list[TensorSlice]:
    """Return tensors of the file as slices of canonical `shape`, or nothing when they do not have that shape.

    Args:
        entries: One tensor, or one per expert.
        shape: (d_out, d_in) or (d_out,).
        experts: Their number, None for a single matrix.
        flip: The file has the axes the other way round.
    """
    wanted = shape[::-1] if flip else shape
    shapes = [entry.shape for entry in entries]
    if experts is None and shapes == [wanted]:
        return [TensorSlice(entries[0], None, 0, entries[0].nbytes, wanted, flip)]
    if experts is not None and shapes == [(experts, *wanted)]:
        step = entries[0].nbytes // experts
        return [TensorSlice(entries[0], e, e * step, (e + 1) * step, wanted, flip) for e in range(experts)]
    if experts is not None and shapes == [wanted] * experts:
        return [TensorSlice(entry, e, 0, entry.nbytes, wanted, flip) for e, entry in enumerate(entries)]
    return []


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key by which `experts.2` comes before `experts.10`."""
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in re.split(r"(\d+)", name)]


def checkpoint_names(model: Any, names: Iterable[str]) -> dict[str, list[str]]:
    """Map every parameter of a transformers model to the names of the tensors that it is loaded from.

    Args:
        model: A loaded model; one that transformers does not know gives an empty mapping.
        names: Names of the tensors in its checkpoint.

    Returns:
        Parameter name → names in the file in natural order, so that experts count up.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    from transformers.modeling_utils import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return {}
    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    state = model.state_dict()
    found: dict[str, list[str]] = {}
    for name in sorted(names, key=_natural):
        renamed, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if renamed not in state and name in state:
            renamed = name
        found.setdefault(renamed, []).append(name)
    return {renamed: keys for renamed, keys in found.items() if renamed in state}


def overlapping(slices: Iterable[TensorSlice]) -> TensorSlice | None:
    """Return a slice that shares bytes with another one, None when all are apart."""
    at, shard = 0, ""
    for piece in sorted(slices, key=lambda p: (p.entry.shard, p.entry.begin + p.begin)):
        if piece.entry.shard == shard and piece.entry.begin + piece.begin < at:
            return piece
        at, shard = piece.entry.begin + piece.end, piece.entry.shard
    return None
