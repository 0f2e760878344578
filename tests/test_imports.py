"""Names that are imported only when something runs: on a GPU, in a child process, in another environment.

A suite without a GPU would pass although tools/bringup or tests/gpu imports what was renamed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.harness.ranks import ROOT

FOLDERS = ("a3po_megatron", "launchers", "slurm", "tests", "tools")


def sources() -> Iterator[Path]:
    for folder in FOLDERS:
        yield from (ROOT / folder).rglob("*.py")


def module_file(dotted: str) -> Path | None:
    """Of a module of this project."""
    place = ROOT.joinpath(*dotted.split("."))
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.exists()), None)


@cache
def defined(path: Path) -> set[str]:
    """Names that a module has once it is imported."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    return names


def missing(path: Path) -> Iterator[str]:
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        above = package[: len(package) + 1 - node.level] if node.level else ()
        dotted = ".".join([*above, *filter(None, [node.module])])
        if dotted.partition(".")[0] not in FOLDERS:
            continue
        where = f"{path.relative_to(ROOT)}:{node.lineno}: {dotted}"
        target = module_file(dotted)
        if target is None and not ROOT.joinpath(*dotted.split(".")).is_dir():
            yield f"{where} is no module"
            continue
        has = defined(target) if target else set()
        for alias in node.names:
            if alias.name not in has and module_file(f"{dotted}.{alias.name}") is None:
                yield f"{where} has no {alias.name}"


def test_everything_that_is_imported_from_this_project_is_there() -> None:
    files = list(sources())
    assert len(files) > 200
    assert not [wrong for path in files for wrong in missing(path)]
