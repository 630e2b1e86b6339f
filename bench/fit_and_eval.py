"""A fit against bare forward passes, and an evaluation against bare `generate`, over the same tokens in one process.

    python bench/fit_and_eval.py MODEL [--prompts 128] [--tokens 64] [--repeats 3]

The bare forward pass runs the model without its LM head over the batches that the fit makes, with no hook; the bare
`generate` is that of transformers, over the batches that the evaluation makes. Both sides take turns and the medians
are compared. Prints JSON. Peak memory is what the fit adds to the model and bare passes: to the process, on a GPU to
what is allocated there.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak(device: Any) -> int:
    """Return the largest resident size of this process so far, or what was allocated at most on its GPU, in bytes."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def finished(device: Any) -> None:
    """Wait for what a GPU was asked to do."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def turns(sides: dict[str, Callable[[], Any]], repeats: int, device: Any) -> dict[str, float]:
    """Run all sides in turn; return the median seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            began = time.perf_counter()
            side()
            finished(device)
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def describe(device: Any) -> str:
    """Return the processor that computed: the GPU by name."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()

    import torch
    import transformers

    from perpend.config import FitSection, PromptsSection
    from perpend.data import load_splits
    from perpend.fitting.accumulate import residual_stats
    from perpend.models.batching import plan
    from perpend.models.load import body, end_tokens, load_model, with_positions
    from perpend.models.session import Session

    session = Session(load_model(asked.model))
    pair = load_splits(PromptsSection(limit=asked.prompts // 2)).fit
    prompts = [*pair.target, *pair.baseline]
    ids = session.chat.encode(prompts)
    print(f"{sum(map(len, ids))} prompt tokens in {len(prompts)} prompts", file=sys.stderr, flush=True)
    groups = plan([len(i) for i in ids], session.budget.forward, session.budget.rows)
    longer = plan([len(i) + asked.tokens for i in ids], session.budget.cached, session.budget.rows)
    ends = transformers.GenerationConfig(
        max_new_tokens=asked.tokens,
        do_sample=False,
        pad_token_id=session.chat.pad,
        eos_token_id=end_tokens(session.model, session.chat.tokenizer),
    )

    def packed(group: list[int]) -> dict[str, torch.Tensor]:
        inputs = session.chat.pack([ids[k] for k in group]).inputs
        return {name: values.to(session.device) for name, values in inputs.items()}

    @torch.no_grad()
    def forward() -> None:
        for group in groups:
            body(session.model)(**with_positions(session.model, packed(group)), use_cache=False)

    @torch.no_grad()
    def generate() -> None:
        for group in longer:
            session.model.generate(**packed(group), generation_config=ends)

    forward()
    bare = peak(session.device)
    residual_stats(session, prompts, FitSection(), label="warm up")
    added = peak(session.device) - bare
    result = {
        "machine": describe(session.device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "model": Path(asked.model).name,
        "dtype": str(session.loaded.dtype),
        "prompts": len(prompts),
        "prompt_tokens": sum(map(len, ids)),
        "fit": turns(
            {
                "bare forward": forward,
                "fit": lambda: residual_stats(session, prompts, FitSection(), label="fit"),
            },
            asked.repeats,
            session.device,
        ),
        "eval": turns(
            {
                "bare generate": generate,
                "eval": lambda: session.generate(prompts, max_new_tokens=asked.tokens),
            },
            max(1, asked.repeats - 1),
            session.device,
        ),
        "fit_added_memory_mb": round(added / 1e6, 1),
    }
    result["fit_ratio"] = round(result["fit"]["fit"] / result["fit"]["bare forward"], 3)
    result["eval_ratio"] = round(result["eval"]["eval"] / result["eval"]["bare generate"], 3)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
