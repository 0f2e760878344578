"""Programs in a sandbox, beside maths by value: in one run, and in an evaluation of a model without a chat template."""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest import mock

import pytest

from a3po_megatron.evaluate.ask import Wishes
from a3po_megatron.evaluate.result import read
from a3po_megatron.files.run_folder import RunFolder
from a3po_megatron.launch.evaluate import PROGRAM_SECONDS, config_of, make_evaluation, plan_evaluation, source_of
from a3po_megatron.ranks.backend import CPU
from a3po_megatron.reward import grader
from a3po_megatron.reward.sandbox.choose import AUTO, why_not
from a3po_megatron.reward.sandbox.program import Chosen
from tests.distributed import cases_evaluate as cases
from tests.harness import interrupted_runs as tools
from tests.harness.ranks import run_ranks
from tests.harness.whole_answers import WORDS, make_model

DOUBLE = {"kind": "asserts", "tests": ["assert double(4) == 8", "assert double('ab') == 'abab'"]}


HELD = pytest.mark.skipif(all(map(why_not, AUTO)), reason="no sandbox holds here")


@HELD
def test_one_run_trains_on_maths_and_on_code(tmp_path: Path) -> None:
    model, golds = make_model(tmp_path / "model"), {"maths": "4", "code": json.dumps(DOUBLE)}
    rows = [
        {
            "problem": f"{kind} {number}",
            "id": f"{kind}{number}",
            "grader": {"maths": "math"}.get(kind, kind),
            "answer": gold,
        }
        for number in range(6)
        for kind, gold in golds.items()
    ]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tools.trained_here(
        tmp_path / "run",
        "parallel.tensor=1",
        *(f"model.path={model}", f"data.path={tmp_path}/mixed.jsonl", "data.grader_field=grader"),
        *("trainer.steps=3", "trainer.rollouts_per_prompt=8", "rollout.max_tokens=3", "reward.extract=any"),
        *("grader_pool.timeout_seconds=60", "sandbox.wall_seconds=30"),
    )
    metrics = [json.loads(line) for line in RunFolder(tmp_path / "run").metrics.read_text().splitlines()]
    assert [row["step"] for row in metrics] == [0, 1, 2]
    assert all(row["reward/invalid_rate"] == 0 and row["rollout/kept_groups"] > 0 for row in metrics)
    outcomes = set()
    for rollout in (each for step in tools.rollouts_of(tmp_path / "run").values() for each in step):
        kind, text = (
            rollout["prompt_id"].strip("@")[:4].replace("math", "maths"),
            "".join(WORDS[token] for token in rollout["tokens"]),
        )
        text, finished = text.replace("<eos>", "").replace("<pad>", ""), rollout["finish"] == "stop"
        name = "math" if kind == "maths" else "code"
        alone = grader.grade(text, golds[kind], grader=name, sandbox=Chosen(), finished=finished)
        assert rollout["outcome"] == alone.outcome, (text, alone)
        outcomes.add((kind, alone.outcome))
        if rollout["accepted"]:
            assert (rollout["advantage"] > 0) == (alone.outcome == "correct")
    assert outcomes == {(kind, outcome) for kind in golds for outcome in ("correct", "wrong")}


@HELD
def test_humaneval_is_graded_in_a_sandbox(tmp_path: Path) -> None:
    model, folder = make_model(tmp_path / "model"), tmp_path / "evaluation"
    row = {"task_id": "HumanEval/0", "entry_point": "double", "prompt": "def double(x):\n    'twice'\n"}
    row["test"] = "def check(candidate):\n    assert candidate(4) == 8 == double(4)\n"
    (tmp_path / "humaneval.jsonl").write_text(json.dumps(row) + "\n")
    source, _ = source_of(model)
    config = config_of(source, None, ["rollout.kv_cache_bytes=8388608"])
    wishes = Wishes(("humaneval",), tmp_path, samples=48, max_tokens=6)
    settings, request = plan_evaluation(source, config, CPU, wishes, lambda name: folder / name, lambda text: None)
    assert settings.grader_pool.timeout_seconds == PROGRAM_SECONDS
    with make_evaluation(folder, settings, request), mock.patch.dict(os.environ, {cases.FOLDER: str(folder)}):
        run_ranks(1, cases.evaluates, folder=RunFolder(folder).logs)
    result = read(folder / "humaneval")
    assert json.loads(result.protocol["limits"])["cpu_seconds"] == 10
    samples = result.problems[0].samples
    for sample in samples:
        alone = grader.grade(
            sample.text,
            json.dumps({"kind": "check", **row}),
            grader="code",
            sandbox=Chosen(),
            finished=sample.finish == "stop",
        )
        assert sample.outcome == alone.outcome, sample
    assert {sample.outcome for sample in samples} == {"correct", "wrong"}
