"""FP8 and MXFP4 checkpoints: which tensors are stored as codes with factors, and the numbers that they stand for.

FP8 (DeepSeek V3 and others): a matrix `[d_out, d_in]` of 8-bit floats and `NAME_scale_inv`, one factor for every block,
of which the last in a row or column may be cut short. MXFP4 (gpt-oss): `NAME_blocks` `[E, out, in / 32, 16]`, two 4-bit
floats to a byte, the lower half first, and `NAME_scales` `[E, out, in / 32]`, exponents of two plus 127; the plain
tensor is `[E, in, out]` (OCP Microscaling Formats specification, version 1.0). Both formats are exact in float32;
MXFP4 is in bfloat16 too, FP8 times a float32 factor is rounded there once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perpend.errors import UsageError
from perpend.models.headers import TensorEntry, read_range

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The numbers of E2M1 by their codes."""
CODES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
FACTORS = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
}
EXPONENT_BIAS = 127
ACTIVATIONS = ("activation_scale", "input_scale")
"""Ends of the names of factors for what goes into a quantised matrix; a plain one has no use for them."""


@dataclass(frozen=True)
class Packed:
    """A tensor that a checkpoint holds as codes and factors.

    Attributes:
        name: Of the plain tensor.
        codes: Where its codes lie.
        factors: Where its factors lie.
        shape: Of the plain tensor.
        block: Rows and columns that share a factor, as the configuration says; None for those of an even grid, and for
            MXFP4.
    """

    name: str
    codes: TensorEntry
    factors: TensorEntry
    shape: tuple[int, ...]
    block: tuple[int, int] | None = None

    def parts(self, folder: Path) -> Iterator[Tensor]:
        """Yield the numbers `[rows, columns]` in float32: of the whole matrix, or of one expert after the other.

        Raises:
            RunFailed: a file ends early.
            UsageError: factors that do not fit the codes.
        """
        for part in range(self.shape[0]) if len(self.shape) == 3 else (None,):
            codes = _read(folder, self.codes, CODES.get(self.codes.dtype, torch.uint8), part)
            factors = _read(folder, self.factors, FACTORS[self.factors.dtype], part)
            if self.codes.dtype in CODES:
                yield unpack_fp8(codes, factors, self.block, self.name)
            else:
                yield unpack_mxfp4(codes, factors)


def _read(folder: Path, entry: TensorEntry, dtype: torch.dtype, part: int | None) -> Tensor:
    """Return a tensor, or one of its parts along the first axis."""
    size, shape = (entry.nbytes, entry.shape) if part is None else (entry.nbytes // entry.shape[0], entry.shape[1:])
    begin = entry.begin + (part or 0) * size
    return torch.frombuffer(read_range(folder / entry.shard, begin, begin + size), dtype=dtype).view(shape)


def find(
    entries: Mapping[str, TensorEntry], method: str, block: tuple[int, int] | None, where: str
) -> dict[str, Packed | None]:
    """Return the packed tensors of a checkpoint by the name of their codes; None for names that go with them.

    Args:
        entries: Every tensor by name.
        method: fp8 or mxfp4.
        block: Rows and columns that share a factor, as the configuration says.
        where: For messages.

    Raises:
        UsageError: codes without factors, or a form that is not known.
    """
    found: dict[str, Packed | None] = {}
    for name, entry in entries.items():
        if method == "mxfp4" and name.endswith("_blocks") and entry.dtype == "U8" and len(entry.shape) == 4:
            plain = name.removesuffix("_blocks")
            factors = entries.get(f"{plain}_scales")
            experts, rows, groups, width = entry.shape
            if factors and factors.dtype == "U8" and factors.shape == entry.shape[:3]:
                found |= {name: Packed(plain, entry, factors, (experts, 2 * groups * width, rows)), factors.name: None}
        elif method == "fp8" and entry.dtype in CODES:
            factors = entries.get(f"{name}_scale_inv")
            fits = factors and factors.dtype in FACTORS and len(entry.shape) in (2, 3)
            if factors and fits and (len(entry.shape) == 2 or factors.shape[:1] == entry.shape[:1]):
                found |= {name: Packed(name, entry, factors, entry.shape, block), factors.name: None}
        elif name.endswith(ACTIVATIONS):
            found[name] = None
    left = next((e for n, e in entries.items() if n not in found and (e.dtype[:2] == "F8" or e.dtype == "U8")), None)
    if left:
        raise UsageError(
            f"tensor {left.name!r} of {left.dtype} is packed in a form that is not known",
            where=where,
            valid="NAME_scale_inv beside FP8, NAME_blocks and NAME_scales of MXFP4",
            hint="edit the unquantised checkpoint",
        )
    return found


def unpack_mxfp4(codes: Tensor, factors: Tensor) -> Tensor:
    """Return the numbers `[in, out]` of one expert in float32.

    Args:
        codes: `[out, in / 32, 16]`, bytes.
        factors: `[out, in / 32]`, bytes.
    """
    known = torch.tensor(FP4)
    halves = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
    sizes = known[halves.int()] * _powers(factors)[..., None]
    return sizes.flatten(-2).T


def _powers(exponents: Tensor) -> Tensor:
    """Return powers of two from their exponents plus 127, in float32."""
    return torch.ldexp(torch.ones(exponents.shape), exponents.int() - EXPONENT_BIAS)


def unpack_fp8(codes: Tensor, factors: Tensor, block: tuple[int, int] | None, name: str = "") -> Tensor:
    """Return the numbers `[rows, columns]` of an FP8 matrix in float32.

    Args:
        codes: `[rows, columns]`, 8-bit floats.
        factors: One for each block, or one for all.
        block: Rows and columns that share a factor; None, or one that does not fit, for those of an even grid.
        name: For the message.

    Raises:
        UsageError: factors that do not fit.
    """
    wide = _powers(factors) if factors.dtype == torch.uint8 else factors.float()
    if wide.numel() == 1:
        return codes.float() * wide.reshape(())
    rows, columns = codes.shape
    if wide.ndim == 1 and len(wide) == rows:
        wide = wide[:, None]
    if wide.ndim != 2:
        raise UsageError(f"factors of shape {list(factors.shape)} for a matrix of {rows} × {columns}", where=name)
    grid = tuple(wide.shape)
    if block is None or (-(-rows // block[0]), -(-columns // block[1])) != grid:
        if rows % grid[0] or columns % grid[1]:
            raise UsageError(
                f"{grid[0]} × {grid[1]} factors do not divide a matrix of {rows} × {columns}",
                where=name,
                valid=f"blocks of {block[0]} × {block[1]}" if block else "",
            )
        block = (rows // grid[0], columns // grid[1])
    down = wide.repeat_interleave(block[0], 0)[:rows]
    return codes.float() * down.repeat_interleave(block[1], 1)[:, :columns]


@contextmanager
def whole_blocks() -> Iterator[None]:
    """Let transformers cut the last FP8 block of a row or column short inside the block, as checkpoints do.

    transformers 5.24 takes the size of a block to be that of the matrix divided by the number of factors. So it refuses
    DeepSeek V3, whose `kv_a_proj_with_mqa` has 576 rows in blocks of 128, and takes 192 rows for two blocks of 96.
    """
    try:
        from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    except ImportError:  # another version, which does it in its own way
        yield
        return
    kind: Any = Fp8Dequantize
    own = kind._dequantize_one
    kind._dequantize_one = lambda self, *given, **named: _one(partial(own, self), self.hf_quantizer, *given, **named)
    try:
        yield
    finally:
        kind._dequantize_one = own


def _one(
    own: Callable[..., Tensor], quantizer: Any, codes: Tensor, factors: Tensor, output_dtype: torch.dtype | None = None
) -> Tensor:
    """Widen a matrix whose factors stand for blocks as the configuration has them; leave others to transformers."""
    block = block_of({"weight_block_size": quantizer.quantization_config.weight_block_size})
    if block is not None and codes.ndim == factors.ndim == 2 and codes.dtype in CODES.values():
        grid = tuple(-(-n // b) for n, b in zip(codes.shape, block, strict=True))
        if grid == tuple(factors.shape):
            return unpack_fp8(codes, factors, block).to(output_dtype or torch.bfloat16)
    return own(codes, factors, output_dtype)


def block_of(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the rows and columns that share a factor, from the quantisation part of a `config.json`."""
    found = settings.get("weight_block_size")
    return (int(found[0]), int(found[1])) if isinstance(found, list | tuple) and len(found) == 2 else None


def wide_bytes(entries: Iterable[TensorEntry], method: str) -> int:
    """Return the bytes that the tensors of a checkpoint take when those that are packed are bfloat16."""
    total = 0
    for entry in entries:
        if method == "mxfp4" and entry.name.endswith("_blocks"):
            total += 2 * 2 * entry.nbytes
        elif method == "fp8" and entry.dtype in CODES:
            total += 2 * math.prod(entry.shape)
        elif not entry.name.endswith(("_scales", "_scale_inv", *ACTIVATIONS)):
            total += entry.nbytes
    return total
