"""What `Engine(backend=...)` takes, and what it refuses before anything is started."""

from __future__ import annotations

from typing import Any

import pytest

from engine import Engine, errors
from engine_inline import InlineAdapter


@pytest.mark.parametrize(
    ("backend", "said"),
    [
        ("lokal", r"backend='lokal' is not the name of an installed plug-in; there are: .*'inline', 'local'"),
        (5, "backend must be the name of an adapter or an adapter instance, not 5"),
        (InlineAdapter, r"backend must be an instance, not the class InlineAdapter: InlineAdapter\(\.\.\.\)"),
    ],
)
def test_what_is_no_adapter(backend: Any, said: str) -> None:
    with pytest.raises(errors.InvalidArgument, match=said):
        Engine(backend=backend)


def test_an_instance_is_taken_as_it_is(leaves_nothing: Any) -> None:
    with Engine(backend=InlineAdapter(), http_options={"location": None}) as engine:
        assert engine.list_backends() == {}
