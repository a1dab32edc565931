"""What is for type checkers: true when it is run, and of no weight. mypy itself checks `typed_program`."""

from __future__ import annotations

import inspect
import pickle
import sys
import typing
from typing import Any

import pytest
import typed_program

from engine import AsyncHandle, Engine, Handle, Ref
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


@pytest.mark.skipif(sys.version_info < (3, 11), reason="overloads are not kept")
def test_the_first_overload_of_a_control_call_is_its_own_signature() -> None:
    """An argument that was added to the method alone would be unknown to type checkers, or pass for anything."""
    overloaded = {
        name: typing.get_overloads(inspect.unwrap(method))  # type: ignore[attr-defined, unused-ignore]
        for name, method in vars(Engine).items()
        if inspect.isfunction(method)
    }
    assert {"create_backend", "set_traffic", "get_handle"} <= {name for name, found in overloaded.items() if found}
    for name, found in overloaded.items():
        if found:
            own, first = (inspect.signature(one).parameters.values() for one in (getattr(Engine, name), found[0]))
            assert [(one.name, one.kind, one.default) for one in own] == (
                [(one.name, one.kind, one.default) for one in first]
            ), name
