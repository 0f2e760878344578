"""Collecting a step: what is accepted, carried over, dropped, counted and refused. Engine and graders are scripted."""

from __future__ import annotations

import random
import tempfile
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from a3po_megatron.batch import Answered, Collected, Group, Prompt, Segment, Step, Verdict
from a3po_megatron.config import NoProcess, ParallelOptions, RewardOptions, RolloutOptions, SpanRewards, TrainerOptions
from a3po_megatron.data.order import rollout_seed
from a3po_megatron.errors import RunFailed
from a3po_megatron.ranks.topology import topology_of
from a3po_megatron.reward.beside import Beside
from a3po_megatron.reward.math import grade
from a3po_megatron.rollout.engine import Completion, Request
from a3po_megatron.rollout.intake import Intake
from a3po_megatron.rollout.sample import Sampler, _answered
from a3po_megatron.run.stop import Interrupt
from tests.harness.journals import journal_of

MAX_TOKENS = 20
OUTCOMES = {"c": "correct", "w": "wrong", "i": "invalid"}
Script = Callable[[int], str]  # prompt index → one letter a sample


class FakeCluster:
    """A single rank, alone with its replica and its engine. A fake: real ranks are tests/test_circle.py's."""

    rank, engine, engine_rank, engines, engine_leaders = 0, 0, 0, 1, (0,)
    batch_group = SimpleNamespace(size=lambda: 1)
    topology = topology_of(ParallelOptions())

    def store_of(self, name: str) -> Any:
        return dist.PrefixStore(name, dist.HashStore())

    def agree(self, tag: str, value: Any, op: Callable[[list[Any]], Any]) -> Any:
        return op([value])

    def any_of_engine(self, flag: bool) -> bool:
        return flag

    def told_by_engine(self, number: int) -> int:
        return number


class FakePrompts:
    """Prompt n has the single token n and the answer "gold n"."""

    def __init__(self) -> None:
        self.position = 0
        self.way_of: Callable[[str], str] | None = None

    def at(self, index: int) -> Prompt:
        return Prompt(f"p/{index}", f"problem {index}", f"gold {index}", (index,), index)


class FakeTokens:
    """The text of a response is its first token, which is the letter of its outcome."""

    def decode(self, tokens: Any) -> str:
        return chr(int(tokens[0]))


class ScriptedEngine:
    """Answers the samples of a prompt with the letters of the script, in the order of the requests."""

    def __init__(self, script: Script, length: Callable[[int, int], int] = lambda prompt, sample: 1) -> None:
        self.script, self.length = script, length
        self.weight_version = 1
        self.requests: list[Request] = []

    def sample(
        self, requests: Iterable[Request | None], room: int | None = None
    ) -> Generator[list[tuple[int, Completion]]]:
        """All that there is at once in one engine step, the last request first."""
        number = 0
        for batch in batches(requests):
            yield [(number + place, done) for place, done in enumerate(self.complete(batch))][::-1]
            number += len(batch)

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        seen: dict[int, int] = {}
        completions = []
        for request in requests:
            (prompt,) = request.prompt
            number = seen[prompt] = seen.get(prompt, -1) + 1
            length = self.length(prompt, number)
            tokens = np.full(length, ord(self.script(prompt)[number]), dtype=np.int64)
            finish = "length" if length == MAX_TOKENS else "stop"
            routes = np.full((length, 2, 1), 16 * prompt % 256 + number, np.uint8)
            completions.append(Completion(tokens, np.full(length, -0.5, dtype=np.float32), finish, routes))
        self.requests += requests
        return completions


def batches(requests: Iterable[Request | None]) -> Iterator[list[Request]]:
    """What there is to sample until there is nothing for now, again and again."""
    batch: list[Request] = []
    for request in requests:
        if request is not None:
            batch.append(request)
        else:
            yield batch
            batch = []
    yield batch


def known(verdicts: list[Verdict]) -> Future[list[Verdict]]:
    future: Future[list[Verdict]] = Future()
    future.set_result(verdicts)
    return future


class ScriptedGraders:
    def __init__(self) -> None:
        self.asked: list[Any] = []

    def submit(self, items: Sequence[Any]) -> Future[list[Verdict]]:
        self.asked += items
        return known([Verdict(OUTCOMES[text]) for text, *_ in items])


class BrokenGraders(ScriptedGraders):
    def submit(self, items: Sequence[Any]) -> Future[list[Verdict]]:
        self.asked += items
        return known([Verdict("invalid", "the grader was killed")] * len(items))


class Setting:
    """An intake with its fakes."""

    def __init__(
        self,
        script: Script,
        wanted: int = 4,
        batches: int = 3,
        length: Callable[[int, int], int] = lambda prompt, sample: 1,
        empty: int = 3,
        size: int = 4,
        journal: Path | None = None,  # a folder; None: a new one
        dynamic: bool = True,
        **reward: Any,
    ) -> None:
        self.engine, self.graders, self.prompts = (
            ScriptedEngine(script, length),
            ScriptedGraders(),
            FakePrompts(),
        )
        sampler = Sampler(
            FakeCluster(),
            FakeTokens(),
            TrainerOptions(prompts_per_step=wanted, rollouts_per_prompt=size, max_empty_steps=empty, seed=5),
            RolloutOptions(max_batches=batches, max_tokens=MAX_TOKENS, dynamic_sampling=dynamic),
            RewardOptions(**reward),
            journal_of(journal or Path(tempfile.mkdtemp(prefix="journal-")), 0, "run"),
            Interrupt(),
            self.engine,
            self.prompts,
            self.graders,
        )
        self.intake = Intake(sampler)

    def step(self, number: int) -> Collected:
        self.engine.weight_version = number + 1
        self.intake.sampler.journal.published(number + 1, "")
        return self.intake.next(number)


def spread_at(*indices: int) -> Script:
    return lambda prompt: "cwww" if prompt in indices else "wwww"


def indices(groups: list[Group]) -> list[int]:
    return [group.prompt.index for group in groups]


def test_every_rollout_keeps_its_own_routes(tmp_path: Path) -> None:
    for journal in (None, tmp_path, tmp_path):  # sampled; sampled and written down; recalled
        found = Setting(lambda prompt: "cwcw", journal=journal).step(0)
        for group in found.groups:
            for number, rollout in enumerate(group.rollouts):
                assert rollout.routes is not None
                assert rollout.routes.tolist() == [[[16 * group.prompt.index + number]] * 2]
    assert found.metrics["perf/recalled_groups"] == 4


# --- what is accepted ----------------------------------------------------------------------------------------------


def test_groups_are_accepted_in_prompt_order_and_those_without_spread_dropped() -> None:
    setting = Setting(spread_at(1, 3, 4, 5))
    found = setting.step(0)
    assert found.accepted == indices(found.groups) == [1, 3, 4, 5]
    assert indices(found.sampled) == list(range(setting.prompts.position))
    assert found.metrics["rollout/kept_groups"] == 4
    assert found.metrics["rollout/sampled_groups"] == setting.prompts.position


def test_without_dynamic_sampling_every_group_with_a_verdict_counts() -> None:
    """But not one whose grading failed as a whole: others are sampled in its place."""
    script = {0: "cccc", 1: "wwww", 2: "iiii", 3: "cwww"}
    setting = Setting(lambda prompt: script.get(prompt, "wwww"), wanted=4, dynamic=False, max_invalid_rate=1.0)
    found = setting.step(0)
    assert found.accepted == indices(found.groups) == [0, 1, 3, 4]
    assert setting.intake.state()["surplus"] == list(range(5, setting.prompts.position))


def test_where_all_groups_count_no_more_are_sampled_than_a_step_wants() -> None:
    setting = Setting(lambda prompt: "cwcw")
    assert setting.step(0).accepted == [0, 1, 2, 3]
    assert setting.prompts.position == 4
    assert setting.step(1).accepted == [4, 5, 6, 7]


def test_a_step_samples_no_more_than_it_may_and_goes_on_with_what_it_has() -> None:
    setting = Setting(spread_at(0), batches=3)
    found = setting.step(0)
    assert found.accepted == [0]
    assert found.metrics["rollout/sampled_groups"] == setting.prompts.position == 3 * 4
    assert len(Setting(spread_at(0), batches=1).step(0).sampled) == 4


def test_surplus_is_used_first_in_the_next_step_with_the_weight_version_that_sampled_it() -> None:
    # The first prompts find nothing, so that more are sampled ahead than turn out to be needed.
    setting = Setting(lambda prompt: "cwww" if prompt > 3 else "wwww")
    first = setting.step(0)
    surplus = list(range(8, setting.prompts.position))
    assert first.accepted == [4, 5, 6, 7]
    assert 0 < len(surplus) <= 4 and setting.intake.state()["surplus"] == surplus
    second = setting.step(1)
    assert second.accepted == indices(second.groups) == [8, 9, 10, 11]
    fresh = 4 - len(surplus)
    versions = [{s.weight_version for r in group.rollouts for s in r.segments} for group in second.groups]
    assert versions == [{1}] * len(surplus) + [{2}] * fresh
    assert [group.rollouts[0].step for group in second.groups] == [0] * len(surplus) + [1] * fresh
    assert not {*surplus} & {*indices(second.sampled)}, "carried groups are not sampled again"
    carried = [found.metrics["rollout/carried_groups"] for found in (first, second)]
    assert carried == [0, len(surplus)]
    assert second.metrics["rollout/kept_groups"] == 4


@pytest.mark.parametrize("seed", range(20))
def test_over_many_steps_no_group_with_spread_is_lost_repeated_or_overtaken(seed: int) -> None:
    draw = random.Random(seed)
    share, wanted, batches = draw.choice([0.1, 0.4, 0.9]), draw.randint(1, 6), draw.randint(1, 4)
    spread = {prompt for prompt in range(2000) if draw.random() < share}
    setting = Setting(spread_at(*spread), wanted, batches, empty=10**6)
    accepted: list[int] = []
    for number in range(15):
        before = setting.prompts.position
        found = setting.step(number)
        assert indices(found.sampled) == list(range(before, setting.prompts.position))
        assert len(found.sampled) <= batches * wanted
        assert found.accepted == indices(found.groups)
        assert len(found.accepted) == wanted or len(found.sampled) == batches * wanted
        accepted += found.accepted
    finished = [prompt for prompt in range(setting.prompts.position) if prompt in spread]
    assert accepted == finished[: len(accepted)]
    assert setting.intake.state()["surplus"] == finished[len(accepted) :]


@pytest.mark.parametrize(
    ("letters", "kept"),
    [
        ("cwcw", True),
        ("cwww", True),
        ("cccc", False),
        ("wwww", False),
        ("cwii", True),
        ("ciic", False),
        ("ciii", False),
        ("wiii", False),
        ("iiii", False),
    ],
)
def test_invalid_verdicts_make_no_spread_and_a_group_with_fewer_than_two_valid_members_is_dropped(
    letters: str, kept: bool
) -> None:
    found = Setting(lambda prompt: letters, wanted=1, batches=1, max_invalid_rate=1.0).step(0)
    assert found.accepted == ([0] if kept else [])
    if kept:
        assert len(found.groups[0].valid) == sum(letter != "i" for letter in letters)
        assert all(rollout.verdict.outcome != "invalid" for rollout in found.groups[0].valid)


@pytest.mark.parametrize("letters", ["cccc", "wwww"])
def test_rewards_that_differ_by_the_overlong_penalty_alone_are_no_spread(letters: str) -> None:
    setting = Setting(
        lambda prompt: letters,
        batches=1,
        length=lambda prompt, sample: (1, 12, 16, MAX_TOKENS)[sample],
        overlong_tokens=10,
    )
    found = setting.step(0)
    assert len({rollout.reward for rollout in found.sampled[0].rollouts}) > 1, "the penalty does make rewards differ"
    assert {rollout.verdict.outcome for rollout in found.sampled[0].rollouts} == {OUTCOMES[letters[0]]}
    assert found.accepted == []


# --- what a rollout carries ----------------------------------------------------------------------------------------


def test_every_rollout_carries_its_name_seed_step_version_and_verdict() -> None:
    setting = Setting(lambda prompt: "cwwi", length=lambda prompt, sample: sample + 1)
    setting.step(0)
    found = setting.step(7)
    requests = iter(setting.engine.requests[-len(found.sampled) * 4 :])
    for group in found.sampled:
        for sample, rollout in enumerate(group.rollouts):
            assert rollout.name == f"p/{group.prompt.index}#{sample}"
            assert rollout.seed == rollout_seed(5, 7, f"p/{group.prompt.index}", sample) == next(requests).seed
            assert (rollout.step, rollout.segments) == (7, (Segment(sample + 1, 8, trained=True),))
            assert rollout.verdict.outcome == OUTCOMES["cwwi"[sample]]
            assert len(rollout.tokens) == len(rollout.logprobs) == sample + 1
    assert len({request.seed for request in setting.engine.requests}) == len(setting.engine.requests)


def test_a_response_is_graded_against_the_gold_answer_of_its_own_prompt() -> None:
    setting = Setting(spread_at(0, 1, 2, 3))
    setting.step(0)
    asked = [(item.response, item.answer, item.finished) for item in setting.graders.asked]
    assert sorted(asked) == sorted((letter, f"gold {prompt}", True) for prompt in range(4) for letter in "cwww")


def test_a_group_is_given_to_the_graders_as_soon_as_it_is_finished_while_the_engine_goes_on() -> None:
    setting = Setting(spread_at(0, 1, 2, 3))
    seen: list[int] = []

    def one_by_one(requests: Iterable[Request | None], room: int | None) -> Generator[list[tuple[int, Completion]]]:
        for batch in batches(requests):
            for number, completion in enumerate(setting.engine.complete(batch)):
                seen.append(len(setting.graders.asked))
                yield [(number, completion)]
            yield []

    setting.engine.sample = one_by_one  # type: ignore[method-assign]
    setting.step(0)
    assert seen == [4 * (number // 4) for number in range(16)]


def test_many_small_groups_are_graded_in_few_calls_and_each_gets_its_own_verdicts_or_the_pools_failure() -> None:
    class Slow:
        """Holds its first call until all has been submitted."""

        def __init__(self) -> None:
            self.calls: list[int] = []
            self.go_on = threading.Event()

        def __enter__(self) -> Slow:
            return self

        def __exit__(self, *_: object) -> None:
            return

        def grade_all(self, items: Sequence[Any]) -> list[Verdict]:
            assert self.go_on.wait(60)
            self.calls.append(len(items))
            if any(item.response == "!" for item in items):
                raise RunFailed("no grader can be started")
            return [Verdict("correct" if item.response == item.answer else "wrong") for item in items]

    pool = Slow()
    with Beside(pool) as graders:
        asked = [[Answered(str(number), str(number // 2 * 2)) for number in range(n, n + 3)] for n in range(20)]
        futures = [graders.submit(items) for items in asked]
        pool.go_on.set()
        for items, future in zip(asked, futures, strict=True):
            assert [v.outcome == "correct" for v in future.result(60)] == [i.response == i.answer for i in items]
        assert len(pool.calls) <= 3 and sum(pool.calls) == 60
        with pytest.raises(RunFailed, match="no grader can be started"):
            graders.submit([Answered("!", "")]).result(60)
        assert graders.submit([Answered("1", "1")]).result(60) == [Verdict("correct")]


def test_graders_are_told_what_was_cut_off_and_that_a_prompt_has_opened_the_thoughts() -> None:
    def answered(prompt: str, response: str, finish: str) -> Any:
        asked = Prompt("p", prompt, "4", grader="choice")
        rollout = SimpleNamespace(prompt=asked, text=response, finish=finish)
        return _answered(rollout)

    assert answered("2+2=", "4", "stop") == ("4", "4", True, "choice", "", "", 0)
    assert answered("2+2=", "It is 4, or", "length") == ("It is 4, or", "4", False, "choice", "", "", 0)
    opened = answered("<|im_start|>assistant\n<think>\n", "2 * 2 = 4", "length")
    assert opened == ("<think>2 * 2 = 4", "4", False, "choice", "", "", 7)
    assert grade(*opened[:2]).outcome == "wrong"  # its thoughts never came to an end
    assert grade(answered("…<think>\n", "5?</think>4", "stop").response, "4").outcome == "correct"


# --- what is counted -----------------------------------------------------------------------------------------------


def test_steps_are_counted_over_all_sampled_rollouts_where_they_are_rewarded_and_else_undefined() -> None:
    class Stepping(ScriptedGraders):
        """c has two steps, w one, i none."""

        def submit(self, items: Sequence[Any]) -> Future[list[Verdict]]:
            steps = {"c": (Step(0, 1, 0.5), Step(1, 2, 1.0)), "w": (Step(0, 1, -1.0),), "i": ()}
            return known([Verdict(OUTCOMES[text], "", steps[text]) for text, *_ in items])

    names = ("reward/steps_rate", "reward/steps_mean", "reward/step_score_mean")
    for process, wanted in ((NoProcess(), [None] * 3), (SpanRewards(), [6 / 8, 9 / 8, 1.5 / 9])):
        setting = Setting(lambda prompt: "ccwi" if prompt else "cwwi", wanted=2, batches=1)
        setting.intake.sampler.graders, setting.intake.process = Stepping(), process
        metrics = setting.step(0).metrics
        assert [metrics[name] for name in names] == (wanted if wanted[0] is None else pytest.approx(wanted))
    none = Setting(spread_at(0), wanted=1, batches=1)
    none.intake.process = SpanRewards()
    assert [none.step(0).metrics[name] for name in names] == [0.0, 0.0, None]


def test_metrics_are_over_all_sampled_rollouts_not_over_the_kept_ones() -> None:
    script = {0: "cccc", 1: "cwww", 2: "wwww", 3: "wwww", 4: "ccww", 5: "wwww", 6: "cccw", 7: "wwww"}
    lengths = {(prompt, sample): 1 + (7 * prompt + 5 * sample) % MAX_TOKENS for prompt in script for sample in range(4)}
    setting = Setting(
        script.__getitem__, batches=2, length=lambda *place: lengths[place], correct=2.0, wrong=-1.0, overlong_tokens=0
    )
    found = setting.step(0)
    assert found.accepted == [1, 4, 6]
    sampled = [(prompt, sample) for prompt in range(8) for sample in range(4)]
    right = sum(script[prompt][sample] == "c" for prompt, sample in sampled)
    wanted = {
        "reward/mean": pytest.approx((2.0 * right - (32 - right)) / 32),
        "reward/correct_rate": pytest.approx(right / 32),
        "reward/invalid_rate": 0.0,
        "rollout/length_mean": pytest.approx(sum(lengths.values()) / 32),
        "rollout/truncated_rate": pytest.approx(sum(n == MAX_TOKENS for n in lengths.values()) / 32),
        "rollout/spread_rate": 3 / 8,
        "rollout/tokens": sum(lengths.values()),
        "rollout/kept_groups": 3,
        "rollout/carried_groups": 0,
        "rollout/sampled_groups": 8,
    }
    assert {name: found.metrics[name] for name in wanted} == wanted
    assert sum(n == MAX_TOKENS for n in lengths.values()) > 0


def test_the_overlong_penalty_counts_in_the_mean_reward() -> None:
    # DAPO, equation 13: none up to 10 tokens, then linear, the whole penalty at 20.
    setting = Setting(
        lambda prompt: "cccw",
        wanted=1,
        length=lambda prompt, sample: (10, 15, 20, 20)[sample],
        overlong_tokens=10,
        overlong_penalty=0.5,
    )
    assert setting.step(0).metrics["reward/mean"] == pytest.approx((1.0 + 0.75 + 0.5 - 0.5) / 4)


def test_invalid_verdicts_are_a_rate_of_all_sampled_rollouts() -> None:
    found = Setting(lambda prompt: "cwwi", wanted=2, max_invalid_rate=0.25).step(0)
    assert found.metrics["reward/invalid_rate"] == 0.25


def test_the_share_of_each_way_of_answering_is_over_all_sampled_rollouts_and_null_where_a_task_names_none() -> None:
    setting = Setting(lambda prompt: "cccc" if prompt else "cwww", wanted=2, batches=1)
    assert setting.step(0).metrics["task/stepwise_rate"] is None
    assert setting.step(1).metrics["task/at_once_rate"] is None
    ways = Setting(lambda prompt: "cccc" if prompt else "cwww", wanted=2, batches=1)
    ways.prompts.way_of = {"c": "stepwise", "w": "at_once"}.__getitem__
    found = ways.step(0).metrics  # the second group has no spread and is dropped, but counts
    assert (found["task/stepwise_rate"], found["task/at_once_rate"]) == (5 / 8, 3 / 8)


# --- what ends the run ---------------------------------------------------------------------------------------------


def test_a_rate_of_invalid_verdicts_above_the_bound_ends_the_run_and_is_said() -> None:
    setting = Setting(lambda prompt: "cwii" if prompt < 4 else "ciii", wanted=4, batches=1, max_invalid_rate=0.5)
    assert setting.step(0).accepted == [0, 1, 2, 3], "at the bound the step goes on"
    with pytest.raises(RunFailed) as caught:
        setting.step(1)
    for words in ("step 1", "12 of 16", "reward.max_invalid_rate = 0.5"):
        assert words in str(caught.value)
    assert caught.value.exit_code == 1


def test_steps_in_a_row_without_any_group_end_the_run_and_the_message_says_the_correct_rate() -> None:
    setting = Setting(lambda prompt: "cccc" if prompt % 4 == 0 else "wwww", wanted=4, batches=2, empty=3)
    for number in range(2):
        assert setting.step(number).accepted == []
    with pytest.raises(RunFailed) as caught:
        setting.step(2)
    for words in ("step 2", "3 steps in a row", "trainer.max_empty_steps", "correct rate was 0.250"):
        assert words in str(caught.value)
    assert caught.value.exit_code == 1


def test_a_step_with_a_group_starts_the_count_of_empty_steps_again() -> None:
    empty = {0, 1, 3, 4}
    setting = Setting(lambda prompt: "wwww" if prompt // 2 in empty else "cwww", wanted=2, batches=1, empty=3)
    assert [bool(setting.step(number).accepted) for number in range(6)] == [n not in empty for n in range(6)]


def test_with_a_single_empty_step_allowed_the_first_one_ends_the_run() -> None:
    with pytest.raises(RunFailed, match=r"correct rate was 1\.000"):
        Setting(lambda prompt: "cccc", empty=1).step(0)


# --- what a run of before had finished ------------------------------------------------------------------------------


def test_responses_that_broken_graders_ended_a_run_with_are_graded_after_a_restart_and_not_sampled_again(
    tmp_path: Path,
) -> None:
    script = spread_at(1, 3, 4, 5)
    broken = Setting(script, journal=tmp_path)
    broken.graders = broken.intake.sampler.graders = BrokenGraders()
    with pytest.raises(RunFailed, match=r"reward\.max_invalid_rate"):
        broken.step(0)
    assert len(broken.graders.asked) == len(broken.engine.requests) > 0

    again, undisturbed = Setting(script, journal=tmp_path), Setting(script)
    found, wanted = again.step(0), undisturbed.step(0)
    assert again.engine.requests == [], "what was sampled is sampled again"
    assert sorted(again.graders.asked) == sorted(undisturbed.graders.asked), "every response is graded, once"
    assert found.accepted == wanted.accepted == [1, 3, 4, 5]
    timing = {"perf/engine_idle_share": found.metrics["perf/engine_idle_share"]}
    assert found.metrics == wanted.metrics | {"perf/recalled_groups": len(found.sampled)} | timing
    assert [r.reward for g in found.groups for r in g.rollouts] == [r.reward for g in wanted.groups for r in g.rollouts]

    third = Setting(script, journal=tmp_path)  # the verdicts that followed count, the invalid ones before them do not
    third.graders = third.intake.sampler.graders = BrokenGraders()
    assert third.step(0).accepted == [1, 3, 4, 5]
    assert third.graders.asked == [] == third.engine.requests
