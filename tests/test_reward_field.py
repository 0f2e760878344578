"""What graders get wrong in the field, and the gold answers of real data sets: where A3PO_TEST_DATA has them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from a3po_megatron.reward.math import gold_text, grade, read_gold

DATA = Path(os.environ.get("A3PO_TEST_DATA") or "/nonexistent")
GOLDS = ("math_train", "math500_test", "gsm8k_test", "dapo_math_17k_first5000", "olympiadbench_text", "aime24_test")


def rows(name: str) -> list[dict[str, str]]:
    file = DATA / f"{name}.jsonl"
    if not file.exists():
        pytest.skip(f"A3PO_TEST_DATA does not name a folder with {file.name}")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_case_from_the_field_gets_its_verdict() -> None:
    cases = rows("field_cases_grading")
    found = [(case, grade(case["response"], case["gold"])) for case in cases]
    wrong = [(case["id"], case["why"], verdict) for case, verdict in found if verdict.outcome != case["expected"]]
    assert not wrong
    assert len(cases) > 400


@pytest.mark.parametrize("name", GOLDS)
def test_every_gold_answer_is_itself_and_not_another_ones(name: str) -> None:
    answers = sorted({str(row["answer"]) for row in rows(name)})[::4]
    unlike = [answer for answer in answers if grade(f"\\boxed{{{gold_text(answer)}}}", answer).outcome != "correct"]
    assert not unlike
    mixed = list(zip(answers, answers[1:] + answers[:1], strict=True))
    alike = [pair for pair in mixed if grade(f"\\boxed{{{gold_text(pair[0])}}}", pair[1]).outcome == "correct"]
    assert len(alike) <= len(answers) / 100  # 1/2 and \frac{1}{2}
    assert sum(isinstance(read_gold(gold_text(answer)), str) for answer in answers) <= len(answers) / 100
