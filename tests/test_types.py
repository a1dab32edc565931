"""What is for type checkers: true when it is run, and of no weight. mypy itself checks `typed_program`."""

from __future__ import annotations

import pickle
import typing
from typing import Any

import pytest
import typed_program

from engine import AsyncHandle, Handle, Ref
from engine.calling.handle import make_handle


def test_the_typed_program_runs() -> None:
    typed_program.main()


@pytest.mark.parametrize("kind", [Handle, AsyncHandle, Ref])
def test_a_result_type_can_be_written_down(kind: Any) -> None:
    assert typing.get_origin(kind[int]) is kind
    assert typing.get_args(kind[int]) == (int,)


@pytest.mark.parametrize("sync", [True, False])
def test_handles_and_refs_are_no_larger_for_it(sync: bool) -> None:
    handle = make_handle("engine", "local", "address", "endpoint", sync=sync)
    assert not hasattr(handle, "__dict__") and not hasattr(Ref(None, "endpoint"), "__dict__")
    assert type(pickle.loads(pickle.dumps(handle))) is type(handle)
