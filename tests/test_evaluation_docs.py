"""docs/evaluation.md says what the benchmarks are: every number in it is the registry's."""

from __future__ import annotations

import re

import pytest

from a3po_megatron.data.tokenizer import TEMPLATES
from a3po_megatron.evaluate import estimators
from a3po_megatron.evaluate.benchmarks import BENCHMARKS, CHOICE, Benchmark
from a3po_megatron.evaluate.problems import ENDINGS
from a3po_megatron.evaluate.rows import ID_FIELDS, MBPP_SET_UP_AFTER, MBPP_TEST
from tests.harness.ranks import ROOT

PAGE = (ROOT / "docs/evaluation.md").read_text()
TABLES = [
    [[cell.strip() for cell in line.strip("|").split("|")] for line in block.strip().splitlines()]
    for block in re.findall(r"(?:^\|.*\n)+", PAGE, re.M)
]
PROTOCOLS, FIELDS, PECULIAR, NUMBERS = ({row[0].strip("`"): row[1:] for row in table[2:]} for table in TABLES)


def protocol_row(benchmark: Benchmark) -> list[str]:
    """As the table has it."""
    return [
        "with release and window" if benchmark.dated else f"`{benchmark.version}`",
        str(benchmark.n),
        str(benchmark.temperature),
        str(benchmark.top_p),
        f"{benchmark.max_tokens:,}",
        ", ".join(filter(None, (benchmark.grader, benchmark.extract))),
        "by release" if benchmark.problems is None else f"{benchmark.problems:,}",
    ]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_tables_have_every_benchmark_as_its_record_says(name: str) -> None:
    benchmark = BENCHMARKS[name]
    assert PROTOCOLS[name] == protocol_row(benchmark)
    layouts = "; ".join(" + ".join(f"`{field}`" for field in layout) for layout in benchmark.layouts)
    assert FIELDS[name] == [layouts]


def test_the_tables_have_no_benchmark_that_there_is_not() -> None:
    assert list(PROTOCOLS) == list(FIELDS) == list(BENCHMARKS)


def test_the_prose_says_what_the_code_does() -> None:
    plain = " ".join(PAGE.split())
    longest = {benchmark.max_tokens for benchmark in BENCHMARKS.values()}
    for words in (
        *(f"{tokens:,} tokens" for tokens in longest),
        *(f"`{ID}`" for ID in ID_FIELDS),
        *(f"`NAME{ending}`" for ending in ENDINGS),
        f'"{TEMPLATES["qwen"].format(problem="").strip()}"',
        f"task ids {MBPP_TEST[0]}–{MBPP_TEST[-1]}",
        f"In {MBPP_SET_UP_AFTER[0]} (and {MBPP_SET_UP_AFTER[1]}, of another split)",
        f"{estimators.RESAMPLES:,} resamples",
        f"{estimators.LEVEL:.0%}".replace("%", " %"),
        f"up to {estimators.EXACT} problems that differ, else {estimators.RESAMPLES:,} drawn",
        f"`{BENCHMARKS['aime24'].version}`.",
        "T 0.6, top-p 0.95, 32,768 tokens",
    ):
        assert words in plain, words
    assert "Answer: $LETTER" in CHOICE and "Answer: $LETTER" in plain
    assert len(longest) == 2
    assert all(each.temperature == 0.6 and each.top_p == 0.95 for each in BENCHMARKS.values())
