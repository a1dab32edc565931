"""Whether another process finds a module by its name, as far as that can be told without importing anything.

A module may be in `sys.modules` and yet nowhere on the path: a plug-in that was loaded from a file
(`importlib.util.spec_from_file_location`), a test module under ``pytest --import-mode=importlib``, the main module in a
child of `multiprocessing`. What is of such a module travels by value.
"""

from __future__ import annotations

import functools
import os
import sys
from types import ModuleType
from typing import Any

__all__ = ["is_importable", "marks_of_unimportable", "note_modules"]

_verdicts: dict[str, tuple[int, bool]] = {}  # by name: of which module, by identity of its spec
marks_of_unimportable: set[bytes] = set()
"""What pickles contain that mention a module which is not to be found by its name, as far as is known."""
_noted = 0  # how many modules there were at the last look


def note_modules() -> None:
    """Look at all modules that came since the last time."""
    global _noted
    if len(sys.modules) == _noted:
        return
    _noted = len(sys.modules)
    for name, module in list(sys.modules.items()):
        # One without a spec was made by hand or by an extension module, often for its own use: there is time to decide
        # when something of it is met.
        spec = getattr(module, "__spec__", None)
        if name not in _verdicts and isinstance(module, ModuleType) and (spec is not None or name == "__mp_main__"):
            is_importable(module)


def is_importable(module: ModuleType) -> bool:
    """Whether another process, which has this one's `sys.path`, finds this very module by its name."""
    name = module.__name__
    if name == "__main__":
        return False
    spec = getattr(module, "__spec__", None)
    known = _verdicts.get(name)
    if known is not None and known[0] == id(spec):
        return known[1]
    try:
        verdict = _decide(name, spec)
    except Exception:  # some module's, or some finder's, way of being different
        verdict = True
    _verdicts[name] = id(spec), verdict
    if not verdict:
        encoded = name.encode()
        marks_of_unimportable.add(b"\x8c%c%s" % (len(encoded), encoded) if len(encoded) < 256 else encoded)
    return verdict


def _decide(name: str, spec: Any) -> bool:
    if name.partition(".")[0] in sys.stdlib_module_names:
        return True
    if spec is None:
        # Made by hand. Below a package that is that package's own business.
        return "." in name or name in sys.builtin_module_names or _find(name, None) is not None
    if spec.name != name:
        return True  # known under another name as well
    if not spec.has_location or not isinstance(spec.origin, str):
        places = list(spec.submodule_search_locations or ())  # of a namespace; else it is built in
        return not places or any(map(functools.partial(_lies_on_path, name), places)) or _is_found(name, *places)
    return _lies_on_path(name, spec.origin) or _is_found(name, spec.origin)


def _lies_on_path(name: str, origin: str) -> bool:
    """Whether a file or directory is where the path leads to by this name: as usual, and told without a look."""
    directory, file = os.path.split(origin)
    stem = file.partition(".")[0]
    place = directory if stem == "__init__" else os.path.join(directory, stem)
    tail = os.sep + name.replace(".", os.sep)
    return place.endswith(tail) and place[: -len(tail)] in _path()


def _path() -> frozenset[str]:
    entries = tuple(entry for entry in sys.path if isinstance(entry, str))
    return _absolute(entries, "" if all(map(os.path.isabs, entries)) else os.getcwd())


@functools.lru_cache(maxsize=8)
def _absolute(entries: tuple[str, ...], cwd: str) -> frozenset[str]:
    return frozenset(os.path.join(cwd, entry).rstrip(os.sep) for entry in entries)


def _is_found(name: str, *origins: str) -> bool:
    """Whether what is found by this name is in one of these places."""
    parent = name.rpartition(".")[0]
    places = None
    if parent:
        package = sys.modules.get(parent)
        if not isinstance(package, ModuleType) or not is_importable(package):
            return False
        places = getattr(package, "__path__", None)
        if places is None:
            return False
    found = _find(name, places)
    if found is None:
        return False
    places = list(found.submodule_search_locations or ()) if found.origin is None else [found.origin]
    return not {*map(os.path.realpath, places)}.isdisjoint(map(os.path.realpath, origins))


def _find(name: str, places: Any) -> Any:
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        if find is None or type(finder).__module__.startswith("_pytest."):  # which other processes lack
            continue
        spec = find(name, places, None)
        if spec is not None:
            return spec
    return None
