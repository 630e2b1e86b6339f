"""The shell completes commands, options, names and keys, and nothing heavy is loaded for it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from perpend.cli.flags import FLAGS, completions
from perpend.cli.main import main
from perpend.config import Machine, Recipe

CASES = {
    "perpend ins": {"inspect"},
    "perpend config v": {"validate"},
    "perpend run --meth": {"--method"},
    "perpend run --method ": {"mean", "projected", "biprojected"},
    "perpend run --layer ": {"auto", "each"},
    "perpend run --classifier per": {"perpend:small"},
    "perpend run --target perpend": {"perpend:target"},
    "perpend run --dtype b": {"bfloat16"},
    "perpend fit --offload ": {"auto", "none", "disk"},
    "perpend run --set edit.mlp.peak_": {"edit.mlp.peak_weight=", "edit.mlp.peak_layer="},
    "perpend run --set edit.mode=": {"edit.mode=plain", "edit.mode=column", "edit.mode=row"},
    "perpend run --set edit.attention.kind=t": {"edit.attention.kind=tent"},
    "perpend run --set seed=": set(),
    "perpend run --output ": set(),
    "perpend ls s": {"schedules"},
}


@pytest.mark.parametrize("typed", CASES)
def test_what_is_typed_is_completed(typed, monkeypatch, capsys):
    monkeypatch.setenv("_PERPEND_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split(" ")) - 1))
    assert main([]) == 0
    said = capsys.readouterr()
    assert {line for line in said.out.splitlines() if line} == CASES[typed]
    assert said.err == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell_is_printed(cli, shell, monkeypatch):
    monkeypatch.setattr("shellingham.detect_shell", lambda *_: (shell, f"/bin/{shell}"))
    said = cli("--show-completion")
    assert said.code == 0
    assert f"_PERPEND_COMPLETE=complete_{shell}" in said.out


def test_completing_loads_no_tensors():
    program = "import sys\nfrom perpend.cli.main import main\nmain([])\nsys.exit('torch' in sys.modules)"
    words = {"_PERPEND_COMPLETE": "complete_bash", "COMP_WORDS": "perpend run --set edit.", "COMP_CWORD": "3"}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **words}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "edit.mode=" in done.stdout


def test_what_is_completed_is_accepted():
    """Whatever a flag completes is a value that its section takes."""
    for flag in FLAGS.values():
        if flag.kind is bool or flag.names[0] == "--set" or not (flag.key or flag.machine):
            continue
        for choice in completions(flag, ""):
            root, path = (Machine, [flag.machine]) if flag.machine else (Recipe, flag.key.split("."))
            data: dict = {}
            inner = data
            for part in path[:-1]:
                inner = inner.setdefault(part, {})
            inner[path[-1]] = choice
            root.model_validate(data)
