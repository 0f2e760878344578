"""`a3po data check`: what a run would see of a data set, and what it would refuse."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..config import DataOptions
from ..data import fields, read
from ..data.fields import Problem
from ..data.golds import unreadable_rows
from ..data.load import Loaded, load, place_name
from ..data.order import named_order
from ..data.tokenizer import Tokenizer
from ..errors import RequestError
from ..files.cache import Cache
from ..files.sources import files_of
from ..model.read import read_facts

SHOWN = 10
COUNTED = 20_000  # prompts whose tokens are counted, evenly spaced
GRAM = 13  # words; GPT-3's measure of contamination (arXiv 2005.14165, appendix C)
_WORD = re.compile(r"\w+")


def data_check(options: DataOptions, model: Path | None, benchmarks: list[Path]) -> Iterator[str]:
    """The lines to print. Raises RequestError for what is no row, and at the end for what a run would refuse."""
    cache = Cache(options.cache)
    data = load(options.model_copy(update={"conflicts": "drop"}), cache)
    tokenizer = _tokenizer(options, model)
    refused: list[str] = []
    counts = data.counts
    yield f"files       {len(data.files)}: {', '.join(data.names[:SHOWN])}{' …' if len(data.names) > SHOWN else ''}"
    for each in dict.fromkeys(counts.fields):
        yield f"fields      problem: {each.problem}, answer: {each.answer}, id: {each.id}"
    yield f"rows        {counts.read}, of which {counts.repeated} repeat another: {len(data.rows)} prompts"
    yield f"conflicts   {counts.conflicting} rows whose problem has another gold answer elsewhere"
    yield from (f"            {said}" for said in data.conflicts())
    if counts.conflicting and options.conflicts == "error":
        refused.append(f"{counts.conflicting} rows conflict (data.conflicts: drop)")
    rows = unreadable_rows(data, options.grader, cache)
    if (names := data.graders()) != [""]:
        yield f"graders     {', '.join(sorted(name or options.grader for name in names))}"
    yield f"gold        {len(data.golds())} different; {len(rows)} rows have one that the grader cannot read"
    for bad in rows[:SHOWN]:
        yield f"            {data.where(bad.row)}: {bad.row.gold!r:.80}"
    if rows and options.unreadable_golds == "error":
        refused.append(f"{len(rows)} gold answers cannot be read (data.unreadable_golds: drop)")
    yield from _lengths(data, tokenizer)
    for path in benchmarks:
        yield from overlap(data, path)
    for number in named_order(len(data.rows), 0, 0)[:SHOWN]:
        row = data.rows[number]
        yield f"--- {data.where(row)}, gold {row.gold!r}"
        yield tokenizer.render(row.problem) if tokenizer else text_of(row.problem)
    if refused:
        raise RequestError(f"a run would refuse this data: {'; '.join(refused)}")


def _tokenizer(options: DataOptions, model: Path | None) -> Tokenizer | None:
    if model is None:
        return None
    facts = read_facts(str(model))
    return Tokenizer.of(options, model, facts.vocab, facts.eos)


def _lengths(data: Loaded, tokenizer: Tokenizer | None) -> Iterator[str]:
    characters = np.array([len(text_of(row.problem)) for row in data.rows])
    yield f"characters  {_spread(characters)}"
    if tokenizer is not None:
        numbers = np.unique(np.linspace(0, len(data.rows) - 1, min(COUNTED, len(data.rows))).astype(int))
        counted = np.array([len(tokenizer.encode(data.rows[int(number)].problem)) for number in numbers])
        yield f"tokens      {_spread(counted)}, of {len(numbers)} prompts"


def _spread(values: np.ndarray) -> str:
    half, most, nearly = (int(np.quantile(values, share, method="higher")) for share in (0.5, 0.99, 0.999))
    return f"least {values.min()}, half {half}, 99% {most}, 99.9% {nearly}, most {values.max()}"


def text_of(problem: Problem) -> str:
    """A problem's words, whoever speaks them."""
    return problem if isinstance(problem, str) else "\n".join(f"{turn.role}: {turn.content}" for turn in problem)


def overlap(data: Loaded, benchmark: Path) -> Iterator[str]:
    """Which problems of a benchmark share runs of 13 words with a prompt (all words, where a problem has fewer), and
    which share of their runs; stock phrases alone are a small one."""
    problems = list(_problems(benchmark))
    runs = [grams(text_of(problem)) for _, problem in problems]
    owners: dict[tuple[str, ...], list[int]] = {}
    for number, own in enumerate(runs):
        for gram in own:
            owners.setdefault(gram, []).append(number)
    short = {len(gram) for gram in owners} - {GRAM}
    best: dict[int, tuple[float, str]] = {}
    for row in data.rows:
        words = _WORD.findall(text_of(row.problem).lower())
        shared: dict[int, int] = {}
        for size in (GRAM, *({len(words)} & short)):
            for gram in {tuple(words[start : start + size]) for start in range(len(words) - size + 1)}:
                for number in owners.get(gram, ()):
                    shared[number] = shared.get(number, 0) + 1
        for number, count in shared.items():
            best[number] = max(best.get(number, (0.0, "")), (count / len(runs[number]), data.where(row)))
    half = sum(share >= 0.5 for share, _ in best.values())
    yield (
        f"overlap     {benchmark}: {len(best)} of {len(problems)} problems share {GRAM} words in a row with a prompt, "
        f"{half} at least half of their own"
    )
    for number in sorted(best, key=lambda number: (-best[number][0], number))[:SHOWN]:
        yield f"            {problems[number][0]}: {best[number][0]:.0%} in {best[number][1]}"


def grams(text: str) -> set[tuple[str, ...]]:
    """Every run of 13 words; the whole text where it has fewer."""
    words = _WORD.findall(text.lower())
    return {tuple(words[start : start + GRAM]) for start in range(max(1, len(words) - GRAM + 1))} if words else set()


def _problems(source: Path) -> Iterator[tuple[str, Problem]]:
    for path in files_of(source):
        names, lined = None, read.has_lines(path)
        for place, row in read.rows_of(path):
            names = names or fields.fields_of(row, "", "", "id")
            where = place_name(path, place, lined)
            try:
                problem = fields.problem_of(row, names.problem)
            except RequestError as error:
                raise RequestError(f"{where}: {error}") from error
            yield where, problem
