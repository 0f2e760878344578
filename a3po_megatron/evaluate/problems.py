"""The problems of a benchmark, from its file: complete prompts with their gold answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..batch import Gold
from ..data import arithmetic, read
from ..data.fields import id_of
from ..data.golds import unreadable
from ..data.load import place_name
from ..data.order import named_seed
from ..errors import RequestError
from ..files.cache import Cache
from ..files.sources import KINDS, PACKED, kind_of, stem_of
from .benchmarks import Benchmark
from .live_code import RELEASES
from .rows import ID_FIELDS, About, layout_of

ENDINGS = ("", "_test", "_text")  # of a file's name behind the benchmark's


@dataclass(frozen=True)
class Problem:
    """One question, as it is put and as it is graded."""

    id: str
    text: str  # the user's turn, complete
    gold: Gold  # as the grader takes it (rows.py)
    grader: str
    extract: str


def file_of(name: str, data_folder: Path) -> Path:
    """Returns a benchmark's file in a folder: NAME, NAME_test or NAME_text, in any form that rows are read from.

    Raises RequestError with what was looked for, or with which of several there are.
    """
    stems = [name + ending for ending in ENDINGS]
    if not data_folder.is_dir():
        raise RequestError(f"--data {data_folder}: there is no such folder")
    files = sorted(
        path for path in data_folder.iterdir() if kind_of(path) and stem_of(path) in stems and path.is_file()
    )
    if not files:
        forms = f"{{{','.join(kind.removeprefix('.') for kind in KINDS)}}}"
        raise RequestError(
            f"--data {data_folder}: it holds no file of {name}: looked for {' or '.join(f'{s}.{forms}' for s in stems)}"
            f" (also {' and '.join(PACKED)})"
        )
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise RequestError(f"--data {data_folder}: it holds {len(files)} files of {name}: {names}: leave one")
    return files[0]


def problems_of(
    benchmark: Benchmark,
    file: Path,
    seed: int,
    *,
    remark: Callable[[str], None] = lambda text: None,
) -> list[Problem]:
    """Returns the problems in the file's order.

    remark: hears, in one sentence each, what is no error and should be said: another number of problems than the
        benchmark has, gold answers that the grader cannot read (its verdicts on them will be invalid).

    Raises RequestError with file and place for a bad row, for an id that stands twice, and for a file without problems.
    """
    lined = read.has_lines(file)
    problems: list[Problem] = []
    places: dict[str, int] = {}
    count = 0
    for place, row in read.rows_of(file):
        count += 1
        try:
            problem = _problem(benchmark, row, place, seed)
            if problem is None:
                continue
            if problem.id in places:
                raise RequestError(f"the id {problem.id!r} stands in {'line' if lined else 'row'} {places[problem.id]}")
        except RequestError as error:
            raise RequestError(f"{place_name(file, place, lined)}: {benchmark.name}: {error}") from error
        places[problem.id] = place
        problems.append(problem)
    if not problems:
        inside = f" from {benchmark.window}" if benchmark.dated else ""
        raise RequestError(f"{file}: none of its {count} rows is a problem of {benchmark.name}{inside}")
    usual, number = benchmark.problems, len(problems)
    if benchmark.dated and benchmark.release in RELEASES:
        usual, number = RELEASES[benchmark.release], count
    if usual not in (None, number):
        which = f"{benchmark.name} {benchmark.release}".strip()
        remark(f"{file}: {number} problems, {which} has {usual}: numbers of other files are not comparable")
    golds = {gold: problem for problem in problems if problem.grader == "math" for gold in _each(problem.gold)}
    if bad := unreadable(golds, Cache("")):
        gold, why = next(iter(bad.items()))
        where = place_name(file, places[golds[gold].id], lined)
        remark(f"{where}: {why}: {gold!r:.80} ({len(bad)} in all): verdicts on them will be invalid")
    return problems


def arithmetic_problems(benchmark: Benchmark, seed: int) -> list[Problem]:
    """Returns problems of the built-in task that no run trains on: their draws have another name."""
    drawn = [arithmetic.problem(number, named_seed("evaluation", seed)) for number in range(benchmark.problems or 0)]
    return [
        Problem(f"arithmetic/{number}", benchmark.prompt.format(problem=text), answer, "math", benchmark.extract)
        for number, (text, answer) in enumerate(drawn)
    ]


def _problem(benchmark: Benchmark, row: dict[str, Any], place: int, seed: int) -> Problem | None:
    layout = layout_of(row, benchmark.layouts)
    name = next(filter(None, (id_of(row, field) for field in ID_FIELDS)), f"{benchmark.name}/{place}")
    item = benchmark.reading(row, layout, About(name, seed, benchmark.window))
    if item is None:
        return None
    prompt = benchmark.starter_prompt if "starter" in item.parts else benchmark.prompt
    return Problem(name, prompt.format(**item.parts), item.gold, item.grader or benchmark.grader, benchmark.extract)


def _each(gold: Gold) -> tuple[str, ...]:
    return (gold,) if isinstance(gold, str) else gold
