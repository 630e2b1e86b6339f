"""vLLM as the engine that answers prompts: a directory as it is, or with a PEFT adapter of an edit.

Prompts are encoded here, by the same chat template and to the same ids as for transformers, and replies are decoded
here; vLLM only continues token ids. It computes with kernels of its own, so greedy replies need not be the same token
by token. Hooks do not reach its modules: an edit is measured as an exported directory or as an adapter.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import Any

from perpend.config import Machine
from perpend.data import Prompt
from perpend.errors import MissingExtra, UsageError
from perpend.models import load
from perpend.models.load import Loaded
from perpend.models.replies import Reply, Sampling
from perpend.models.session import Session
from perpend.models.trust import trusted

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Largest ranks that vLLM can be opened for."""


def require_vllm() -> None:
    """Refuse to go on without vLLM.

    Raises:
        MissingExtra: says the line that installs it.
    """
    if importlib.util.find_spec("vllm") is None:
        raise MissingExtra("vllm", "vllm", "--engine vllm")


class VllmSession(Session):
    """A model that vLLM holds; what is asked of it is `generate`, since no hook reaches it."""

    def __init__(self, loaded: Loaded, machine: Machine, *, adapter: Path | None = None, **asked: Any) -> None:
        """Open a model in vLLM.

        Args:
            loaded: Without weights, as `perpend.models.load.unloaded` returns it.
            machine: dtype, and processes that share every matrix.
            adapter: Folder of a PEFT adapter (LoRA) to answer with.
            asked: System prompt, chat template and overrides, as for a session.

        Raises:
            MissingExtra: vLLM is not installed.
            UsageError: an adapter that vLLM cannot hold.
        """
        require_vllm()
        rank = None if adapter is None else _rank(adapter)
        super().__init__(loaded, machine.model_copy(update={"tensor_parallel": 1}), **asked)
        import vllm

        ours: Any = vllm
        options: dict[str, Any] = {} if rank is None else {"enable_lora": True, "max_lora_rank": rank}
        self.engine = f"vllm {ours.__version__}"
        self._adapter = None if adapter is None else _request(adapter)
        self._llm = ours.LLM(
            model=str(loaded.source.path),
            dtype=machine.dtype,
            tensor_parallel_size=machine.tensor_parallel,
            trust_remote_code=trusted(loaded.ref, machine),
            **options,
        )

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        store: MutableMapping[str, Reply] | None = None,
    ) -> list[Reply]:
        """Let the model answer; see `Session.generate`. vLLM makes its own batches, all of them at once.

        Raises:
            UsageError: a prompt with a picture.
        """
        prompts, store = list(prompts), {} if store is None else store
        if any(prompt.image is not None for prompt in prompts):
            raise UsageError("pictures are not handed to vLLM", where="--engine vllm", valid="--engine transformers")
        ids = self._encode(prompts, max_new_tokens)
        missing = [k for k, prompt in enumerate(prompts) if prompt.id not in store]
        ends = load.end_tokens(self.model, self.chat.tokenizer)
        settings = [self._parameters(max_new_tokens, sampling, ends, prompts[k].id) for k in missing]
        given = [{"prompt_token_ids": ids[k]} for k in missing]
        made = self._llm.generate(given, settings, lora_request=self._adapter, use_tqdm=False) if given else []
        for k, output in zip(missing, made, strict=True):
            tokens = tuple(int(token) for token in output.outputs[0].token_ids)
            finished = bool(tokens) and tokens[-1] in ends
            store[prompts[k].id] = Reply(self.chat.decode(list(tokens)), tokens, finished)
        return [store[prompt.id] for prompt in prompts]

    def _parameters(self, most: int, sampling: Sampling | None, ends: list[int], name: str) -> Any:
        import vllm

        ours: Any = vllm
        drawn: dict[str, Any] = {"temperature": 0.0}
        if sampling is not None:
            drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k or -1}
            drawn["seed"] = sampling.seed_of([name]) % 2**31
        return ours.SamplingParams(max_tokens=most, stop_token_ids=ends, detokenize=False, **drawn)


def _rank(adapter: Path) -> int:
    """Return the rank to open vLLM for.

    Raises:
        UsageError: no adapter, DoRA, parameters beside modules, or a rank that vLLM does not hold.
    """
    try:
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UsageError(
            "no PEFT adapter", where=str(adapter), hint="perpend adapter MODEL --edit EDIT -o OUT"
        ) from None
    for key, name in (("use_dora", "DoRA"), ("target_parameters", "fused experts as parameters")):
        if config.get(key):
            hint = "perpend apply, and --engine vllm on its output"
            raise UsageError(f"vLLM holds no adapter with {name}", where=str(adapter), hint=hint)
    rank = next((known for known in RANKS if config["r"] <= known), None)
    if rank is None:
        raise UsageError(f"an adapter of rank {config['r']}", where=str(adapter), valid=f"at most {RANKS[-1]}")
    return rank


def _request(adapter: Path) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest("edit", 1, str(adapter))
