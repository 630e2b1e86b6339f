"""Control vectors for llama.cpp: a GGUF file of a vector per layer that is added to the residual stream.

`direction.l` `[d]` float32 is added to the output of layer l, counted from 0 as everywhere here; llama.cpp has none for
layer 0. The weights stay as they are: `llama-cli -m model.gguf --control-vector-scaled FILE:1.0`. What is added is the
same for every prompt and token, unlike an edit, which takes out what is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from perpend.core.directions import Directions
from perpend.errors import MissingExtra, UsageError

ARCHITECTURE = "controlvector"


def shifts(directions: Directions, layers: range) -> dict[int, Tensor]:
    """Return what to add so that target prompts come to lie where baseline prompts do along the directions.

    With one layer l that is -Vᵀ V (target mean - baseline mean) of layer l; several layers share it, each taking its
    own by the number of layers, since what one layer adds is still there in the next.

    Args:
        directions: Of all layers.
        layers: Layers that add, from 1 on.

    Returns:
        Layer → `[d]` float32.

    Raises:
        UsageError: layer 0, a layer that is not there, or none.
    """
    if not layers or layers.start < 1 or layers.stop > directions.n_layers:
        raise UsageError(f"layers {layers.start} to {layers.stop - 1}", valid=f"1 to {directions.n_layers - 1}")
    made = {}
    for layer in layers:
        v = directions.vectors[layer].double()
        moved = directions.target_mean[layer].double() - directions.baseline_mean[layer].double()
        made[layer] = (-(v.mT @ (v @ moved)) / len(layers)).float()
    return made


def write_control_vector(path: Path, vectors: Mapping[int, Tensor], *, hint: str, about: Mapping[str, str]) -> int:
    """Write a control vector.

    Args:
        path: File to make.
        vectors: Layer → `[d]`.
        hint: Which model it is for, for people; llama.cpp checks only the size.
        about: More metadata, by key.

    Returns:
        Size of the file in bytes.

    Raises:
        MissingExtra: the gguf package is not installed.
    """
    try:
        from gguf import GGUFWriter
    except ImportError:
        raise MissingExtra("gguf", "gguf", "writing a control vector") from None
    writer = GGUFWriter(path, ARCHITECTURE)
    writer.add_string(f"{ARCHITECTURE}.model_hint", hint)
    writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(vectors))
    for key, value in about.items():
        writer.add_string(key, value)
    for layer, vector in sorted(vectors.items()):
        writer.add_tensor(f"direction.{layer}", vector.to(torch.float32).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.stat().st_size
