"""Who may import whom, lazy imports and names for types included; and what `import engine` must not cost."""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from harness import run_python

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "engine": ROOT / "engine",
    **{path.name: path for path in sorted((ROOT / "adapters").iterdir()) if (path / "__init__.py").exists()},
}
FLOORS = {
    "engine": (
        *("errors", "config", "seam", "request", "calling", "http", "serving", "control", "engine", "testing"),
        "__main__",
    ),
    "engine_ray": ("link", "calling", "working", "controlling", "adapter"),
}
"""The rooms of a package, and what stands beside them, from the ground up: each imports only what stands before it."""
ADAPTERS = frozenset(PACKAGES) - {"engine"}
MAY_IMPORT = {
    "engine": frozenset[str](),
    "engine_wire": frozenset({"engine"}),
    "engine_local": frozenset({"engine", "engine_wire"}),
    "engine_inline": frozenset({"engine", "engine_wire"}),
    "engine_http": frozenset({"engine"}),
    "engine_ray": frozenset({"engine", "engine_wire"}),
}
FORBIDDEN_IN_CORE = frozenset({"hypercorn", "uvicorn", "h2", "ray", "uvloop", "socket", "selectors", "multiprocessing"})
SERVERS = frozenset({"create_server", "create_unix_server", "start_server", "start_unix_server", "Server"})


def modules(package: str) -> dict[str, Path]:
    """The modules of a package by full name."""
    base = PACKAGES[package]
    found = {}
    for path in sorted(base.rglob("*.py")):
        parts = [package, *path.relative_to(base).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


ALL_MODULES = {name: path for package in PACKAGES for name, path in modules(package).items()}
CORE = [name for name in modules("engine") if not f"{name}.".startswith("engine.testing.")]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def nodes_of(tree: ast.AST, *, lazy: bool, types: bool) -> Iterator[ast.AST]:
    """Every node, on demand without the bodies of functions, and without what only type checkers read."""
    for child in ast.iter_child_nodes(tree):
        if is_type_checking(child) and not types:
            assert isinstance(child, ast.If)
            for other in child.orelse:
                yield from nodes_of(other, lazy=lazy, types=types)
        elif lazy or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield child
            yield from nodes_of(child, lazy=lazy, types=types)


@functools.cache
def imports_of(module: str, *, lazy: bool = True, types: bool = False) -> set[str]:
    """The full names of what a module imports; names of modules as far as they are ours.

    Args:
        lazy: Also what functions import when they run.
        types: Also what is imported for type checkers alone.
    """
    path = ALL_MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in nodes_of(ast.parse(path.read_text()), lazy=lazy, types=types):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, *([base] if base else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.add(full if full in ALL_MODULES else base)
    return found


def top(name: str) -> str:
    return name.partition(".")[0]


def test_every_package_is_known() -> None:
    assert set(MAY_IMPORT) == set(PACKAGES)


def test_the_walk_sees_lazy_imports_and_on_demand_those_for_type_checkers() -> None:
    assert "uvloop" in imports_of("engine.seam.event_loop")
    assert "uvloop" not in imports_of("engine.seam.event_loop", lazy=False)
    assert "engine.calling.handle" in imports_of("engine.serving.context")  # in a function
    assert "engine.control.controller" not in imports_of("engine.control.operations")
    assert "engine.control.controller" in imports_of("engine.control.operations", types=True)


@pytest.mark.parametrize("module", ALL_MODULES)
def test_packages_import_in_one_direction(module: str) -> None:
    package = top(module)
    others = {top(name) for name in imports_of(module)} & set(PACKAGES) - {package}
    assert others <= MAY_IMPORT[package]


@pytest.mark.parametrize("module", CORE)
def test_the_core_knows_no_server_no_socket_and_no_cluster(module: str) -> None:
    allowed = {"uvloop"} if module == "engine.seam.event_loop" else set()
    assert {top(name) for name in imports_of(module)} & FORBIDDEN_IN_CORE <= allowed


@pytest.mark.parametrize("module", CORE)
def test_the_core_opens_no_server_through_a_loop(module: str) -> None:
    tree = ast.parse(ALL_MODULES[module].read_text())
    assert not {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} & SERVERS


@pytest.mark.parametrize("module", modules("engine_inline"))
def test_the_inline_adapter_takes_only_the_addresses_from_the_wire(module: str) -> None:
    wire = {name for name in imports_of(module) if top(name) == "engine_wire"}
    assert wire <= {"engine_wire.listening"}


@pytest.mark.parametrize("module", [name for name in ALL_MODULES if not f"{name}.".startswith("engine.testing.")])
def test_only_tests_import_what_is_for_tests(module: str) -> None:
    assert not [name for name in imports_of(module, types=True) if f"{name}.".startswith("engine.testing.")]


def test_what_replicas_import_of_the_tests_needs_only_the_standard_library() -> None:
    for module in ("engine.testing", "engine.testing.instruments"):
        assert {top(name) for name in imports_of(module)} <= sys.stdlib_module_names
    assert {top(name) for name in imports_of("engine.testing.fakes")} <= {"engine", *sys.stdlib_module_names}


def test_only_one_package_imports_hypercorn() -> None:
    importers = {top(module) for module in ALL_MODULES if "hypercorn" in map(top, imports_of(module))}
    assert importers == {"engine_http"}


def test_only_one_package_imports_ray_and_only_when_it_must() -> None:
    importers = {top(module) for module in ALL_MODULES if "ray" in map(top, imports_of(module))}
    assert importers == {"engine_ray"}
    assert not [module for module in ALL_MODULES if "ray" in map(top, imports_of(module, lazy=False))]


def circle_in(edges: Mapping[str, set[str]]) -> list[str]:
    """A way that leads from a module back to itself, or an empty list."""
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module not in done:
            for other in sorted(edges[module]):
                if circle := visit(other, (*path, module)):
                    return circle
            done.add(module)
        return []

    return next((circle for module in edges if (circle := visit(module, ()))), [])


def test_a_circle_is_found() -> None:
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_have_no_circles(package: str) -> None:
    """Two modules that need each other, be it only for a type, are a sign that a noun is missing."""
    own = modules(package)
    # Names are imported when they are first used there, from wherever they are: no module needs the package itself.
    edges = {name: (imports_of(name, types=True) & set(own)) - {package} for name in own if name != package}
    assert circle_in(edges) == []


IN_ROOMS = [name for package in FLOORS for name in modules(package) if name != package]


@pytest.mark.parametrize("module", IN_ROOMS)
def test_rooms_import_downwards(module: str) -> None:
    package, floor = module.split(".")[:2]
    floors = FLOORS[package]
    others = {name for name in imports_of(module, types=True) if name.startswith(f"{package}.")}
    assert {name.split(".")[1] for name in others} <= set(floors[: floors.index(floor) + 1])


def test_importing_the_engine_loads_nothing_heavy() -> None:
    script = (
        "import sys; before = set(sys.modules); import engine; "  # a coverage run has loaded more by then
        "[getattr(engine, name) for name in engine.__all__]; print(*set(sys.modules) - before)"
    )
    loaded = {top(name) for name in run_python("-c", script).split()}
    assert "engine" in loaded
    heavy = {"starlette", "hypercorn", "multiprocessing", "asyncio", "uvloop", "cloudpickle", "anyio"}
    assert not loaded & (heavy | ADAPTERS)
