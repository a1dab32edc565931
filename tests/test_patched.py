"""Processes whose threads and sockets gevent or eventlet has replaced."""

from __future__ import annotations

import sys
import threading
from types import ModuleType

import pytest

from engine import Engine, errors
from engine.calling.client import Client
from engine.seam.patched import check_unpatched
from engine.testing.fakes import FakeAdapter


def pretend(monkeypatch: pytest.MonkeyPatch, library: str, patched: tuple[str, ...]) -> None:
    """Let a library that need not be installed say what it has patched."""
    name, asked = {
        "gevent": ("gevent.monkey", "is_module_patched"),
        "eventlet": ("eventlet.patcher", "is_monkey_patched"),
    }[library]
    module = ModuleType(name)
    setattr(module, asked, lambda name: name in patched)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize(
    ("library", "patched", "named"),
    [
        ("gevent", ("_thread", "threading", "socket", "select", "time"), "_thread, threading, socket, select"),
        ("gevent", ("socket",), "socket"),
        ("eventlet", ("thread", "socket", "select", "os"), "thread, socket, select"),
    ],
)
def test_an_engine_is_refused_there(
    monkeypatch: pytest.MonkeyPatch, library: str, patched: tuple[str, ...], named: str
) -> None:
    pretend(monkeypatch, library, patched)
    before = set(threading.enumerate())
    for create in (lambda: Engine(backend="inline"), lambda: Engine.connect("any", backend="ray")):
        with pytest.raises(errors.InvalidArgument, match=f"{library} has patched {named} in this process") as caught:
            create()
        assert "gthread" in str(caught.value)
    assert set(threading.enumerate()) == before


def test_a_handle_that_was_sent_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "gevent", ("threading",))
    with pytest.raises(errors.InvalidArgument, match="gevent has patched threading"):
        Client.subscribe("elsewhere", FakeAdapter(), "fake:controller")


@pytest.mark.parametrize("library", ["gevent", "eventlet"])
def test_one_that_is_merely_imported_is_welcome(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    pretend(monkeypatch, library, ("ssl", "time"))
    check_unpatched()
