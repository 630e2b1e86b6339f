"""Pico models as GGUF files, written with the package `gguf` and without any of the code under test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

import pico

WIDE = {
    "llama": {"hidden_size": 128, "intermediate_size": 256},
    "gemma3_text": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "head_dim": 32,
        "query_pre_attn_scalar": 256,  # what transformers takes it to be for a GGUF file
        "layer_types": ["sliding_attention"] * 3,
    },
    "qwen3_moe": {"hidden_size": 128, "head_dim": 32, "moe_intermediate_size": 768, "norm_topk_prob": True},
    "qwen2": {"hidden_size": 128, "intermediate_size": 256},
    "gpt2": {"n_embd": 128, "n_positions": 1024},  # what transformers takes it to be for a GGUF file
    "gpt_oss": {"hidden_size": 128, "intermediate_size": 64, "head_dim": 32},
}
ARCHITECTURES = {
    "llama": "llama",
    "gemma3_text": "gemma3",
    "qwen3_moe": "qwen3moe",
    "qwen2": "qwen2",
    "gpt2": "gpt2",
    "gpt_oss": "gpt-oss",
}
BIASED = ("gpt2", "gpt_oss")
"""Families whose writers have biases, and matrices that a GGUF file has the other way round."""


def save_wide(family: str, folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Write a checkpoint whose rows are whole groups of 32."""
    pico.build(family, seed=seed, **WIDE[family]).to(dtype).save_pretrained(folder)
    pico.tokenizer().save_pretrained(folder)
    return folder


def _permuted(weights: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of a query or key matrix as llama.cpp wants them for the Llama architecture."""
    shape = weights.shape
    return weights.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def _metadata(writer: gguf.GGUFWriter, family: str, config: Any) -> None:
    writer.add_name("pico")
    writer.add_license("apache-2.0")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if family == "gpt2":
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(size)
    writer.add_value_length(size)
    if family == "llama":
        writer.add_rope_dimension_count(size)
    if family == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
    if family == "qwen3_moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _tokenizer(writer: gguf.GGUFWriter) -> None:
    made = json.loads(pico.tokenizer().backend_tokenizer.to_str())
    vocabulary = {v: k for k, v in pico.tokenizer().get_vocab().items()}
    special = {token["id"] for token in made["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([vocabulary[k] for k in range(len(vocabulary))])
    writer.add_token_types([3 if k in special else 1 for k in range(len(vocabulary))])
    writer.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in made["model"]["merges"]])
    writer.add_bos_token_id(pico.BOS)
    writer.add_eos_token_id(pico.EOS)
    writer.add_pad_token_id(pico.PAD)
    writer.add_add_bos_token(True)
    writer.add_chat_template(pico.CHAT_TEMPLATE)


def _named(family: str, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a model by their GGUF names, values as the file has them."""
    config = model.config
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[family])
    mapping = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    found = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        tensor = tensor.float()
        if family == "gpt_oss" and ".experts." in name:
            found |= _interleaved(name, tensor)
            continue
        if family == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensor = tensor.T
        if name.endswith("experts.gate_up_proj"):
            layer = name.split(".")[2]
            gate, up = tensor.chunk(2, dim=1)
            found |= {f"blk.{layer}.ffn_gate_exps.weight": gate, f"blk.{layer}.ffn_up_exps.weight": up}
            continue
        own = mapping.get_name(name, try_suffixes=(".weight", ".bias"))
        own = own if own.endswith((".weight", ".bias")) else f"{own}.weight"
        if family == "llama" and ".attn_q." in own:
            tensor = _permuted(tensor, config.num_attention_heads)
        if family == "llama" and ".attn_k." in own:
            tensor = _permuted(tensor, config.num_key_value_heads)
        if family == "gemma3_text" and own.endswith("norm.weight"):
            tensor = tensor + 1
        found[own] = tensor
    return found


def _interleaved(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of gpt-oss's experts: `[E, out, in]` in a GGUF file, gate and up apart."""
    kind = "bias" if name.endswith("_bias") else "weight"
    tensor = tensor if kind == "bias" else tensor.transpose(1, 2)
    layer = f"blk.{name.split('.')[2]}"
    if "down_proj" in name:
        return {f"{layer}.ffn_down_exps.{kind}": tensor}
    return {f"{layer}.ffn_gate_exps.{kind}": tensor[:, ::2], f"{layer}.ffn_up_exps.{kind}": tensor[:, 1::2]}


def write_gguf(family: str, model: torch.nn.Module, path: Path, kind: str = "F32", *, parts: int = 1) -> Path:
    """Write a pico model as a GGUF file whose matrices are of a type; returns the first file."""
    tensors = _named(family, model)
    most = -(-len(tensors) // parts) if parts > 1 else 0
    writer = gguf.GGUFWriter(path, ARCHITECTURES[family], split_max_tensors=most)
    _metadata(writer, family, model.config)
    _tokenizer(writer)
    own = gguf.GGMLQuantizationType[kind]
    for name, tensor in tensors.items():
        matrix = tensor.ndim > 1 and name.startswith("blk.") and name.endswith("weight") and "gate_inp" not in name
        whole = matrix and tensor.shape[-1] % 32 == 0
        data = np.ascontiguousarray(tensor.numpy())
        writer.add_tensor(name, gguf.quants.quantize(data, own) if whole else data, raw_dtype=own if whole else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if parts == 1 else path.with_name(f"{path.stem}-00001-of-{parts:05d}.gguf")
