"""What has one home in the package is found nowhere else. Syntax trees are walked, nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.ranks import ROOT

PACKAGE = ROOT / "a3po_megatron"
NAMES = "files/run_folder.py"  # where steps are written in names
MODULES = ("os", "shutil")
MOVES = frozenset({"rename", "renames", "replace", "move"})  # of these modules


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def renames(tree: ast.AST) -> Iterator[int]:
    """Yields lines where a file or folder may be given another name.

    `rename` is a method of paths alone here. `replace` is a path's if it is given one thing to be replaced by: a text's
    takes two, that of a date or of a code object takes keywords, and dataclasses.replace has both. What os and shutil
    have of this is not even to be named.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            if any(alias.name in MOVES for alias in node.names):
                yield node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in MODULES:
            if node.attr in MOVES:
                yield node.lineno
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            unbound = isinstance(node.func.value, ast.Name) and node.func.value.id == "Path"
            target = [keyword.arg for keyword in node.keywords] == ["target"]
            one = target or (len(node.args) == 1 and not node.keywords)
            of_os = isinstance(node.func.value, ast.Name) and node.func.value.id in MODULES  # seen above
            if not of_os and (node.func.attr == "rename" or (node.func.attr == "replace" and (one or unbound))):
                yield node.lineno


def imported(tree: ast.AST) -> set[str]:
    """The modules of others that a file imports."""
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return found | {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}


def step_names(tree: ast.AST) -> Iterator[int]:
    """Yields lines with a string that holds the beginning of a step's name, also within an f-string. Docstrings and
    comments may speak of them."""
    said = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) not in said:
            text = node.value.decode("latin-1") if isinstance(node.value, bytes) else node.value
            if isinstance(text, str) and "step-" in text:
                yield node.lineno


def test_one_file_alone_gives_a_file_another_name() -> None:
    trees = {path.relative_to(PACKAGE): ast.parse(path.read_text()) for path in sources()}
    assert len(trees) > 100
    found = [f"{path}:{line}" for path, tree in trees.items() for line in renames(tree)]
    assert [place for place in found if not place.startswith("files/replace.py:")] == []
    assert found  # it is seen where it does stand


def test_one_file_alone_takes_locks() -> None:
    where = [str(path.relative_to(PACKAGE)) for path in sources() if "fcntl" in imported(ast.parse(path.read_text()))]
    assert where == ["files/lock.py"]


def test_the_names_of_steps_are_written_in_one_file() -> None:
    where = {str(path.relative_to(PACKAGE)) for path in sources() if any(step_names(ast.parse(path.read_text())))}
    assert where == {NAMES}


@pytest.mark.parametrize(
    "code",
    [
        "os.replace(a, b)",
        "os.rename(a, b)",
        "shutil.move(a, b)",
        "from os import replace",
        "call = os.replace",
        "partial.replace(path)",
        "(folder / 'x').rename(folder / 'y')",
        "Path.rename(a, b)",
        "path.rename(target=b)",
        "path.replace(target=b)",
        "Path.replace(a, b)",
    ],
)
def test_every_way_to_give_a_file_another_name_is_seen(code: str) -> None:
    assert list(renames(ast.parse(code))) == [1]


@pytest.mark.parametrize(
    "code", ["text.replace('a', 'b')", "dataclasses.replace(a, b=1)", "code.replace(co_consts=c)", "os.path.join(a)"]
)
def test_a_replacement_in_a_text_or_a_record_is_none(code: str) -> None:
    assert list(renames(ast.parse(code))) == []


@pytest.mark.parametrize(
    "code", ["f'step-{step:06d}'", "a.glob('step-*')", "p = b'step-'", "'x' + f'{a}torn-step-{b}'"]
)
def test_every_name_of_a_step_is_seen(code: str) -> None:
    assert list(step_names(ast.parse(code))) == [1]


def test_what_a_docstring_says_of_a_step_is_no_name() -> None:
    assert list(step_names(ast.parse('"""step-00012"""\ndef f():\n    """step-3"""\n'))) == []
