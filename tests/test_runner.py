"""The controller's thread: what happens when it cannot start."""

from __future__ import annotations

import asyncio

import pytest

from engine import Engine, errors


def test_without_a_loop_there_is_an_error_and_an_end(monkeypatch, leaves_nothing):
    def lacking():
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(asyncio, "new_event_loop", lacking)
    engine = Engine(backend="inline")
    with pytest.raises(OSError, match="Too many open files"):
        engine.create_backend("b", len)
    engine.shutdown()
    with pytest.raises(errors.EngineClosed):
        engine.create_backend("b", len)
