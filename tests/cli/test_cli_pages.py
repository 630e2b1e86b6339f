"""What the pages tell a reader to type: scripts, targets and Python exist and run, the latter on a small model."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import httpx
import pytest
import torch
import typer

sys.path.insert(0, str(Path(__file__).parent.parent / "serving"))

from served import a_duet, listening

import perpend
from perpend.cli.main import app
from perpend.core.stats import wilson

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TARGETS = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    """Return the blocks of one language on a page."""
    found: list[str] = re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    return found


def typed(page: Path) -> list[list[str]]:
    """Return the words of every line to type on a page, in a block or within a sentence."""
    lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    lines += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    found = []
    for line in lines:
        line = re.sub(r"^([A-Z_]+=\S+ )+", "", line)
        if re.match(r"(python|torchrun|make) \S", line):
            found.append(shlex.split(re.split(r" [<>|] ", line)[0], comments=True))
    return found


LINES = [pytest.param(words, id=f"{page.stem}: {' '.join(words)}") for page in PAGES for words in typed(page)]


class Parsed(Exception):
    """A script has parsed its arguments; the rest of it is not run."""


@pytest.fixture
def parsing(monkeypatch):
    """`parsing(words)` lets a script parse what would be typed after its name, and ends it there."""
    parse = argparse.ArgumentParser.parse_args

    def parsed(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Parsed

    def run(words: list[str]) -> None:
        module = words[0] == "-m"
        monkeypatch.setattr(sys, "argv", words[module:])
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
        if module and len(words) == 2:  # one that takes no arguments
            assert "__main__" in inspect.getsource(importlib.import_module(words[1]))
        elif module:
            with pytest.raises(Parsed):
                importlib.import_module(words[1]).main()
        else:
            monkeypatch.syspath_prepend(str((ROOT / words[0]).parent))
            with pytest.raises(Parsed):
                runpy.run_path(str(ROOT / words[0]), run_name="__main__")

    return run


def test_lines_to_type_are_found():
    programs = {words.values[0][0] for words in LINES}
    assert programs == {"python", "torchrun", "make"}
    assert len({words.values[0][1] for words in LINES if words.values[0][0] == "python"}) >= 8


@pytest.mark.parametrize("words", LINES)
def test_a_script_takes_the_arguments_of_its_page_and_a_target_exists(words, parsing):
    program, *rest = words
    if program == "make":
        assert [word for word in rest if "=" not in word and word not in TARGETS] == []
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        asked = get_args_parser().parse_args([word for word in rest if word != "..."])
        assert (asked.module, asked.training_script) == (True, "perpend")
        assert asked.training_script_args[0] in typer.main.get_command(app).commands
    elif rest[0] == "-c":
        compile(rest[1], "typed", "exec")
    elif rest[:2] != ["-m", "llama_cpp.server"]:  # that program is not ours
        parsing(rest)


def test_scripts_that_are_named_exist():
    for page in PAGES:
        for name in re.findall(
            r"\b(?:bench|examples|docs|tests)/[\w./-]*\w\.(?:py|json|jsonl|toml|txt)\b", page.read_text()
        ):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_a_script_is_refused_what_it_does_not_take(parsing):
    with pytest.raises(SystemExit):
        parsing(["bench/judges.py", "--no-such-option"])


SMALL = """limit=4, set=["fit.filter=false", "fit.layer=1", "export.gate_prompts=1", "eval.classifier='none'",
    "eval.max_new_tokens=2", "eval.drift_tokens=2", "eval.control_prompts=0"])"""


def test_the_python_of_the_readme_and_of_adapters_runs_on_a_small_model(pico_dir, tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    model = str(pico_dir("llama"))
    (block,) = blocks(ROOT / "README.md", "python")
    text = block.replace("google/gemma-3-1b-it", model).replace(", limit=128", "")
    text, steps = re.subn(r'(output="\w+")\)', lambda found: f"{found[1]}, {SMALL}", text)
    assert steps == 3
    exec(compile(text, "README.md", "exec"), {})
    assert "accepted 100.0% → 100.0% of 4" in capsys.readouterr().out
    assert (tmp_path / "edited" / "model.safetensors").is_file()
    perpend.adapter(model, edit="fit", output="adapter")
    (block,) = blocks(ROOT / "docs" / "adapters.md", "python")
    names: dict[str, object] = {}
    exec(compile(block.replace("google/gemma-3-4b-it", model), "adapters.md", "exec"), names)
    merged = names["model"].merge_and_unload().state_dict()
    edited = perpend.models.load.load_model(tmp_path / "edited").model.state_dict()
    base = perpend.models.load.load_model(model).model.state_dict()
    assert not all(torch.equal(base[name], tensor) for name, tensor in edited.items())
    assert all(torch.allclose(merged[name], tensor, rtol=1e-4, atol=1e-6) for name, tensor in edited.items())


def test_the_clients_of_the_page_on_serving_are_answered(pico_dir, capsys):
    page = ROOT / "docs" / "serve.md"
    (python,) = blocks(page, "python")
    (curl,) = [block for block in blocks(page, "sh") if block.startswith("curl ")]
    with listening(a_duet(pico_dir("llama"))) as url:
        there = "http://127.0.0.1:8000"
        assert there in python
        exec(compile(python.replace(there, url), page.name, "exec"), {})
        assert [
            line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith(("base", "edited"))
        ] == [
            "base",
            "edited",
            "edited@0.5",
        ]
        _, address, option, body = shlex.split(curl)
        assert option == "--json"
        said = httpx.post(address.replace(there, url), json=json.loads(body), timeout=60)
    assert said.status_code == 200
    assert said.text.rstrip().endswith("data: [DONE]")


def test_intervals_in_tables_of_counts_are_those_of_wilson():
    seen = 0
    for page in PAGES:
        n = 0
        for line in page.read_text(encoding="utf-8").splitlines():
            if headings := re.findall(r" of (\d+)(?: \[95 %\])? \|", line):
                n = int(headings[-1])
            elif not line.startswith("|"):
                n = 0
            for k, low, high in re.findall(r"\| \**(\d+)(?:, [\d.]+ %)? \[([\d.]+), ([\d.]+)\]", line) if n else ():
                digits = len(low.partition(".")[2])
                assert [f"{100 * end:.{digits}f}" for end in wilson(int(k), n)] == [low, high], f"{page.name}: {line}"
                seen += 1
    assert seen >= 40


def test_pages_tell_the_error_of_the_shipped_judges_that_is_kept():
    kept = json.loads((ROOT / "src/perpend/judges/known_error.json").read_text())["judges"]
    counts = next(row["counts"] for row in kept if "classifier" in row["judges"])["en"]
    (right, complying), (rejected, others) = counts["accepted"], counts["rejected"]
    told = (
        r"accepts?\s+(\d+)\s+of\s+(?:the\s+)?(\d+)\s+(?:English\s+)?(?:test\s+)?replies\s+that\s+comply"
        r"(?:\s+and\s+(\d+)\s+of\s+(\d+)\s+others)?"
    )
    seen = 0
    for page in [*PAGES[1:], ROOT / "CHANGELOG.md"]:
        for found in re.finditer(told, page.read_text(encoding="utf-8")):
            assert found.group(1, 2) == (str(right), str(complying)), page.name
            assert found.group(3, 4) in {(None, None), (str(others - rejected), str(others))}, page.name
            seen += 1
    assert seen >= 3
