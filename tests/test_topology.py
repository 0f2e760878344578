"""Who is where: as Megatron has it, as real ranks hold it (tests/test_cluster.py), and for more ranks than fit here."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, get_args

import pytest

from a3po_megatron.config import ParallelOptions
from a3po_megatron.errors import RequestError
from a3po_megatron.model.layout import Layout
from a3po_megatron.ranks.topology import Coordinates, Kind, Role, Topology, topology_of
from tests.harness.ranks import ROOT

KINDS: tuple[Kind, ...] = get_args(Kind)


def topologies() -> Iterator[Topology]:
    sizes = itertools.product((1, 2, 4), (1, 2), (1, 2, 4), (1, 2), (1, 2, 4), (None, 1))
    for tensor, context, data, pipeline, expert, expert_tensor in sizes:
        parallel = ParallelOptions(
            tensor=tensor, context=context, data=data, pipeline=pipeline, expert=expert, expert_tensor=expert_tensor
        )
        if context * data * tensor % max(tensor, (expert_tensor or tensor) * expert) == 0:
            yield topology_of(parallel)


def test_groups_are_those_of_megatrons_rank_generator() -> None:
    from megatron.core.parallel_state import RankGenerator

    compared = 0
    for at in topologies():
        order = "tp-cp-ep-dp-pp"
        dense = RankGenerator(tp=at.tensor, ep=1, dp=at.data, pp=at.pipeline, cp=at.context, order=order)
        copies = at.world // (at.expert_tensor * at.expert * at.pipeline)
        experts = RankGenerator(tp=at.expert_tensor, ep=at.expert, dp=copies, pp=at.pipeline, cp=1, order=order)
        wanted: dict[Any, list[list[int]]] = {
            "tensor": dense.get_ranks("tp"),
            "context": dense.get_ranks("cp"),
            "data": dense.get_ranks("dp"),
            "pipeline": dense.get_ranks("pp"),
            "tokens": dense.get_ranks("dp-cp"),
            "batch": dense.get_ranks("tp-cp-pp"),
            "experts": experts.get_ranks("tp-ep"),
            "expert_copies": experts.get_ranks("dp"),
        }
        for kind, groups in wanted.items():
            assert at.groups(kind) == sorted(map(sorted, groups)), (at, kind)
            compared += 1
    assert compared > 1000


def test_a_replica_is_the_smallest_set_of_ranks_that_holds_every_slice_of_everything() -> None:
    for at in topologies():
        slices = {(stage, part) for stage in range(at.pipeline) for part in range(at.tensor)}
        size = at.expert_tensor * at.expert
        experts = {(stage, part) for stage in range(at.pipeline) for part in range(size)}
        stage = at.world // at.pipeline
        for ranks in at.groups("replica"):
            places = [at.coordinates(rank) for rank in ranks]
            assert {(place.pipeline, place.tensor) for place in places} == slices, at
            assert {(rank // stage, rank % size) for rank in ranks} == experts, at
            assert len(ranks) == at.pipeline * at.tensor * at.spread
            assert [at.within(rank) for rank in ranks] == [*range(at.tensor * at.spread)] * at.pipeline
            for smaller in range(1, at.spread):
                few = ranks[: at.tensor * smaller]
                assert len({rank % size for rank in few}) < size, at


def test_a_layout_places_each_rank_in_its_replica_where_the_whole_run_has_it() -> None:
    for at in topologies():
        layout = Layout(at.tensor, at.pipeline, expert=at.expert, expert_tensor=at.expert_tensor)
        stage = at.world // at.pipeline
        for rank in range(at.world):
            place, dense = layout.place(at.coordinates(rank).pipeline, at.within(rank)), at.coordinates(rank)
            assert (place.pipeline, place.tensor) == (dense.pipeline, dense.tensor), (at, rank)
            assert place.data == (dense.context + at.context * dense.data) % at.spread, (at, rank)
            # As Megatron counts within a stage, and of the copies of the experts those of this replica alone.
            assert place.expert_tensor == rank % stage % at.expert_tensor, (at, rank)
            assert place.expert == rank % stage // at.expert_tensor % at.expert, (at, rank)
            copies = at.stage_ranks // (at.expert_tensor * at.expert)
            assert place.copy == rank % stage // (at.expert_tensor * at.expert) % copies, (at, rank)


def test_every_rank_is_in_one_group_of_every_kind_and_coordinates_count_as_ranks_do() -> None:
    for at in topologies():
        for kind in KINDS:
            assert sorted(itertools.chain(*at.groups(kind))) == list(range(at.world)), (at, kind)
            assert all(at.group(kind, ranks[-1]) == ranks for ranks in at.groups(kind))
        for rank in range(at.world):
            place = at.coordinates(rank)
            again = place.tensor + at.tensor * (place.context + at.context * (place.data + at.data * place.pipeline))
            assert again == rank


@pytest.mark.parametrize("engine_ranks", [1, 2, 4, 8])
def test_each_data_parallel_rank_of_an_engine_has_one_leader_in_it(engine_ranks: int) -> None:
    at = topology_of(ParallelOptions(tensor=2, context=2, data=2, pipeline=2), engine_ranks)
    assert at.engines * engine_ranks == at.world == 16
    for number, ranks in enumerate(at.groups("engine")):
        assert [at.engine(rank) for rank in ranks] == [(number, place) for place in range(engine_ranks)]
        leaders = at.leaders(number)
        assert set(leaders) <= set(ranks)
        spanned = [at.coordinates(rank).data for rank in ranks]
        assert sorted(at.coordinates(rank).data for rank in leaders) == sorted(set(spanned))


def test_ranks_that_only_sample_come_behind_those_that_learn() -> None:
    at = Topology(tensor=2, data=2, engine_ranks=2, apart=6)
    assert (at.learning, at.sampling, at.world, at.engines) == (4, 6, 10, 3)
    assert [at.role(rank) for rank in range(10)] == [Role.LEARNER] * 4 + [Role.ENGINE] * 6
    assert at.groups("engine") == [[4, 5], [6, 7], [8, 9]]
    assert [at.leaders(engine) for engine in range(3)] == [[4], [6], [8]]
    assert at.groups("batch") == [[0, 1], [2, 3]]
    assert at.engine(7) == (1, 1)
    assert {Topology(tensor=2).role(rank) for rank in range(2)} == {Role.BOTH}


def test_data_parallelism_follows_from_the_ranks_or_from_the_experts() -> None:
    assert topology_of(ParallelOptions(tensor=2, pipeline=2), learning=16).data == 4
    assert topology_of(ParallelOptions(tensor=2)).data == 1
    assert topology_of(ParallelOptions(tensor=1, expert=4)).data == 4
    assert topology_of(ParallelOptions(tensor=2, expert=4, expert_tensor=1)).data == 2
    assert topology_of(ParallelOptions(context=2, expert=4)).coordinates(3) == Coordinates(data=1, context=1)


@pytest.mark.parametrize(
    ("parallel", "engine_ranks", "learning", "says"),
    [
        (ParallelOptions(tensor=4), 1, 6, "6 ranks, but parallel.tensor × context × pipeline = 4 does not divide them"),
        (ParallelOptions(tensor=4), 1, 2, "2 ranks, but parallel.tensor × context × pipeline = 4 does not divide them"),
        (ParallelOptions(tensor=2, data=2), 1, 8, "= 2 and parallel.data = 2"),
        (ParallelOptions(data=3, expert=2), 1, None, "parallel.context × parallel.data = 3 is no multiple of that"),
        (ParallelOptions(data=3), 2, None, "rollout.tensor = 2 does not divide the 3 ranks of the layout"),
    ],
)
def test_ranks_that_do_not_divide_by_the_layout_are_refused_by_name(
    parallel: ParallelOptions, engine_ranks: int, learning: int | None, says: str
) -> None:
    with pytest.raises(RequestError, match=says.replace(".", r"\.")):
        topology_of(parallel, engine_ranks, learning)


def test_a_thousand_ranks_are_counted_without_torch() -> None:
    code = """
import sys
from a3po_megatron.ranks.topology import Topology
at = Topology(tensor=4, context=2, data=16, pipeline=8, expert=8, expert_tensor=1, engine_ranks=8)
assert at.world == 1024 and "torch" not in sys.modules
print(*(len(at.groups(kind)) for kind in sys.argv[1:]))
"""
    done = subprocess.run([sys.executable, "-c", code, *KINDS], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    counts = dict(zip(KINDS, map(int, done.stdout.split()), strict=True))
    assert counts == {
        **{"tensor": 256, "context": 512, "data": 64, "pipeline": 128, "tokens": 32, "batch": 16},
        **{"replica": 16, "experts": 128, "expert_copies": 64, "engine": 128},
    }
