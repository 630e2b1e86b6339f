"""Refusal classifiers: Minos, any other sequence classifier, and the small one that comes with the package."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from perpend.config import Machine
from perpend.errors import PerpendError, UsageError, nearest
from perpend.judges.labels import LabelJudge, RefusalClassifier
from perpend.models.memory import pick_device
from perpend.models.quiet import silenced
from perpend.models.trust import FLAG, trusted
from perpend.progress import note, track
from perpend.refs import ModelRef

MINOS = "NousResearch/Minos-v1"
"""ModernBERT-large, 8,192 tokens, trained on 387,134 request and reply pairs (its model card)."""
MINOS_REVISION: str | None = None
"""Commit to which Minos is pinned; None takes the newest one. The commit that was loaded is recorded either way."""
MINOS_LABELS = {0: "Non-refusal", 1: "Refusal"}
"""Passed by us: early revisions of the repository have no label names."""
SMALL = "perpend:small"
NONE = "none"
ENDPOINT = "endpoint:"
OPTION = "--classifier"
JUDGES = "org/name, org/name@revision, a directory, perpend:small, endpoint:URL#model=NAME, none"

Input = Literal["turns", "reply"]

_TOKENS_CPU, _TOKENS_GPU = 4096, 65536
_REFUSES = re.compile(r"refus|reject|declin", re.I)
_NEGATED = re.compile(r"^(non|not|no|un)", re.I)


def turns(request: str, reply: str) -> str:
    """Return the text that Minos reads: both turns, each under the name of its speaker."""
    return f"<|user|>\n{request}\n<|assistant|>\n{reply}"


@dataclass(frozen=True)
class _Choice:
    """A classifier as it was typed: `org/name@revision#label=REJECTION,input=reply`."""

    model: str
    label: str | None = None
    input: Input = "turns"

    @classmethod
    def parse(cls, text: str) -> _Choice:
        model, _, tail = text.partition("#")
        options = dict.fromkeys(("label", "input"), "")
        for item in tail.split(",") if tail else ():
            key, sign, value = item.partition("=")
            if key not in options or not sign or not value:
                raise UsageError(
                    f"'{item}' is no option of a classifier",
                    where=text,
                    valid="label=NAME, input=turns, input=reply",
                    hint=nearest(key, options),
                )
            options[key] = value
        if options["input"] not in ("", "turns", "reply"):
            raise UsageError(f"unknown input '{options['input']}'", where=text, valid="turns, reply")
        return cls(model, options["label"] or None, "reply" if options["input"] == "reply" else "turns")


class Classifier:
    """A sequence classifier that says how likely a reply refuses.

    Attributes:
        name: What was asked for.
        revision: Commit on the hub; None for a local directory.
        label: Name of the class that means refusal.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        label: int,
        *,
        name: str,
        revision: str | None = None,
        reads: Input = "turns",
        batch_size: int | None = None,
    ) -> None:
        self.model, self.tokenizer, self.name, self.revision = model, tokenizer, name, revision
        self.label = str(model.config.id2label[label])
        self._index, self._reads, self._batch_size = label, reads, batch_size
        self.device = next(model.parameters()).device
        limits = (getattr(model.config, "max_position_embeddings", None), tokenizer.model_max_length)
        self.max_tokens = min([n for n in limits if isinstance(n, int) and 0 < n < 10**6], default=10**6)
        self._pad = next(n for n in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if n is not None)
        if getattr(model.config, "pad_token_id", None) is None:
            model.config.pad_token_id = self._pad

    @classmethod
    def load(
        cls, name: str, machine: Machine | None = None, revision: str | None = None
    ) -> tuple[Classifier | None, str]:
        """Return the classifier, or None and the reason why it cannot be had.

        Raises:
            UsageError: `name` was typed wrong: an unknown option, or a directory that does not exist.
        """
        require_judge(name)
        try:
            return cls.open(name, machine, revision), ""
        except PerpendError as error:
            return None, str(error)

    @classmethod
    def open(cls, name: str, machine: Machine | None = None, revision: str | None = None) -> Classifier:
        """Load a classifier.

        Args:
            name: `NousResearch/Minos-v1`, or any sequence classifier as `org/name@revision#label=NAME`, where NAME is
                the class that means refusal (found by itself when one class is named after refusal or rejection); with
                `input=reply` it reads the reply alone, else both turns in Minos' format.
            machine: Device, dtype (auto: float32 on a CPU, else the checkpoint's own) and batch size.
            revision: Commit, branch or tag; one in `name` wins.

        Raises:
            UsageError: not to be had, no sequence classifier, or no class that means refusal.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        machine, choice = machine or Machine(), _Choice.parse(name)
        ref = ModelRef.parse(choice.model)
        if ref.kind == "gguf":
            raise UsageError("a GGUF file is no sequence classifier", where=name, valid="a hub id or a directory")
        minos = ref.kind == "hub" and ref.name == MINOS
        pinned = ref.revision or revision or (MINOS_REVISION if minos else None)
        source = ModelRef(ref.kind, ref.name, pinned if ref.kind == "hub" else None).resolve()
        device, trust = pick_device(machine.device), trusted(ref, machine)
        labels = {"id2label": MINOS_LABELS, "label2id": {v: k for k, v in MINOS_LABELS.items()}} if minos else {}
        dtype: Any = machine.dtype if machine.dtype != "auto" else "float32" if device.type == "cpu" else "auto"
        try:
            with silenced():
                tokenizer = AutoTokenizer.from_pretrained(source.path, trust_remote_code=trust)
                model, info = AutoModelForSequenceClassification.from_pretrained(
                    source.path,
                    dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                    use_safetensors=True,
                    output_loading_info=True,
                    trust_remote_code=trust,
                    **labels,
                )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            if "trust_remote_code" in str(error):
                hint = f"{FLAG} {choice.model}, after reading that code"
                raise UsageError("needs Python code that comes with it", where=name, hint=hint) from None
            raise UsageError(f"cannot be loaded: {str(error).splitlines()[0]}", where=name) from None
        missing = sorted(info["missing_keys"])
        if missing:
            raise UsageError(f"no sequence classifier: it has no {missing[0]}", where=name, hint=MINOS)
        size = machine.batch_size if isinstance(machine.batch_size, int) else None
        return cls(
            model.eval().requires_grad_(False).to(device),
            tokenizer,
            refusal_index(model.config.id2label, choice.label, name),
            name=name,
            revision=source.revision,
            reads=choice.input,
            batch_size=size,
        )

    def refusal_probability(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Return softmax(logits)[refusal] of each pair; see `RefusalClassifier`.

        A pair of more tokens than the classifier reads is NaN, and so is one on which it runs out of memory alone.
        """
        texts = [turns(request, reply) if self._reads == "turns" else reply for request, reply in pairs]
        with silenced():
            ids = self.tokenizer(texts).input_ids if texts else []
        found = [math.nan] * len(texts)
        rows = [r for r in range(len(ids)) if len(ids[r]) <= self.max_tokens]
        if len(rows) < len(ids):
            note(f"{self.name}: {len(ids) - len(rows)} replies are longer than {self.max_tokens} tokens: not judged")
        for group in track(self._plan(rows, ids), "judge", total=len(rows), size=len):
            for row, p in zip(group, self._scores([ids[r] for r in group]), strict=True):
                found[row] = p
        return found

    def describe(self) -> dict[str, Any]:
        """Return name, revision, class and dtype."""
        dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        return {"name": self.name, "revision": self.revision, "label": self.label, "reads": self._reads, "dtype": dtype}

    def _plan(self, rows: list[int], ids: Sequence[Sequence[int]]) -> list[list[int]]:
        """Group rows of similar length, longest first."""
        budget = _TOKENS_CPU if self.device.type == "cpu" else _TOKENS_GPU
        groups: list[list[int]] = []
        for row in sorted(rows, key=lambda r: -len(ids[r])):
            limit = self._batch_size or max(1, budget // len(ids[groups[-1][0]])) if groups else 0
            if groups and len(groups[-1]) < limit:
                groups[-1].append(row)
            else:
                groups.append([row])
        return groups

    @torch.no_grad()
    def _scores(self, ids: list[list[int]]) -> list[float]:
        tokens = torch.full((len(ids), max(map(len, ids))), self._pad)
        mask = torch.zeros_like(tokens)
        for row, line in enumerate(ids):
            tokens[row, : len(line)] = torch.tensor(line)
            mask[row, : len(line)] = 1
        try:
            logits = self.model(input_ids=tokens.to(self.device), attention_mask=mask.to(self.device)).logits
        except torch.OutOfMemoryError:
            if len(ids) == 1:
                note(f"{self.name}: out of memory on one reply of {len(ids[0])} tokens: not judged")
                return [math.nan]
            self._batch_size = half = len(ids) // 2
            note(f"{self.name}: out of memory: {half} replies at a time from here on")
            return self._scores(ids[:half]) + self._scores(ids[half:])
        return [float(p) for p in logits.double().softmax(-1)[:, self._index].cpu()]


def refusal_index(id2label: Mapping[int, str], label: str | None, where: str) -> int:
    """Return the index of the class that means refusal.

    Args:
        id2label: Names of the classes.
        label: Name that was asked for; None looks for the one class named after refusal, rejection or declining.
        where: The classifier, for the error.

    Raises:
        UsageError: no such class, or not exactly one that could be meant.
    """
    named = {str(name): int(index) for index, name in id2label.items()}
    if label is not None:
        if label not in named:
            raise UsageError(f"no class '{label}'", where=where, valid=", ".join(named), hint=nearest(label, named))
        return named[label]
    found = [i for name, i in named.items() if _REFUSES.search(name) and not _NEGATED.search(name)]
    if len(found) != 1:
        raise UsageError(
            "which class means refusal cannot be told",
            where=where,
            valid=", ".join(named),
            hint=f"{where.partition('#')[0]}#label={next(iter(named))}",
        )
    return found[0]


def require_judge(name: str) -> None:
    """Refuse a second judge that was typed wrong; whether it can be had is not looked at.

    Raises:
        UsageError: names what is near, and all that is valid.
    """
    if name in (NONE, SMALL):
        return
    if name.startswith(ENDPOINT):
        from perpend.judges.endpoint import Settings

        Settings.parse(name)
        return
    scheme, colon, _ = name.partition(":")
    if colon and scheme.isalpha() and len(scheme) > 1 and not Path(name.partition("#")[0]).expanduser().exists():
        near = nearest(name, (SMALL,)) or nearest(f"{scheme}:", (ENDPOINT,))
        raise UsageError(f"unknown judge '{name}'", where=OPTION, valid=JUDGES, hint=near)
    model = _Choice.parse(name).model
    try:
        ModelRef.parse(model)
    except UsageError as error:
        what = error.within(OPTION).what
        raise UsageError(what, where=OPTION, valid=JUDGES, hint=error.hint or nearest(name, (SMALL, MINOS))) from None


def load_classifier(name: str, machine: Machine | None = None) -> tuple[RefusalClassifier | LabelJudge | None, str]:
    """Return the second judge called `name`, or None and the reason why there is none.

    Args:
        name: `none`, `perpend:small`, `endpoint:URL#model=NAME`, or what `Classifier.open` takes.
        machine: How it is run.

    Raises:
        UsageError: `name` was typed wrong; what merely cannot be had is a reason.
    """
    require_judge(name)
    if name == NONE:
        return None, "no classifier was asked for"
    if name == SMALL:
        from perpend.judges.small import SmallClassifier

        return SmallClassifier.load(), ""
    if name.startswith(ENDPOINT):
        from perpend.judges.endpoint import EndpointJudge, Settings

        return EndpointJudge(Settings.parse(name)), ""
    return Classifier.load(name, machine)
