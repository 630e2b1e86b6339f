"""The program, run in this process: its exit code and what it said where."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import perpend
from perpend.cli.main import main


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass(frozen=True)
class Answer:
    """What a task in these tests returns."""

    data: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return self.data


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    """`cli("fit", "org/name", "-o", "out")` runs the program in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Said:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Said(code, captured.out, captured.err)

    return run


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """`task("fit", answer)` puts a stand-in for `perpend.fit`, which records its calls; an exception is raised."""

    def replace(name: str, answer: Any = None) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def stand_in(*args: Any, **kwargs: Any) -> Answer:
            calls.append((args, kwargs))
            if isinstance(answer, BaseException):
                raise answer
            return Answer(answer(*args, **kwargs) if callable(answer) else answer or {})

        monkeypatch.setitem(vars(perpend), name, stand_in)
        return calls

    return replace
