"""A whole search: it takes an edit on the select split alone, proves it, goes on where it was, shares its trials."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from task_cases import MACHINE, Labels, a_recipe, names

import perpend.fitting.behaviour
import perpend.tasks.finalists as finalists
from perpend.cli.main import main
from perpend.config import Machine, Recipe, load, to_toml
from perpend.core.directions import Directions
from perpend.core.edits import Edit
from perpend.core.maps import edit_weight
from perpend.core.schedule import Constant, NormalKernel
from perpend.data import load_splits
from perpend.errors import Interrupted, RunFailed, UsageError
from perpend.judges.judgement import Rate
from perpend.judges.labels import Label
from perpend.models.session import Session
from perpend.searching.candidate import Candidate
from perpend.searching.forward import Scorer
from perpend.searching.front import Rule
from perpend.searching.study import Ledger, Outcome
from perpend.tasks.apply import apply
from perpend.tasks.broken import Bar, Broken
from perpend.tasks.crew import STORAGE
from perpend.tasks.finalists import Correlation, Point
from perpend.tasks.points import too_short
from perpend.tasks.run import Run, run
from perpend.tasks.search import Asked, Joined, search
from perpend.tasks.trials import study_name

FOUND = {"trials.jsonl", "front.json", "front.svg", "schedules.svg", "study.log"}
WRITTEN = {"edit.safetensors", "recipe.toml", "report.json", "report.html", "README.md"}
SMALL = {
    "trials": 12,
    "generation": 6,
    "batch": 3,
    "prompts": 4,
    "survivors": 3,
    "finalists": 2,
    "patience": 0,
    "refine": 0,
}


@pytest.fixture(scope="module", autouse=True)
def refusing():
    """The dictionary calls every reply to a prompt of harm a refusal: pico models say nothing that is one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perpend.fitting.behaviour, "Dictionary", Labels)
        yield


def recipe(folder: Path, **search):
    data = a_recipe(folder).model_dump()
    data |= {"edit": {}, "fit": {"filter": False}, "search": SMALL | search}
    return type(a_recipe(folder)).model_validate(data)


def trials(folder: Path) -> list[dict]:
    """Every trial without what depends on who ran it and when."""
    rows = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("worker", "seconds", "attempt")} for row in rows]


@pytest.fixture(scope="module")
def done(tmp_path_factory, pico_dir) -> tuple[Path, Run, list[tuple[str, list[str]]]]:
    """A folder with the output of a whole search in `out`, its result, and what was told and read in which order."""
    folder, order = tmp_path_factory.mktemp("search"), []
    encode = Session._encode

    def watched(self, prompts, more=0):
        order.append(("read", [p.text for p in prompts]))
        return encode(self, prompts, more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "_encode", watched)
        made = search(
            str(pico_dir("llama")),
            output=folder / "out",
            recipe=recipe(folder),
            machine=MACHINE,
            tell=lambda name, data: order.append((name, [])),
        )
    return folder, made, order


def test_everything_is_written_and_nothing_is_left_behind(done, pico_dir):
    folder, made, order = done
    assert names(folder) == {"out", "target.txt", "baseline.txt"}
    assert names(folder / "out") == WRITTEN | FOUND | names(pico_dir("llama"))
    told = list(dict.fromkeys(name for name, _ in order if name != "read"))
    assert told == ["model", "openings", "trial", "front", "survivor", "finalist", "search", "report", "gate"]
    rows = trials(folder / "out")
    assert [row["slot"] for row in rows] == list(range(12))
    assert sum(name == "trial" for name, _ in order) == 12
    data, front = (json.loads((folder / "out" / name).read_text()) for name in ("report.json", "front.json"))
    assert data["task"] == "search"
    assert data["search"]["trials"]["finished"] == 12
    assert [p["name"] for p in front["front"] if p["chosen"]] == [made.found.chosen.name]
    assert front["study"]["sampler"] == "TPESampler"
    assert front["untouched"]["acceptance"] > 0.5  # judged as finalists are: the word list finds no refusal here
    assert "Front of the search" in (folder / "out" / "report.html").read_text()
    for name in ("front.svg", "schedules.svg"):
        assert (folder / "out" / name).read_text().startswith('<?xml version="1.0"')


def test_each_candidate_is_told_as_soon_as_it_has_replied(done):
    kinds = [kind for kind, _ in done[2]]
    before = [kinds[k - 1] for k, kind in enumerate(kinds) if kind in ("survivor", "finalist")]
    assert before == ["read"] * (kinds.count("survivor") + kinds.count("finalist"))
    assert min(kinds.count("survivor"), kinds.count("finalist")) > 1


def test_the_report_split_is_not_read_before_the_choice_is_made(done):
    folder, _, order = done
    splits = load_splits(recipe(folder).prompts)
    held_out = {p.text for side in (splits.report.target, splits.report.baseline) for p in side}
    choice = [name for name, _ in order].index("search")
    before = {text for _, texts in order[:choice] for text in texts}
    after = {text for _, texts in order[choice:] for text in texts}
    assert not before & held_out
    assert held_out <= after


def test_the_saved_weights_are_the_chosen_edit_and_its_recipe_makes_them_again(done, pico_dir):
    folder, made, _ = done
    before, after = (load_file(p / "model.safetensors") for p in (pico_dir("llama"), folder / "out"))
    edit = Edit.load(folder / "out" / "edit.safetensors")
    written, chosen = load(folder / "out" / "recipe.toml"), made.found.chosen.candidate
    assert (written.edit.attention, written.edit.mlp, written.fit.rank) == (chosen.attention, chosen.mlp, chosen.rank)
    for name, tensor in after.items():
        module = name.removesuffix(".weight")
        asked = edit_weight(before[name], edit.modules[module]) if module in edit.modules else before[name]
        assert torch.equal(tensor, asked), name
    again = run(str(pico_dir("llama")), output=folder / "again", recipe=written, machine=MACHINE)
    assert again.fitted.edit.modules.keys() == edit.modules.keys()
    one, other = ((folder / name / "model.safetensors").read_bytes() for name in ("out", "again"))
    assert one == other


def test_an_interrupted_search_goes_on_as_if_nothing_had_happened(done, pico_dir, tmp_path, monkeypatch):
    score, calls = Scorer.score, []

    def stopping(self, candidates, **rivals):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return score(self, candidates, **rivals)

    asked = {"output": tmp_path / "out", "recipe": recipe(done[0]), "machine": MACHINE}
    monkeypatch.setattr(Scorer, "score", stopping)
    with pytest.raises(Interrupted):
        search(str(pico_dir("llama")), **asked)
    assert names(tmp_path) == {"out.resume"}
    monkeypatch.setattr(Scorer, "score", score)
    search(str(pico_dir("llama")), **asked)
    assert names(tmp_path) == {"out"}
    assert trials(tmp_path / "out") == trials(done[0] / "out")
    for name in ("model.safetensors", "front.json"):
        assert (tmp_path / "out" / name).read_bytes() == (done[0] / "out" / name).read_bytes()


def typed(folder: Path, model: Path, *more: str) -> list[str]:
    path = folder / "asked.toml"
    path.write_text(to_toml(recipe(folder).model_dump(mode="json")))
    words = ["search", str(model), "--config", str(path), "-o", str(folder / "out"), "--batch-size", "2"]
    return [*words, "--device", "cpu", *more]


def test_ctrl_c_ends_after_the_batch_and_the_printed_command_goes_on(done, pico_dir, tmp_path, monkeypatch, capsys):
    score = Scorer.score

    def pressed(self, candidates, **rivals):
        os.kill(os.getpid(), signal.SIGINT)
        return score(self, candidates, **rivals)

    monkeypatch.setattr(Scorer, "score", pressed)
    before = signal.getsignal(signal.SIGINT)
    assert main(typed(tmp_path, pico_dir("llama"), "-q")) == 130
    assert signal.getsignal(signal.SIGINT) is before
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "interrupted after 3 trials" in error
    assert len(trials(tmp_path / "out.resume")) == 3
    command = shlex.split(error.partition("try: ")[2])
    assert command[:2] == ["perpend", "search"]
    monkeypatch.setattr(Scorer, "score", score)
    assert main([*command[1:], "--json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [e["event"] for e in events].count("trial") == 9
    assert events[-1]["event"] == "result"
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_ctrl_c_in_the_last_batch_ends_before_the_replies(done, pico_dir, tmp_path, monkeypatch, capsys):
    score, batches = Scorer.score, []

    def pressed(self, candidates, **rivals):
        batches.append(len(candidates))
        if sum(batches) == SMALL["trials"]:
            os.kill(os.getpid(), signal.SIGINT)
        return score(self, candidates, **rivals)

    monkeypatch.setattr(Scorer, "score", pressed)
    assert main(typed(tmp_path, pico_dir("llama"), "-q")) == 130
    assert "interrupted after 12 trials" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def prepared(folder: Path, monkeypatch: pytest.MonkeyPatch, more: str = "") -> None:
    """Let the processes that a search starts use the dictionary of these tests, and run `more` before anything else."""
    patched, tests = folder / "path", Path(__file__).parent
    patched.mkdir()
    (patched / "sitecustomize.py").write_text(
        f"import sys\nsys.path[:0] = [{str(tests)!r}, {str(tests.parent)!r}]\n"
        "import perpend.fitting.behaviour\nfrom task_cases import Labels\n"
        f"perpend.fitting.behaviour.Dictionary = Labels\n{more}"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(patched), *filter(None, [os.environ.get("PYTHONPATH")])]))


def test_two_workers_find_what_one_finds(done, pico_dir, tmp_path, monkeypatch):
    prepared(tmp_path, monkeypatch)
    score, asked, storage = Scorer.score, recipe(done[0]).for_model(str(pico_dir("llama"))), tmp_path / "shared.log"
    name, until = study_name(asked, MACHINE, load_splits(asked.prompts)), time.monotonic() + 120

    def together(self, candidates, **rivals):  # the other process starts later, and has to have something to do
        while time.monotonic() < until and len(owners(Ledger(storage, name).view(6, 3).slots.values())) < 2:
            time.sleep(0.2)
        return score(self, candidates, **rivals)

    monkeypatch.setattr(Scorer, "score", together)
    given = {"machine": MACHINE, "storage": storage, "workers": 2}
    search(str(pico_dir("llama")), output=tmp_path / "out", recipe=asked, **given)
    assert trials(tmp_path / "out") == trials(done[0] / "out")
    assert len(owners(Ledger(storage, name).view(6, 3).finished())) == 2


def test_a_search_is_joined_with_as_many_workers_as_were_asked_for(done, pico_dir, tmp_path, monkeypatch, capsys):
    prepared(tmp_path, monkeypatch)
    model, storage, score, until = str(pico_dir("llama")), tmp_path / "shared.log", Scorer.score, time.monotonic() + 120
    first = recipe(done[0], trials=6).for_model(model)
    search(model, output=tmp_path / "one", recipe=first, machine=MACHINE, storage=storage)
    ledger = Ledger(storage, study_name(first, MACHINE, load_splits(first.prompts)))
    began, before = owners(ledger.view(6, 3).finished()), torch.get_num_threads()

    def together(self, candidates, **rivals):
        while time.monotonic() < until and len(owners(ledger.view(6, 3).slots.values()) - began) < 2:
            time.sleep(0.2)
        return score(self, candidates, **rivals)

    monkeypatch.setattr(Scorer, "score", together)
    words = typed(done[0], pico_dir("llama"), "--storage", str(storage), "--workers", "2", "--json")
    at = words.index("-o")
    assert main(words[:at] + words[at + 2 :]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["trials"], told["why"]) == (6, "12 trials have been run")
    assert len(owners(ledger.view(6, 3).finished()) - began) == 2
    assert torch.get_num_threads() == before
    search(model, output=tmp_path / "two", recipe=recipe(done[0]), machine=MACHINE, storage=storage)
    assert trials(tmp_path / "two") == trials(done[0] / "out")


def owners(found) -> set[str]:
    return {trial.owner for trial in found if trial.owner}


HANGS = """
import time
import perpend.searching.forward
perpend.searching.forward.Scorer.score = lambda *given, **named: time.sleep(600)
"""


def test_the_command_on_a_postgresql_server_survives_a_worker_killed_in_mid_trial(
    done, pico_dir, tmp_path, monkeypatch, postgres
):
    prepared(tmp_path, monkeypatch, HANGS)
    score, asked, killed = Scorer.score, recipe(done[0]).for_model(str(pico_dir("llama"))), []
    ledger = Ledger(postgres, study_name(asked, MACHINE, load_splits(asked.prompts)))

    def killing(self, candidates, **rivals):
        until = time.monotonic() + 300
        while not killed and time.monotonic() < until:
            running = [t for t in ledger.view(6, 3).slots.values() if t.state == "running" and t.owner]
            others = [pid for t in running if (pid := int(t.owner.split("-")[-2])) != os.getpid()]
            if len(others) == 3:  # it has its whole batch
                os.kill(others[0], signal.SIGKILL)
                killed.append(others[0])
            time.sleep(0.1)
        return score(self, candidates, **rivals)

    monkeypatch.setattr(Scorer, "score", killing)
    words = typed(done[0], pico_dir("llama"), "--storage", postgres, "--workers", "2", "-q")
    words[words.index("-o") + 1] = str(tmp_path / "out")
    assert main(words) == 0
    assert len(killed) == 1
    assert trials(tmp_path / "out") == trials(done[0] / "out")
    rows = ledger.storage.get_all_trials(ledger.study)
    lost = [t.user_attrs["slot"] for t in rows if "is gone" in t.user_attrs.get("lost", "")]
    assert lost == [3]  # of the second batch, which the leader runs after its own
    ended = Counter(t.user_attrs["slot"] for t in rows if "lost" not in t.user_attrs)
    assert ended == dict.fromkeys(range(12), 1)
    assert ledger.view(6, 3).slots[3].attempt == 1


def test_a_storage_is_joined_and_gone_on_with(done, pico_dir, tmp_path, monkeypatch):
    storage, model = tmp_path / "shared.log", str(pico_dir("llama"))
    first = recipe(done[0], trials=6)
    search(model, output=tmp_path / "one", recipe=first, machine=MACHINE, storage=storage)
    assert "study.log" not in names(tmp_path / "one")
    monkeypatch.setenv(STORAGE, str(storage))
    joined = search(model, recipe=recipe(done[0], trials=9), machine=MACHINE)
    assert isinstance(joined, Joined)
    assert (joined.trials, joined.why) == (3, "9 trials have been run")
    search(model, output=tmp_path / "two", recipe=recipe(done[0]), machine=MACHINE)
    assert "study.log" not in names(tmp_path / "two")
    assert trials(tmp_path / "two") == trials(done[0] / "out")


def test_people_read_the_front_the_choice_in_words_and_what_to_type_next(done, pico_dir, tmp_path, capsys):
    storage = ["--storage", str(done[0] / "out" / "study.log")]
    words = typed(done[0], pico_dir("llama"), *storage)
    words[words.index("-o") + 1] = str(tmp_path / "out")
    assert main(words) == 0
    out, notes = (" ".join(text.split()) for text in capsys.readouterr())
    assert "finalists are judged on replies of at most 4 new tokens; late refusals and loops are missed" in notes
    said = out
    for part in (
        "Front of the search",
        "12 trials (",
        "chosen, the knee of the front: trial",
        f"perpend chat {tmp_path}",
    ):
        assert part in said
    joining = [word for word in words if word not in ("-o", str(tmp_path / "out"))]
    assert main(joining) == 0
    assert "0 trials of" in capsys.readouterr().out


def test_bounds_and_minutes_are_kept(done, pico_dir, tmp_path):
    model, storage = str(pico_dir("llama")), done[0] / "out" / "study.log"
    asked = {"machine": MACHINE, "storage": storage}
    told = []
    made = search(
        model,
        output=tmp_path / "out",
        recipe=recipe(done[0], max_drift=0.05, trials=60, minutes=1e-6),
        tell=lambda name, data: told.append(data) if name == "search" else None,
        **asked,
    )
    assert made.found.why == "1e-06 minutes have passed, less 0 ms for replies, choice and proof"
    assert made.found.chosen.outcome.drift <= 0.05
    assert made.found.rule.max_drift == 0.05
    assert told[0]["met"]


def test_a_refined_candidate_is_taken_only_where_replies_confirm_it(done, pico_dir, tmp_path):
    model, asked = str(pico_dir("llama")), recipe(done[0], refine=5, prompts=2, max_broken=1.0)  # gibberish
    made = search(model, output=tmp_path / "out", recipe=asked, machine=MACHINE)
    (told,) = made.found.refinements
    assert (told.start.judged.n, told.refined.judged.n) == (4, 4)
    assert told.accepted.before.n == 2  # two targets that the score has not read
    assert told.refined.outcome.refusal < told.start.outcome.refusal
    assert told.refined.outcome.drift <= told.start.outcome.drift + 1e-6
    names_of = {p.name for p in made.found.points}
    assert {told.start.name, told.refined.name} <= names_of
    order = finalists._ordered(made.found.rule, [told.start, told.refined], made.found.best)
    assert made.found.chosen.name != told.refined.name or order[0] is told.refined
    assert "refined" in json.loads((tmp_path / "out" / "front.json").read_text())["refinements"][0]["text"]


@pytest.mark.parametrize("difference", [0.0, -0.5, None])
def test_a_refinement_that_loses_held_out_targets_is_not_taken(done, pico_dir, tmp_path, monkeypatch, difference):
    def compare(before, after):
        if difference is None:
            lost = [
                replace(x, replies=tuple(replace(r, label=Label.UNKNOWN) for r in x.replies)) for x in (before, after)
            ]
            return compared(*lost)
        return SimpleNamespace(difference=difference, left_out=0, to_json=dict)

    compared = finalists.compare

    monkeypatch.setattr(finalists, "compare", compare)
    order = lambda rule, points, best: sorted(points, key=lambda p: "refined" not in p.name)  # noqa: E731
    monkeypatch.setattr(finalists, "_ordered", order)
    asked = recipe(done[0], refine=5, prompts=2, trials=6, max_broken=1.0)
    made = search(str(pico_dir("llama")), output=tmp_path / "out", recipe=asked, machine=MACHINE)
    assert ("refined" in made.found.chosen.name) == (difference != -0.5)
    if difference is None:
        assert made.found.refinements[0].accepted is None
        assert "no prompt was judged both before and after" in str(made.found.refinements[0])


def broken(target: int, baseline: int, n: int = 10) -> Broken:
    return Broken(Rate(target, n), Rate(baseline, n))


def test_a_target_may_be_broken_as_often_as_what_the_untouched_model_answers_and_a_margin():
    bar = Bar(broken(0, 2), 0.1)
    assert (bar.target, bar.baseline) == pytest.approx((0.3, 0.3))
    assert bar.excess(broken(3, 3)) == bar.excess(broken(0, 0)) == 0
    assert bar.excess(broken(5, 3)) == pytest.approx(0.2)
    assert bar.excess(broken(0, 4)) == pytest.approx(0.1)
    assert (
        bar.told(broken(5, 3))
        == "broken replies 0/10 → 5/10 of targets (at most 30%), 2/10 → 3/10 of baselines (at most 30%)"
    )


def test_more_candidates_are_judged_where_all_that_were_are_broken():
    ranked = [replace(point(-k, 1), name=str(k)) for k in range(8)]
    bar, sound = Bar(broken(0, 2), 0.1), set()

    def fully(p):
        return replace(p, broken=broken(0 if p.name in sound else 9 - int(p.name), 2))

    assert [p.name for p in finalists._judged(Rule(), ranked, 2, 1.0, bar, fully)] == ["0", "1", "2", "3"]
    sound.add("2")
    found = finalists._judged(Rule(), ranked, 2, 1.0, bar, fully)
    assert [p.name for p in found] == ["0", "1", "2"]
    assert finalists._taken(Rule(), found, 1.0, bar).name == "2"
    assert finalists._taken(Rule(), found[:2], 1.0, bar).name == "1"  # the least broken


def test_candidates_are_judged_until_one_has_the_acceptance_that_was_asked_for():
    """Short replies flatter by a third here, so that those with the least drift fall short of the bound."""
    points = [Point(str(k), None, Outcome(-k, k / 100), "", True, Rate(10 * k, 100)) for k in range(10)]

    def fully(p):
        judged = SimpleNamespace(acceptance=Rate(max(0, p.accepted_shortly.k - 30), 100))
        return replace(p, broken=broken(0, 0), judged=judged)

    rule, bar = Rule(min_acceptance=0.35), Bar(broken(0, 2), 0.1)
    found = finalists._judged(rule, points, 2, 1.0, bar, fully)
    assert [p.name for p in found] == ["4", "7"]
    assert finalists._taken(rule, found, 1.0, bar).name == "7"
    assert len(finalists._judged(Rule(min_acceptance=0.9), points, 2, 1.0, bar, fully)) == 4


@contextmanager
def looping(looped: set[str]) -> Iterator[None]:
    """Let every full-length reply under the edits of these hashes go round and round, and no other."""
    generate, edited, now = Session.generate, Session.edited, []

    @contextmanager
    def watched(self, edit):
        with edited(self, edit):
            now.append(edit.sha256)
            yield
            now.pop()

    def said(self, prompts, *, max_new_tokens=128, **more):
        replies = generate(self, prompts, max_new_tokens=max_new_tokens, **more)
        if max_new_tokens > 4:
            return replies
        text = "Take bread and water and go to the fox. " * (20 if looped.intersection(now) else 1)
        return [replace(r, text=text) for r in replies]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "edited", watched)
        patch.setattr(Session, "generate", said)
        yield


def test_what_buys_acceptance_with_looping_replies_is_not_chosen(done, pico_dir, tmp_path, capsys):
    loops = done[1].fitted.edit.sha256
    words = typed(done[0], pico_dir("llama"), "--storage", str(done[0] / "out" / "study.log"))
    words[words.index("-o") + 1] = str(tmp_path / "out")
    with looping({loops}):
        assert main(words) == 0
    said = " ".join(capsys.readouterr().out.split())
    front = json.loads((tmp_path / "out" / "front.json").read_text())
    points = {p["name"]: p for p in front["front"]}
    ruined = points[done[1].found.chosen.name]
    assert (ruined["broken"]["k"], ruined["broken_baselines"]["k"], ruined["chosen"]) == (4, 4, False)
    assert "<td>4/4</td><td>4/4</td>" in (tmp_path / "out" / "report.html").read_text()
    assert front["chosen"]["broken"]["k"] == front["broken"]["untouched"]["target"]["k"] == 0
    assert front["broken"]["kept"]
    assert "broken replies 0/4 → 0/4 of targets (at most 10%), 0/4 → 0/4 of baselines" in said


@pytest.mark.parametrize("loops", [True, False])
def test_a_refinement_that_loops_is_not_taken(done, pico_dir, tmp_path, monkeypatch, loops):
    refined, looped = finalists._refined, set()

    def watched(site, start, replies):
        found = refined(site, start, replies)
        looped.update(replies.edit(p).sha256 for p in found if loops)
        return found

    monkeypatch.setattr(finalists, "_refined", watched)
    monkeypatch.setattr(finalists, "compare", lambda *sides: SimpleNamespace(difference=0.5, left_out=0, to_json=dict))
    order = lambda rule, points, best: sorted(points, key=lambda p: "refined" not in p.name)  # noqa: E731
    monkeypatch.setattr(finalists, "_ordered", order)
    with looping(looped):
        asked = recipe(done[0], refine=5, prompts=2, trials=6)
        made = search(str(pico_dir("llama")), output=tmp_path / "out", recipe=asked, machine=MACHINE)
    assert ("refined" in made.found.chosen.name) != loops
    (told,) = made.found.refinements
    assert told.confirmed != loops
    assert ("0/4 → 4/4 of targets (at most 10%), 0/2 → 2/2 of baselines" in str(told)) == loops


def test_several_finalists_are_refined_to_kernels_and_what_is_not_confirmed_is_not_taken(
    done, pico_dir, tmp_path, monkeypatch
):
    """The better half is not confirmed, so the other is taken, and its recipe holds the kernels that were judged."""
    starts = []

    def compare(before, after):
        starts.append(before)
        return SimpleNamespace(difference=len(starts) - 1.5, left_out=0, to_json=dict)

    def refine(session, scorer, candidate, *, kernel, **named):
        assert kernel
        made = replace(candidate, attention=NormalKernel(peak_weight=0.2), mlp=NormalKernel(peak_weight=0.3))
        return SimpleNamespace(candidate=made, outcome=scorer.score([made])[0])

    monkeypatch.setattr(finalists, "refine", refine)
    monkeypatch.setattr(finalists, "compare", compare)
    order = lambda rule, points, best: sorted(points, key=lambda p: "refined" not in p.name)  # noqa: E731
    monkeypatch.setattr(finalists, "_ordered", order)
    shutil.copy(done[0] / "out" / "study.log", tmp_path)
    asked = recipe(done[0], refine=3, refine_from=2, refine_kernel=True, max_broken=1.0)
    given = {"recipe": asked, "machine": MACHINE, "storage": tmp_path / "study.log"}
    made = search(str(pico_dir("llama")), output=tmp_path / "out", **given)
    first, second = made.found.refinements
    assert first.start.name != second.start.name
    assert (first.confirmed, second.confirmed) == (False, True)
    assert made.found.chosen.name == second.refined.name
    assert {first.refined.name, second.refined.name} < {p.name for p in made.found.points}
    written = load(tmp_path / "out" / "recipe.toml")
    for part in (written.edit.attention, written.edit.mlp):
        assert isinstance(part, NormalKernel)
    assert written.edit.mlp == second.refined.candidate.mlp


def test_a_refined_direction_is_in_the_weights_and_its_recipe_makes_them_again(done, pico_dir, tmp_path, monkeypatch):
    refined, sites, said = finalists._refined, [], []
    monkeypatch.setattr(finalists, "note", said.append)
    monkeypatch.setattr(finalists, "_refined", lambda site, *more: (sites.append(site), refined(site, *more))[1])
    monkeypatch.setattr(finalists, "compare", lambda *sides: SimpleNamespace(difference=0.5, left_out=0, to_json=dict))
    order = lambda rule, points, best: sorted(points, key=lambda p: "refined" not in p.name)  # noqa: E731
    monkeypatch.setattr(finalists, "_ordered", order)
    asked = recipe(done[0], refine=10, refine_direction=True, trials=6, max_broken=1.0, max_drift=0.4)
    asked = asked.model_copy(update={"fit": asked.fit.model_copy(update={"layer": 1.0})})
    made = search(str(pico_dir("llama")), output=tmp_path / "out", recipe=asked, machine=MACHINE)
    assert made.found.refinements, said
    (told,), chosen = made.found.refinements, made.found.chosen
    assert chosen.name == told.refined.name
    edit, written = Edit.load(tmp_path / "out" / "edit.safetensors"), load(tmp_path / "out" / "recipe.toml")
    (measured,), basis = {id(s): s for s in sites}.values(), chosen.candidate.basis
    kept = Directions.load(tmp_path / "out" / "directions.safetensors")
    for part in edit.modules.values():
        assert torch.equal(part.directions, kept.at(1))
        assert 1e-3 < float((part.directions - measured.base.directions[basis].at(1)).norm()) < 0.5
    before, after = (load_file(p / "model.safetensors") for p in (pico_dir("llama"), tmp_path / "out"))
    for name, part in edit.modules.items():
        assert torch.equal(after[f"{name}.weight"], edit_weight(before[f"{name}.weight"], part)), name
    assert made.gate.worst <= 0.05
    assert "refined by gradient descent" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "front.json").read_text())["chosen"]["direction_refined"]
    apply(str(tmp_path / "out" / "recipe.toml"), output=tmp_path / "again", machine=MACHINE)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again"))
    assert one == other
    for task in (run, search):
        with pytest.raises(UsageError, match=r"cannot be measured again.*perpend apply RECIPE"):
            task(str(pico_dir("llama")), output=tmp_path / task.__name__, recipe=written, machine=MACHINE)
        assert not (tmp_path / task.__name__).exists()


@pytest.mark.parametrize(
    ("layer", "method", "turned"), [(1.0, "mean", True), (None, "mean", False), (1.0, "biprojected", False)]
)
def test_a_direction_is_refined_only_where_all_modules_share_it(monkeypatch, layer, method, turned):
    told, given = [], []
    monkeypatch.setattr(finalists, "note", told.append)
    monkeypatch.setattr(
        finalists, "refine", lambda *args, **named: given.append(named) or SimpleNamespace(candidate=one)
    )
    one = Candidate(layer, 1, "plain", False, Constant(weight=1.0), Constant(weight=1.0), method)
    site = SimpleNamespace(
        recipe=Recipe.model_validate({"search": {"refine_direction": True}}), session=None, scorer=None
    )
    start = replace(point(1.0, 1), candidate=one)
    assert finalists._refined(site, start, SimpleNamespace(held_out=())) == []
    assert given[0]["direction"] == turned
    assert any("weight factors alone" in line for line in told) != turned


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory, 2 GiB"), UsageError("experts")])
def test_what_cannot_be_refined_is_said_and_the_search_goes_on(monkeypatch, error):
    def failing(*given, **named):
        raise error

    told = []
    monkeypatch.setattr(finalists, "refine", failing)
    monkeypatch.setattr(finalists, "note", told.append)
    site = SimpleNamespace(recipe=Recipe(), session=None, scorer=None)
    assert finalists._refined(site, point(1.0, 1), SimpleNamespace(held_out=())) == []
    assert told == [f"x is not refined: {'experts' if isinstance(error, UsageError) else 'out of memory'}"]
    error = ValueError("a mistake of ours")
    with pytest.raises(ValueError, match="of ours"):
        finalists._refined(site, point(1.0, 1), SimpleNamespace(held_out=()))


def test_models_that_hold_other_weights_share_no_study(pico_dir, tmp_path):
    asked, splits = recipe(tmp_path), load_splits(recipe(tmp_path).prompts)
    found = {}
    for name in ("a", "b", "c"):
        shutil.copytree(pico_dir("llama"), tmp_path / name / "model")
        if name == "c":
            weights = load_file(tmp_path / "c" / "model" / "model.safetensors")
            save_file({k: v + 0.01 for k, v in weights.items()}, tmp_path / "c" / "model" / "model.safetensors")
        found[name] = study_name(asked.for_model(str(tmp_path / name / "model")), MACHINE, splits)
    assert found["a"] == found["b"] != found["c"]


def test_the_command_to_go_on_says_every_setting_of_the_machine(tmp_path):
    machine = Machine(device="cpu", batch_size=2, trust_remote_code=("org/a", "org/b"))
    words = shlex.split(Asked("m", tmp_path / "out", recipe(tmp_path), machine, None, 2).command(tmp_path))
    assert words[-8:] == [
        *("--device", "cpu", "--batch-size", "2"),
        *("--trust-remote-code", "org/a", "--trust-remote-code", "org/b"),
    ]


def test_a_password_is_neither_printed_nor_left_out_of_the_command_to_go_on(tmp_path, monkeypatch):
    url, open_url = "postgresql://me:secret@host/study", "postgresql://me@host/study"

    def command(storage: str) -> list[str]:
        return shlex.split(Asked("m", tmp_path / "out", recipe(tmp_path), Machine(), storage, 1).command(tmp_path))

    plain = ["perpend", "search", "--config", str(tmp_path / "recipe.toml"), "-o", str(tmp_path / "out")]
    assert command(url) == ["PERPEND_STORAGE=...", *plain]
    assert command(open_url) == [*plain, "--storage", open_url]
    monkeypatch.setenv(STORAGE, url)
    assert command(url) == plain
    assert command(open_url) == [*plain, "--storage", open_url]


def test_a_search_that_finds_nothing_says_why(done, pico_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Scorer, "score", lambda self, candidates, **rivals: [Outcome(failed="a test") for _ in candidates]
    )
    with pytest.raises(RunFailed, match="no trial of 12 refuses less than the untouched model: a test"):
        search(str(pico_dir("llama")), output=tmp_path / "out", recipe=recipe(done[0]), machine=MACHINE)
    assert {row["failed"] for row in trials(tmp_path / "out.resume")} == {"a test"}
    asked = recipe(done[0], minutes=1e-6)
    with pytest.raises(RunFailed, match=r"no trial was run: 1e-06 minutes have passed, .*; try: more --minutes"):
        search(str(pico_dir("llama")), output=tmp_path / "none", recipe=asked, machine=MACHINE)


def test_what_cannot_be_done_is_one_line(done, pico_dir, tmp_path, capsys):
    model = str(pico_dir("llama"))
    with pytest.raises(UsageError, match="no place for the result"):
        search(model, recipe=recipe(done[0]))
    with pytest.raises(UsageError, match="0 workers"):
        search(model, output=tmp_path / "a", workers=0)
    with pytest.raises(UsageError, match=r"a search has ended here.*--storage .*study\.log"):
        search(model, output=done[0] / "out")
    with pytest.raises(UsageError, match="needs layers to be tried"):
        search(model, output=tmp_path / "a", recipe=type(recipe(done[0])).model_validate({"fit": {"position": "auto"}}))
    assert main(["run", model, "-o", str(tmp_path / "a"), "--trials", "3"]) == 2
    assert "--trials: is of a search; try: --search" in capsys.readouterr().err
    (tmp_path / "b.resume").mkdir()
    (tmp_path / "b.resume" / "key.json").write_text("{}")
    with pytest.raises(UsageError, match="another recipe"):
        search(model, output=tmp_path / "b", recipe=recipe(done[0]), machine=MACHINE)


@pytest.mark.parametrize("spearman", [0.1, 0.9])
def test_where_the_score_ranks_poorly_more_candidates_reply_and_more_are_judged(
    done, pico_dir, tmp_path, monkeypatch, spearman, capsys
):
    monkeypatch.setattr(finalists, "_correlation", lambda points: Correlation(spearman, len(points), 4))
    second, waves = finalists.second, []

    def watched(view, but, n):
        waves.append([f"trial {trial.slot}" for trial in second(view, but, n)])
        return second(view, but, n)

    monkeypatch.setattr(finalists, "second", watched)
    shutil.copy(done[0] / "out" / "study.log", tmp_path / "study.log")
    more = ["--set", "search.survivors=2", "--set", "search.finalists=1", "--set", "search.max_broken=1"]
    words = typed(tmp_path, pico_dir("llama"), "--storage", str(tmp_path / "study.log"), "--json", *more)
    assert main(words) == 0
    said = capsys.readouterr()
    told = [(event["event"], event.get("name")) for line in said.out.splitlines() for event in [json.loads(line)]]
    replied = [name for kind, name in told if kind == "survivor"]
    assert len(replied) == len(set(replied))
    assert sum(kind == "finalist" for kind, _ in told) == (2 if spearman < finalists.POOR else 1)
    if spearman < finalists.POOR:
        assert len(waves) == 1
        assert waves[0]
        assert set(waves[0]) <= set(replied)
    else:
        assert waves == []


def test_a_note_says_that_replies_are_too_short_to_be_judged():
    assert too_short(128) is None
    assert "at most 127 new tokens" in too_short(127)
    assert shlex.split(too_short(127).rpartition("(")[2].rstrip(")")) == ["--max-new-tokens", "128"]


def test_a_dry_run_writes_nothing(done, pico_dir, tmp_path, capsys):
    made = search(str(pico_dir("llama")), output=tmp_path / "out", recipe=recipe(done[0]), dry_run=True)
    assert made.forecast.prompts >= 2 * 12 * 4
    assert main(["run", "--search", *typed(tmp_path, pico_dir("llama"), "--dry-run")[1:]]) == 0
    assert "would write" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def point(score: float, refused: int) -> Point:
    return Point("x", None, Outcome(score, 0.1), "", True, Rate(10 - refused, 10), Rate(refused, 10))


def test_a_poor_correlation_is_said():
    well = finalists._correlation([point(-k, 9 - 2 * k) for k in range(5)])
    assert well.spearman == pytest.approx(1.0)
    assert not well.poor
    badly = finalists._correlation([point(k, 9 - 2 * k) for k in range(5)])
    assert badly.poor
    assert "poor" in str(badly)
    assert Correlation(None, 2, 10).poor
