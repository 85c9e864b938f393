"""How the house is laid out: few rooms, data that flows one way, no circle, files that are read in one sitting."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import hvp_engine

PACKAGE = Path(hvp_engine.__file__).parent
ROOMS = (
    "errors",
    "_support",
    "ops",
    "differentiable",
    "differentiation",
    "solvers",
    "engines",
    "distributed",
    "operators",
    "linear_model",
    "hypergradients",
    "tuning",
    "diagnostics",
    "demo",
)
"""Every room, each above those that it may use."""

FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.relative_to(PACKAGE).parts[0] not in ("kernels", "__init__.py", "__main__.py")
}


@cache
def imports_of(module: str) -> frozenset[str]:
    """The modules of the package that a module imports, wherever the statement stands."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    submodules = {name for name in found if name in FILES}
    packages = {name for name in submodules if FILES[name].name == "__init__.py"}
    named = {name for name in packages if any(other.startswith(f"{name}.") for other in submodules)}
    return frozenset(submodules - named - {module})


def room_of(module: str) -> str:
    return module.split(".")[1]


def test_the_rooms_are_these() -> None:
    files = {"__init__.py", "__main__.py", "__pycache__", "_C.pyi", "py.typed", "kernels"}
    found = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.name not in files}
    assert {name for name in found if not name.endswith((".so", ".pyd"))} == set(ROOMS) and len(ROOMS) <= 14


def test_data_flows_one_way() -> None:
    upward = [
        f"{module} imports {other}"
        for module in FILES
        for other in imports_of(module)
        if ROOMS.index(room_of(other)) > ROOMS.index(room_of(module))
    ]
    assert not upward, upward


def test_no_module_waits_for_itself() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"circle: {' > '.join([*path[path.index(module) :], module])}"
        if module not in done:
            for other in imports_of(module):
                visit(other, (*path, module))
            done.add(module)

    for module in FILES:
        visit(module, ())


def test_a_file_is_read_in_one_sitting() -> None:
    lengths = {module: len(path.read_text().splitlines()) for module, path in FILES.items()}
    assert not {module: length for module, length in lengths.items() if length > 320}


def test_no_module_shares_its_name_with_a_function_it_exports() -> None:
    for module, path in FILES.items():
        defined = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
        assert module.rpartition(".")[2] not in defined, module
