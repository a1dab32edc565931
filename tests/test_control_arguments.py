"""Control calls' arguments: other names for them, and options in the wrong place."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from engine import Engine
from engine.control.arguments import also_named, check_init_options
from engine.errors import InvalidArgument


@also_named(first="one", third="three")
def plain(first: int, second: int = 2, *, third: int = 3) -> tuple[int, int, int]:
    """A docstring."""
    return first, second, third


@also_named(first="one")
def passing_on(first: int, *args: Any, **kwargs: Any) -> tuple[int, tuple[Any, ...], dict[str, Any]]:
    return first, args, kwargs


def test_either_name_will_do() -> None:
    assert plain(7) == plain(first=7) == plain(one=7) == (7, 2, 3)
    assert plain(7, three=8) == plain(one=7, three=8) == plain(three=8, second=2, one=7) == (7, 2, 8)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((1,), {"one": 1}, r"^plain\(\) got 'first' twice: 'one' is another name of it$"),
        ((), {"one": 1, "first": 1}, r"^plain\(\) got 'first' twice: 'one' is another name of it$"),
        ((), {"first": 1, "third": 1, "three": 1}, r"^plain\(\) got 'third' twice: 'three' is another name of it$"),
        ((), {}, "missing 1 required positional argument: 'first'"),
        ((), {"one": 1, "two": 2}, "unexpected keyword argument 'two'"),
    ],
)
def test_names_that_do_not_fit(args: Any, kwargs: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        plain(*args, **kwargs)


def test_a_name_that_is_not_needed_belongs_to_what_arguments_are_passed_on_to() -> None:
    assert passing_on(one=1, two=2) == (1, (), {"two": 2})
    assert passing_on(1, 2, one=3) == (1, (2,), {"one": 3})
    assert passing_on(first=1, one=3) == (1, (), {"one": 3})


def test_what_looks_at_a_method_sees_its_own_names() -> None:
    assert list(inspect.signature(plain).parameters) == ["first", "second", "third"]
    assert plain.__doc__ == "A docstring."
    assert list(inspect.signature(Engine.set_traffic).parameters) == ["self", "name", "weights"]


class Takes:
    def __init__(self, num_replicas: int) -> None: ...


class TakesAny:
    def __init__(self, **options: Any) -> None: ...


def function(request: Any) -> None: ...


@pytest.mark.parametrize("kind", [Takes, TakesAny, dict], ids=lambda kind: str(kind.__name__))
def test_a_constructor_may_take_a_name_of_the_engines(kind: Any) -> None:
    check_init_options("b", kind, {"num_replicas": 2, "other": 1})


class Unprintable:
    def __repr__(self) -> str:
        raise ValueError("no words")


@pytest.mark.parametrize(
    ("kind", "kwargs", "message"),
    [
        (Takes, {"num_replicas": 2, "num_cpus": 1}, "num_cpus is no argument of Takes, but belongs in "
         "ray_actor_options={'num_cpus': 1}"),
        (function, {"user_config": "x" * 99}, "user_config is no argument of function, but belongs in "
         "config={'user_config': 'xxxxxxxxxxxx...xxxxxxxxxxxxx'}"),
        (Takes, {"methods": ["GET"]}, "methods is no argument of Takes, but belongs in "
         "create_endpoint(..., methods=['GET'])"),
        (Takes, {"env": 1}, "env is no argument of Takes, but belongs in ray_actor_options={'runtime_env': {...}}"),
    ],
)  # fmt: skip
def test_an_option_that_nothing_takes_is_shown_its_place(kind: Any, kwargs: Any, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_init_options("b", kind, kwargs)
    assert str(caught.value) == f"backend 'b': {message}"


def test_a_value_that_cannot_be_printed() -> None:
    with pytest.raises(InvalidArgument, match="<Unprintable instance at "):
        check_init_options("b", function, {"user_config": Unprintable()})
