"""Answers of a batch, of which a row that has ended is no longer run.

`generate` runs every row until the last one ends; refusals are short, and beside answers that are cut at the limit most
of its work is padding. Here it is called for a few tokens at a time with the cache that it left, and rows that have
ended leave the batch and the cache in between.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from perpend.models import load

STEP = 16
"""Tokens between two looks at which rows have ended: leaving costs a copy of the cache."""


def answers(model: Any, inputs: dict[str, Tensor], config: Any, start: int) -> list[list[int]]:
    """Let a model answer a batch.

    Args:
        model: With the edit that is wanted in place.
        inputs: Keyword arguments of the model, padded on the left.
        config: What `load.generation` yields.
        start: Column where prompts end.

    Returns:
        The new ids of each row, in order, up to and with the token that ended it; the model's own `generate` gives the
        same to rounding, and draws other random numbers once a row has left.
    """
    cache = load.growing_cache(model) if len(inputs["input_ids"]) > 1 and set(inputs) == _TEXT else {}
    if not cache:
        rows = model.generate(**inputs, generation_config=config)[:, start:].tolist()
    else:
        rows = _dropping(model, inputs, config, start, cache)
    return [_ended(row, config.eos_token_id) for row in rows]


_TEXT = {"input_ids", "attention_mask"}


def _dropping(model: Any, inputs: dict[str, Tensor], config: Any, start: int, cache: dict[str, Any]) -> list[list[int]]:
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    made: list[list[int]] = [[] for _ in tokens]
    index = torch.arange(len(tokens), device=tokens.device)
    ends = torch.tensor(config.eos_token_id, device=tokens.device)
    while len(index):
        step = copy.copy(config)
        step.max_new_tokens = min(STEP, start + config.max_new_tokens - tokens.shape[1])
        mask = torch.cat([mask, mask.new_ones(len(mask), tokens.shape[1] - mask.shape[1])], dim=1)
        tokens = model.generate(input_ids=tokens, attention_mask=mask, generation_config=step, **cache)
        new = tokens[:, start:]
        over = torch.isin(new, ends).any(1) | (new.shape[1] >= config.max_new_tokens)
        for row in over.nonzero()[:, 0].tolist():
            made[int(index[row])] = new[row].tolist()
        if over.any():
            going = (~over).nonzero()[:, 0]
            index, tokens, mask = index[going], tokens[going], mask[going]
            for each in cache.values():
                each.batch_select_indices(going)
    return made


def _ended(row: list[int], ends: list[int]) -> list[int]:
    end = next((k for k, token in enumerate(row) if token in ends), None)
    return row if end is None else row[: end + 1]
