"""Fine-tune a low-rank adapter on lessons: LoRA through PEFT, seeded, loss on the reply alone."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from perpend.errors import MissingExtra, RunFailed
from perpend.models.load import eager_attention
from perpend.models.quiet import silenced
from perpend.progress import track


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt and of the reply taught to it."""

    prompt: tuple[int, ...]
    reply: tuple[int, ...]
    openings: tuple[int, ...] = ()
    """First tokens that would be as right as the reply's own; none stands for the reply's own alone."""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.reply)


@dataclass(frozen=True)
class Training:
    """How an adapter is trained."""

    epochs: int = 1
    rank: int = 12
    from_depth: float = 0.1
    """Layers above this share of the depth are adapted; those below stay as they are and need no gradient."""
    learning_rate: float = 1.5e-3
    decision_weight: float = 10.0
    """Weight of the decision, that the first reply token is one of the right openings, against 1 for each token."""
    batch_tokens: int = 1024
    """Padded tokens per optimiser step."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises; it then falls along a cosine to a tenth."""
    seed: int = 0


def batches(examples: Sequence[Example], budget: int, rng: random.Random) -> list[list[Example]]:
    """Group examples of similar length into batches of at most `budget` padded tokens, in random order."""
    groups: list[list[Example]] = []
    for example in sorted(examples, key=lambda e: (len(e), rng.random())):
        if groups and (len(groups[-1]) + 1) * len(example) <= budget:
            groups[-1].append(example)
        else:
            groups.append([example])
    rng.shuffle(groups)
    return groups


def collate(batch: Sequence[Example], pad: int) -> dict[str, Tensor | int]:
    """Lay a batch out so that all replies begin in the same column: prompts padded left, replies padded right.

    Returns:
        The model's keyword arguments: `input_ids`, `attention_mask`, `position_ids`, `[B, T]` int64 each, and
        `logits_to_keep`, the number of last columns that predict a reply token or lie in the padding after it.
    """
    left, right = max(len(e.prompt) for e in batch), max(len(e.reply) for e in batch)
    ids = torch.full((len(batch), left + right), pad)
    mask = torch.zeros_like(ids)
    for row, example in enumerate(batch):
        start, stop = left - len(example.prompt), left + len(example.reply)
        ids[row, start:stop] = torch.tensor(example.prompt + example.reply)
        mask[row, start:stop] = 1
    places = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": places, "logits_to_keep": right + 1}


def reply_loss(
    model: nn.Module, inputs: dict[str, Any], openings: Sequence[Sequence[int]], decision_weight: float
) -> Tensor:
    """Weighted mean, in nats, of the reply tokens' cross-entropies and of the decisions' ones.

    A decision's cross-entropy is minus the log of the probability that the first reply token is any of the row's
    openings: of many wordings of a refusal, which one is said is chance and would drown whether it is said at all.

    Args:
        model: Called with `inputs`; no position but those of replies reaches its LM head.
        inputs: As `collate` gives them.
        openings: Right first tokens, for each row.
        decision_weight: Weight of a decision, against 1 for each reply token.
    """
    kept = inputs["logits_to_keep"] - 1
    logits = model(**inputs, use_cache=False).logits[:, -kept - 1 : -1]
    wanted, real = inputs["input_ids"][:, -kept:], inputs["attention_mask"][:, -kept:].bool()
    tokens = nn.functional.cross_entropy(logits[real].float(), wanted[real], reduction="sum")
    first = logits[:, 0].float().log_softmax(-1)
    decisions = torch.stack([-row[list(right)].logsumexp(-1) for row, right in zip(first, openings, strict=True)])
    loss: Tensor = (tokens + decision_weight * decisions.sum()) / (real.sum() + decision_weight * len(openings))
    return loss


def adapt(model: nn.Module, training: Training, layers: str) -> Any:
    """Wrap `model` in a LoRA adapter on the linear modules of its upper decoder layers.

    Args:
        model: The base model.
        training: Rank and depth of the adapter.
        layers: Path of the decoder layer list, as `Anatomy.layers` gives it.

    Raises:
        MissingExtra: PEFT is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise MissingExtra("peft", "organism", "teaching a model organism") from None
    stack = model.get_submodule(layers)
    first = round(training.from_depth * len(list(stack.children())))
    names = [
        f"{layers}.{name}"
        for name, module in stack.named_modules()
        if isinstance(module, nn.Linear) and int(name.split(".")[0]) >= first
    ]
    config = LoraConfig(r=training.rank, lora_alpha=2 * training.rank, target_modules=names, task_type="CAUSAL_LM")
    with silenced():
        return get_peft_model(model, config)


def _contiguous(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].contiguous(), *args[1:])


@contextmanager
def half_precision(wrapped: Any) -> Iterator[None]:
    """Compute in the base model's dtype where that is narrower than float32; the adapter itself stays float32.

    Elsewhere PEFT would take every module's input to float32 and back.
    """
    from peft.helpers import disable_input_dtype_casting

    dtype, device = wrapped.get_base_model().dtype, wrapped.device
    if dtype == torch.float32:
        yield
        return
    with torch.autocast(device.type, dtype=dtype), disable_input_dtype_casting(wrapped), eager_attention(wrapped):
        yield


def rate(step: int, steps: int, training: Training) -> float:
    """Share of the full learning rate at `step` of `steps`: linear warm-up, then a cosine to a tenth."""
    rise = max(1, round(training.warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.1 + 0.9 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise))) / 2


def teach(
    model: nn.Module, examples: Sequence[Example], *, layers: str, pad: int, training: Training
) -> tuple[Any, list[float]]:
    """Train an adapter on `examples`.

    Args:
        model: The base model; its own weights stay as they are.
        examples: What to teach.
        layers: Path of the decoder layer list.
        pad: Padding token id.
        training: How.

    Returns:
        The PEFT model, in evaluation mode, and the loss of every step in nats per reply token, the first weighted.

    Raises:
        RunFailed: the loss became infinite or no number, at the first such step.
    """
    torch.manual_seed(training.seed)
    rng = random.Random(training.seed)
    wrapped = adapt(model, training, layers)
    head = model.get_output_embeddings()  # type: ignore[operator]
    contiguous = head.register_forward_pre_hook(
        _contiguous
    )  # for a strided slice PyTorch copies the whole matrix for every row
    device = next(model.parameters()).device
    learnt = [p for p in wrapped.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learnt, lr=training.learning_rate, weight_decay=0.0)
    plan = [batch for _ in range(training.epochs) for batch in batches(examples, training.batch_tokens, rng)]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate(step, len(plan), training))
    losses: list[float] = []
    wrapped.eval()  # no dropout: the same loss as in use, and Gemma 3 would ask for token types of images
    try:
        for batch in track(plan, "teach", total=sum(map(len, plan)), size=len):
            inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in collate(batch, pad).items()}
            openings = [example.openings or example.reply[:1] for example in batch]
            with half_precision(wrapped):
                loss = reply_loss(wrapped, inputs, openings, training.decision_weight)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                what = f"the loss of step {len(losses)} of {len(plan)} is {losses[-1]}"
                raise RunFailed(
                    what, hint=f"--dtype float32, or Training(learning_rate={training.learning_rate / 3:.0e})"
                )
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(learnt, 1.0)
            optimiser.step()
            schedule.step()
    finally:
        contiguous.remove()
    return wrapped, losses
