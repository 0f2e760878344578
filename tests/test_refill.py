"""How far ahead a step samples, and which engine takes what: the same prompts whoever is faster."""

from __future__ import annotations

import math
import random

import pytest
import torch.distributed as dist

from a3po_megatron.rollout.board import NO_MORE, Board
from a3po_megatron.schedule.refill import Refill, Share

CASES = [(wanted, share, seed) for wanted in (1, 3, 8, 32) for share in (0.1, 0.5, 0.95) for seed in range(4)]


def released_by_the_rule(verdicts: list[bool], missing: int, wanted: int, most: int, before: Share) -> int:
    """Where a step ends: the rule as docs say it, over the verdicts in the order of their prompts."""
    prior = (before.kept + 1) / (before.tried + 1)
    released, known = 0, 0
    while True:
        kept = sum(verdicts[:known])
        if kept >= missing or known >= most:
            return released
        lack = missing - kept
        share = (kept + wanted * prior) / (known + wanted)
        if known + lack / share > released:
            margin = 2 * math.sqrt(lack * (1 - share) / share**2)
            ahead = min(math.ceil(lack / share + margin), int((lack + wanted - 1) / min(1.0, 1.5 * share)))
            released = min(most, max(released, known + max(1, ahead)))
        assert known < released, "a step that waits for verdicts of nothing"
        known += 1


@pytest.mark.parametrize(("wanted", "share", "seed"), CASES)
def test_what_is_sampled_follows_from_verdicts_in_prompt_order_and_never_from_the_order_in_which_they_come(
    wanted: int, share: float, seed: int
) -> None:
    draw = random.Random(f"{wanted} {share} {seed}")
    missing, most = draw.randint(1, wanted), 4 * wanted
    before = Share(draw.randint(0, wanted), wanted)
    verdicts = [draw.random() < share for _ in range(most)]
    ends = set()
    for _ in range(10):
        refill, waiting, taken = Refill(missing, wanted, most, before), [], 0
        while taken < refill.released or waiting:
            waiting += range(taken, refill.released)
            taken = refill.released
            number = waiting.pop(draw.randrange(len(waiting)))
            refill.add(number, verdicts[number])
        assert refill.enough
        ends.add(taken)
    assert ends == {released_by_the_rule(verdicts, missing, wanted, most, before)}


def test_a_step_that_needs_nothing_samples_nothing_and_one_that_knows_that_all_count_no_more_than_it_needs() -> None:
    assert Refill(0, 8, 32, Share()).released == 0
    assert Refill(5, 8, 32, Share()).released == 5
    assert Refill(5, 8, 32, Share(100.0, 100.0)).released == 5


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_where_the_share_is_known_most_steps_need_not_sample_again_after_they_have_begun(share: float) -> None:
    """With rounds every step must that does not keep all. Here 26, 15 and 7 in a hundred were counted: a step looks
    after each prompt, and where few groups count, more ahead would be too much to carry over."""
    draw, again, steps = random.Random(7), 0, 400
    for _ in range(steps):
        refill = Refill(128, 128, 4 * 128, Share(share * 1000, 1000))
        first = refill.released
        for number in range(512):
            refill.add(number, draw.random() < share)
        again += refill.released > first
    assert again <= steps / 3


def test_the_share_of_earlier_steps_counts_half_with_every_step_and_a_step_without_prompts_leaves_it() -> None:
    assert Share(8.0, 10.0).after(3, 4) == Share(7.0, 9.0)
    assert Share(8.0, 10.0).after(0, 0) == Share(8.0, 10.0)


FIRST = 1001  # index of the step's first prompt


class Engine:
    """A first rank among `engines`. A fake of ranks: real ones are tests/test_circle.py's."""

    engine_rank = 0

    def __init__(self, engine: int, engines: int) -> None:
        self.engine, self.engines = engine, engines

    def told_by_engine(self, number: int) -> int:
        return number


def through(
    speeds: list[float], verdicts: list[bool], seed: int, leaves: int | None = None, at_once: int = 1
) -> list[list[int]]:
    """What each engine takes of one step: who acts next is drawn, by their speeds; an engine takes what it can get, and
    finishes up to `at_once` of those that it holds. One may leave with its first prompt unfinished."""
    engines, store, draw = len(speeds), dist.HashStore(), random.Random(seed)
    boards = [Board(Engine(n, engines), store, FIRST, Refill(12, 16, 64, Share(4, 8))) for n in range(engines)]
    took: list[list[int]] = [[] for _ in speeds]
    held: list[list[int]] = [[] for _ in speeds]
    at_work, idle = set(range(engines)), 0
    while at_work:
        engine = draw.choices(range(engines), speeds)[0]
        if engine not in at_work:
            continue
        while (index := boards[engine].take(len(held[engine]))) >= 0:
            took[engine].append(index - FIRST)
            held[engine].append(index - FIRST)
        if held[engine] and engine == leaves:
            boards[engine].leave()
            at_work.remove(engine)
        elif held[engine]:
            count = min(draw.randint(1, at_once), len(held[engine]))
            done = [held[engine].pop(draw.randrange(len(held[engine]))) for _ in range(count)]
            boards[engine].say({FIRST + number: verdicts[number] for number in done})
            idle = 0
        elif index == NO_MORE:
            at_work.remove(engine)
        idle += 1
        assert idle < 10_000, "all wait for ever"
    return took


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("speeds", [[1.0], [1.0, 1.0], [1.0, 0.1], [1.0, 0.02, 0.3, 1.0]])
def test_engines_take_every_released_prompt_once_however_fast_each_is(speeds: list[float], seed: int) -> None:
    verdicts = [random.Random(f"{seed} {number}").random() < 0.4 for number in range(64)]
    took = through(speeds, verdicts, seed, at_once=3)
    wanted = released_by_the_rule(verdicts, 12, 16, 64, Share(4, 8))
    assert sorted(number for each in took for number in each) == list(range(wanted))


@pytest.mark.parametrize("seed", range(10))
def test_where_all_are_as_fast_hardly_any_prompt_is_taken_by_another_engine_than_its_own(seed: int) -> None:
    took = through([1.0] * 4, [number % 2 == 0 for number in range(64)], seed)
    own = sum((FIRST + number) % 4 == engine for engine, numbers in enumerate(took) for number in numbers)
    assert own >= 0.8 * sum(map(len, took))


@pytest.mark.parametrize("seed", range(10))
def test_a_slow_engine_takes_fewer_prompts(seed: int) -> None:
    quick, slow = through([1.0, 0.02], [number % 3 == 0 for number in range(64)], seed)
    assert len(slow) < len(quick)


@pytest.mark.parametrize("seed", range(10))
def test_an_engine_that_leaves_holds_up_no_other(seed: int) -> None:
    assert through([1.0, 1.0, 1.0], [False] * 64, seed, leaves=1)[1]
