"""The command: up where it says, down when it is told, and refused for what can be known before a model is loaded."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys

import httpx
import pytest
import torch
from task_cases import MACHINE, a_recipe

from perpend.core.edits import Edit, ModuleEdit
from perpend.errors import MissingExtra, UsageError
from perpend.tasks import serve as module
from perpend.tasks.serve import serve


@pytest.fixture
def unloaded(monkeypatch):
    monkeypatch.setattr("perpend.tasks.setup.load_model", None)


def test_what_can_be_known_before_a_model_is_loaded(pico_dir, unloaded, monkeypatch):
    model = str(pico_dir("llama"))
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UsageError, match=r"is in use.*--port 0"):
        serve(model, port=taken.getsockname()[1], machine=MACHINE)
    for host in ("0.0.0.0", "192.168.0.4", "::", "model.example"):
        with pytest.raises(UsageError, match="there is no API key"):
            serve(model, host=host, port=0, machine=MACHINE)
    with pytest.raises(UsageError, match="cannot be had"):
        serve(model, host="nowhere.invalid", api_key="k", port=0, machine=MACHINE)
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "uvicorn" else "there")
    with pytest.raises(MissingExtra, match=r"a server needs the package uvicorn.*perpend\[serve\]"):
        serve(model, port=0, machine=MACHINE)


def test_a_dry_run_says_where_it_would_listen(pico_dir, unloaded, tmp_path):
    edit = tmp_path / "edit.safetensors"
    Edit({"model.layers.1.mlp.down_proj": ModuleEdit(torch.eye(1, 32), 1.0)}).save(edit)
    planned = serve(str(pico_dir("llama")), edit=edit, port=0, recipe=a_recipe(tmp_path), machine=MACHINE, dry_run=True)
    assert planned.url.startswith("http://127.0.0.1:")
    assert planned.to_json()["edited_modules"] == 1
    assert planned.to_json()["dry_run"] is True


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_the_program_serves_until_it_is_told_to_stop(pico_dir, tmp_path, end):
    Edit({"model.layers.1.mlp.down_proj": ModuleEdit(torch.eye(1, 32), 1.0)}).save(tmp_path / "edit.safetensors")
    arguments = [
        "serve",
        str(pico_dir("llama")),
        "--edit",
        str(tmp_path),
        "--port",
        "0",
        "--classifier",
        "none",
        "--json",
    ]
    with subprocess.Popen(
        [sys.executable, "-m", "perpend", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PERPEND_API_KEY": "secret"},
    ) as process:
        try:
            said = ""
            while not said.endswith("\n}\n") and (line := process.stdout.readline()):
                said += line
            served = json.loads(said)
            assert served["models"] == ["base", "edited", "edited@0.5"]
            assert httpx.get(f"{served['api']}/models").status_code == 401
            found = httpx.get(f"{served['api']}/models", headers={"authorization": "Bearer secret"})
            assert [model["id"] for model in found.json()["data"]] == served["models"]
            assert "text/html" in httpx.get(served["url"]).headers["content-type"]
            asked = {
                "model": "base",
                "messages": [{"role": "user", "content": "Bread?"}],
                "max_tokens": 450,
                "stream": True,
            }
            headers = {"authorization": "Bearer secret"}
            with httpx.stream("POST", f"{served['api']}/chat/completions", json=asked, headers=headers) as answer:
                next(answer.iter_lines())
                process.send_signal(end)
            rest, complaints = process.communicate(timeout=30)
        finally:
            process.kill()
    assert rest == ""
    told = ("dictionary only", "load weights: ")
    assert [line for line in complaints.splitlines() if not any(part in line for part in told)] == []
    assert process.returncode == (0 if end == signal.SIGINT else -signal.SIGTERM)
