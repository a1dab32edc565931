"""The command `engineroom`: what it prints is that of the installed distribution."""

from __future__ import annotations

from importlib import metadata

import pytest
from harness import run_python

import engine
from engine.__main__ import main


def test_the_version_is_the_distributions() -> None:
    assert engine.__version__ == metadata.version("engineroom")
    assert "__version__" in dir(engine)


def test_sources_that_nobody_installed_have_a_version_that_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    vars(engine).pop("__version__", None)
    monkeypatch.setattr(metadata, "version", missing)
    assert engine.__version__ == "0+unknown"
    del vars(engine)["__version__"]  # it was noted: whoever asks next is to look it up again


def test_the_version_is_looked_up_when_it_is_asked_for() -> None:
    script = (
        "import engine; print('__version__' in vars(engine)); engine.__version__; print('__version__' in vars(engine))"
    )
    assert run_python("-c", script) == "False\nTrue\n"


def test_the_command_is_installed_under_the_distributions_name() -> None:
    (script,) = metadata.distribution("engineroom").entry_points.select(group="console_scripts")
    assert script.name == "engineroom"
    assert script.load() is main


def test_it_says_its_version() -> None:
    assert run_python("-m", "engine", "--version") == f"engineroom {engine.__version__}\n"


def test_it_says_what_to_do_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    assert "from engine import Engine" in capsys.readouterr().out


def test_what_it_does_not_know_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["serve"])
    assert caught.value.code == 2
    assert "unrecognized arguments: serve" in capsys.readouterr().err
