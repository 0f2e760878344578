"""Rollouts dealt over replicas: how even, how few move, and that nothing of them changes on the way."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a3po_megatron.batch import Prompt, Rollout, Segment, Step, Verdict
from a3po_megatron.rollout.parcel import pack, unpack
from a3po_megatron.schedule.balance import attention_scale, costs_of, deal, imbalance
from a3po_megatron.schedule.packing import heaviest_first, token_multiple
from a3po_megatron.schedule.packing import pack as bins_of
from tests.distributed import cases_balance as cases
from tests.harness.ranks import run_ranks
from tests.harness.tiny_models import make_checkpoint

MINI_BATCH = 256  # rollouts, of 32 groups


class Sizes:
    """Qwen3-8B's."""

    hidden, ffn, heads, kv_heads, head_dim, experts = 4096, 12288, 32, 8, 128, None


@pytest.mark.parametrize(("median", "sigma"), [(4000, 0.6), (8000, 0.6), (6000, 1.0)])
@pytest.mark.parametrize("replicas", [8, 16, 32, 64])
@pytest.mark.parametrize("attention", [False, True])
def test_the_heaviest_replica_is_near_the_mean_or_the_longest_rollout(
    median: int, sigma: float, replicas: int, attention: bool
) -> None:
    """By tokens alone, and with what attention costs."""
    scale = attention_scale(Sizes()) if attention else float("inf")
    moved = []
    for seed in range(10):
        draw = np.random.default_rng(seed)
        lengths = np.minimum(np.exp(np.log(median) + sigma * draw.normal(size=MINI_BATCH)), 16384).astype(int).tolist()
        owners = [group % replicas for group in range(MINI_BATCH // 8) for _ in range(8)]
        costs = costs_of(lengths, scale)
        dealt = deal(costs, owners, replicas)
        loads = np.bincount(dealt, costs, replicas)
        near = loads.max() <= (1.07 if replicas == 64 else 1.05) * loads.mean()
        assert near or loads.max() <= 1.01 * max(loads.mean(), max(costs))
        assert deal(costs, owners, replicas) == dealt
        moved.append(sum(a != b for a, b in zip(owners, dealt, strict=True)) / MINI_BATCH)
    if replicas < 64:  # there half of the replicas have nothing to begin with
        assert np.mean(moved) < 0.2


@pytest.mark.parametrize("grain", [1, 128])  # bf16, blockwise FP8 (model/precision.py)
@pytest.mark.parametrize(("median", "sigma"), [(4000, 0.6), (8000, 0.6), (6000, 1.0)])
def test_of_what_the_learner_computes_two_percent_at_most_is_padding(median: int, sigma: float, grain: int) -> None:
    """Tensor parallel 4 with sequence parallelism, context parallel 2, 8 replicas, 65,536 tokens a micro-batch."""
    multiple, held, read = 2 * token_multiple(grain, 4, True), 0, 0
    for seed in range(10):
        draw = np.random.default_rng(seed)
        lengths = np.minimum(np.exp(np.log(median) + sigma * draw.normal(size=MINI_BATCH)), 16384).astype(int).tolist()
        dealt = deal(costs_of(lengths, float("inf")), [n % 8 for n in range(MINI_BATCH)], 8)
        for replica in range(8):
            mine = [-(-n // 4) * 4 for n, owner in zip(lengths, dealt, strict=True) if owner == replica]
            sums = [sum(mine[item] for item in items) for items in bins_of(mine, 65536)]
            held += sum(-(-tokens // multiple) * multiple for tokens in sums)
        read += sum(lengths)
    assert 1 - read / held <= 0.02


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_dealing_makes_nothing_heavier_and_leaves_what_is_even_where_it_is(data: st.DataObject) -> None:
    replicas = data.draw(st.integers(1, 6))
    lengths = data.draw(st.lists(st.integers(1, 1000), max_size=40))
    owners = [data.draw(st.integers(0, replicas - 1)) for _ in lengths]
    costs = costs_of(lengths, 300.0)
    dealt = deal(costs, owners, replicas)
    assert len(dealt) == len(owners) and all(0 <= owner < replicas for owner in dealt)
    if costs:
        before, after = (np.bincount(each, costs, replicas).max() for each in (owners, dealt))
        assert after <= before * (1 + 1e-12)
        assert imbalance(lengths, dealt, replicas) >= 1
    even = [n % replicas for n in range(4 * replicas)]
    assert deal([7.0] * len(even), even, replicas) == even


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_heaviest_replica_is_near_the_best_that_there_is(data: st.DataObject) -> None:
    """Every way to deal a few rollouts is tried. Longest first is within 4/3 of the best one (Graham 1969)."""
    replicas = data.draw(st.integers(1, 3))
    costs = costs_of(data.draw(st.lists(st.integers(1, 1000), min_size=1, max_size=7)), 300.0)
    owners = [data.draw(st.integers(0, replicas - 1)) for _ in costs]
    best = min(np.bincount(way, costs, replicas).max() for way in itertools.product(range(replicas), repeat=len(costs)))
    heaviest = np.bincount(deal(costs, owners, replicas), costs, replicas).max()
    assert heaviest <= max(4 / 3 * best, 1.03 * sum(costs) / replicas, 1.005 * max(costs)) * (1 + 1e-12)


def test_nothing_is_dealt_where_there_is_nothing() -> None:
    assert deal([], [], 4) == [] and imbalance([], [], 4) == 1.0 and deal([3.0], [0], 1) == [0]


def test_bins_of_experts_come_heaviest_first() -> None:
    assert heaviest_first([[0], [1, 2], [3]], [5, 4, 4, 7]) == [[1, 2], [3], [0]]


rollouts = st.builds(
    lambda n, sample, text, outcome, reward, scores, routed: Rollout(
        prompt=Prompt("p", "q", "a", (1, 2), sample % 3),
        sample=sample,
        seed=2**63 - sample,
        step=sample,
        tokens=np.arange(n, dtype=np.int64) * 7919 % 150000,
        logprobs=np.linspace(-9, 0, n, dtype=np.float32),
        finish="length" if n % 2 else "stop",
        text=text,
        segments=(Segment(n - n // 2, 1), Segment(n // 2, 2, trained=False)),
        verdict=Verdict(outcome, text[:3], tuple(Step(i, i + 1, score) for i, score in enumerate(scores))),
        reward=reward,
        routes=np.full((n + 1, 2, 4), 300, np.uint16) if routed else None,
    ),
    st.integers(2, 9),
    st.integers(0, 5),
    st.text(),
    st.sampled_from(["correct", "wrong", "invalid"]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.lists(st.floats(-1e9, 1e9), max_size=3),
    st.just(True),
)


@settings(max_examples=50, deadline=None)
@given(st.lists(rollouts, max_size=4), st.booleans())
def test_a_rollout_is_the_same_on_the_other_side(sent: list[Rollout], routed: bool) -> None:
    for rollout in sent:
        rollout.routes = rollout.routes if routed else None
    prompts = {index: Prompt("p", "q", "a", (1, 2), index) for index in range(3)}
    arrays = {"a": np.array([1.5, float("-inf")]), "b": np.zeros((0, 3), bool)}
    came, more = unpack(pack(sent, arrays), prompts.__getitem__)
    assert len(came) == len(sent)
    for one, other in zip(sent, came, strict=True):
        assert (one.routes is None) == (other.routes is None)
        for name in ("tokens", "logprobs", "routes"):
            ours, theirs = getattr(one, name), getattr(other, name)
            assert ours is None or (np.array_equal(ours, theirs) and ours.dtype == theirs.dtype)
        plain = [
            {k: v for k, v in vars(each).items() if k not in ("tokens", "logprobs", "routes")} for each in (one, other)
        ]
        assert plain[0] == plain[1]
    assert all(np.array_equal(more[name], array) and more[name].dtype == array.dtype for name, array in arrays.items())


@pytest.mark.parametrize("world", [2, 4])
def test_replicas_share_all_rollouts_evenly_and_know_of_each_what_was_known(world: int) -> None:
    ranks = run_ranks(world, cases.dealt)["dealt"]
    for layout in map(str, cases.LAYOUTS[world]):
        found: dict[int, Any] = {}
        for each in (rank[layout] for rank in ranks):
            assert each["home"], layout
            if each["replica"] in found:
                assert each == found[each["replica"]], "ranks of a replica hold the same"
            found[each["replica"]] = each
        replicas = len(found)
        after = {name: said for each in found.values() for name, said in each["after"].items()}
        assert sum(len(each["after"]) for each in found.values()) == len(after)
        before = found[0]["before"]
        assert after == before
        assert all(each["order"] == sorted(each["order"]) for each in found.values())
        tokens = [found[replica]["tokens"] for replica in range(replicas)]
        assert max(tokens) / (sum(tokens) / replicas) < 1.1, "one of two had nearly all"
        assert all(1 <= each["imbalance"] < 1.1 for each in found.values())


def test_the_ranks_of_a_replica_gather_what_each_has() -> None:
    names = [
        r.name for group in cases.uneven().groups[1::2] for r in group.rollouts
    ]  # rank 0 has none, and hears of all
    assert run_ranks(2, cases.gathers)["gathers"] == [names, names]


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.soak)])
def test_an_update_is_the_same_wherever_its_rollouts_are(world: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("models")
    for kind in ("qwen3", "qwen3_moe"):
        make_checkpoint(folder / kind, kind)
    for found in run_ranks(world, cases.updates, folder=folder)["updates"]:
        assert found and all(apart < 5e-6 for apart in found.values()), found
