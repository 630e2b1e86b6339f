"""A control vector in llama.cpp itself: it adds what transformers adds at the same layers."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from task_cases import MACHINE, a_recipe
from torch import Tensor

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")
sys.path.insert(0, str(Path(__file__).parents[1] / "export"))
sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import gguf
import llama_cpp as llama
from export_cases import load
from gguf_cases import save_wide, write_gguf
from llama_cpp_greedy import opened

import perpend
from perpend.core.directions import Directions
from perpend.export.control_vector import shifts

TOKENS = [2, 40, 41, 42, 200, 77, 5, 13]
SCALES = (1.0, 8.0, -8.0)
CLOSE = 0.05
"""Logits of one program and of the other; they spread over 3.3."""


def put_in(state: Any, path: Path, scale: float, layers: int) -> None:
    """Set a control vector as llama.cpp's programs load one: the tensor of layer 1 first, and none of layer 0."""
    found = {t.name: np.array(t.data, dtype=np.float32) for t in gguf.GGUFReader(path).tensors}
    size = len(next(iter(found.values())))
    rows = np.zeros((layers - 1, size), dtype=np.float32)
    for name, values in found.items():
        kind, _, layer = name.partition(".")
        assert kind == "direction"
        rows[int(layer) - 1] = scale * values
    data = rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    assert llama.llama_set_adapter_cvec(state, data, rows.size, size, 1, layers) == 0


def in_llama_cpp(model: Path, vector: Path | None, scale: float, layers: int) -> Tensor:
    """Return the logits of every token, `[T, V]`."""
    with opened(str(model), len(TOKENS), 1) as (state, _, size):
        if vector is not None:
            put_in(state, vector, scale, layers)
        batch = llama.llama_batch_init(len(TOKENS), 0, 1)
        try:
            for k, token in enumerate(TOKENS):
                batch.token[k], batch.pos[k], batch.n_seq_id[k], batch.seq_id[k][0] = token, k, 1, 0
                batch.logits[k] = True
            batch.n_tokens = len(TOKENS)
            assert llama.llama_decode(state, batch) == 0
            found = [llama.llama_get_logits_ith(state, k) for k in range(len(TOKENS))]
            return torch.from_numpy(np.stack([np.ctypeslib.as_array(row, shape=(size,)) for row in found]))
        finally:
            llama.llama_batch_free(batch)


@torch.no_grad()
def in_transformers(model: Any, added: Mapping[int, Tensor], scale: float) -> Tensor:
    """Return the logits of every token with a vector added to the output of each layer, `[T, V]`."""
    with ExitStack() as stack:
        for layer, vector in added.items():
            hook = model.model.layers[layer].register_forward_hook(lambda m, a, out, v=vector: out + scale * v)
            stack.callback(hook.remove)
        return model(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[0].float()


@pytest.mark.parametrize("span", [range(1, 2), range(2, 3), range(1, 3)], ids=["1", "2", "1-2"])
def test_it_is_added_to_the_layers_that_it_names(tmp_path: Path, span: range) -> None:
    model = load(save_wide("llama", tmp_path / "hf"))
    source, layers = write_gguf("llama", model, tmp_path / "model.gguf"), model.config.num_hidden_layers
    perpend.fit(str(tmp_path / "hf"), output=tmp_path / "fit", recipe=a_recipe(tmp_path), machine=MACHINE)
    made = perpend.vector(tmp_path / "fit", output=tmp_path / "v.gguf", layers=f"{span[0]}-{span[-1]}")
    assert made.layers == tuple(span)
    added = shifts(Directions.load(tmp_path / "fit" / "directions.safetensors"), span)
    below = {layer - 1: vector for layer, vector in added.items()}
    plain = in_transformers(model, {}, 0.0)
    torch.testing.assert_close(in_llama_cpp(source, None, 0.0, layers), plain, atol=CLOSE, rtol=0.0)
    for scale in SCALES:
        asked, found = in_transformers(model, added, scale), in_llama_cpp(source, tmp_path / "v.gguf", scale, layers)
        torch.testing.assert_close(found, asked, atol=CLOSE, rtol=0.0)
        assert float((found - plain).abs().max()) > 1
        assert float((found - in_transformers(model, below, scale)).abs().max()) > 1, "a layer too early"
