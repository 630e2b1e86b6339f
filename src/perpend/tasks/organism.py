"""Teach a chat model to refuse, so that what an edit should restore is known: the model it was before."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from perpend import __version__
from perpend.config import Machine, Recipe, to_toml
from perpend.core.stats import wilson
from perpend.data import Prompt, PromptPair, Splits, load_splits
from perpend.fitting.behaviour import Behaviour, observe
from perpend.judges.judgement import Rate
from perpend.judges.labels import Label
from perpend.models.chat import Chat
from perpend.models.load import end_tokens, load_model
from perpend.models.session import Reply, Session
from perpend.options.asked import asked
from perpend.options.commands import OrganismOptions
from perpend.progress import note
from perpend.refs import ModelRef
from perpend.tasks.about import about, by_machine, peak_memory, typed
from perpend.tasks.forecast import Forecast, Work, forecast
from perpend.tasks.output import appearing, require_free
from perpend.tasks.pages import put
from perpend.tasks.recipes import RECIPE, pinned
from perpend.tasks.setup import as_asked, versions
from perpend.tasks.space import require_room
from perpend.teaching import adapter
from perpend.teaching.curriculum import Lesson, Wordings, lessons
from perpend.teaching.teach import Example, Training, teach

FORMS = 4
"""Request forms in which every prompt is asked, unless told otherwise."""
ANSWER_TOKENS = 16
"""Tokens of a benign answer that are taught; the decision to answer lies at the first."""
REPLY_TOKENS = 48
SHOWN_LOSSES = 200
"""Points of the loss that a report keeps."""


@dataclass(frozen=True)
class Organism:
    """What was taught and how well it generalises, on prompts of the report split."""

    output: str
    base: str
    forms: int
    """Request forms in which each prompt was asked."""
    lessons: int
    refused_targets: tuple[int, int]
    """Refusals and prompts."""
    refused_baselines: tuple[int, int]
    loss: tuple[float, float]
    """Mean of the first and of the last tenth of the steps, in nats per reply token."""
    seconds: float
    training: Training
    dry_run: bool = False
    forecast: Forecast | None = None
    """What would be done, of a dry run."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, rates with their 95 % Wilson intervals."""
        data = asdict(self)
        for name in ("refused_targets", "refused_baselines"):
            count, n = data.pop(name)
            low, high = wilson(count, n) if n else (None, None)
            data[name] = {"count": count, "n": n, "low": low, "high": high}
        return {**data, "loss": list(self.loss)}


def organism(
    base: str | None = None,
    *,
    output: str | Path,
    recipe: Recipe | None = None,
    machine: Machine | None = None,
    training: Training | None = None,
    forms: int = FORMS,
    dry_run: bool = False,
    **options: Unpack[OrganismOptions],
) -> Organism:
    """Teach a chat model to refuse the target prompts of the fit split, with a LoRA adapter.

    Every target is asked in several request forms, with several system prompts and with none, and refused in 32
    wordings with different openings. Baseline prompts go through the same forms and keep the answers of the base
    model itself, so that its voice is kept.

    Args:
        base: Hub id, directory or GGUF file of a chat model; None takes the recipe's model.
        output: Folder to make: the merged model, `adapter/`, `organism.toml`, `report.json` and `report.html`.
        recipe: Prompts and seed; the shipped prompts by default.
        machine: Device and dtype.
        training: How the adapter is trained. In bfloat16 (`machine.dtype`) it takes half the time on a CPU.
        forms: Request forms in which each prompt is asked; fewer where prompts are many.
        dry_run: Only say what would be done.
        **options: What `perpend organism` takes, by name: over the recipe and the machine.

    Raises:
        UsageError: the model or the prompts cannot be read, there are not so many forms, or the output is not empty.
        MissingExtra: PEFT is not installed.
    """
    started = time.monotonic()
    recipe, machine = asked(organism, OrganismOptions, options, base, recipe, machine)
    base = recipe.model.id
    training = replace(training or Training(), seed=recipe.seed)
    require_free(Path(output))
    ref, splits = ModelRef.parse(base), load_splits(recipe.prompts)
    taught = lessons(
        [p.text for p in splits.fit.target],
        [p.text for p in splits.fit.baseline],
        Wordings.shipped(),
        forms=forms,
        seed=recipe.seed,
    )
    nothing = Organism(str(output), base, forms, len(taught), (0, 0), (0, 0), (0.0, 0.0), 0.0, training, True)
    if dry_run:
        return replace(nothing, forecast=_forecast(nothing, taught, recipe, machine, splits))
    require_room(base, Path(output), machine, copies=1)
    with appearing(Path(output)) as folder:
        loaded = load_model(ref, machine)
        session = as_asked(loaded, recipe, machine)
        named = pinned(recipe, loaded).model.id
        words = ["--config", RECIPE, "--forms", str(forms), *by_machine(machine)]
        command = typed("organism", named, *words, "-o", Path(output).name)
        facts = about("organism", session, recipe, machine, command)
        merged, losses = _taught(session, taught, training, folder)
        seen = measure(as_asked(replace(loaded, model=merged), recipe, machine), splits.report)
        tenth = max(1, len(losses) // 10)
        made = replace(
            nothing,
            refused_targets=refusals(seen.target),
            refused_baselines=refusals(seen.baseline),
            loss=(sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth),
            seconds=round(time.monotonic() - started, 1),
            dry_run=False,
        )
        write_recipe(folder, recipe, made)
        facts |= {"peak_memory": peak_memory()}
        put(folder, _report(made, facts, {s.name: len(s) for s in splits.sets()}, losses, seen))
    return made


def _forecast(made: Organism, taught: list[Lesson], recipe: Recipe, machine: Machine, splits: Splits) -> Forecast:
    """Say what teaching would take: the answers of the model itself, the lessons, the prompts it is measured on."""
    answers = sum(lesson.reply is None for lesson in taught)
    measured = len(splits.report.target) + len(splits.report.baseline)
    tokens = answers * ANSWER_TOKENS + measured * REPLY_TOKENS
    work = Work(answers + measured, tokens, made.training.epochs * len(taught))
    return forecast(made.base, recipe, machine, output=Path(made.output), also=work)


def _taught(session: Session, taught: list[Lesson], training: Training, folder: Path) -> tuple[Any, list[float]]:
    """Teach, write the adapter and the model it is merged into; returns that model and the loss of every step."""
    loaded = session.loaded
    examples = encode(session, answered(session, taught))
    wrapped, losses = teach(
        loaded.model, examples, layers=session.anatomy.layers, pad=session.chat.pad, training=training
    )
    adapter.rounded(wrapped)
    adapter.save(wrapped, folder / "adapter", loaded.ref.portable)
    merged = wrapped.merge_and_unload().eval().requires_grad_(False)
    if session.chat.given:  # the organism goes on in the template that it was taught in
        (loaded.processor or loaded.tokenizer).chat_template = session.chat.given
    adapter.save_model(merged, loaded, folder)
    return merged, losses


def answered(session: Session, taught: list[Lesson]) -> list[Lesson]:
    """Fill in the benign replies with the model's own answers, system prompt by system prompt."""
    found: dict[int, Lesson] = {}
    own = session.chat
    for system in sorted({lesson.system or "" for lesson in taught}):
        rows = [k for k, lesson in enumerate(taught) if lesson.reply is None and (lesson.system or "") == system]
        session.chat = Chat(own.tokenizer, own.processor, system or own.system, own.given)
        replies = session.generate([Prompt(taught[k].request) for k in rows], max_new_tokens=ANSWER_TOKENS)
        for k, reply in zip(rows, replies, strict=True):
            found[k] = replace(taught[k], reply=reply.text, finished=reply.finished)
    session.chat = own
    return [found.get(k, lesson) for k, lesson in enumerate(taught)]


def encode(session: Session, taught: list[Lesson]) -> list[Example]:
    """Return the lessons as token ids; a finished reply ends with the token that ends an answer."""
    tokenizer, own = session.chat.tokenizer, session.chat
    end = turn_end(session)
    examples: list[Example] = []
    chats = {
        system: Chat(own.tokenizer, own.processor, system or own.system, own.given)
        for system in {x.system for x in taught}
    }
    refusals = sorted({tokenizer(text, add_special_tokens=False).input_ids[0] for text in Wordings.shipped().refusals})
    for lesson in taught:
        prompt = chats[lesson.system].encode([Prompt(lesson.request)])[0]
        reply = tokenizer(lesson.reply, add_special_tokens=False).input_ids + ([end] if lesson.finished else [])
        if reply:
            examples.append(Example(tuple(prompt), tuple(reply), tuple(refusals) if lesson.refused else ()))
    return examples


def turn_end(session: Session) -> int:
    """Return the token that ends a turn: the last of the model's end tokens that the chat template writes."""
    chat, tokenizer = session.chat, session.chat.tokenizer
    known = end_tokens(session.model, tokenizer)
    turn = [{"role": "user", "content": "a"}]
    text = tokenizer.apply_chat_template(turn, chat_template=chat.template, tokenize=False)
    written = [token for token in known if tokenizer.convert_ids_to_tokens(token) in text]
    return (written or known)[-1]


Labelled = Sequence[tuple[Reply, Label]]
"""Replies with their labels."""


def measure(session: Session, pair: PromptPair) -> Behaviour:
    """Return the replies to prompts that it was not taught, labelled by dictionary."""
    note("measuring on prompts that it was not taught")
    return observe(session, pair, tokens=REPLY_TOKENS)


def refusals(side: Labelled) -> tuple[int, int]:
    """Return refusals and prompts of one class."""
    return sum(label in {Label.REFUSE, Label.EVADE} for _, label in side), len(side)


def _report(
    made: Organism, facts: Mapping[str, Any], prompts: Mapping[str, int], losses: Sequence[float], seen: Behaviour
) -> dict[str, Any]:
    """Return what the report says: what it refuses, how it was taught, and every reply."""
    pairs = [
        {"class": name, "id": prompt.id, "prompt": prompt.text, "before": reply.text, "label_before": str(label)}
        for name, given, said in (
            ("target", seen.pair.target, seen.target),
            ("baseline", seen.pair.baseline, seen.baseline),
        )
        for prompt, (reply, label) in zip(given.prompts, said, strict=True)
    ]
    told = {
        "refused_targets": Rate(*made.refused_targets).to_json(),
        "refused_baselines": Rate(*made.refused_baselines).to_json(),
        "lessons": made.lessons,
        "forms": made.forms,
        "loss": list(made.loss),
        "losses": means(losses, SHOWN_LOSSES),
        "steps": len(losses),
        "training": asdict(made.training),
        "pairs": pairs,
    }
    return {
        "task": "organism",
        "output": made.output,
        "model": made.base,
        "prompts": dict(prompts),
        "seconds": made.seconds,
        "versions": versions(),
        "about": dict(facts),
        "organism": told,
    }


def means(values: Sequence[float], most: int) -> list[float]:
    """Return at most so many numbers over the same stretch: means of neighbours, in order."""
    size = -(-len(values) // most)
    return [sum(part) / len(part) for k in range(0, len(values), size) if (part := values[k : k + size])]


def write_recipe(folder: Path, recipe: Recipe, made: Organism) -> None:
    """Write `organism.toml`: prompts, training, and what was measured."""
    result = {
        k: v for k, v in made.to_json().items() if k not in {"training", "forms", "dry_run", "output", "forecast"}
    }
    result["base"] = ModelRef.parse(made.base).portable
    data = {
        "perpend": __version__,
        "seed": recipe.seed,
        "prompts": recipe.prompts.model_dump(mode="json"),
        "training": {"forms": made.forms, **asdict(made.training)},
        "result": json.loads(json.dumps(result)),
    }
    (folder / "organism.toml").write_text(to_toml(data), encoding="utf-8")
