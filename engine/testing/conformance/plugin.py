"""The suite as a plugin of pytest: the option ``--adapter``.

It is no entry point, which every pytest of every user would load: whoever wants it says
``-p engine.testing.conformance.plugin``, or runs ``python -m engine.testing.conformance``.
"""

from __future__ import annotations

import importlib
from difflib import get_close_matches
from typing import Any

import pytest

from .factory import AdapterFactory, NoAdapter, describe

__all__ = ["factories_of", "load_factory", "pytest_addoption", "pytest_sessionstart"]

_FACTORIES = pytest.StashKey[list[AdapterFactory]]()
_NONE_GIVEN = (
    "the conformance suite needs an adapter to run against: give --adapter PACKAGE:FACTORY, say "
    "--adapter engine_local:LocalAdapter"
)
_NOT_LOADED = f"{_NONE_GIVEN}; pytest knows that option with -p engine.testing.conformance.plugin"
_CURE = "name a module, and in it a callable without arguments that returns an adapter, such as the adapter's class"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--adapter``."""
    parser.getgroup("engine").addoption(
        "--adapter",
        action="append",
        default=[],
        metavar="PACKAGE:FACTORY",
        help="run the conformance suite against the adapter that this callable returns; may be given several times",
    )


def pytest_sessionstart(session: pytest.Session) -> None:
    """Make an adapter of each kind before anything is collected: what is wrong with them shows here."""
    given: list[str] = session.config.getoption("--adapter")
    if not given:
        raise pytest.UsageError(_NONE_GIVEN)
    session.config.stash[_FACTORIES] = [load_factory(value) for value in given]


def factories_of(config: pytest.Config) -> list[AdapterFactory]:
    """What the command line gave.

    Raises:
        pytest.UsageError: Nothing.
    """
    try:
        return config.stash[_FACTORIES]
    except KeyError:
        raise pytest.UsageError(_NOT_LOADED) from None


def load_factory(given: str) -> AdapterFactory:
    """Import what ``--adapter`` names, and see whether it returns an adapter.

    Args:
        given: ``package:factory``; both may have dots.

    Raises:
        pytest.UsageError: It cannot be imported, or is no factory of adapters; the message says what to do.
    """
    try:
        return describe(given, _factory(given))
    except (pytest.UsageError, NoAdapter) as error:
        raise pytest.UsageError(f"--adapter {given}: {error}") from error
    except Exception as error:
        raise pytest.UsageError(
            f"--adapter {given}: calling it raised {type(error).__name__}: {error}; {_CURE}"
        ) from error


def _factory(given: str) -> Any:
    module, _, path = given.partition(":")
    if not module or not path:
        raise pytest.UsageError(f"it must be PACKAGE:FACTORY, as in engine_local:LocalAdapter; {_CURE}")
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:
        raise pytest.UsageError(
            f"{module!r} cannot be imported ({type(error).__name__}: {error}); install it, or run this in the "
            "directory that it is in"
        ) from error
    for name in path.split("."):
        if not hasattr(found, name):
            near = get_close_matches(name, dir(found), 1)
            hint = f"did you mean {near[0]!r}?" if near else _CURE
            raise pytest.UsageError(f"{getattr(found, '__name__', found)} has no {name!r}; {hint}")
        found = getattr(found, name)
    if not callable(found):
        raise pytest.UsageError(f"that is {found!r}, which cannot be called; {_CURE}")
    return found
