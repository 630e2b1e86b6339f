"""An edit as a PEFT adapter: a few megabytes beside the base model instead of a second copy of it.

A plain edit is W' = W + B A with B = -λ Vᵀ and A = V W, of rank k: a LoRA that is exact. A row-wise edit keeps the norm
n of every row, which is what DoRA writes: W' = n ⊙ (W + B A) / ‖W + B A‖ by rows, exact again. A column-wise edit
scales every column, a change of full rank: the adapter holds the best one of the rank asked for, and what that leaves
out is measured and said. Formats: https://huggingface.co/docs/peft/developer_guides/checkpoint; DoRA: Liu et al. 2024,
https://arxiv.org/abs/2402.09353, in PEFT's form, which takes norms over rows of `[d_out, d_in]`.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from perpend.core.edits import Edit
from perpend.core.linear import double
from perpend.core.maps import Geometry, HookMap, ModuleEdit, edit_bias
from perpend.errors import UsageError
from perpend.export.checkpoint import Checkpoint
from perpend.export.names import Locator
from perpend.progress import track

if TYPE_CHECKING:
    from perpend.models.anatomy import Anatomy, Writer

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
"""What PEFT puts before the path of a module."""
EXPERTS = ("w2", "down_proj")
"""Names by which PEFT 0.21 takes any module of a model with fused experts for an expert of former days, and looks for
it among the fused ones; such modules are named by their parameter instead."""
REFUSED = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
"""Model types of which PEFT 0.21 wraps no `out_proj`: fused kernels of state spaces read the matrix past the module."""
EXACT = 1e-6
"""Largest error, as a share of the change, that is the rounding of the adapter's float32."""


@dataclass(frozen=True)
class AdapterRow:
    """What the adapter holds of one module.

    Attributes:
        module: Name of the writer.
        mode: Mode of its edit.
        form: lora or dora.
        error: ‖W + B A - W'‖ / ‖W' - W‖ (Frobenius, experts together; for DoRA of the scaled sum): how much of the
            change is left out.
        spared: ‖W + B A - W'‖ / ‖W'‖, the same beside the whole matrix.
    """

    module: str
    mode: str
    form: str
    error: float
    spared: float


@dataclass(frozen=True)
class AdapterResult:
    """An adapter on disk.

    Attributes:
        rows: One per module.
        rank: Of every module.
        bytes: Size of its weights.
    """

    rows: tuple[AdapterRow, ...]
    rank: int
    bytes: int

    @property
    def error(self) -> float:
        """Largest share of a module's change that is left out."""
        return max((row.error for row in self.rows), default=0.0)

    @property
    def exact(self) -> bool:
        """Whether nothing but rounding is left out."""
        return self.error <= EXACT

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "rows": [asdict(row) for row in self.rows], "error": self.error, "exact": self.exact}


@dataclass(frozen=True)
class _Change:
    """The change of one matrix in canonical orientation, float64."""

    old: Tensor
    """`[d_out, d_in]` W."""
    made: HookMap
    """The map, in float64."""

    @classmethod
    def of(cls, matrix: Tensor, part: ModuleEdit) -> _Change:
        old = double(matrix)
        return cls(old, Geometry.of(old, part.directions, part.mode).at(part.weight))

    def low(self) -> tuple[Tensor, Tensor]:
        """B `[d_out, k]` and A `[k, d_in]` of W - λ Pᵀ R W, without scales."""
        return -float(self.made.factor) * self.made.write.mT, self.made.read @ self.old

    def new(self) -> Tensor:
        """W'."""
        return self.made.edited(self.old)


def write_adapter(
    source: Path,
    edit: Edit,
    anatomy: Anatomy,
    model: nn.Module,
    out: Path,
    *,
    base: str,
    revision: str | None,
    rank: int,
) -> AdapterResult:
    """Write `adapter_config.json` and `adapter_model.safetensors` into a folder, in float32.

    Args:
        source: Folder of the original safetensors checkpoint.
        edit: What is taken out; modules with weight factor 0 are left out.
        anatomy: Writers of the loaded model.
        model: The loaded model, by whose values tensors are recognised; its module paths are those of the adapter.
        out: An existing folder.
        base: What the adapter calls its base model.
        revision: Commit of it on the hub.
        rank: Of the adapter where the edit has none: column mode, and row mode of fused experts.

    Raises:
        UsageError: nothing is edited, a writer is not in the files, or a rank below 1.
    """
    parts = {name: part for name, part in edit.modules.items() if part.weight != 0}
    if not parts:
        raise UsageError("the edit changes nothing", where="edit", valid="a weight factor other than 0")
    if rank < 1:
        raise UsageError(f"rank {rank}", where="--rank", valid="1 or more")
    writers = {name: anatomy.writer(name) for name in parts}
    _require_wrappable(model, writers)
    wrapped = {name for name in writers if _is_linear(model, writers[name])}
    fused = len(wrapped) < len(writers)
    linear = {name for name in wrapped if not (fused and name.rpartition(".")[2] in EXPERTS and not writers[name].bias)}
    dora = len(linear) == len(writers) and any(part.mode == "row" for part in parts.values())  # for all or none
    width = max(rank if _needs_rank(part, dora) else len(part.directions) for part in parts.values())
    checkpoint = Checkpoint(source)
    locator = Locator(checkpoint, model, anatomy)
    biased = {name for name in linear if writers[name].bias}
    inner = not dora and len(linear) == len(writers) == len(biased)  # PEFT's lora_bias is for all modules or none
    tensors: dict[str, Tensor] = {}
    rows: list[AdapterRow] = []
    for name, part in track(parts.items(), "adapter"):
        pieces = locator.matrices(writers[name])
        changes = [_Change.of(p.view(checkpoint.read(p.entry, p.begin, p.end)), part) for p in pieces]
        exact = not _needs_rank(part, dora)
        factors = [change.low() if exact else _best(change, width) for change in changes]
        factors = [_padded(b, a, width) for b, a in factors]
        rows.append(_row(name, part, changes, factors, dora))
        biases = [p.view(checkpoint.read(p.entry, p.begin, p.end)) for p in locator.biases(writers[name])]
        shifts = [_shift(bias, part, change) for bias, change in zip(biases, changes, strict=False)]
        if name in linear:
            own = PREFIX + name
            tensors |= {f"{own}.lora_A.weight": factors[0][1], f"{own}.lora_B.weight": factors[0][0]}
            tensors |= {f"{own}.lora_magnitude_vector": changes[0].new().norm(dim=1)} if dora else {}
            for old, shift in zip(biases, shifts, strict=True):
                tensors |= {f"{own}.lora_B.bias": shift} if inner else {f"{own}.base_layer.bias": double(old) + shift}
        else:
            tensors |= _parameters(model, writers[name], factors, shifts)
    targets = _targets(writers, linear, parts)
    config = _config(base, revision, width, dora, bool(biased) and inner, bool(biased) and not inner, targets)
    single = {key: value.to(torch.float32).contiguous() for key, value in tensors.items()}
    save_file(single, out / WEIGHTS, metadata={"format": "pt"})
    (out / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return AdapterResult(tuple(rows), width, (out / WEIGHTS).stat().st_size)


def _require_wrappable(model: nn.Module, writers: dict[str, Writer]) -> None:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    found = next((name for name in writers if name.endswith(".out_proj")), None)
    if kind in REFUSED and found:
        raise UsageError(
            f"PEFT adapts no state-space projection of a '{kind}' model",
            where=found,
            valid="an edit without it",
            hint="perpend apply",
        )


def _is_linear(model: nn.Module, writer: Writer) -> bool:
    """Whether PEFT wraps the module itself; other owners of a matrix are reached by the name of their parameter."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(model.get_submodule(writer.name), nn.Linear | Conv1D)


def _needs_rank(part: ModuleEdit, dora: bool) -> bool:
    return part.mode == "column" or (part.mode == "row" and not dora)


def _best(change: _Change, rank: int) -> tuple[Tensor, Tensor]:
    """Return B and A of the best approximation of W' - W of that rank, but for a randomised search's last digits."""
    delta = change.new() - change.old
    rank = min(rank, *delta.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(delta, q=min(rank + 8, *delta.shape), niter=6)
    return u[:, :rank] * s[:rank], v[:, :rank].mT


def _padded(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return B and A with zeros up to a common rank, in float32."""
    more = rank - a.shape[0]
    b, a = nn.functional.pad(b, (0, more)), nn.functional.pad(a, (0, 0, 0, more))
    return b.float(), a.float()


def _row(
    name: str, part: ModuleEdit, changes: list[_Change], factors: list[tuple[Tensor, Tensor]], dora: bool
) -> AdapterRow:
    missed, moved, whole = 0.0, 0.0, 0.0
    for change, (b, a) in zip(changes, factors, strict=True):
        new, got = change.new(), change.old + b.double() @ a.double()
        if dora:
            norms = got.norm(dim=1)
            if not bool((norms > 0).all()):
                raise UsageError("a row of zeros has no DoRA form", where=name, valid="plain or column mode")
            got = got * (new.norm(dim=1).float().double() / norms)[:, None]
        missed += float((got - new).square().sum())
        moved += float((new - change.old).square().sum())
        whole += float(new.square().sum())
    share = math.sqrt(missed / moved) if moved else 0.0
    spared = math.sqrt(missed / whole) if whole else 0.0
    return AdapterRow(name, part.mode, "dora" if dora else "lora", share, spared)


def _shift(bias: Tensor, part: ModuleEdit, change: _Change) -> Tensor:
    """Return b' - b, float64."""
    old = double(bias)
    return double(edit_bias(old, part, change.old)) - old


def _parameters(
    model: nn.Module, writer: Writer, factors: list[tuple[Tensor, Tensor]], shifts: list[Tensor]
) -> dict[str, Tensor]:
    """Return the tensors of matrices, and of experts' biases, that PEFT reaches as parameters of their module.

    Several wrappers on one module are nested in the order of its parameters, the first innermost; experts are unfolded
    as `[E · r, in]` and `[out, r · E]`.
    """
    module = model.get_submodule(writer.name)
    reached = [name for name, _ in module.named_parameters(recurse=False) if name in (writer.parameter, writer.bias)]
    path = {name: ".base_layer" * k for k, name in enumerate(reversed(reached if shifts else [writer.parameter]))}
    turned = writer.experts is not None and bool(getattr(module, "is_transposed", False))
    first = writer.out_axis == (0 if writer.experts is None else 1)
    kept = [(b, a) if first else (a.mT, b.mT) for b, a in factors]  # whose product lies as the tensor does
    pairs = [(right.mT, left.mT) if turned else (left, right) for left, right in kept]
    own = PREFIX + writer.name + path[writer.parameter]
    made = {
        f"{own}.lora_A.weight": torch.cat([right for _, right in pairs]),
        f"{own}.lora_B.weight": torch.stack([left for left, _ in pairs], dim=-1).flatten(1),
    }
    if shifts and writer.bias:
        own, rank = PREFIX + writer.name + path[writer.bias], factors[0][1].shape[0]
        u, s, vh = torch.linalg.svd(torch.stack(shifts), full_matrices=False)  # [E, d_out], of rank k at most
        b, a = _padded((u * s)[:, :rank], vh[:rank], rank)
        made |= {f"{own}.lora_A.weight": a, f"{own}.lora_B.weight": b}
    return made


def _targets(writers: dict[str, Writer], linear: set[str], parts: dict[str, ModuleEdit]) -> dict[str, list[str]]:
    """Return the modules and parameters that the adapter names."""
    others = [writers[name] for name in parts if name not in linear]
    named = [key for writer in others for key in (writer.key, writer.bias_key) if key is not None]
    return {"target_modules": sorted(linear), "target_parameters": named}


def _config(
    base: str, revision: str | None, rank: int, dora: bool, inner: bool, outer: bool, targets: dict[str, list[str]]
) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "lora_only" if outer else "none",
        "lora_bias": inner,
        "use_dora": dora,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        **targets,
    }
