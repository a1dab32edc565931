"""What `Engine(backend=...)` takes, and what it refuses before anything is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine import Engine, errors
from engine.seam.adapter import AdapterBase
from engine.seam.worker import WorkerSpec
from engine.testing.fakes import FakeAdapter
from engine_inline import InlineAdapter


class Unfinished(AdapterBase):
    async def start_worker(self, spec: WorkerSpec) -> None:
        raise NotImplementedError

    def __repr__(self) -> str:
        return "an unfinished adapter"


@pytest.mark.parametrize(
    ("backend", "said"),
    [
        ("lokal", r"backend='lokal' is not the name of an installed plug-in; there are: .*'inline', 'local'"),
        (5, "backend must be the name of an adapter or an adapter instance, not 5"),
        (Unfinished(), "backend=an unfinished adapter is no adapter: it lacks bound, close, .*, tell$"),
        (InlineAdapter, r"backend must be an instance, not the class InlineAdapter: InlineAdapter\(\.\.\.\)"),
    ],
)
def test_what_is_no_adapter(backend: Any, said: str) -> None:
    with pytest.raises(errors.InvalidArgument, match=said):
        Engine(backend=backend)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("no_such_module:Adapter", "No module named 'no_such_module'"),
        ("engine_inline:Nothing", "no attribute 'Nothing'"),
    ],
)
def test_an_adapter_that_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str, said: str
) -> None:
    installed = tmp_path / "broken_adapter-1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-adapter\nVersion: 1\n")
    (installed / "entry_points.txt").write_text(f"[engine.adapters]\nbroken = {entry}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        errors.InvalidArgument,
        match=f"backend='broken' is installed, by broken-adapter, but '{entry}' cannot be imported: .*{said}",
    ):
        Engine(backend="broken")


@pytest.mark.parametrize("method", ["start", "start_worker", "stop"])
def test_a_method_that_is_no_coroutine_is_named(method: str, leaves_nothing: Any) -> None:
    adapter = FakeAdapter()
    setattr(adapter, method, lambda *args: None)
    with pytest.raises(errors.InvalidArgument, match=f"its method {method} must be written with `async def`"):
        engine = Engine(backend=adapter, http_options={"location": None})
        try:
            if method != "stop":
                engine.create_backend("b", len)
        finally:
            engine.shutdown()


def test_an_instance_is_taken_as_it_is(leaves_nothing: Any) -> None:
    with Engine(backend=InlineAdapter(), http_options={"location": None}) as engine:
        assert engine.list_backends() == {}
