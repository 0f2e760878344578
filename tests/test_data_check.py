"""`a3po data check` prints what a run would see, and ends as a run would."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from a3po_megatron.cli import app
from a3po_megatron.errors import RequestError
from a3po_megatron.launch.data_check import GRAM, grams

TEXT = "a box of seven red and nine blue balls is open how many ways to draw two of each there are"
WORDS = TEXT.split(" ")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def check(*arguments: object) -> tuple[str, BaseException | None]:
    done = CliRunner().invoke(app, ["data", "check", *map(str, arguments)])
    return done.output, done.exception


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    problems = [(TEXT, 1), ("1+1", 2), ("1+1", 2), ("2+2", 4), ("2+2", 5), ("3+3", "))((")]
    return write(tmp_path / "rows.jsonl", [{"question": problem, "answer": answer} for problem, answer in problems])


def test_it_counts_what_a_run_would_see_and_says_what_one_would_refuse(rows: Path) -> None:
    output, error = check(rows)
    for line in (
        "files       1: rows.jsonl",
        "fields      problem: question, answer: answer, id: id",
        "rows        6, of which 1 repeat another: 3 prompts",
        "conflicts   2 rows whose problem has another gold answer elsewhere",
        f"            {rows}:5: the problem stands in line 4 with another gold answer, here '5': '2+2'",
        "gold        3 different; 1 rows have one that the grader cannot read",
        f"            {rows}:6: '))(('",
        f"characters  least 3, half 3, 99% {len(' '.join(WORDS))}, ",
        f"--- {rows}:2, gold '2'\n1+1\n",
    ):
        assert line in output
    assert isinstance(error, RequestError)
    assert str(error).startswith("a run would refuse this data: 2 rows conflict (data.conflicts: drop); 1 gold answers")
    dropped = ["--set", "data.conflicts=drop", "--set", "data.unreadable_golds=drop"]
    assert check(rows, *dropped) == (output, None)


def test_with_a_model_tokens_are_counted_and_prompts_rendered(rows: Path) -> None:
    model = Path(__file__).parents[1] / "configs/models/tiny-arithmetic"
    output, _ = check(rows, "--model", model, "--set", "data.template=qwen")
    assert "tokens      least " in output
    assert "1+1\nPlease reason step by step, and put your final answer within \\boxed{}.\n" in output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--set", "trainer.steps=3"], "expected an option of the section data"),
        (["--set", "data.path=x"], "expected an option of the section data, but not its path"),
        (["--set", "data.conflict=drop"], "did you mean data.conflicts?"),
        (["--set", "data.answer_field=gold"], "the field 'gold' is missing"),
    ],
)
def test_what_is_wrong_with_the_request_is_named(rows: Path, arguments: list[str], says: str) -> None:
    _, error = check(rows, *arguments)
    assert isinstance(error, RequestError) and says in str(error)


def test_overlap_is_that_of_comparing_every_pair_of_runs(rows: Path, tmp_path: Path) -> None:
    random_ = random.Random(0)
    texts = [" ".join(random_.choices("ab", k=k)) for k in (3, 13, 15, 16, 20)]
    texts += [" ".join(WORDS[2:]).upper() + "?", "1 + 1", " ".join(WORDS[:12])]
    problems = [" ".join(random_.choices("ab", k=40)) for _ in range(30)] + [TEXT, "1+1"]
    data = write(tmp_path / "train.jsonl", [{"problem": text, "answer": 1} for text in problems])
    benchmark = write(tmp_path / "test.jsonl", [{"prompt": text} for text in texts])

    def words(text: str) -> list[str]:
        return text.lower().replace("+", " ").replace("?", "").split()

    def share(text: str, prompt: str) -> float:
        own, other = words(text), words(prompt)
        if len(own) < GRAM:
            return float(own == other)
        runs = {tuple(own[n : n + GRAM]) for n in range(len(own) - GRAM + 1)}
        return sum(any(list(run) == other[n : n + GRAM] for n in range(len(other))) for run in runs) / len(runs)

    best = [max(share(text, prompt) for prompt in problems) for text in texts]
    output, _ = check(data, "--benchmark", benchmark)
    met, half = sum(s > 0 for s in best), sum(s >= 0.5 for s in best)
    assert 0 < half < met < len(texts)
    assert f"{met} of {len(texts)} problems share 13 words in a row with a prompt, {half} at least half" in output
    for number, wanted in enumerate(best, start=1):
        assert (f"{benchmark}:{number}: {wanted:.0%} in {data}:" in output) == (wanted > 0)
    assert grams("one two") == {("one", "two")}
