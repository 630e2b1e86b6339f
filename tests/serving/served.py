"""A server on loopback with a pico model and an edit."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from perpend.core.edits import Edit, ModuleEdit
from perpend.judges.panel import Panel
from perpend.models.load import load_model
from perpend.models.session import Session
from perpend.serving.app import Settings, application
from perpend.serving.duet import Duet
from perpend.serving.listen import Listener, address_of, take


def an_edit(session: Session, weight: float = 1.0, mode: Any = "plain") -> Edit:
    """An edit of every writer along one random direction."""
    direction = torch.randn(1, session.hidden_size, generator=torch.Generator().manual_seed(1))
    part = ModuleEdit(direction / direction.norm(), weight, mode)
    return Edit({writer.name: part for writer in session.anatomy.writers})


def a_duet(folder: Path, *, edited: bool = True) -> Duet:
    session = Session(load_model(folder))
    return Duet(session, an_edit(session) if edited else None, Panel)


@contextmanager
def listening(duet: Duet, **settings: Any) -> Iterator[str]:
    """Yield the URL of a server that is up inside the block."""
    ready = threading.Event()
    taken = take("127.0.0.1", 0)
    url = address_of(taken, "127.0.0.1")
    app = application(duet, replace(Settings("pico", 16), **settings))
    listener = Listener(app, taken, ready.set)
    thread = threading.Thread(target=listener.serve_until_stopped, daemon=True)
    thread.start()
    assert ready.wait(20)
    try:
        yield url
    finally:
        listener.should_exit = True
        thread.join(20)
    assert not thread.is_alive()


def raw(url: str, text: str) -> str:
    """Send bytes that no client would send; returns the response."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as wire:
        wire.sendall(text.replace("\n", "\r\n").encode())
        wire.shutdown(socket.SHUT_WR)
        found = b""
        while block := wire.recv(65536):
            found += block
    return found.decode()
