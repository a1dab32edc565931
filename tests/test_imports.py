"""Who may import whom, lazy imports included; and what `import engine` must not cost."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import run_python

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "engine": ROOT / "engine",
    **{path.name: path for path in sorted((ROOT / "adapters").iterdir()) if (path / "__init__.py").exists()},
}
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


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def nodes_of(tree: ast.AST, *, lazy: bool) -> Iterator[ast.AST]:
    """Everything that runs: without what only type checkers read, and on demand without the bodies of functions."""
    for child in ast.iter_child_nodes(tree):
        if is_type_checking(child):
            assert isinstance(child, ast.If)
            for other in child.orelse:
                yield from nodes_of(other, lazy=lazy)
        elif lazy or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield child
            yield from nodes_of(child, lazy=lazy)


def imports_of(module: str, *, lazy: bool = True) -> set[str]:
    """The full names of what a module imports; names of modules as far as they are ours."""
    path = ALL_MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in nodes_of(ast.parse(path.read_text()), lazy=lazy):
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


def test_the_walk_sees_lazy_imports_but_not_those_for_type_checkers() -> None:
    assert "uvloop" in imports_of("engine.http.ingress_worker")
    assert "uvloop" not in imports_of("engine.http.ingress_worker", lazy=False)
    assert "engine.calling.handle" in imports_of("engine.serving.context")  # in a function
    assert "engine.seam.adapter" not in imports_of("engine.calling.slot")  # for annotations only


@pytest.mark.parametrize("module", ALL_MODULES)
def test_packages_import_in_one_direction(module: str) -> None:
    package = top(module)
    others = {top(name) for name in imports_of(module)} & set(PACKAGES) - {package}
    assert others <= MAY_IMPORT[package]


@pytest.mark.parametrize("module", modules("engine"))
def test_the_core_knows_no_server_no_socket_and_no_cluster(module: str) -> None:
    allowed = {"uvloop"} if module == "engine.http.ingress_worker" else set()
    assert {top(name) for name in imports_of(module)} & FORBIDDEN_IN_CORE <= allowed


@pytest.mark.parametrize("module", modules("engine"))
def test_the_core_opens_no_server_through_a_loop(module: str) -> None:
    tree = ast.parse(ALL_MODULES[module].read_text())
    assert not {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} & SERVERS


@pytest.mark.parametrize("module", modules("engine_inline"))
def test_the_inline_adapter_takes_only_the_addresses_from_the_wire(module: str) -> None:
    wire = {name for name in imports_of(module) if top(name) == "engine_wire"}
    assert wire <= {"engine_wire.listening"}


def test_only_one_package_imports_hypercorn() -> None:
    importers = {top(module) for module in ALL_MODULES if "hypercorn" in map(top, imports_of(module))}
    assert importers == {"engine_http"}


def test_only_one_package_imports_ray_and_only_when_it_must() -> None:
    importers = {top(module) for module in ALL_MODULES if "ray" in map(top, imports_of(module))}
    assert importers == {"engine_ray"}
    assert not [module for module in ALL_MODULES if "ray" in map(top, imports_of(module, lazy=False))]


def test_the_core_imports_itself_without_circles() -> None:
    edges = {module: imports_of(module, lazy=False) & set(ALL_MODULES) for module in modules("engine")}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(edges[module]):
                visit(other, (*path, module))
            done.add(module)

    for module in edges:
        visit(module, ())
    assert done == set(edges)


def test_importing_the_engine_loads_nothing_heavy() -> None:
    script = (
        "import sys; before = set(sys.modules); import engine; "  # a coverage run has loaded more by then
        "[getattr(engine, name) for name in engine.__all__]; print(*set(sys.modules) - before)"
    )
    loaded = {top(name) for name in run_python("-c", script).split()}
    assert "engine" in loaded
    heavy = {"starlette", "hypercorn", "multiprocessing", "asyncio", "uvloop", "cloudpickle", "anyio"}
    assert not loaded & (heavy | ADAPTERS)
