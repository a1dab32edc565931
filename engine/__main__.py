"""The command ``engineroom``, also ``python -m engine``: says which version is installed, and what to do with it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

__all__ = ["main"]

_WHAT_IT_IS = """\
An embeddable multiprocessing engine: functions and classes served from processes, by handle and over HTTP.

It is a library. A program uses it by

    from engine import Engine

and help(engine), help(engine.Engine) tell the rest in Python; the pages of the documentation are in docs/ of the
project's repository."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line says (by default that of this process), and print it."""
    import engine

    parser = argparse.ArgumentParser(
        prog="engineroom", description=_WHAT_IT_IS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {engine.__version__}")
    parser.parse_args(arguments)
    parser.print_help()


if __name__ == "__main__":
    main()
