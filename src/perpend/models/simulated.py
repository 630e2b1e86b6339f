"""A loaded model whose matrices are overwritten by what a plain pass of llama.cpp makes of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from perpend.core.quant import GROUP, simulate
from perpend.errors import UsageError
from perpend.models.anatomy import Anatomy
from perpend.progress import track


def matrices(model: nn.Module, anatomy: Anatomy) -> Iterator[tuple[str, Tensor]]:
    """Yield the matrices of the layers that llama.cpp quantises, each as a view with its input axis last.

    Embeddings and LM head, which it keeps at six bits or more, routers (a row per expert, or one), norms, biases and
    kernels of convolutions are no such matrices.

    Yields:
        The parameter's name and `[..., d_out, d_in]`, which shares its memory.
    """
    own = {writer.name: writer for writer in anatomy.writers}
    experts = {writer.experts for writer in anatomy.writers}
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        if not name.startswith(f"{anatomy.layers}.") or not 2 <= parameter.ndim <= 3:
            continue
        module, writer = model.get_submodule(path), own.get(path)
        if (
            leaf.endswith("bias")
            or isinstance(module, nn.modules.conv._ConvNd)
            or (writer is None and leaf != "weight")
        ):
            continue
        turned = type(module).__name__ == "Conv1D"  # of transformers, which keeps [d_in, d_out]
        if writer is not None:  # fused experts keep both their tensors the same way round
            turned = writer.out_axis == len(writer.shape) - 1
        matrix = parameter.detach()
        matrix = matrix.transpose(-1, -2) if turned else matrix
        if matrix.ndim == 2 and (matrix.shape[0] == 1 or matrix.shape[0] in experts):
            continue
        yield name, matrix


@torch.no_grad()
def quantise(model: nn.Module, anatomy: Anatomy, kind: str) -> int:
    """Overwrite the matrices of the layers in place by their values after a plain pass.

    Values are rounded once more to the dtype of the parameter, so a model in float32 holds exactly what the quantised
    file would. Rows that the type cannot hold are left, as llama.cpp leaves them in 16 bits.

    Args:
        model: In memory; its layers are of no other use afterwards.
        anatomy: Its writers.
        kind: q4_0, q8_0 or another type that `core.quant.simulate` knows.

    Returns:
        How many parameters were overwritten.

    Raises:
        UsageError: layers that are not in memory, or are quantised already.
    """
    count = 0
    for name, matrix in track(list(matrices(model, anatomy)), kind):
        require_plain(name, matrix)
        if matrix.shape[-1] % GROUP == 0:
            matrix.copy_(simulate(matrix.contiguous(), kind))
            count += 1
    return count


def require_plain(name: str, tensor: Tensor) -> None:
    """Refuse a parameter that cannot be overwritten by numbers.

    Raises:
        UsageError: says which.
    """
    if tensor.is_meta or not tensor.is_floating_point():
        raise UsageError(
            "a simulated pass overwrites the weights in memory, and this one is not there as plain numbers",
            where=name,
            valid="--offload none --quantization none",
        )
