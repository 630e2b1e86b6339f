"""Greedy replies by llama.cpp, through the library of llama-cpp-python: several sequences in one batch.

python bench/llama_cpp_greedy.py MODEL.gguf "Hello" [--tokens 32]
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

SEQUENCES = 16
"""Prompts that are answered together."""


@contextmanager
def opened(path: str, context: int, threads: int) -> Iterator[tuple[Any, Any, int]]:
    """Give a context, its memory and the size of the vocabulary."""
    global _SILENT
    import llama_cpp as llama

    _SILENT = _SILENT or llama.llama_log_callback(_quiet)
    llama.llama_backend_init()
    llama.llama_log_set(_SILENT, ctypes.c_void_p(0))
    params = llama.llama_model_default_params()
    params.use_extra_bufts = False
    model = llama.llama_model_load_from_file(path.encode(), params)
    if not model:
        raise SystemExit(f"{path}: llama.cpp cannot load it")
    asked = llama.llama_context_default_params()
    asked.n_ctx, asked.n_batch, asked.n_seq_max = context * SEQUENCES, context * SEQUENCES, SEQUENCES
    asked.n_threads = asked.n_threads_batch = threads
    state = llama.llama_init_from_model(model, asked)
    size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    try:
        yield state, llama.llama_get_memory(state), size
    finally:
        llama.llama_free(state)
        llama.llama_model_free(model)


def _quiet(level: int, text: bytes, data: Any) -> None: ...


_SILENT: Any = None


def greedy(
    path: str, prompts: Sequence[Sequence[int]], ends: Collection[int], tokens: int = 64, threads: int = 1
) -> list[list[int]]:
    """Return the reply to every prompt, as token ids without the end token.

    Args:
        path: GGUF file.
        prompts: Token ids, special ones included.
        ends: Token ids that end a reply.
        tokens: Where a reply is cut.
        threads: Of the CPU.
    """
    import llama_cpp as llama

    found: list[list[int]] = []
    longest = max(map(len, prompts)) + tokens
    with opened(path, longest, threads) as (state, memory, size):
        for first in range(0, len(prompts), SEQUENCES):
            llama.llama_memory_clear(memory, True)
            found += _together(state, size, prompts[first : first + SEQUENCES], ends, tokens)
    return found


def _together(
    state: Any, size: int, prompts: Sequence[Sequence[int]], ends: Collection[int], tokens: int
) -> list[list[int]]:
    """Answer a few prompts in one batch, sequence by sequence in step."""
    import llama_cpp as llama

    replies: list[list[int]] = [[] for _ in prompts]
    batch = llama.llama_batch_init(sum(map(len, prompts)), 0, 1)
    try:
        todo = {k: (0, list(prompt)) for k, prompt in enumerate(prompts)}  # sequence → position and new tokens
        for _ in range(tokens):
            last = _fill(batch, todo)
            if llama.llama_decode(state, batch):
                raise SystemExit("llama.cpp cannot decode this batch")
            todo = _next(state, size, todo, last, replies, ends)
            if not todo:
                break
    finally:
        llama.llama_batch_free(batch)
    return replies


def _fill(batch: Any, todo: dict[int, tuple[int, list[int]]]) -> dict[int, int]:
    """Put new tokens into the batch; returns where the last one of each sequence is."""
    n, last = 0, {}
    for k, (start, new) in todo.items():
        for j, token in enumerate(new):
            batch.token[n], batch.pos[n], batch.n_seq_id[n], batch.seq_id[n][0] = token, start + j, 1, k
            batch.logits[n] = j == len(new) - 1
            n += 1
        last[k] = n - 1
    batch.n_tokens = n
    return last


def _next(
    state: Any,
    size: int,
    todo: dict[int, tuple[int, list[int]]],
    last: dict[int, int],
    replies: list[list[int]],
    ends: Collection[int],
) -> dict[int, tuple[int, list[int]]]:
    """Take the most likely token of every sequence; those that end are left out of what is returned."""
    import llama_cpp as llama

    onward = {}
    for k, (start, new) in todo.items():
        logits = np.ctypeslib.as_array(llama.llama_get_logits_ith(state, last[k]), shape=(size,))
        token = int(logits.argmax())
        if token not in ends:
            replies[k].append(token)
            onward[k] = (start + len(new), [token])
    return onward


def main() -> None:
    """Answer one prompt, in the model's chat template by transformers."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("prompt")
    parser.add_argument("--tokens", type=int, default=32)
    asked = parser.parse_args()
    from perpend.data import Prompt
    from perpend.models.load import load_model
    from perpend.models.session import Session

    session = Session(load_model(asked.model))
    ids = session.chat.encode([Prompt(asked.prompt)])
    ends = session.model.generation_config.eos_token_id
    reply = greedy(asked.model, ids, ends if isinstance(ends, list) else [ends], asked.tokens)[0]
    print(session.chat.tokenizer.decode(reply))


if __name__ == "__main__":
    main()
