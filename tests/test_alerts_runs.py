"""Alerts in real runs that are made to fail so, in one that an alert ends, and in healthy ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from a3po_megatron.config.alerts import AlertName
from a3po_megatron.errors import RunFailed
from a3po_megatron.report.page import write_report
from tests.harness import interrupted_runs as tools
from tests.harness.bit_for_bit import rows_of
from tests.harness.ranks import ROOT
from tests.harness.whole_answers import make_model
from tests.test_report import page_data

# ----- real runs that are made to fail

GRADERS = '''
import hashlib


def says_five(response, answer, *, finished):
    """What the benchmark does not ask for."""
    return "5" in response


def never(response, answer, *, finished):
    return False


def is_long(response, answer, *, finished):
    return len(response) > 1 and not finished


def says_five_where_it_counts(response, answer, *, finished):
    """Of half of the problems no answer is accepted."""
    return "5" in response and int(answer.split()[1]) % 2 == 1


def by_chance(response, answer, *, finished):
    """Nothing that could be learned: it follows from the words' hash."""
    return hashlib.sha256((response + answer).encode()).digest()[0] % 2 == 0
'''


def failing_run(tmp_path: Path, grader: str, *changes: str) -> tuple[list[dict[str, Any]], str]:
    """Rows and words of a run of a random model whose words are whole answers, graded by one of GRADERS."""
    make_model(tmp_path / "model")
    (tmp_path / "graders.py").write_text(GRADERS)
    problems = [{"problem": f"say four {number}", "answer": "4"} for number in range(8)]  # all of them in every step
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    graded = [{**row, "answer": f"4 {number}", "grader": "function"} for number, row in enumerate(problems)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in graded))
    ended = tools.trained_here(
        tmp_path / "run",
        "parallel.tensor=1",  # one rank: what an alert looks at is the whole run's
        *(f"model.path={tmp_path}/model", f"data.path={tmp_path}/train.jsonl", "data.grader_field=grader"),
        *(f"reward.function={tmp_path}/graders.py:{grader}", "reward.extract=any", "trainer.prompts_per_step=8"),
        *("trainer.rollouts_per_prompt=8", "rollout.max_tokens=6", "rollout.max_batches=1", "alerts.window=2"),
        "trainer.max_empty_steps=10",
        *changes,
    )
    return rows_of(tmp_path / "run"), ended.out


def steps_of(found: list[dict[str, Any]], name: str) -> list[int]:
    return [row["step"] for row in found if row[f"alert/{name}"] == 1]


def assert_told(found: list[dict[str, Any]], said: str, name: str, *words: str) -> None:
    """The column begins after the window's first step and a line says so once, with these words."""
    steps = steps_of(found, name)
    assert steps, [{n: v for n, v in row.items() if n.startswith(("reward/", "policy/"))} for row in found]
    said = " ".join(said.split())  # the console wraps lines
    assert said.count(f"alert {name} at step {steps[0]}: ") == said.count(f"alert {name} at step") == 1, said
    for word in words:
        assert word in said
    assert all(row[f"alert/{each}"] in (0, 1) for row in found for each in get_args(AlertName))


@pytest.mark.soak
def test_a_run_that_learns_far_too_fast_what_solves_half_of_the_task_clips_and_collapses(tmp_path: Path) -> None:
    found, said = failing_run(
        tmp_path,
        "says_five_where_it_counts",
        *("trainer.steps=7", "optimizer.lr=0.03", "trainer.mini_batches=4", "rollout.dynamic_sampling=false"),
        "alerts.clip_rate=0.1",
    )
    assert_told(found, said, "entropy_collapse", "alerts.entropy_share", "optimizer.lr")
    assert_told(found, said, "clipping", "alerts.clip_rate")
    assert found[-1]["reward/correct_rate"] == 0.5


def test_a_run_that_is_rewarded_for_length_explodes(tmp_path: Path) -> None:
    found, said = failing_run(tmp_path, "is_long", "trainer.steps=4", "optimizer.lr=0.01", "rollout.max_tokens=12")
    assert_told(found, said, "length_explosion", "alerts.truncated_rate", "reward.overlong_tokens")
    assert found[0]["rollout/truncated_rate"] < 0.4 < 0.9 < found[-1]["rollout/truncated_rate"]


def test_a_run_whose_reward_is_not_what_it_is_held_against_is_seen_to_hack(tmp_path: Path) -> None:
    found, said = failing_run(
        tmp_path,
        "says_five",
        *("trainer.steps=5", "optimizer.lr=0.005", "alerts.window=4", "evaluation.every_steps=1"),
        *(f"evaluation.benchmarks=[{tmp_path}/held_out.jsonl]", "evaluation.samples=8", "evaluation.max_tokens=6"),
    )
    assert_told(found, said, "reward_hacking", "eval/held_out_avg falls by", "alerts.hacking_fall")
    assert found[-1]["reward/mean"] > found[0]["reward/mean"]
    assert found[-1]["eval/held_out_avg"] < found[0]["eval/held_out_avg"]


def test_a_run_that_samples_from_another_distribution_than_it_learns_of_mismatches(tmp_path: Path) -> None:
    found, said = failing_run(tmp_path, "by_chance", "trainer.steps=2", "rollout.top_k=3")
    assert_told(found, said, "mismatch", "mismatch/kl_k3", "alerts.mismatch_logprob", "rollout.top_p")


def test_a_run_whose_reward_is_the_same_for_all_has_no_spread(tmp_path: Path) -> None:
    found, said = failing_run(tmp_path, "never", "trainer.steps=3")
    assert_told(found, said, "no_spread", "0.0% of the sampled groups", "alerts.spread_rate")
    assert steps_of(found, "no_spread") == [1, 2]
    assert [row["rollout/spread_rate"] for row in found] == [0.0, 0.0, 0.0]


# The guesser writes digits that it is sure of: of its wrong rollouts nearly every shaped token is inert, and says so.
GUESSER = (
    f"model.path={ROOT}/configs/models/tiny-guesser",
    "rollout.max_tokens=64",
    "alerts.window=3",
    "trainer.steps=4",
)


@pytest.mark.parametrize("by_command", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_an_alert_ends_the_run_with_1_and_a_checkpoint_from_which_it_comes_out_as_if_nothing_had_been(
    by_command: bool, tmp_path: Path
) -> None:
    """In ranks of this session, where what ends them is what the command ends with 1 and says; and by command."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    tools.trained_here(whole, *tools.LAYOUTS["tp2"], *GUESSER)
    steps = steps_of(rows_of(whole), "inert_shaping")
    assert steps[0] == 2  # a full window
    mine = (*tools.LAYOUTS["tp2"], *GUESSER, "alerts.stop=[no_spread, inert_shaping]")
    if by_command:
        ended = tools.launch(run, *mine)
        assert ended.code == 1 and "Traceback" not in ended.err, ended.all
        said = ended.err
    else:
        with pytest.raises(AssertionError) as failed:
            tools.trained_here(run, *mine)
        assert RunFailed.__name__ in str(failed.value) and RunFailed.exit_code == 1
        said = str(failed.value)
    for words in (
        "step 2: alert inert_shaping: of the shaped tokens",
        "of wrong rollouts have 1 - p < 1e-4, more than 0.75 (alerts.inert_rate)",
        f"alerts.stop ended the run; what it has done is in {run}/checkpoints/step-000003",
        "take it out of alerts.stop, or change its threshold",
    ):
        assert words in " ".join(said.split()), said
    assert tools.saved_steps(run) == 3  # not one that was due: those are of every second step
    assert len(rows_of(run)) == 3
    tools.trained_here(run, *tools.LAYOUTS["tp2"], *GUESSER)
    tools.assert_same_run(run, whole, 4)  # the columns of every alert among the rest, bit for bit
    page = page_data(write_report([run]))
    (drawn,) = page["runs"]
    assert drawn["alerts"] == [[2, "inert_shaping"]]
    assert [chart["title"] for chart in page["charts"] if "inert_shaping" in chart["alerts"]] == ["Inert shaped tokens"]
    assert not [name for name in drawn["metrics"] if name.startswith("alert/")]
    assert "Alert inert_shaping in steps 2 to" in (run / "report.html").read_text()


# ----- healthy runs


def judged(*folders: Path) -> str:
    """What tools/alerts_of.py says of runs."""
    words = [sys.executable, str(ROOT / "tools/alerts_of.py"), *map(str, folders)]
    return subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=60).stdout


@pytest.mark.soak  # about four minutes a run of the first, two of the second
@pytest.mark.parametrize("seed", [11, 12, 13])
@pytest.mark.parametrize("config", ["demo", "arithmetic"])
def test_a_healthy_demo_raises_no_alert_but_that_the_shaping_of_wrong_rollouts_is_inert(
    config: str, seed: int, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "a3po_megatron", "train", f"configs/{config}.yaml", "--run-dir", f"{tmp_path}/run"]
    subprocess.run([*command, "--set", f"trainer.seed={seed}"], cwd=ROOT, check=True, timeout=1800)
    found = rows_of(tmp_path / "run")
    others = [name for name in get_args(AlertName) if name != "inert_shaping"]
    assert {name: steps for name in others if (steps := steps_of(found, name))} == {}
    assert steps_of(found, "inert_shaping")
    said = judged(tmp_path / "run")
    assert "of those of wrong rollouts" in said
    assert "of those of correct rollouts" not in said
