"""Which tensor of a GGUF file holds the matrix of a writer: by the name mapping of the package `gguf`, then by role."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from perpend.errors import UsageError
from perpend.models.gguf import TensorInfo

if TYPE_CHECKING:
    from perpend.models.anatomy import Anatomy, Writer

BY_ROLE: dict[str, tuple[str, ...]] = {
    "attention_out": ("attn_output",),
    "mlp_down": ("ffn_down",),
    "expert_down": ("ffn_down_exps",),
    "shared_expert_down": ("ffn_down_shexp",),
    "mixer_out": ("ssm_out", "shortconv.out_proj"),
}
"""What llama.cpp calls the matrix of each role, behind `blk.N.`."""


def find(
    tensors: Mapping[str, TensorInfo], architecture: str, anatomy: Anatomy, writer: Writer
) -> tuple[TensorInfo, TensorInfo | None]:
    """Return the tensor of a writer's matrix and that of its bias.

    A GGUF file has a matrix as `[d_out, d_in]` and fused experts as `[E, d_out, d_in]`, however the model keeps them.

    Args:
        tensors: Of all parts of the file.
        architecture: What the file calls it, such as `gemma3`.
        anatomy: Writers of the model.
        writer: One of them.

    Raises:
        UsageError: no such tensor, or one of another shape.
    """
    kept = writer.shape if writer.experts is None else writer.shape[1:]
    shape = (kept[1], kept[0]) if writer.out_axis != (0 if writer.experts is None else 1) else kept
    shape = shape if writer.experts is None else (writer.experts, *shape)
    tried = [f"{name}.weight" for name in _candidates(architecture, anatomy, writer)]
    for name in tried:
        if name in tensors:
            if tensors[name].shape != shape:
                raise UsageError(
                    f"has the shape {list(tensors[name].shape)}", where=name, valid=f"{list(shape)}, as the model"
                )
            return tensors[name], tensors.get(name.removesuffix("weight") + "bias")
    raise UsageError(f"no tensor holds {writer.name}", where="GGUF", valid=" or ".join(dict.fromkeys(tried)))


def _candidates(architecture: str, anatomy: Anatomy, writer: Writer) -> list[str]:
    """Return names without their last part, most certain first."""
    import gguf

    arch = next((key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    found = []
    if arch is not None:
        mapping = gguf.get_tensor_name_map(arch, anatomy.n_layers)
        inner = writer.name.removeprefix(f"{anatomy.layers}.")
        last = anatomy.layers.rpartition(".")[2]
        for path in (writer.name, f"model.{last}.{inner}", f"{last}.{inner}"):
            for key in (path, f"{path}.{writer.parameter}"):
                found += [name] if (name := mapping.get_name(key)) else []
    return [*found, *(f"blk.{writer.layer}.{name}" for name in BY_ROLE[writer.role])]
