"""Rules of the house that need code to check."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("actors", "algorithms", "bridge", "configs")
PRODUCT = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
SOURCES = [*PRODUCT, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "examples").rglob("*.py"))]

# Foreign libraries are patched here and nowhere else.
PATCHING = {"actors/megatron_cpu.py", "bridge/transport/vllm_fixes.py"}
FOREIGN = ("torch", "megatron", "vllm", "ray", "transformers")
# The only homes of these libraries.
HOMES = {
    "megatron": re.compile(r"(actors|bridge)/megatron\w*\.py"),
    "vllm": re.compile(r"actors/engine\w*\.py|bridge/transport/\w+\.py"),
    "ray": re.compile(r"actors/\w+\.py"),
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_and_functions_stay_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, f"{name_of(path)}: {node.name}"


def imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", PRODUCT, ids=name_of)
def test_ray_vllm_and_megatron_stay_at_home(path: Path) -> None:
    for library in HOMES.keys() & set(imported(tree_of(path))):
        assert HOMES[library].fullmatch(name_of(path)), f"{library} is imported in {name_of(path)}"


def foreign_names(tree: ast.Module) -> set[str]:
    """Names in the module that came from a foreign library."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.asname or a.name.split(".")[0] for a in node.names if a.name.split(".")[0] in FOREIGN}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FOREIGN:
            found |= {alias.asname or alias.name for alias in node.names}
    return found


def root_name(node: ast.expr) -> str | None:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


@pytest.mark.parametrize("path", [path for path in PRODUCT if name_of(path) not in PATCHING], ids=name_of)
def test_foreign_libraries_are_patched_in_one_place(path: Path) -> None:
    tree = tree_of(path)
    foreign = foreign_names(tree)
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in targets:
            patched = isinstance(target, ast.Attribute) and root_name(target) in foreign
            assert not patched, f"{name_of(path)}:{node.lineno} assigns to {ast.unparse(target)}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
            assert root_name(node.args[0]) not in foreign, f"{name_of(path)}:{node.lineno}"


@pytest.mark.parametrize("path", PRODUCT, ids=name_of)
def test_nothing_happens_at_import(path: Path) -> None:
    """Top-level statements define; calls that only make a value (loggers, patterns, types) are assignments."""
    for node in tree_of(path).body:
        if isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant), f"{name_of(path)}:{node.lineno}"
        if isinstance(node, ast.If):
            test = ast.unparse(node.test)
            assert test in ("TYPE_CHECKING", "__name__ == '__main__'"), f"{name_of(path)}:{node.lineno}"
        for inner in ast.walk(node):
            assert not isinstance(inner, ast.Global), f"{name_of(path)}:{node.lineno}"
