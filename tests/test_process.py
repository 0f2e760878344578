"""Process rewards: from a grader's steps to advantages and polarity of tokens, against loops in plain Python."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from a3po_megatron.algorithm.advantage import assemble
from a3po_megatron.algorithm.process import add_process
from a3po_megatron.algorithm.shaping import shape
from a3po_megatron.algorithm.statistics import batch_metrics, batch_sums
from a3po_megatron.batch import Answered, Batch, Collected, Segment, Step, Verdict
from a3po_megatron.config import (
    AdvantageOptions,
    NoProcess,
    NoShaping,
    Process,
    RewardsToGo,
    ShapingOptions,
    SpanRewards,
    load_config,
)
from a3po_megatron.reward.grader import grade
from a3po_megatron.reward.pool import GraderPool
from a3po_megatron.reward.worker import judge
from a3po_megatron.telemetry.rollouts import rejected_entries, rollout_table, write_rejected, write_rollouts
from tests.harness import interrupted_runs as tools
from tests.harness.ranks import ROOT
from tests.harness.tiny_models import literal_token_weights, make_collected, trained_places, with_tools

KINDS: dict[str, type[SpanRewards] | type[RewardsToGo]] = {"spans": SpanRewards, "to_go": RewardsToGo}


# --- steps of rollouts ---------------------------------------------------------------------------------------------


def begins_of(tokens: np.ndarray) -> np.ndarray:
    """Where tokens begin, by themselves: some lie within one character, some are several characters long."""
    widths = tokens % 3
    return np.concatenate([[0], np.cumsum(widths)[:-1]]).astype(np.int64) if len(tokens) else np.zeros(0, np.int64)


def drawn_steps(draw: random.Random, length: int) -> tuple[Step, ...]:
    """Steps of a text, with gaps between some of them."""
    cuts = sorted(draw.sample(range(length + 1), min(length + 1, draw.choice([0, 2, 3, 4, 7, 12]))))
    scores = draw.choice([[0.5], [0.0, 1.0], [draw.gauss(0, 1) for _ in range(9)], [1e6, 1e6 + 1]])
    pairs = [pair for pair in itertools.pairwise(cuts) if draw.random() < 0.8]
    return tuple(Step(begin, end, draw.choice(scores)) for begin, end in pairs)


def graded(seed: int, tools_too: bool = False) -> Collected:
    """Groups whose rollouts have steps, or none, and an invalid one here and there, which had some."""
    draw = random.Random(seed)
    collected = make_collected(groups=draw.randint(1, 5), size=draw.randint(2, 5), seed=seed)
    for rollout in (r for group in collected.groups for r in group.rollouts):
        outcome = "invalid" if rollout.sample > 1 and draw.random() < 0.2 else rollout.verdict.outcome
        rollout.verdict = Verdict(outcome, "", drawn_steps(draw, int((rollout.tokens % 3).sum())))
    return with_tools(collected) if tools_too else collected


def assembled(collected: Collected, process: Process, options: AdvantageOptions | None = None) -> Batch:
    options = options or AdvantageOptions()
    return add_process(assemble(collected, options, 2), process, options, begins_of)


def literal(collected: Collected, kind: str, options: AdvantageOptions) -> dict[str, list[float]]:
    """Rollout → the process advantage of each of its tokens, one step and one token at a time."""
    found: dict[str, list[float]] = {}
    for group in collected.groups:
        scores = [step.score for r in group.valid for step in r.verdict.steps]
        mean = math.fsum(scores) / len(scores) if scores else 0.0
        deviation = 0.0
        if len(scores) > options.ddof:
            deviation = math.sqrt(math.fsum((s - mean) ** 2 for s in scores) / (len(scores) - options.ddof))
        for rollout in group.valid:
            trained = trained_places(rollout)
            values = []
            for place, begin in enumerate(begins_of(rollout.tokens).tolist()):
                value = 0.0
                for step in rollout.verdict.steps:
                    worth = (step.score - mean) / ((deviation + options.eps) if options.normalise_std else 1.0)
                    last = step.end - 1  # its last character
                    counts = last >= begin if kind == "to_go" else step.begin <= begin <= last
                    value += worth if counts else 0.0
                values.append(value if place in trained else 0.0)
            found[rollout.name] = values
    return found


def per_rollout(batch: Batch, values: torch.Tensor | None) -> dict[str, list[float]]:
    assert values is not None
    parts = values.split(batch.lengths.tolist())
    return {rollout.name: part.tolist() for rollout, part in zip(batch.rollouts, parts, strict=True)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(40))
def test_process_advantages_are_those_of_a_loop_over_steps_and_tokens(kind: str, seed: int) -> None:
    draw = random.Random(seed)
    weight = draw.choice([1.0, 0.25, 3.0])
    options = AdvantageOptions(
        ddof=draw.choice([0, 1]), eps=draw.choice([1e-6, 0.5]), normalise_std=draw.random() < 0.7, negative_scale=0.5
    )
    collected = graded(seed, tools_too=seed % 2 == 1)
    batch = assembled(collected, KINDS[kind](weight=weight), options)
    wanted = literal(collected, kind, options)
    found, whole = per_rollout(batch, batch.process_advantages), per_rollout(batch, batch.token_advantages())
    outcome = dict(zip([r.name for r in batch.rollouts], batch.advantages.tolist(), strict=True))
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert found[name] == pytest.approx([weight * value for value in values], rel=1e-6, abs=1e-7), name
        together = [outcome[name] + weight * value for value in values]
        assert whole[name] == pytest.approx(together, rel=1e-5, abs=1e-6), name
    assert batch.token_positive is None
    places = torch.randperm(batch.rollout_index.numel(), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(batch.token_advantages(places), batch.token_advantages()[places])


def test_what_a_group_is_worth_depends_on_no_other_group_bit_for_bit() -> None:
    collected = graded(3)
    whole = assembled(collected, RewardsToGo())
    together = per_rollout(whole, whole.process_advantages)
    for group in collected.groups:
        alone = assembled(Collected([group], [], [group.prompt.index], {}), RewardsToGo())
        for name, values in per_rollout(alone, alone.process_advantages).items():
            assert values == together[name]


def test_steps_that_cancel_out_leave_no_sign() -> None:
    """1 + 0 + 0 less their mean is nothing, and in floats some 1e-17: no reason to reward a token or to punish it."""
    for scores in ([1.0, 0.0, 0.0], [0.1, 0.2, 0.3, 0.7], [0.3, 0.1, 0.2] * 5):
        collected = make_collected(groups=1, size=2)
        for rollout in collected.groups[0].rollouts:
            rollout.tokens, rollout.logprobs = np.full(len(scores), 1), np.zeros(len(scores), np.float32)
            rollout.segments = (Segment(len(scores), 1),)
            steps = tuple(Step(place, place + 1, score) for place, score in enumerate(scores))
            rollout.verdict = Verdict(rollout.verdict.outcome, "", steps)
        batch = assembled(collected, RewardsToGo(polarity="tokens"))
        assert batch.process_advantages is not None and batch.token_positive is not None
        firsts = [0, len(scores)]
        assert batch.process_advantages[firsts].tolist() == [0.0, 0.0]
        assert batch.token_positive[firsts].tolist() == batch.positive.tolist()


def test_equal_scores_and_a_single_step_are_worth_exactly_nothing() -> None:
    for steps in ((Step(0, 1, 0.1),), (Step(0, 1, 0.1), Step(1, 3, 0.1))):
        for sample in range(2):
            collected = make_collected(groups=1, size=2)
            for rollout in collected.groups[0].rollouts[sample:]:
                rollout.verdict = dataclasses.replace(rollout.verdict, steps=steps)
            for process in (SpanRewards(), RewardsToGo()):
                batch = assembled(collected, process)
                assert batch.process_advantages is not None
                assert not batch.process_advantages.any()


def test_without_process_rewards_a_batch_is_bit_for_bit_as_it_was() -> None:
    for seed in range(4):
        collected = graded(seed, tools_too=seed % 2 == 1)
        plain, none = assemble(collected, AdvantageOptions(), 2), assembled(collected, NoProcess())
        for each in (plain, none):
            prepared(each)
            shape(each, 20, ShapingOptions())
        for field in dataclasses.fields(Batch):
            before, after = getattr(plain, field.name), getattr(none, field.name)
            same = torch.equal(before, after) if isinstance(before, torch.Tensor) else before == after
            assert same, field.name
        assert none.process_advantages is None and none.token_positive is None
        assert torch.equal(none.token_advantages(), plain.advantages[plain.rollout_index])
        assert torch.equal(batch_sums(none, 1), batch_sums(plain, 1))


# --- polarity of tokens --------------------------------------------------------------------------------------------


def prepared(batch: Batch) -> Batch:
    """Scored by no model, with numbers that differ from token to token."""
    batch.old_logprobs = batch.rollout_logprobs * 1.25
    batch.entropy = (batch.rollout_logprobs * 7).sin() + 1
    return batch


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(20))
def test_with_polarity_of_tokens_each_side_of_a_rollout_is_ranked_and_counted_by_itself(kind: str, seed: int) -> None:
    collected = graded(seed, tools_too=seed % 2 == 1)
    batch = prepared(assembled(collected, KINDS[kind](polarity="tokens", weight=seed % 3)))
    options = ShapingOptions(
        rho=2.0, rho_negative=3.0, fraction=0.3, metric="entropy" if seed % 4 == 3 else "probability"
    )
    shape(batch, 20, options)
    process = literal(collected, kind, AdvantageOptions())
    ranked = batch.old_logprobs if options.metric == "probability" else -batch.entropy
    keys, weights = per_rollout(batch, ranked), per_rollout(batch, batch.token_weights)
    sizes = {True: [0, 0], False: [0, 0]}  # side → tokens, those of them that are shaped
    for rollout in batch.rollouts:
        is_correct, trained = rollout.verdict.outcome == "correct", trained_places(rollout)
        signs = {t: is_correct if abs(v) < 1e-9 else v > 0 for t, v in enumerate(process[rollout.name]) if t in trained}
        wanted = [0.0] * len(rollout.tokens)
        for side, rho in ((True, 2.0), (False, 3.0)):
            mine = [t for t, sign in signs.items() if sign == side]
            (row,) = literal_token_weights([[keys[rollout.name][t] for t in mine]], [side], 20, 0.3, rho, 0.005)
            for place, weight in zip(mine, row, strict=True):
                wanted[place] = weight
            sizes[side][0] += len(mine)
            sizes[side][1] += sum(weight != 1 for weight in row)
        assert weights[rollout.name] == pytest.approx(wanted), rollout.name
    metrics = batch_metrics(batch_sums(batch, 1), batch.rho)
    for side, name in ((True, "positive"), (False, "negative")):
        tokens, shaped = sizes[side]
        assert metrics[f"shaping/shaped_rate_{name}"] == (pytest.approx(shaped / tokens) if tokens else None)


def test_with_polarity_of_the_outcome_weights_are_those_of_a_run_without_process_rewards() -> None:
    for seed in range(6):
        collected = graded(seed)
        plain, with_process = (
            shape(prepared(assembled(collected, each)), 20, ShapingOptions()) for each in (NoProcess(), SpanRewards())
        )
        assert torch.equal(plain.token_weights, with_process.token_weights)


def test_the_pull_of_shaped_tokens_is_by_their_own_advantages() -> None:
    batch = shape(prepared(assembled(graded(1), SpanRewards())), 20, ShapingOptions())
    assert batch.token_weights is not None and batch.old_logprobs is not None
    pull = (
        batch.token_weights.double()
        * batch.token_advantages().double().abs()
        * -torch.expm1(batch.old_logprobs.double())
    )
    for side, name in ((batch.positive, "positive"), (~batch.positive, "negative")):
        mine = side[batch.rollout_index]
        share = float(pull[mine & (batch.token_weights != 1)].sum() / pull[mine].sum())
        assert batch_metrics(batch_sums(batch, 1), batch.rho)[f"shaping/gradient_share_{name}"] == pytest.approx(share)


def test_records_hold_steps_and_what_they_add_and_stay_as_they_were_without_process_rewards(tmp_path: Path) -> None:
    collected = graded(5, tools_too=True)
    for process in (NoProcess(), RewardsToGo(weight=0.5)):
        batch = shape(prepared(assembled(collected, process)), 20, NoShaping())
        table = rollout_table(20, collected.groups, set(collected.accepted), batch, 0, list)
        write_rollouts(path := tmp_path / "rollouts.parquet", table)
        records = {f"{r['prompt_id']}#{r['sample']}": r for r in tools.read_rollouts(path)}
        if isinstance(process, NoProcess):
            assert not any({"steps", "process"} & record.keys() for record in records.values())
            continue
        found = per_rollout(batch, batch.process_advantages)
        for rollout in (r for group in collected.groups for r in group.rollouts):
            record, places = records[rollout.name], trained_places(rollout)
            assert [Step(*step) for step in record["steps"]] == list(rollout.verdict.steps)
            if rollout.verdict.outcome == "invalid":
                assert record["process"] is None
                continue
            values = [v if t in places else None for t, v in enumerate(found[rollout.name])]
            assert record["process"] == values
        write_rejected(path := tmp_path / "rejected" / "batch.pt", rejected_entries(batch, 0))
        kept = torch.load(path, weights_only=False)
        assert all(entry["process"].tolist() == found[entry["name"]] for entry in kept)


# --- what a grader returns -----------------------------------------------------------------------------------------

OWN = '''
import numpy as np

from a3po_megatron.batch import Step, Verdict

def parts(response, answer):
    """A step a word, worth its length."""
    steps, begin = [], 0
    for word in response.split(" "):
        if word:
            steps.append(Step(begin, begin + len(word), len(word)))
        begin += len(word) + 1
    return Verdict("correct" if response.endswith(answer) else "wrong", "by words", tuple(steps))

def as_arrays(response, answer):
    return Verdict("correct", "", [(np.int64(0), np.int64(2), np.float32(0.25)), [2, 3, 1]])

def said(response, answer):
    return Verdict("correct", "", eval(answer))
'''


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path / "own.py"


def test_steps_come_out_of_the_pool_as_the_function_gave_them_and_of_the_rollouts_text(own: Path) -> None:
    items = [
        Answered("so 4", "4", grader="function"),
        Answered("so 5", "4", grader="function"),
        Answered("", "4", grader="function"),
        Answered("<think>ab c", "c", grader="function", opened=7),  # "<think>ab" is a step that begins before the text
        Answered("é 😀 4", "4", grader="function"),
        Answered(r"\boxed{4}", "4", grader="math"),
    ]
    wanted = [
        Verdict("correct", "by words", (Step(0, 2, 2.0), Step(3, 4, 1.0))),
        Verdict("wrong", "by words", (Step(0, 2, 2.0), Step(3, 4, 1.0))),
        Verdict("wrong", "by words"),
        Verdict("correct", "by words", (Step(0, 2, 9.0), Step(3, 4, 1.0))),
        Verdict("correct", "by words", (Step(0, 1, 1.0), Step(2, 3, 1.0), Step(4, 5, 1.0))),
        Verdict("correct"),
    ]
    graders = functools.partial(grade, function=f"{own}:parts")
    assert [judge(graders, *item) for item in items] == wanted
    with GraderPool(graders, 1, 20.0, 2 << 30) as pool:
        found = pool.grade_all(items)
    assert found == wanted
    assert all(type(step) is Step and type(step.score) is float for verdict in found for step in verdict.steps)


def test_steps_of_other_kinds_of_numbers_are_plain_ones_in_the_end(own: Path) -> None:
    found = judge(functools.partial(grade, function=f"{own}:as_arrays"), "abc", "", grader="function")
    assert found == Verdict("correct", "", (Step(0, 2, 0.25), Step(2, 3, 1.0)))
    assert [type(value) for step in found.steps for value in step] == [int, int, float] * 2
    assert json.loads(json.dumps(found.steps)) == [[0, 2, 0.25], [2, 3, 1.0]]


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ("[(1, 1, 0.5)]", "step 0 (1, 1, 0.5) ends where it begins, or before"),
        ("[(2, 1, 0.5)]", "ends where it begins, or before"),
        ("[(7, 8, 0.5), (9, 13, 1)]", "step 1 (9, 13, 1.0) is beyond the text of 12 characters"),
        ("[(-1, 3, 0.5)]", "is beyond the text of 12 characters"),
        ("[(8, 10, 1), (7, 9, 1)]", "step 1 (7, 9, 1.0) begins before the end of the one in front of it, 10"),
        ("[(8, 11, 1), (10, 12, 1)]", "begins before the end of the one in front of it, 11"),
        ("[(0, 7, 1)]", "is of the first 7 characters, which the prompt had written"),
        ("[(8, 9, float('nan'))]", "has a score that is not finite"),
        ("[(8, 9, -float('inf'))]", "has a score that is not finite"),
        ("[(8, 9, 10**400)]", "expected (begin, end, score) each"),
        ("[(8, 9)]", "expected (begin, end, score) each"),
        ("[(8, 9.0, 1)]", "expected (begin, end, score) each"),
        ("[(8, 9, 'high')]", "expected (begin, end, score) each"),
        ("None", "expected (begin, end, score) each"),
        ("7", "expected (begin, end, score) each"),
    ],
)
def test_malformed_steps_make_a_verdict_invalid_and_say_why(own: Path, steps: str, says: str) -> None:
    item = Answered("<think>hello", steps, grader="function", opened=7)
    found = judge(functools.partial(grade, function=f"{own}:said"), *item)
    assert found.outcome == "invalid" and found.steps == ()
    assert found.reason.startswith("grader returned malformed steps: ") and says in found.reason, found


def test_a_reply_with_steps_that_are_none_is_no_reply(own: Path) -> None:
    from a3po_megatron.reward.pool import _verdict

    item = Answered("<think>hello", "", opened=7)
    assert _verdict(b'["correct", "", [[0, 5, 0.5]]]', item) == Verdict("correct", "", (Step(0, 5, 0.5),))
    unreadable = Verdict("invalid", "grader worker sent an unreadable reply")
    for steps in ("[[0, 6, 0.5]]", "[[0, 5, NaN]]", "[[3, 2, 1]]", "[0]", "null", '"so"', "[[0, 5, 0.5], [0, 5, 0.5]]"):
        assert _verdict(f'["correct", "", {steps}]'.encode(), item) == unreadable, steps


# --- a run ---------------------------------------------------------------------------------------------------------

EXAMPLE = dict(re.findall(r"```(\w+)\n(.*?)```", (ROOT / "docs/method.md").read_text(), re.DOTALL))  # language → text


def arithmetic(folder: Path) -> list[str]:
    """Problems of the built-in task in a file, with the grader of steps of docs/method.md."""
    from a3po_megatron.data.arithmetic import problem

    rows = (dict(zip(("problem", "answer"), problem(number, 7), strict=True)) for number in range(200))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "steps.py").write_text(EXAMPLE["python"])
    data = [f"data.path={folder}/rows.jsonl", "data.grader=function", "data.duplicates=all"]
    return [*data, f"reward.function={folder}/steps.py:by_steps"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["process.name=spans"], "process.name = spans has no effect: no row has a grader that scores steps"),
        (["process.weight=2"], "process.weight has no effect, because process.name is none"),
        (
            ["process.name=spans", "process.polarity=tokens", "shaping.rho=1", "shaping.decay=null"],
            "process.polarity: tokens has no effect",
        ),
        (["process.name=spans", "process.polarity=tokens", "shaping.name=none"], "because shaping.name is none"),
        (["process.name=steps"], "process.name: Input should be 'none' or 'spans' or 'to_go' (got 'steps')"),
        (["process.name=to_go", "process.weight=-1"], "process.weight"),
    ],
)
def test_process_rewards_that_could_do_nothing_are_refused_before_a_run(
    options: list[str], says: str, tmp_path: Path
) -> None:
    ended = tools.launched_here(tmp_path / "run", *tools.LAYOUTS["dp2"], *options)
    assert ended.code == 2 and says in ended.err, ended.all


def test_the_configuration_of_the_page_is_one(tmp_path: Path) -> None:
    arithmetic(tmp_path)
    text = EXAMPLE["yaml"].replace("base: arithmetic.yaml", f"base: {ROOT}/configs/arithmetic.yaml")
    (tmp_path / "steps.yaml").write_text(text)
    config = load_config(tmp_path / "steps.yaml")
    assert config.process == SpanRewards(weight=0.5, polarity="tokens")
    assert config.reward.function == f"{tmp_path}/steps.py:by_steps" and config.data.grader == "function"
    graders = functools.partial(grade, function=config.reward.function)
    found = judge(graders, r"1,1*8=8?y,2*3=7,\boxed{3}", "3", True, "function")
    assert found == Verdict("correct", "", (Step(0, 2, 0.5), Step(2, 10, 1.0), Step(10, 16, 0.0)))


LOOKED_AT = ("trainer.steps=2", "telemetry.texts_per_step=100", "process.weight=0.5", "process.polarity=tokens")


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return arithmetic(tmp_path_factory.mktemp("asked"))


@pytest.fixture(scope="module")
def runs(asked: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {kind: tmp_path_factory.mktemp("runs") / kind for kind in KINDS}
    for kind, folder in folders.items():
        tools.trained_here(folder, *tools.LAYOUTS["dp2"], *asked, *LOOKED_AT, f"process.name={kind}")
    return folders


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_run_adds_to_its_tokens_is_what_a_loop_over_its_own_records_makes_of_them(
    kind: str, runs: dict[str, Path]
) -> None:
    folder = runs[kind]
    rows, records = tools.rows_of(folder), tools.rollouts_of(folder)
    assert [row["step"] for row in rows] == [0, 1]
    for row in rows:
        every = [r for r in records[row["step"]] if not r["carried"]]
        scores = [score for r in every for _, _, score in r["steps"]]
        assert row["reward/steps_rate"] == pytest.approx(sum(bool(r["steps"]) for r in every) / len(every))
        assert row["reward/steps_mean"] == pytest.approx(len(scores) / len(every))
        assert row["reward/step_score_mean"] == pytest.approx(sum(scores) / len(scores))
        assert row["policy/ratio_first_max"] < 1e-4
    seen: set[int] = set()
    for step, found in records.items():
        rho = max(2.0 - 0.025 * step, 1.0)
        for _, members in itertools.groupby(sorted(found, key=by_prompt), key=by_prompt):
            group = [r for r in members if r["accepted"] and r["outcome"] != "invalid"]
            scores = [score for r in group for _, _, score in r["steps"]]
            mean = sum(scores) / len(scores) if scores else 0.0
            deviation = math.sqrt(sum((s - mean) ** 2 for s in scores) / max(len(scores) - 1, 1))
            for record in group:
                texts = ["" if piece == "<eos>" else piece for piece in record["pieces"]]
                ends = list(itertools.accumulate(map(len, texts)))
                process = []
                for text, end in zip(texts, ends, strict=True):
                    begin = end - len(text) if text else max(end - 1, 0)
                    counts = [s for b, e, s in record["steps"] if e > begin and (kind == "to_go" or b <= begin)]
                    process.append(sum((score - mean) / (deviation + 1e-6) for score in counts))
                assert record["process"] == pytest.approx([0.5 * p for p in process], abs=1e-5)
                correct = record["outcome"] == "correct"
                sides = [correct if abs(value) < 1e-9 else value > 0 for value in process]
                for side in {*sides}:
                    mine = [t for t, each in enumerate(sides) if each == side]
                    chosen = [record["old_logprobs"][t] for t in mine]
                    shaped = sum(abs(record["weights"][t] - rho) < 1e-6 for t in mine)
                    assert shaped == max(1, math.floor(0.2 * len(mine)))
                    least = sorted(chosen, reverse=not side)[:shaped]
                    weighed = [record["old_logprobs"][t] for t in mine if record["weights"][t] != 1]
                    assert sorted(weighed, reverse=not side) == pytest.approx(least, abs=1e-6)
                seen |= {(value > 0) - (value < 0) for value in process}
    assert seen == {-1, 0, 1} if kind == "spans" else seen >= {-1, 1}


def by_prompt(record: dict[str, object]) -> object:
    return record["prompt_index"]


LAYOUTS = tools.LAYOUTS | {"cp2": ("parallel.tensor=1", "parallel.context=2")}


# Data parallelism is that of the runs above; a stage of a pipeline gets them as it gets token weights.
@pytest.mark.parametrize("names", [("tp2", "cp2"), pytest.param(tuple(LAYOUTS), marks=pytest.mark.soak)], ids=len)
def test_every_layout_learns_from_the_advantages_of_tokens(
    names: tuple[str, ...], asked: list[str], tmp_path: Path
) -> None:
    """At a ratio of 1 the loss is -Σ w · A' · TIS / tokens: the records say it, and no rank's code."""
    rows = {}
    for name in names:
        layout = LAYOUTS[name]
        once = ("trainer.steps=1", "trainer.mini_batches=1", "process.name=to_go", "process.polarity=tokens")
        tools.trained_here(tmp_path / name, *layout, *asked, *once)
        (rows[name],) = tools.rows_of(tmp_path / name)
        terms, of_outcomes = [], []
        for record in tools.rollouts_of(tmp_path / name)[0]:
            if record["process"] is not None:
                keys = ("process", "weights", "old_logprobs", "logprobs")
                for process, weight, old, sampled in zip(*(record[key] for key in keys), strict=True):
                    factor = -weight * min(math.exp(old - sampled), 2.0)
                    terms.append(factor * (record["advantage"] + process))
                    of_outcomes.append(factor * record["advantage"])
        assert rows[name]["learner/loss"] == pytest.approx(sum(terms) / len(terms), rel=1e-4, abs=1e-6), name
        assert abs(sum(terms) - sum(of_outcomes)) > 0.1 * abs(sum(terms))
        for metric in ("policy/grad_norm", "shaping/gradient_share_positive", "shaping/gradient_share_negative"):
            assert rows[name][metric] == pytest.approx(rows["tp2"][metric], rel=1e-4, abs=1e-6), (name, metric)


@pytest.mark.soak
def test_a_run_that_is_killed_and_resumed_is_the_same_bit_for_bit(
    asked: list[str], runs: dict[str, Path], tmp_path: Path
) -> None:
    options = [*tools.LAYOUTS["dp2"], *asked, *LOOKED_AT, "process.name=to_go"]
    point = tools.Interrupt("update", 1, "SIGKILL", "rank")  # graded and scored, and in the journal alone
    tools.interrupted(tmp_path / "run", point, *options)
    tools.trained_here(tmp_path / "run", *options)
    tools.assert_same_run(tmp_path / "run", runs["to_go"], 2)
    assert any(row["perf/recalled_groups"] for row in tools.rows_of(tmp_path / "run"))
    other = tools.launched_here(tmp_path / "run", *options, "process.weight=0.25")
    assert other.code == 2 and "process.weight was 0.5, is 0.25" in other.err, other.all
