"""A stand-in with the part of vLLM's interface that Perpend calls; transformers does the work, one prompt at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from vllm.lora.request import LoRARequest

__version__ = "0.0-stand-in"


@dataclass
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    seed: int | None = None
    max_tokens: int = 16
    stop_token_ids: list[int] = field(default_factory=list)
    detokenize: bool = True


@dataclass
class CompletionOutput:
    token_ids: list[int]
    finish_reason: str


@dataclass
class RequestOutput:
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


class LLM:
    opened: ClassVar[list[dict[str, Any]]] = []
    generated: ClassVar[int] = 0

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        tensor_parallel_size: int = 1,
        trust_remote_code: bool = False,
        enable_lora: bool = False,
        max_lora_rank: int = 16,
    ) -> None:
        settings = {"model": model, "dtype": dtype, "tensor_parallel_size": tensor_parallel_size}
        LLM.opened.append(settings | {"enable_lora": enable_lora, "max_lora_rank": max_lora_rank})
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        self.lora = enable_lora

    @torch.no_grad()
    def generate(
        self,
        prompts: list[dict[str, list[int]]],
        sampling_params: list[SamplingParams],
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequest | None = None,
    ) -> list[RequestOutput]:
        assert len(prompts) == len(sampling_params)
        model = self.model
        if lora_request is not None:
            assert self.lora
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, lora_request.lora_path)
        made = []
        for prompt, how in zip(prompts, sampling_params, strict=True):
            LLM.generated += 1
            assert how.temperature == 0.0
            ids = prompt["prompt_token_ids"]
            config = GenerationConfig(max_new_tokens=how.max_tokens, eos_token_id=how.stop_token_ids, pad_token_id=0)
            row = model.generate(input_ids=torch.tensor([ids]), generation_config=config)[0, len(ids) :].tolist()
            reason = "stop" if row and row[-1] in how.stop_token_ids else "length"
            made.append(RequestOutput(ids, [CompletionOutput(row, reason)]))
        return made
