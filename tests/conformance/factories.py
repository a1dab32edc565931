"""The adapters that the suite runs against, and what the tests must know about each.

A new adapter adds one line to `FACTORIES` and passes the suite unchanged.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import pytest

from engine import Engine

HTTP = {"host": "127.0.0.1", "port": 0}


@dataclass(frozen=True)
class AdapterFactory:
    """Makes engines on one adapter.

    Attributes:
        name: What `Engine` calls the adapter.
        where: Module and class, to make instances with options.
        options: Options of the instance that most tests share.
        processes: Replicas are processes of their own: they can die alone, and other processes can reach them.
        own_refs: Refs are the engine's own, with `result`; otherwise they are what the platform calls a ref.
        cluster: It needs a Ray cluster to connect to.
    """

    name: str
    where: tuple[str, str]
    options: dict[str, Any]
    processes: bool
    own_refs: bool
    cluster: bool = False

    def adapter_class(self) -> type[Any]:
        module, name = self.where
        cls: type[Any] = getattr(importlib.import_module(module), name)
        return cls

    def engine(self, **http_options: Any) -> Engine:
        """An engine as most users make it: the adapter by name. The caller shuts it down."""
        return Engine(backend=self.name, http_options={**HTTP, **http_options})

    def shared_engine(self) -> Engine:
        """An engine whose replicas start fast, although they import test modules."""
        return Engine(backend=self.adapter_class()(**self.options), http_options=HTTP)


_TEST_MODULES_IMPORT = ["fastapi", "harness", "httpx", "numpy", "pydantic", "pytest", "starlette.responses", "engine"]

FACTORIES = [
    pytest.param(
        AdapterFactory("inline", ("engine_inline", "InlineAdapter"), {}, processes=False, own_refs=True), id="inline"
    ),
    pytest.param(
        AdapterFactory(
            "local", ("engine_local", "LocalAdapter"), {"preload": _TEST_MODULES_IMPORT}, processes=True, own_refs=True
        ),
        id="local",
    ),
    pytest.param(
        AdapterFactory("ray", ("engine_ray", "RayAdapter"), {}, processes=True, own_refs=False, cluster=True), id="ray"
    ),
]
