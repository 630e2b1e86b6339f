"""The trials of a search in an Optuna storage that any number of processes and machines share.

Every candidate has a *slot*: its place in the search. What is stored for a slot is one Optuna trial, or several when
a worker was lost; the one that counts is the first that was not lost. Trials are made WAITING with all their
parameters, taken with the storage's own compare-and-set from WAITING to RUNNING, and end as COMPLETE or FAIL.

Work is taken in *batches* of consecutive slots of one generation, so that the same candidates are always scored
together and rounding does not depend on who scores them. Taking a batch is taking its first trial that has not ended,
and that one is ended last.

A worker that is gone (its process, where that can be seen; else its sign of life has not changed for `LEASE` seconds
of the observer's own clock) loses its batches: the trial becomes FAIL with the reason, and a new one for the same slot
is made. Ending a trial is atomic in the storage, so only one observer does it; and where two processes make a trial for
one slot, only the first is ever run.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perpend.errors import RunFailed
from perpend.searching.space import Proposal, Space
from perpend.searching.storage import masked, open_storage, runs, this_process

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

BEAT = 5.0
"""Seconds between two signs of life."""
LEASE = 60.0
"""Seconds without one after which a worker that cannot be looked up is gone."""
ROUND = 5
"""Decimal places of stored scores: further ones depend on the processor."""
LOST = "lost"
DOUBLE = "another trial of the same slot came first"


@dataclass(frozen=True)
class Outcome:
    """What became of a candidate."""

    refusal: float = float("nan")
    """Mean refusal log-odds in nats; lower refuses less."""
    drift: float = float("nan")
    """Nats per token."""
    refusal_interval: tuple[float, float] | None = None
    """95 % over prompts."""
    drift_interval: tuple[float, float] | None = None
    dropped: str | None = None
    """Why it was not scored to the end; the numbers are then lower bounds."""
    failed: str | None = None
    """Why there are no numbers."""
    per_target: tuple[float, ...] | None = None
    """Log-odds of refusing each target, where it was scored to the end."""
    per_baseline: tuple[float, ...] | None = None
    """Drift on each baseline, likewise."""


@dataclass(frozen=True)
class Trial:
    """What counts for one slot now."""

    slot: int
    id: int
    number: int
    """Of the Optuna trial."""
    state: str
    """waiting, running, complete or fail."""
    params: dict[str, Any]
    origin: str
    attempt: int
    """Trials of this slot that were lost before."""
    owner: str | None
    outcome: Outcome | None
    seconds: float | None

    @property
    def finished(self) -> bool:
        """Whether it has ended, well or not."""
        return self.state in {"complete", "fail"}

    @property
    def scored(self) -> bool:
        """Whether it has numbers over all prompts."""
        return self.outcome is not None and self.state == "complete" and self.outcome.dropped is None


@dataclass(frozen=True)
class Batch:
    """Consecutive slots that one worker scores together; all of them, also where a crash has left some to do."""

    trials: tuple[Trial, ...]

    @property
    def lead(self) -> Trial | None:
        """The trial that stands for the batch: the first that has not ended; None when all have."""
        return next((trial for trial in self.trials if not trial.finished), None)


@dataclass
class View:
    """The slots of a study as they were at one moment."""

    size: int
    """Slots of a generation."""
    batch: int
    slots: dict[int, Trial]
    doubles: list[Trial] = field(default_factory=list)

    def generation(self, number: int, limit: int) -> range:
        """Return the slots of a generation below `limit`."""
        return range(number * self.size, min((number + 1) * self.size, limit))

    def complete(self, number: int, limit: int) -> bool:
        """Return whether every slot of a generation has ended."""
        return all(s in self.slots and self.slots[s].finished for s in self.generation(number, limit))

    def batches(self, limit: int) -> Iterator[Batch]:
        """Yield the batches that have trials, in order."""
        for first in range(0, limit, self.size):
            for lead in range(first, min(first + self.size, limit), self.batch):
                own = range(lead, min(lead + self.batch, first + self.size, limit))
                if all(slot in self.slots for slot in own):
                    yield Batch(tuple(self.slots[slot] for slot in own))

    def finished(self) -> list[Trial]:
        """Return the trials that have ended, in the order of their slots."""
        return [self.slots[slot] for slot in sorted(self.slots) if self.slots[slot].finished]


class Ledger:
    """One study in a storage, as one worker sees it."""

    def __init__(self, where: str | Path, name: str) -> None:
        """Open the storage; the study need not be there yet.

        Args:
            where: Journal file or database URL.
            name: Of the study.
        """
        self.where, self.name = where, name
        self.storage = open_storage(where)
        self.worker = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self._beats: dict[str, tuple[Any, float]] = {}
        self._study: int | None = None

    # ------------------------------------------------------------------------------------------------- the study

    def found(self) -> bool:
        """Return whether the study is there."""
        if self._study is None:
            with contextlib.suppress(KeyError):
                self._study = self.storage.get_study_id_from_name(self.name)
        return self._study is not None

    def create(self) -> bool:
        """Make the study; False when another process has made it in the meantime."""
        import optuna
        from optuna.exceptions import DuplicatedStudyError
        from optuna.study import StudyDirection

        try:
            self._study = self.storage.create_new_study([StudyDirection.MINIMIZE] * 2, self.name)
        except DuplicatedStudyError:
            self.found()
            return False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # called experimental
            optuna.load_study(study_name=self.name, storage=self.storage).set_metric_names(["refusal", "drift"])
        return True

    @property
    def study(self) -> int:
        """Identity of the study in the storage.

        Raises:
            RunFailed: it is gone.
        """
        if not self.found() or self._study is None:
            raise RunFailed(f"there is no study '{self.name}'", where=masked(self.where))
        return self._study

    def keep(self, name: str, value: Any) -> None:
        """Store a setting or a text of the study."""
        self.storage.set_study_user_attr(self.study, name, value)

    def keep_base(self, texts: Mapping[str, str]) -> None:
        """Store what every worker begins with, the list of names last, so that it is there whole or not at all."""
        for name, text in texts.items():
            self.storage.set_study_system_attr(self.study, f"perpend:base:{name}", text)
        self.storage.set_study_system_attr(self.study, "perpend:base", sorted(texts))

    def base(self) -> dict[str, str] | None:
        """Return what every worker begins with; None when it is not there yet."""
        attrs = self.storage.get_study_system_attrs(self.study)
        names = attrs.get("perpend:base")
        return None if names is None else {name: attrs[f"perpend:base:{name}"] for name in names}

    def settings(self) -> dict[str, Any]:
        """Return what was stored with `keep`."""
        return dict(self.storage.get_study_user_attrs(self.study))

    # ------------------------------------------------------------------------------------------------ the trials

    def view(self, size: int, batch: int) -> View:
        """Return what counts now."""
        found = View(size, batch, {})
        for frozen in self.storage.get_all_trials(self.study, deepcopy=False):
            trial = _read(frozen)
            if trial is None:
                continue
            if trial.slot in found.slots:
                found.doubles.append(trial)
            else:
                found.slots[trial.slot] = trial
        return found

    def plan(self, slots: Sequence[int], proposals: Sequence[Proposal], view: View, space: Space) -> None:
        """Make trials for slots that have none."""
        for slot, proposal in zip(slots, proposals, strict=True):
            if slot not in view.slots:
                self._make(slot, proposal.params, proposal.origin, 0, space)

    def _make(self, slot: int, params: dict[str, Any], origin: str, attempt: int, space: Space) -> None:
        from optuna.trial import TrialState, create_trial

        attrs = {"slot": slot, "origin": origin, "attempt": attempt}
        ranges = {name: space.distributions[name] for name in params}
        template = create_trial(state=TrialState.WAITING, params=params, distributions=ranges, user_attrs=attrs)
        self.storage.create_new_trial(self.study, template_trial=template)

    def take(self, batch: Batch) -> bool:
        """Take a batch; False when another worker was first, or nothing of it is left to do."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        lead = batch.lead
        if lead is None or lead.state != "waiting":
            return False
        try:
            if not self.storage.set_trial_state_values(lead.id, TrialState.RUNNING):
                return False
        except UpdateFinishedTrialError:
            return False
        self.storage.set_trial_user_attr(lead.id, "owner", self.worker)
        for trial in batch.trials:
            if not trial.finished and trial is not lead:
                with contextlib.suppress(UpdateFinishedTrialError):  # so that a dashboard shows it
                    self.storage.set_trial_state_values(trial.id, TrialState.RUNNING)
                    self.storage.set_trial_user_attr(trial.id, "owner", self.worker)
        return True

    def end(self, batch: Batch, outcomes: Sequence[Outcome], seconds: float) -> bool:
        """Store what became of a batch, its lead last.

        Returns:
            Whether the batch was still this worker's; if not, nothing is stored that another has.
        """
        lead = batch.lead
        if lead is None or self.storage.get_trial(lead.id).state.is_finished():
            return False
        pairs = sorted(zip(batch.trials, outcomes, strict=True), key=lambda pair: pair[0] is lead)
        kept = [self._end(t, outcome, seconds / len(pairs)) for t, outcome in pairs if not t.finished]
        return kept[-1]

    def _end(self, trial: Trial, outcome: Outcome, seconds: float) -> bool:
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        data = {name: value for name, value in vars(outcome).items() if value is not None and value == value}
        values = None if outcome.failed else [outcome.refusal, outcome.drift]
        state = TrialState.FAIL if outcome.failed else TrialState.COMPLETE
        try:
            self.storage.set_trial_user_attr(trial.id, "outcome", data)
            self.storage.set_trial_user_attr(trial.id, "seconds", round(seconds, 3))
            self.storage.set_trial_state_values(trial.id, state, values)
        except UpdateFinishedTrialError:
            return False
        return True

    # ------------------------------------------------------------------------------------------------ the workers

    @contextmanager
    def alive(self, about: Mapping[str, Any] | None = None) -> Iterator[None]:
        """Give signs of life inside the block, from a thread with a connection of its own."""
        own, stop = open_storage(self.where), threading.Event()
        record = {**this_process(), **(about or {})}

        def beat() -> None:
            count = 0
            while not stop.wait(BEAT if count else 0):
                count += 1
                with contextlib.suppress(Exception):  # a database that is away for a moment; the lease is long
                    own.set_study_user_attr(self.study, f"worker:{self.worker}", {**record, "beat": count})

        own.set_study_user_attr(self.study, f"worker:{self.worker}", {**record, "beat": 0})
        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def requeue(self, view: View, space: Space) -> list[str]:
        """Take the batches of workers that are gone away from them; returns a line for each."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        told = []
        for double in view.doubles:
            if double.state == "waiting":
                self._fail(double.id, DOUBLE)
        for batch in view.batches(1 + max(view.slots, default=-1)):
            lead = batch.lead
            reason = self._gone(lead) if lead is not None and lead.state == "running" else None
            if lead is None or reason is None:
                continue
            try:
                self.storage.set_trial_user_attr(lead.id, LOST, reason)
                self.storage.set_trial_state_values(lead.id, TrialState.FAIL)
            except UpdateFinishedTrialError:
                continue
            self._make(lead.slot, lead.params, lead.origin, lead.attempt + 1, space)
            told.append(f"trials {lead.slot} to {batch.trials[-1].slot} are run again: {reason}")
        return told

    def _fail(self, trial: int, reason: str) -> None:
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        with contextlib.suppress(UpdateFinishedTrialError):
            self.storage.set_trial_user_attr(trial, LOST, reason)
            self.storage.set_trial_state_values(trial, TrialState.FAIL)

    def _gone(self, trial: Trial) -> str | None:
        """Return why the owner of a running trial is taken to be gone; None while it may be at work."""
        if trial.owner == self.worker:
            return None
        record = self.settings().get(f"worker:{trial.owner}") or {}
        own = this_process()
        if record.get("machine") == own["machine"] and not runs(record):
            return f"worker {trial.owner} is gone"
        sign, now = record.get("beat"), time.monotonic()
        key = trial.owner or f"trial {trial.id}"
        before = self._beats.get(key)
        if before is None or before[0] != sign:
            self._beats[key] = (sign, now)
            return None
        return f"worker {key} gave no sign of life for {LEASE:.0f} s" if now - before[1] > LEASE else None


def _read(frozen: FrozenTrial) -> Trial | None:
    """Return an Optuna trial as a slot's; None when it is none, or was lost."""
    attrs, state = frozen.user_attrs, frozen.state.name.lower()
    if "slot" not in attrs or (state == "fail" and LOST in attrs):
        return None
    data = attrs.get("outcome")
    kept: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in (data or {}).items()}
    outcome = Outcome(**kept) if data else None
    return Trial(
        slot=attrs["slot"],
        id=frozen._trial_id,
        number=frozen.number,
        state=state,
        params=dict(frozen.params),
        origin=attrs["origin"],
        attempt=attrs["attempt"],
        owner=attrs.get("owner"),
        outcome=outcome,
        seconds=attrs.get("seconds"),
    )
