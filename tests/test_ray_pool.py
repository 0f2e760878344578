"""Graders on a real local Ray: the verdicts of the local pool, in order, also when an actor is killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from a3po_megatron.batch import Answered, Step, Verdict
from a3po_megatron.config import LocalPool, RayPool, RewardOptions
from a3po_megatron.reward.graders import graders_of, local_graders, ray_graders
from a3po_megatron.reward.ray_pool import RayGraders

pytestmark = pytest.mark.alone  # actors that are slow to answer count as dead

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
HALVES = """
from a3po_megatron.batch import Step, Verdict

def halves(response, answer):
    middle = len(response) // 2
    return Verdict("correct", "", (Step(0, middle, 0.1), Step(middle, len(response), -1.0)))
"""
ITEMS = [(f"so the answer is \\boxed{{{n if n % 3 else n + 1}}}", str(n)) for n in range(40)]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> RewardOptions:
    own = tmp_path_factory.mktemp("own") / "halves.py"
    own.write_text(HALVES)
    return RewardOptions(function=f"{own}:halves")


@pytest.fixture(scope="module")
def graders(options: RewardOptions) -> Iterator[RayGraders]:
    ray.init(
        "local",
        num_cpus=2,
        include_dashboard=False,
        namespace="a3po",
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
    )
    with ray_graders(options, RayPool(address="local")) as pool:
        yield pool
    ray.shutdown()


def test_ray_gives_the_verdicts_of_the_local_pool_in_their_order(graders: RayGraders) -> None:
    with local_graders(RewardOptions(), LocalPool()) as local:
        wanted = local.grade_all(ITEMS)
    assert graders.grade_all(ITEMS) == wanted
    assert graders.grade_all([]) == []
    with graders_of(RewardOptions(), RayPool(address="local")) as beside:  # as a run asks: from a thread
        assert beside.submit(ITEMS).result() == wanted


def test_steps_of_verdicts_are_those_of_the_local_pool(graders: RayGraders, options: RewardOptions) -> None:
    items = [Answered("<think>é 4, 5", "", grader="function", opened=7), Answered("so", "", grader="function")]
    with local_graders(options, LocalPool()) as local:
        wanted = local.grade_all(items)
    assert wanted[1] == Verdict("correct", "", (Step(0, 1, 0.1), Step(1, 2, -1.0)))
    assert [each.outcome for each in wanted] == ["invalid", "correct"]  # the first half is the prompt's
    assert graders.grade_all(items) == wanted


@pytest.mark.parametrize("seconds", [0.0, 0.1])  # Ray has not noticed, is starting it again
def test_verdicts_survive_the_death_of_the_actor_that_was_asked_for_them(graders: RayGraders, seconds: float) -> None:
    wanted = graders.grade_all(ITEMS)

    @ray.remote(num_cpus=0)
    def pid_of_actor() -> int:
        import psutil

        named = {p.pid: " ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])}
        (found,) = [
            pid
            for pid, words in named.items()
            if "_Node" in words and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        ]
        return int(found)

    victim: Any = ray.get(pid_of_actor.remote())
    os.kill(victim, signal.SIGKILL)
    time.sleep(seconds)
    assert graders.grade_all(ITEMS) == wanted
    assert not psutil.pid_exists(victim) or psutil.Process(victim).status() == psutil.STATUS_ZOMBIE
