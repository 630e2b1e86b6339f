"""Perpend's search and heretic-llm: the same organism, prompts and wall-clock budget, judged by one neutral judge.

    python bench/versus_heretic.py ORGANISM ORIGINAL WORK [--minutes 20] [--heretic VENV] [-o results.json]

heretic-llm is installed from PyPI into an environment of its own and run as its users run it; when the time is spent it
is interrupted (Ctrl-C), and models along its final front are saved through its own menu. Perpend is run as its users
run it. What both found answers held-out target prompts, greedily, 128 tokens; the labels are those of the dictionary
and `perpend:small`, which neither search has seen for these prompts. Drift is the KL divergence per token over the
organism's own answers, and over the never-refusing original's. Prints JSON and Markdown tables.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from perpend import drift
from perpend.config import Machine, Recipe
from perpend.core.edits import Edit
from perpend.core.stats import wilson
from perpend.data import Prompt, Splits, load_splits
from perpend.export.shards import bake
from perpend.judges.panel import Panel
from perpend.models.load import load_model
from perpend.models.session import Reply, Session
from perpend.searching.base import Base
from perpend.searching.candidate import Candidate
from perpend.searching.front import CEILING, along, decades, front, hypervolume
from perpend.searching.study import Ledger
from perpend.tasks.measure import judge

Point = dict[str, Any]
REFINED = ", refined"
Asked = list[tuple[Prompt, Reply]]


def _interruptible() -> None:
    """Let Ctrl-C reach a program whose parent was started in the background, where it is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Talk:
    """A program that asks on its standard output and reads answers from its standard input."""

    def __init__(self, command: list[str], log: Path, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
            text=True,
            preexec_fn=_interruptible,
        )
        self.said, self._log, self._read = "", log, 0
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while piece := self.process.stdout.read(1):
            self.said += piece
        self._log.write_text(self.said, encoding="utf-8")

    def wait_for(self, question: str, timeout: float) -> str | None:
        """Return what was said up to a question; None when the program ended or did not ask in time."""
        until = time.monotonic() + timeout
        while time.monotonic() < until:
            at = self.said.find(question, self._read)
            if at >= 0:
                told, self._read = self.said[self._read : at], at + len(question)
                return told
            if self.process.poll() is not None:
                return None
            time.sleep(0.1)
        return None

    def answer(self, text: str) -> None:
        """Type an answer."""
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()


def install(venv: Path) -> None:
    """Install heretic-llm into an environment of its own, where it is not there yet."""
    if (venv / "bin" / "heretic").exists():
        return
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    subprocess.run([str(venv / "bin" / "pip"), "install", "-q", "heretic-llm"], check=True)


def versions(venv: Path) -> dict[str, str]:
    """Return which versions of what are compared."""
    names = {"perpend": sys.executable, "heretic-llm": str(venv / "bin" / "python")}
    ask = "import importlib.metadata as m, sys; print(*(m.version(n) for n in sys.argv[1:]))"
    found = {}
    for name, python in names.items():
        told = subprocess.run(
            [python, "-c", ask, name, "torch", "transformers"], capture_output=True, text=True, check=True
        )
        found[name], torch, transformers = told.stdout.split()
        found[f"beside {name}"] = f"torch {torch}, transformers {transformers}"
    return found


def write_prompts(splits: Splits, folder: Path, each: int, held_out: int) -> dict[str, Path]:
    """Write the prompts of every split and class, one a line; returns the files by name."""
    found = {}
    for prompts in splits.sets():
        path = folder / f"{prompts.name}.txt"
        most = held_out if prompts.name.endswith("report") else each
        texts = [" ".join(p.text.split()) for p in prompts.limited(most)]
        path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
        found[prompts.name] = path
    return found


def run_theirs(organism: str, work: Path, files: dict[str, Path], given: argparse.Namespace) -> dict[str, Any]:
    """Let heretic search for the budget and save models along its final front."""
    sets = {"bad": "target.fit", "good": "baseline.fit"}
    sets |= {"bad-evaluation": "target.select", "good-evaluation": "baseline.select"}
    words = [f"--{name}-prompts.dataset={files[key]}" for name, key in sets.items()]
    words += [f"--{name}-prompts.{part}=null" for name in sets for part in ("split", "column")]
    words += ["--export-strategy", "MERGE", "--seed", "0", "--batch-size", str(given.their_batch)]
    words += ["--study-checkpoint-dir", str(work / "study"), "--n-trials", "100000", "--model", organism]
    environment = {"COLAB_GPU": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    began, started = time.time(), time.monotonic()
    talk = Talk([str(given.heretic / "bin" / "heretic"), *words], work / "heretic.log", environment)
    menu = "Which trial do you want to use?"
    told = talk.wait_for(menu, 60 * given.minutes)
    if told is None and talk.process.poll() is None:
        talk.process.send_signal(signal.SIGINT)
        told = talk.wait_for(menu, 300)
    searched = time.monotonic() - started
    points = _saved(talk, work, given.models) if told is not None else []
    talk.process.kill()
    trials = _their_trials(work / "study", began)
    for point in points:
        point["found_at"] = next((t["ended"] for t in trials if t["index"] == point["index"]), searched)
    first = min((t["began"] for t in trials), default=None)
    return {"seconds": round(searched, 1), "before_first_trial": first, "trials": trials, "points": points}


def _saved(talk: Talk, work: Path, n: int) -> list[Point]:
    """Save models along the front that the menu lists."""
    listed = talk.wait_for("Enter number: ", 60) or ""
    rows = re.findall(r"\[(\d+)\] \[Trial\s+(\d+)\] Refusals:\s*(\d+)/(\d+), KL divergence: ([\d.]+)", listed)
    found = []
    for number, index, refusals, asked, kl in along(rows, n, lambda r: (int(r[2]) / int(r[3]), decades(float(r[4])))):
        talk.answer(number)
        talk.wait_for("Enter number: ", 120)
        talk.answer("1")
        talk.wait_for("Path to the folder:", 60)
        path = work / f"heretic-{index}"
        talk.answer(str(path))
        talk.wait_for("Enter number: ", 300)
        talk.answer("5")
        talk.wait_for("Enter number: ", 60)
        own = {"refusals": f"{refusals}/{asked}", "first_token_kl": float(kl)}
        found.append({"name": f"heretic, trial {index}", "index": int(index), "path": str(path), "own": own})
    return [point for point in found if (Path(point["path"]) / "config.json").exists()]


def _their_trials(folder: Path, began: float) -> list[Point]:
    """Return the trials that ended, with seconds since the start, from the Optuna journal that heretic keeps."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path = next(iter(folder.glob("*.jsonl")), None)
    if path is None:
        return []
    storage = JournalStorage(JournalFileBackend(str(path)))
    study = storage.get_study_id_from_name("heretic")
    ended = [t for t in storage.get_all_trials(study) if t.state.name == "COMPLETE"]
    return [
        {
            "index": t.user_attrs["index"],
            "began": round(t.datetime_start.timestamp() - began, 1),
            "ended": round(t.datetime_complete.timestamp() - began, 1),
        }
        for t in ended
    ]


def run_ours(organism: str, work: Path, files: dict[str, Path], given: argparse.Namespace) -> dict[str, Any]:
    """Let Perpend search for the budget, in which replies, choice, report and gate are to fit as well."""
    out = work / "perpend"
    words = ["search", organism, "-o", str(out), "--json", "--classifier", "perpend:small", "--trials", "100000"]
    words += ["--target", str(files["target.fit"]), "--baseline", str(files["baseline.fit"])]
    for side in ("target", "baseline"):
        for split in ("select", "report"):
            words += ["--set", f"prompts.{side}_{split}={files[f'{side}.{split}']}"]
    words += ["--set", "eval.control_prompts=0", "--minutes", str(given.minutes)]
    for assignment in given.assignments:
        words += ["--set", assignment]
    started = time.monotonic()
    command = [sys.executable, "-m", "perpend", *words]
    events, chosen = [], None
    with (work / "perpend.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        for line in process.stdout:
            if not line.startswith('{"event"'):
                continue
            event = json.loads(line)
            now = round(time.monotonic() - started, 1)
            if event["event"] == "trial":
                events.append({"slot": event["slot"], "ended": now, "seconds": event["seconds"]})
            elif event["event"] == "search":
                chosen = now
        process.wait()
    if process.returncode:
        raise SystemExit((work / "perpend.log").read_text())
    result = json.loads((out / "report.json").read_text())
    first = min((e["ended"] - e["seconds"] for e in events), default=None)
    points = _ours_on_front(out, {f"trial {e['slot']}": e["ended"] for e in events}, given.models, chosen)
    return {
        "seconds": chosen,
        "before_first_trial": first,
        "trials": events,
        "points": points,
        "stages": result["seconds"],
    }


def _ours_on_front(out: Path, times: dict[str, float], n: int, chosen: float) -> list[Point]:
    """Return the chosen model, others along the front of its own replies, and what refinement began from and made.

    A search keeps a refined direction of the chosen candidate alone: others that have one are left out.
    """
    data = json.loads((out / "front.json").read_text())

    def pair(point: Point) -> tuple[float, float]:
        return 1 - point["accepted_shortly"]["share"], point["drift"]

    kept = [p for p in data["front"] if p["chosen"] or not p["direction_refined"]]
    if lost := [p["name"] for p in data["front"] if p not in kept]:
        print(f"not judged, for its refined direction was not kept: {', '.join(lost)}", file=sys.stderr)
    replied = [p for p in kept if p["accepted_shortly"]]
    edge = [p for p in front(replied, pair) if not p["chosen"]]
    taken = along(edge, n - 1, lambda p: (pair(p)[0], decades(p["drift"])))
    made = {p["name"].removesuffix(REFINED) for p in replied if p["name"].endswith(REFINED)}
    taken += [p for p in replied if p["name"].removesuffix(REFINED) in made and not p["chosen"] and p not in taken]
    name = next(p["name"] for p in data["front"] if p["chosen"])
    found = [{"name": f"perpend, {name}: chosen", "path": str(out), "found_at": chosen}]
    for point in taken:
        at = times.get(point["name"], chosen)
        found.append(
            {"name": f"perpend, {point['name']}", "edit": point["candidate"], "of_front": point, "found_at": at}
        )
    return found


def save(session: Session, organism: str, work: Path, points: list[Point]) -> None:
    """Write the points that are no model yet, as `perpend apply` does, so that both tools' files are judged."""
    for k, point in enumerate(points):
        if "path" not in point:
            edit, out = edit_of(session, work / "perpend", point["of_front"]), work / f"perpend-{k}"
            bake(Path(organism), edit, session.anatomy, out, session.model)
            point["path"] = str(out)


class Judge:
    """One judge for all models: held-out targets, and drift from the organism and from the original."""

    def __init__(self, organism: str, original: str, splits: Splits, given: argparse.Namespace) -> None:
        self.organism, self.panel, self._given = (
            Session(load_model(organism), Machine()),
            Panel.load("perpend:small"),
            given,
        )
        self.targets = splits.report.target.limited(given.held_out).prompts
        baselines = splits.report.baseline.limited(given.held_out).prompts
        self.own: Asked = list(zip(baselines, self._replies(self.organism, baselines), strict=True))
        self.original = Session(load_model(original), Machine())
        self.true: Asked = list(zip(self.targets, self._replies(self.original, self.targets), strict=True))

    def _replies(self, session: Session, prompts: Iterable[Prompt]) -> list[Reply]:
        return session.generate(list(prompts), max_new_tokens=self._given.max_new_tokens)

    def __call__(self, session: Session, edit: Edit | None = None) -> Point:
        """Judge a model, or an edit of the organism."""
        with session.edited(edit):
            side = judge(self.targets, self._replies(session, self.targets), self.panel).judged
        low, high = wilson(side.accepted, side.n)
        return {
            "n": side.n,
            "accepted": side.accepted,
            "interval": [round(low, 3), round(high, 3)],
            "refused": side.refused,
            "evaded": side.evaded,
            "broken": side.broken,
            "drift": round(self._drift(self.organism, session, edit, self.own), 4),
            "to_original": round(self._drift(self.original, session, edit, self.true), 3),
        }

    def _drift(self, reference: Session, session: Session, edit: Edit | None, asked: Asked) -> float:
        batches = session.batches([p for p, _ in asked], [r.tokens for _, r in asked], max_tokens=48)
        return drift.measure(reference.under(None), session.under(edit), batches).mean


def edit_of(session: Session, out: Path, point: Point) -> Edit:
    """Return the edit of a point of our front: as it was saved, or from the directions that its study keeps."""
    if point["chosen"]:
        return Edit.load(out / "edit.safetensors")
    if point["direction_refined"]:
        raise SystemExit(f"{out}: {point['name']}: its refined direction was not kept; only the chosen edit can be had")
    data, name = point["candidate"], json.loads((out / "front.json").read_text())["study"]["name"]
    base = Base.from_texts(Ledger(out / "study.log", name).base())
    recipe = Recipe.model_validate({"edit": {part: data[part] for part in ("attention", "mlp")}})
    layer = None if data["layer"] == "each" else data["layer"]
    own = (data["mode"], data["through_post_norm"], recipe.edit.attention, recipe.edit.mlp)
    return Candidate(layer, data["rank"], *own, data["method"]).edit(session, base.directions, recipe)


def compared(theirs: dict[str, Any], ours: dict[str, Any], untouched: Point, budget: float) -> dict[str, Any]:
    """Return who is ahead by the neutral judge: time to dominate, hypervolume at equal time, equal acceptance."""

    def pair(point: Point) -> tuple[float, float]:
        return 1 - point["accepted"] / point["n"], point["drift"]

    def beaten(point: Point, known: list[Point]) -> bool:
        return any(pair(q)[0] <= pair(point)[0] and pair(q)[1] <= pair(point)[1] for q in known)

    nothing = {**untouched, "found_at": 0.0}
    dominated_at = None
    for moment in sorted({p["found_at"] for p in ours["points"]}):
        known = [nothing, *(p for p in ours["points"] if p["found_at"] <= moment)]
        if theirs["points"] and all(beaten(p, known) for p in theirs["points"]):
            dominated_at = moment
            break
    reference = (pair(untouched)[0], CEILING)

    def volume(side: dict[str, Any]) -> float:
        return round(hypervolume([pair(p) for p in side["points"] if p["found_at"] <= budget], reference), 4)

    rows = []
    for point in theirs["points"]:
        equal = [p for p in ours["points"] if p["accepted"] / p["n"] >= point["accepted"] / point["n"]]
        best = min(equal, key=lambda p: p["drift"], default=None)
        rows.append(
            {"theirs": point["name"], "ours": best and best["name"], "drift": [point["drift"], best and best["drift"]]}
        )
    return {
        "our_front_dominates_theirs_at": dominated_at,
        "their_whole_run": theirs["seconds"],
        "hypervolume_at_equal_time": {"theirs": volume(theirs), "ours": volume(ours)},
        "at_least_their_acceptance": rows,
    }


def told(side: dict[str, Any]) -> dict[str, Any]:
    """Return how fast a side was."""
    trials = side["trials"]
    span = max((t["ended"] for t in trials), default=0.0) - (side["before_first_trial"] or 0.0)
    return {
        "trials": len(trials),
        "seconds_per_trial": round(span / len(trials), 2) if trials else None,
        "before_first_trial": side["before_first_trial"],
        "seconds": side["seconds"],
    }


def main() -> None:
    """Install, search with both, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("organism")
    parser.add_argument("original")
    parser.add_argument("work", type=Path)
    parser.add_argument("--minutes", type=float, default=20.0, help="wall clock of either search")
    parser.add_argument("--prompts", type=int, default=96, help="of each class, to fit on and to select on")
    parser.add_argument("--held-out", type=int, default=96)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--models", type=int, default=3, help="of either front that are judged")
    parser.add_argument("--heretic", type=Path, default=Path("heretic-venv"))
    parser.add_argument("--together", action="store_true", help="both at once, where there is room for two")
    parser.add_argument("--their-batch", type=int, default=32)
    parser.add_argument("--set", dest="assignments", action="append", default=[])
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()

    install(given.heretic)
    given.work.mkdir(parents=True)
    splits = load_splits(Recipe().prompts)
    files = write_prompts(splits, given.work, given.prompts, given.held_out)
    settings = {k: v for k, v in vars(given).items() if k not in LOCAL}
    found: dict[str, Any] = {"settings": settings, "versions": versions(given.heretic), "cores": os.cpu_count()}

    def keep() -> None:  # after every step, so that a run that is cut short leaves what it has
        if given.output:
            given.output.parent.mkdir(parents=True, exist_ok=True)
            given.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    with ThreadPoolExecutor(2 if given.together else 1) as pool:
        running = [pool.submit(run, given.organism, given.work, files, given) for run in (run_theirs, run_ours)]
        theirs = running[0].result()
        found["heretic"] = {**told(theirs), "points": [_public(p) for p in theirs["points"]]}
        keep()
        ours = running[1].result()
        found["perpend"] = {**told(ours), "stages": ours["stages"], "points": [_public(p) for p in ours["points"]]}
        keep()
    judged = Judge(given.organism, given.original, splits, given)
    found["untouched"], found["original"] = judged(judged.organism), judged(judged.original)
    save(judged.organism, given.organism, given.work, ours["points"])
    for name, side in (("perpend", ours), ("heretic", theirs)):
        for k, point in enumerate(side["points"]):
            point |= judged(Session(load_model(point["path"]), Machine()))
            found[name]["points"][k] = _public(point)
            keep()
    found["compared"] = compared(theirs, ours, found["untouched"], 60 * given.minutes)
    keep()
    print(json.dumps(found, indent=1))
    print(markdown(found))


def _public(point: Point) -> Point:
    return {key: value for key, value in point.items() if key not in ("path", "of_front")}


LOCAL = ("organism", "original", "work", "heretic", "output")


def markdown(found: dict[str, Any]) -> str:
    """Return the judged models as a table."""
    rows = [("untouched organism", found["untouched"]), ("never-refusing original", found["original"])]
    rows += [(p["name"], p) for side in ("heretic", "perpend") for p in found[side]["points"]]

    def line(name: str, p: Point) -> str:
        accepted = f"{p['accepted']}/{p['n']} [{p['interval'][0]}, {p['interval'][1]}]"
        cells = (name, p.get("found_at", ""), accepted, p["refused"], p["broken"], p["drift"], p["to_original"])
        return f"| {' | '.join(map(str, cells))} |"

    head = "| model | found at, s | accepted (95 %) | refused | broken | drift | KL to original |"
    models = [head, "|---|---|---|---|---|---|---|", *(line(name, p) for name, p in rows)]
    return "\n".join([*_speeds(found), "", *models, "", *_verdict(found["compared"])])


def _speeds(found: dict[str, Any]) -> list[str]:
    """Return how fast either tool was, as a table."""
    both = [found["heretic"], found["perpend"]]
    rows = [
        ("seconds per trial", *(f"{b['seconds_per_trial']} ({b['trials']} trials)" for b in both)),
        ("before the first trial, s", *(b["before_first_trial"] for b in both)),
        ("whole search, s", *(b["seconds"] for b in both)),
    ]
    return ["| | heretic-llm | perpend |", "|---|---|---|", *(f"| {' | '.join(map(str, row))} |" for row in rows)]


def _verdict(compared: dict[str, Any]) -> list[str]:
    """Return who is ahead: dominance, hypervolume, and the drift of each at no less than the other's acceptance."""
    at, volume = compared["our_front_dominates_theirs_at"], compared["hypervolume_at_equal_time"]
    said = "never" if at is None else f"{at:.0f} s, of their {compared['their_whole_run']:.0f} s"
    head = [f"our front dominates their final one: {said}", f"hypervolume at equal time: {volume}", ""]
    rows = [
        f"| {r['theirs']} | {r['drift'][0]} | {r['ours'] or 'none'} | {r['drift'][1] or ''} |"
        for r in compared["at_least_their_acceptance"]
    ]
    return [*head, "| theirs | drift | ours with at least its acceptance | drift |", "|---|---|---|---|", *rows]


if __name__ == "__main__":
    main()
