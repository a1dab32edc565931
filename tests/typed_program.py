"""A program whose types are the test: mypy checks it with the engine, and test_types.py runs it.

A line with an error to be ignored must have that error: mypy complains about an ignored error that is not there.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import engine as engine_package
from engine import AsyncHandle, BackendConfig, Engine, Handle, Ref, ServeRequest, accept_batch, get_replica_context

if TYPE_CHECKING:
    from typing_extensions import assert_type
else:

    def assert_type(value: Any, kind: Any) -> Any:
        return value


def double(request: ServeRequest) -> int:
    return int(2 * request.data)


@accept_batch
def doubles(requests: list[ServeRequest]) -> list[int]:
    return [2 * int(request.data) for request in requests]


class Front:
    def __init__(self, back: Handle[int]) -> None:
        self.back = back
        self.by_name = get_replica_context().get_handle("double", sync=True)

    def __call__(self, request: ServeRequest) -> list[int]:
        return [self.back.call(request.data), self.by_name.call(request.data)]

    @accept_batch
    def each(self, values: list[int]) -> list[str]:
        return [str(value) for value in values]


def use_refs(engine: Engine, handle: Handle[int]) -> None:
    ref: Ref[int] = handle.remote(1)  # on Ray it is Ray's own, so it has no type of ours by itself
    assert_type(ref.result(timeout=5), int)
    assert_type(ref.future().result(), int)
    assert_type(engine.get(ref), int)
    assert_type(engine.get([ref, ref]), list[int])
    assert_type(engine.wait([ref], num_returns=1), tuple[list[Ref[int]], list[Ref[int]]])
    anything = handle.remote(1)
    assert_type(anything, Any)
    assert (engine.get(anything), engine.get([anything])) == (2, [2])


def use_floats(handle: Handle[float]) -> float:
    return assert_type(handle.call(1), float)


def use_handles(engine: Engine) -> None:
    assert_type(engine.get_handle("double"), Handle[Any])
    assert_type(engine.get_handle("double", sync=True), Handle[Any])
    assert_type(engine.get_handle("double", sync=False), AsyncHandle[Any])
    assert_type(engine.get_handle("double", missing_ok=True), Handle[Any])
    assert_type(engine.get_handle(endpoint_name="double"), Handle[Any])
    assert_type(engine.get_handle(endpoint_name="double", sync=False), AsyncHandle[Any])
    handle: Handle[int] = engine.get_handle("double")
    assert assert_type(handle.call(1), int) == 2
    assert_type(handle.options(timeout_s=5, shard_key="k", http_headers={"a": "b"}), Handle[int])
    assert_type(handle.options(timeout_s=5).call(1), int)
    assert_type(handle.options(method_name="__call__"), Handle[Any])  # another method gives something else
    untyped: Handle = engine.get_handle("double")  # as good as Handle[Any]
    assert untyped.call(1) == 2
    assert use_floats(handle) == 2.0
    use_refs(engine, handle)
    if TYPE_CHECKING:
        text: str = handle.call(1)  # type: ignore[assignment]
        narrower: Handle[bool] = handle  # type: ignore[assignment]
        blocking: Handle[int] = engine.get_handle("double", sync=False)  # type: ignore[assignment]
        handle.options(timeout=5)  # type: ignore[call-overload]
        assert text and narrower and blocking


async def use_async_handles(engine: Engine) -> None:
    handle: AsyncHandle[int] = engine.get_handle("double", sync=False)
    assert_type(await handle.call(1), int)
    assert_type(await handle.options(timeout_s=5).call(1), int)
    ref: Ref[int] = await handle.remote(1)
    assert_type(await ref, int)


def use_names_of_ray_serve(engine: Engine) -> None:
    engine.create_backend(backend_tag="former", func_or_class=double, config=BackendConfig(max_queued_requests=5))
    engine.update_backend_config("former", config_options={"max_queued_requests": 6})
    assert_type(engine.get_backend_config(backend_tag="former"), BackendConfig)
    engine.create_endpoint(endpoint_name="former", backend="former")
    engine.set_traffic("former", traffic_policy_dictionary={"former": 1.0})
    engine.shadow_traffic("former", backend_tag="double", proportion=0.0)
    engine.delete_endpoint(endpoint="former")
    engine.delete_backend(backend_tag="former")
    if TYPE_CHECKING:
        engine.create_endpoint(backend="former")  # type: ignore[call-overload]
        engine.delete_backend("former", backend_tag="former")  # type: ignore[call-overload]


def main() -> None:
    assert_type(engine_package.__version__, str)
    with Engine("inline", http_options={"location": None}) as engine:
        engine.create_backend("double", double)
        engine.create_endpoint("double", backend="double")
        engine.update_backend("double", double, config=BackendConfig(max_surge=1), ray_actor_options={"num_cpus": 1})
        engine.create_backend("doubles", doubles, config={"max_batch_size": 2})
        engine.create_backend("front", Front, engine.get_handle("double"))
        engine.create_endpoint("front", backend="front")
        use_handles(engine)
        asyncio.run(use_async_handles(engine))
        use_names_of_ray_serve(engine)
        front: Handle[list[int]] = engine.get_handle("front")
        assert front.call(2) == [4, 4]
        assert front.options(method_name="each").call(5) == "5"
    if TYPE_CHECKING:
        assert_type(doubles([]), list[int])
        assert_type(Front(engine.get_handle("double")).each([1]), list[str])
        doubles(1)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
