"""`a3po eval`: the same samples whoever draws them, of the weights that were named, in a file that says all of it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import AutoTokenizer

from a3po_megatron.convert.convert import import_checkpoint
from a3po_megatron.data.arithmetic import apply, parse, problem
from a3po_megatron.errors import RequestError
from a3po_megatron.evaluate.ask import Wishes
from a3po_megatron.evaluate.result import Result, read
from a3po_megatron.files.run_folder import RunFolder, step_files
from a3po_megatron.launch.evaluate import config_of, make_evaluation, plan_evaluation, source_of
from a3po_megatron.ranks.backend import CPU
from a3po_megatron.reward.sandbox import choose
from a3po_megatron.run.journal import read_frames
from tests.distributed import cases_evaluate as cases
from tests.harness import interrupted_runs as tools
from tests.harness.ranks import ROOT, run_ranks
from tests.harness.tiny_models import hf_model

MODEL = ROOT / "configs/models/tiny-arithmetic"
SMALL = ("data.template=raw", "rollout.max_tokens=48", "reward.extract=boxed", "rollout.kv_cache_bytes=8388608")
PROBLEMS, SAMPLES = 16, 4
FEW = ("rollout.max_sequences=4",)  # so that some problems end long before others
AROUND = os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "sums.jsonl"
    rows = [dict(zip(("problem", "answer"), problem(number, seed=77), strict=True)) for number in range(PROBLEMS)]
    path.write_text("".join(json.dumps({"id": f"sum-{n}", **row}) + "\n" for n, row in enumerate(rows)))
    return path


def evaluated(
    folder: Path, model: Path, file: Path, *overrides: str, ranks: int = 1, steps: int | None = None
) -> Result | str:
    """The result, from ranks of the session; or what they were interrupted with after so many engine steps."""
    source, _ = source_of(model)
    config = config_of(source, None, [*([] if source.kind == "run" else SMALL), *overrides])
    wishes = Wishes((str(file),), samples=SAMPLES)
    settings, request = plan_evaluation(source, config, CPU, wishes, lambda name: folder / f"{name}.json", pytest.fail)
    asked = {cases.FOLDER: str(folder)} | ({} if steps is None else {cases.STEPS: str(steps)})
    with make_evaluation(folder, settings, request), mock.patch.dict(os.environ, asked):
        said = run_ranks(ranks, cases.evaluates, folder=RunFolder(folder).logs)["evaluates"]
    return said[0] or read(folder / "sums.json")


def lasting(result: Result | str) -> Result:
    """Without what measures the machine."""
    assert isinstance(result, Result), result
    summary = dataclasses.replace(result.summary, seconds=0.0, tokens_per_second=0.0)
    return dataclasses.replace(result, summary=summary)


@pytest.fixture(scope="module")
def alone(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return lasting(evaluated(tmp_path_factory.mktemp("alone"), MODEL, file))


def test_every_problem_gets_its_samples_and_their_verdicts_and_the_summary_is_theirs(alone: Result) -> None:
    assert (alone.benchmark, alone.file.name, alone.file.problems) == ("sums", "sums.jsonl", PROBLEMS)
    assert [each.id for each in alone.problems] == [f"sum-{number}" for number in range(PROBLEMS)]
    right = 0
    for each in alone.problems:
        value, steps = parse(each.text)
        for operator, operand in steps:
            value = apply(value, operator, operand)
        assert each.gold == str(value)
        assert len({sample.seed for sample in each.samples}) == len(each.samples) == SAMPLES
        for sample in each.samples:
            named = sample.text.rpartition("\\boxed{")[2].partition("}")[0] if "\\boxed{" in sample.text else ""
            assert (sample.outcome == "correct") == (named == str(value)), sample
            right += sample.outcome == "correct"
    assert alone.summary.avg is not None
    assert alone.summary.avg.value == pytest.approx(right / (PROBLEMS * SAMPLES), abs=1e-12)
    assert 0 < right < PROBLEMS * SAMPLES
    assert len({sample.text for each in alone.problems for sample in each.samples}) > PROBLEMS


@pytest.mark.soak  # of one over two ranks it is shown with a checkpoint below, of two with what was interrupted
@pytest.mark.parametrize("layout", [("parallel.data=2",), ("parallel.tensor=2", "rollout.tensor=2")], ids=str)
def test_two_engines_and_one_over_two_ranks_draw_what_one_alone_draws(
    layout: tuple[str, ...], alone: Result, file: Path, tmp_path: Path
) -> None:
    assert lasting(evaluated(tmp_path, MODEL, file, *layout, ranks=2)) == alone


def test_a_checkpoint_and_a_folder_of_the_same_weights_are_one_model_and_an_engine_over_two_ranks_draws_as_one_alone(
    alone: Result, file: Path, tmp_path: Path
) -> None:
    import_checkpoint(MODEL, tmp_path / "checkpoint", 1, 1 << 20, lambda _: lambda _: None)
    layout = ("parallel.tensor=2", "rollout.tensor=2")
    other = lasting(evaluated(tmp_path / "evaluation", tmp_path / "checkpoint", file, *layout, ranks=2))
    assert other.model.kind == "checkpoint" and other.model.digest == alone.model.digest
    assert dataclasses.replace(other, model=alone.model) == alone


def test_the_weights_of_a_runs_step_are_those_that_the_run_published(
    file: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = tools.uninterrupted("dp2", tmp_path_factory)
    newest, _ = source_of(run)
    assert (newest.kind, newest.step) == ("run", tools.STEPS)
    step = tools.STEPS - tools.EVERY  # of which the journal still has what was sampled with its weights
    result = lasting(evaluated(tmp_path, run / "checkpoints" / f"step-{step:06d}", file, ranks=2))
    assert (result.model.path, result.model.kind, result.model.step) == (str(run), "run", step)
    frames = [frame.header for path in step_files(RunFolder(run).journal) for frame in read_frames(path)]
    groups = [header["of"] for header in frames if header["kind"] == "group" and header["samples"][0][2] == step]
    assert groups and {of.partition(" ")[2] for of in groups} == {result.model.digest}


def test_the_greedy_answers_are_those_of_transformers(file: Path, tmp_path: Path) -> None:
    # At this temperature the second best token of a float32 model is never drawn, save at a tie.
    result = lasting(evaluated(tmp_path, MODEL, file, "rollout.temperature=0.001"))
    model, tokenizer = hf_model(MODEL, torch.float32), AutoTokenizer.from_pretrained(MODEL)
    for each in result.problems[:8]:
        prompt = tokenizer(each.text, add_special_tokens=False, return_tensors="pt").input_ids
        whole = model.generate(prompt, do_sample=False, max_new_tokens=48)  # type: ignore[operator]
        text = tokenizer.decode(whole[0, prompt.shape[1] :], skip_special_tokens=True)
        assert {sample.text for sample in each.samples} == {text}


def test_what_cannot_be_evaluated_is_refused_with_what_to_do(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = source_of(MODEL)
    assert folder.parent == Path("evaluations") and folder.name.startswith("tiny-arithmetic-")
    config = config_of(source, None, SMALL)

    def refusal(benchmarks: str, **wishes: object) -> str:
        asked = Wishes(tuple(benchmarks.split(",")), **wishes)  # type: ignore[arg-type]
        with pytest.raises(RequestError) as error:
            plan_evaluation(source, config, CPU, asked, lambda name: tmp_path / name, lambda remark: None)
        return str(error.value)

    assert "--data (evaluation.data) names its folder" in refusal("gsm8k")
    assert "did you mean gsm8k" in refusal("gsm8")
    assert "there is no such file" in refusal(str(tmp_path / "none.jsonl"))
    assert "sums is asked for twice" in refusal(f"{file},{file}")
    assert "--release v5 has no effect" in refusal(str(file), release="v5")
    assert "--samples 0" in refusal(str(file), samples=0)
    (tmp_path / "humaneval.jsonl").write_text(
        json.dumps({"task_id": "0", "prompt": "def f():", "test": "def check(f): f()", "entry_point": "f"}) + "\n"
    )
    monkeypatch.setattr(choose, "why_not", lambda kind: "not here")
    choose.sandbox_of.cache_clear()
    assert "sandbox.name = auto: no sandbox holds here" in refusal("humaneval", data=tmp_path, max_tokens=16)
    long = refusal(str(file), max_tokens=100_000)
    assert "more than the model's context" in long and "--max-tokens" in long
    config = config_of(source, None, [*SMALL, "rollout.tensor=3", "parallel.data=3"])
    assert "rollout.tensor = 3 does not divide" in refusal(str(file)) or "neither divides" in refusal(str(file))
    with pytest.raises(RequestError, match="neither an HF folder"):
        source_of(tmp_path)
    with pytest.raises(RequestError, match="there is no such folder"):
        source_of(tmp_path / "nowhere")


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "a3po_megatron", *map(str, words)]


def command_of(file: Path, folder: Path) -> subprocess.Popen[str]:
    """`a3po eval` in this folder, just started."""
    options = [word for option in (*SMALL, *FEW) for word in ("--set", option)]
    words = command("eval", MODEL, "--benchmark", file, "--samples", SAMPLES, "--json", folder / "a.json", *options)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(words, cwd=folder, env=AROUND, text=True, **pipes)  # type: ignore[call-overload]


def assert_goes_on(file: Path, folder: Path, alone: Result) -> None:
    assert not (folder / "a.json").exists()
    again = command_of(file, folder)
    said, _ = again.communicate(timeout=180)
    assert again.returncode == 0, said
    assert "problems were finished before" in said and f"result: {folder / 'a.json'}" in said
    assert alone.version in said and "avg@4" in said and "95 % interval" in said
    assert lasting(read(folder / "a.json")) == alone


def test_an_evaluation_that_is_interrupted_again_and_again_goes_on_by_command_and_ends_as_an_undisturbed_one(
    alone: Result, file: Path, tmp_path: Path
) -> None:
    """After other weights left theirs unfinished in the same folder, of which nothing is taken over."""
    _, folder = source_of(MODEL)
    folder, few = tmp_path / folder, ("rollout.max_sequences=8",)  # so that some problems end long before others
    assert isinstance(evaluated(folder, ROOT / "configs/models/tiny-guesser", file, *few, steps=10), str)
    (others,) = (folder / "partial").iterdir()
    finished: list[int] = []
    for ranks, layout in ((1, ()), (2, ("parallel.data=2",))):  # the second goes on where one engine stopped
        said = evaluated(folder, MODEL, file, *layout, *few, ranks=ranks, steps=25)
        assert isinstance(said, str) and "goes on from the last finished problem" in said
        (partial,) = {*(folder / "partial").iterdir()} - {others}
        finished.append(sum(path.read_bytes().count(b"\n") for path in partial.iterdir()))
        (partial / "rank-0.jsonl").open("ab").write(b'{"problem": 3, "samp')  # as of a machine that lost power
    assert 0 < finished[0] < finished[1] < PROBLEMS
    assert_goes_on(file, tmp_path, alone)
    assert list((folder / "partial").iterdir()) == [others]
    ended = tools.main_here(["compare", *[str(tmp_path / "a.json")] * 2], pytest.fail)
    assert ended.code == 0 and "B - A" in ended.out


@pytest.mark.soak  # that an evaluation goes on from what was finished is shown above
def test_the_command_is_killed_and_goes_on(alone: Result, file: Path, tmp_path: Path) -> None:
    first = command_of(file, tmp_path)
    deadline, begun = time.monotonic() + 120, "*/partial/*/rank-0.jsonl"
    written: Callable[[], list[Path]] = lambda: list((tmp_path / "evaluations").glob(begun))  # noqa: E731
    while not (written() and written()[0].stat().st_size) and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.005)
    first.kill()
    first.wait()
    assert written()
    assert_goes_on(file, tmp_path, alone)


def evaluating(file: Path, every: int) -> list[str]:
    return [f"evaluation.every_steps={every}", f"evaluation.benchmarks=[{file}]", "evaluation.samples=2"]


def test_a_run_that_evaluates_itself_is_bit_for_bit_the_one_that_does_not(
    file: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, layout = tmp_path / "run", tools.LAYOUTS["dp2"]
    asked = [*evaluating(file, every=2), "evaluation.keep_best=sums", "checkpoint.keep_last=1"]
    said = tools.trained_here(folder, *layout, *asked).out
    wanted = tools.uninterrupted("dp2", tmp_path_factory)
    rows, others = tools.rows_of(folder), tools.rows_of(wanted)
    names = [f"eval/sums_{kind}" for kind in ("avg", "pass", "length")]
    assert list(rows[0]) == [*others[0], *names]
    averages: dict[int, float] = {}
    for row in rows:
        results = [row.pop(name) for name in names]
        path = folder / "evaluations" / f"step-{row['step']:06d}" / "sums.json"
        if row["step"] % 2:
            assert results == [None] * 3 and not path.exists()
            continue
        result = read(path)
        assert result.summary.avg is not None and result.protocol["n"] == 2
        assert results == [result.summary.avg.value, result.summary.pass_at[2].value, result.summary.length_mean]
        averages[row["step"]] = result.summary.avg.value
        assert f"step {row['step']}: {result.version}" in said
    last = read(folder / "evaluations" / f"step-{tools.STEPS:06d}" / "sums.json").summary.avg  # of the last weights
    assert last is not None
    averages[tools.STEPS] = last.value
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    tools.assert_same_run(folder, wanted)
    # Of the checkpoints after steps 2, 4 and 6 the best is kept beside the last; the model before training has none.
    best = json.loads((folder / "evaluations/best.json").read_text())
    assert best["step"] == max(averages, key=lambda step: (averages[step], -step))
    assert "selection" in best["note"] and best["file"] == file.name
    saved = {path.name for path in (folder / "checkpoints").glob("step-*")}
    assert saved == {f"step-{step:06d}" for step in {best["step"], tools.STEPS} - {0}}
    # What it found is what the command finds: the same samples, of the same weights.
    again = evaluated(tmp_path / "again", folder, file, "rollout.max_sequences=8", ranks=2)
    assert isinstance(again, Result)
    of_run = read(folder / "evaluations" / f"step-{tools.STEPS:06d}" / "sums.json")
    assert again.model == of_run.model
    for one, other in zip(again.problems, of_run.problems, strict=True):
        assert one.samples[:2] == other.samples


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["evaluation.every_steps=2"], "evaluation.benchmarks names nothing"),
        (["evaluation.samples=2"], "has no effect, because evaluation.every_steps is 0"),
        (["evaluation.every_steps=2", "evaluation.benchmarks=[gsm8k]"], "--data (evaluation.data) names its folder"),
        (
            [
                "evaluation.every_steps=3",
                "evaluation.benchmarks=[builtin:arithmetic]",
                "evaluation.keep_best=arithmetic",
            ],
            "is no multiple of checkpoint.every_steps = 2",
        ),
        (
            ["evaluation.every_steps=2", "evaluation.benchmarks=[builtin:arithmetic]", "evaluation.keep_best=sums"],
            "none of the benchmarks: arithmetic",
        ),
        (
            ["evaluation.every_steps=2", "evaluation.benchmarks=[builtin:arithmetic]", "evaluation.max_tokens=5000"],
            "more than the model's context",
        ),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused_before_the_run_starts(
    options: list[str], words: str, tmp_path: Path
) -> None:
    ended = tools.launched_here(tmp_path / "run", *tools.LAYOUTS["dp2"], *options)
    assert ended.code == 2 and words in ended.err, ended.all
