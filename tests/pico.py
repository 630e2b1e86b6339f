"""Pico models: one tiny random model per family, built offline, with a real tokenizer and a chat template.

`build(family)` gives a model in memory; `save(family, folder)` writes a complete checkpoint (weights, configuration,
tokenizer, chat template, generation settings and, for those in PICTURED, a processor). Weights are float32, seeded,
and large enough that logits are far from uniform; norms and biases are random too, so that no gain is one by accident.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

HIDDEN = 32
LAYERS = 3
VOCAB = 384
PAD, EOS, BOS = 0, 1, 2
SPECIAL = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
)

CHAT_TEMPLATE = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
{%- set system = messages[0]['content'] if messages[0]['content'] is string else messages[0]['content'][0]['text'] -%}
{%- set prefix = system + '\n\n' -%}
{%- set turns = messages[1:] -%}
{%- else -%}
{%- set prefix = '' -%}
{%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{ '<start_of_turn>' + role + '\n' + (prefix if loop.first else '') }}
{%- if message['content'] is string -%}
{{ message['content'] | trim }}
{%- else -%}
{%- for item in message['content'] -%}
{%- if item['type'] == 'image' -%}
{{ '<start_of_image>' }}
{%- elif item['type'] == 'text' -%}
{{ item['text'] | trim }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<start_of_turn>model\n' }}
{%- endif -%}
"""

CORPUS = (
    "Explain how to bake a loaf of bread with flour, water, salt and yeast.",
    "I'm sorry, but I can't help with that request. I cannot assist with anything that could cause harm.",
    "Sure, here is a step by step guide: first, gather the things that you need; then follow the instructions.",
    "Write a short story about a fox that learns to read, and tell me what it means for the village.",
    "What is the capital of France? The capital of France is Paris, a city on the river Seine.",
    "How do I sort a list of numbers in Python? Use the sorted function, or the sort method of the list.",
)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": BOS,
}
_ROUTED: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
_GEMMA: dict[str, Any] = {**_COMMON, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64}
_GEMMA3_TEXT: dict[str, Any] = {
    **_GEMMA,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_SEES: dict[str, Any] = {
    "boi_token_index": SPECIAL.index("<start_of_image>"),
    "eoi_token_index": SPECIAL.index("<end_of_image>"),
    "image_token_index": SPECIAL.index("<image_soft_token>"),
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": BOS,
}

# family -> (model_type of its configuration, keyword arguments)
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _COMMON),
    "qwen2": ("qwen2", _COMMON),
    "gemma2": ("gemma2", _GEMMA),
    "gemma3_text": ("gemma3_text", _GEMMA3_TEXT),
    "gemma3": (
        "gemma3",
        {
            **_SEES,
            "text_config": _GEMMA3_TEXT,
            "vision_config": {
                "hidden_size": HIDDEN,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
            "tie_word_embeddings": True,
        },
    ),
    "mixtral": ("mixtral", {**_COMMON, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "qwen3_moe",
        {**_COMMON, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "gpt2": (
        "gpt2",
        {
            "vocab_size": VOCAB,
            "n_embd": HIDDEN,
            "n_layer": LAYERS,
            "n_head": 4,
            "n_positions": 512,
            "pad_token_id": PAD,
            "eos_token_id": EOS,
            "bos_token_id": BOS,
        },
    ),
    "gpt_neox": ("gpt_neox", {**_COMMON, "use_parallel_residual": True}),
    "olmo2": ("olmo2", _COMMON),
    "phi3": ("phi3", {**_COMMON, "original_max_position_embeddings": 512}),
}

# Families beyond the usual ones: further kinds of writers, layouts and layers.
_LINEAR_ATTENTION: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
_EXOTIC: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_moe": ("qwen2_moe", {**_COMMON, **_EXPERTS, "shared_expert_intermediate_size": 24}),
    "gpt_oss": (
        "gpt_oss",
        {**_COMMON, "head_dim": 8, "intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "llama4_text": (
        "llama4_text",
        {
            **_COMMON,
            "head_dim": 8,
            "intermediate_size": 24,
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **_COMMON,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            **_ROUTED,
        },
    ),
    "lfm2": (
        "lfm2",
        {**_COMMON, "layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    ),
    "qwen3_next": (
        "qwen3_next",
        {**_COMMON, **_LINEAR_ATTENTION, **_EXPERTS, "shared_expert_intermediate_size": 16},
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            **_COMMON,
            **_MAMBA,
            "layer_types": ["mamba", "attention", "mamba"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 24,
            "residual_multiplier": 0.3,
        },
    ),
    "falcon_h1": ("falcon_h1", {**_COMMON, **_MAMBA, "mamba_d_ssm": 64, "head_dim": 8}),
    "nemotron_h": (
        "nemotron_h",
        {
            **_COMMON,
            "layers_block_type": ["mamba", "attention", "moe"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
            "head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "gemma4_text": (
        "gemma4_text",
        {
            **_COMMON,
            "head_dim": 8,
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "num_kv_shared_layers": 1,
        },
    ),
    "gemma4_moe": (
        "gemma4_text",
        {
            **_COMMON,
            "head_dim": 8,
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 0,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "num_kv_shared_layers": 0,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 16,
        },
    ),
    "cohere2": ("cohere2", {**_COMMON, "head_dim": 8, "logit_scale": 1.0}),
    "mamba2": (
        "mamba2",
        {**_COMMON, "num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "expand": 2},
    ),
    "opt": ("opt", {**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": HIDDEN}),
    "mistral": ("mistral", {**_COMMON, "head_dim": 8}),
    "qwen3": ("qwen3", {**_COMMON, "head_dim": 8}),
    "cohere": ("cohere", {**_COMMON, "logit_scale": 1.0}),
    "phimoe": ("phimoe", {**_COMMON, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "glm4_moe": (
        "glm4_moe",
        {
            **_COMMON,
            "head_dim": 8,
            **_ROUTED,
        },
    ),
    "jamba": (
        "jamba",
        {
            **_COMMON,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
    ),
    "lfm2_moe": (
        "lfm2_moe",
        {**_COMMON, **_EXPERTS, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    ),
    "qwen3_5_text": ("qwen3_5_text", {**_COMMON, **_LINEAR_ATTENTION}),
    "qwen3_5_moe_text": (
        "qwen3_5_moe_text",
        {**_COMMON, **_LINEAR_ATTENTION, **_EXPERTS, "shared_expert_intermediate_size": 16},
    ),
    "gemma3n_text": (
        "gemma3n_text",
        {
            **_COMMON,
            "head_dim": 8,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB,
            "laurel_rank": 4,
            "altup_num_inputs": 2,
            "num_kv_shared_layers": 1,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "activation_sparsity_pattern": [0.5, 0.0, 0.0],
        },
    ),
}

# Families that see, beside Gemma 3: a vision tower that must stay as it is, and a text tower inside.
_TOWER: dict[str, Any] = {"hidden_size": HIDDEN, "intermediate_size": 48}
_PATCHES: dict[str, Any] = {**_TOWER, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28}
_QWEN_TOWER: dict[str, Any] = {**_TOWER, "depth": 2, "num_heads": 4, "out_hidden_size": HIDDEN, "patch_size": 14}
_MROPE: dict[str, Any] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
_VISION: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral3": (
        "mistral3",
        {
            "text_config": {**_COMMON, "head_dim": 8, "model_type": "mistral"},
            "vision_config": {**_PATCHES, "patch_size": 14, "model_type": "pixtral", "head_dim": 8},
            "image_token_index": SPECIAL.index("<image_soft_token>"),
        },
    ),
    "qwen2_5_vl": (
        "qwen2_5_vl",
        {"text_config": {**_COMMON, "rope_parameters": _MROPE}, "vision_config": _QWEN_TOWER},
    ),
    "qwen3_vl": (
        "qwen3_vl",
        {
            "text_config": {**_COMMON, "head_dim": 8, "rope_parameters": _MROPE},
            "vision_config": {**_QWEN_TOWER, "deepstack_visual_indexes": [0]},
        },
    ),
    "qwen3_5": (
        "qwen3_5",
        {"text_config": {**_COMMON, **_LINEAR_ATTENTION}, "vision_config": _QWEN_TOWER},
    ),
    "gemma4": (
        "gemma4",
        {
            "text_config": _EXOTIC["gemma4_text"][1],
            "vision_config": {**_PATCHES, "head_dim": 8, "num_key_value_heads": 4, "global_head_dim": 8},
            "image_token_id": SPECIAL.index("<image_soft_token>"),
        },
    ),
}

_UNRUN: dict[str, tuple[str, dict[str, Any]]] = {
    "llama4": (
        "llama4",
        {
            "text_config": _EXOTIC["llama4_text"][1],
            "vision_config": {
                **_PATCHES,
                "patch_size": 14,
                "vision_output_dim": HIDDEN,
                "projector_input_dim": HIDDEN,
                "projector_output_dim": HIDDEN,
            },
        },
    ),
}
FAMILIES = tuple(_FAMILIES)
EXOTIC = (*_EXOTIC, *_VISION)
UNRUN = tuple(_UNRUN)
"""Families that can be saved and loaded, but whose class as saved cannot be run."""
SEEING = ("gemma3", *_VISION, *_UNRUN)
PICTURED = ("gemma3",)
"""Families that are saved with a processor of pictures; the others' need torchvision."""


def config(family: str, **overrides: Any) -> PreTrainedConfig:
    """Return the family's pico configuration; overrides go to the text part of a model that sees."""
    model_type, values = (_FAMILIES | _EXOTIC | _VISION | _UNRUN)[family]
    if "text_config" in values:
        values = {**values, "text_config": {**values["text_config"], **overrides}}
    else:
        values = {**values, **overrides}
    return AutoConfig.for_model(model_type, **values)


def build(family: str, *, seed: int = 0, **overrides: Any) -> nn.Module:
    """Return a float32 pico model in evaluation mode; the same seed gives the same weights."""
    auto = AutoModelForImageTextToText if family in SEEING else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config(family, **overrides), dtype=torch.float32)
        randomise(model, seed)
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    return model.eval()


def randomise(model: nn.Module, seed: int) -> None:
    """Overwrite matrices by normal noise and shift vectors, so that logits and norm gains are far from trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                parameter.copy_(noise * 0.3)
            else:
                parameter.add_(noise * 0.2)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of VOCAB tokens; `add_special_tokens` puts a <bos> in front, as Gemma's does."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator(CORPUS, trainer)
    raw.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)]
    )
    result = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        extra_special_tokens={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        padding_side="left",
        model_max_length=512,
    )
    result.chat_template = CHAT_TEMPLATE
    return result


def _processor() -> Any:
    from transformers import Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    images = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    return Gemma3Processor(images, tokenizer(), chat_template=CHAT_TEMPLATE, image_seq_length=4)


def save(family: str, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Path:
    """Write a complete checkpoint of the family into `folder`.

    Args:
        family: One of FAMILIES or EXOTIC.
        folder: Where to write; made when missing.
        seed: Of the weights.
        dtype: Of the saved weights.
        kwargs: For `save_pretrained`, such as max_shard_size="40KB" for a sharded checkpoint.
    """
    build(family, seed=seed).to(dtype).save_pretrained(folder, **kwargs)
    (_processor() if family in PICTURED else tokenizer()).save_pretrained(folder)
    return folder
