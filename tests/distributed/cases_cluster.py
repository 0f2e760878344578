"""What each rank sees of the cluster (tests/test_cluster.py)."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from a3po_megatron.batch import Prompt
from a3po_megatron.config import ParallelOptions
from a3po_megatron.errors import RunFailed
from a3po_megatron.ranks.agree import same
from a3po_megatron.ranks.backend import CPU
from a3po_megatron.ranks.groups import Ranks, arrange
from tests.harness.ranks import CaseRanks

# By rank. Floats whose decimal forms are long, numbers above 2^53, text, nothing, nested values.
VALUES: tuple[tuple[Any, Any], ...] = (
    (False, True),
    (True, True),
    (0.1 + 0.2, -1e-300),
    (2**62 + 1, 7),
    (0, 0),
)
OPERATIONS: tuple[Callable[[list[Any]], Any], ...] = (any, all, min, max, sum, list)
ANYTHING = ("é", None, {"a": [1, {"b": 0.5}]}, [], 3)
LATE = timedelta(seconds=0.5)


def failure(action: Callable[[], Any]) -> str:
    try:
        return f"no failure, but {action()!r}"
    except RunFailed as error:
        return str(error)


def operations(ranks: CaseRanks) -> dict[str, Any]:
    """Every operation on every pair of values, and a function of one's own that sees all values by rank."""
    cluster = ranks.arrange(tensor=1, data=2)
    found: dict[str, Any] = {}
    for number, pair in enumerate(VALUES):
        for operation in OPERATIONS:
            found[f"{operation.__name__}/{number}"] = cluster.agree("values", pair[ranks.rank], operation)
    found["anything"] = [cluster.agree("anything", [ranks.rank, value], list) for value in ANYTHING]
    found["own"] = cluster.agree("own", ranks.rank, lambda values: {"reversed": values[::-1]})
    found["same"] = [cluster.agree("same", value, same) for value in ANYTHING]
    found["many rounds"] = [cluster.agree(f"round {n}", n * (ranks.rank + 1), sum) for n in range(200)]
    return found


def disagreements(ranks: CaseRanks) -> dict[str, Any]:
    """What a disagreement is reported as on this rank, and that the next decision is possible."""
    cluster = ranks.arrange(tensor=1, data=2)
    tags = ("checkpoint", "publish")
    found = {"tags": failure(lambda: cluster.agree(tags[ranks.rank], 1, sum))}
    found["after tags"] = cluster.agree("again", 1, sum)
    found["same"] = failure(lambda: cluster.agree("plan", f"digest-{ranks.rank}", same))
    found["after same"] = cluster.agree("again", 1, sum)
    return found


def absences(ranks: CaseRanks) -> dict[str, str]:
    """Each rank in turn comes to a decision alone: what it says after the time limit."""
    found = {}
    for alone in range(2):
        store = dist.PrefixStore(f"alone-{alone}", ranks.store)
        ranks.arrange()
        cluster = Ranks(CPU, ParallelOptions(), 1, store)
        dist.barrier()
        if ranks.rank == alone:
            store.set_timeout(LATE)
            found["alone"] = failure(functools.partial(cluster.agree, "time is up", True, any))
            store.set_timeout(timedelta(seconds=120))
        dist.barrier()
    return found


def connections(ranks: CaseRanks) -> list[int]:
    """How many sockets this rank has for a new group of all: before it is used, after a sum over it."""
    before = _sockets()
    group = dist.new_group()
    counts = [_sockets() - before]
    ranks.store.set(f"counted/{ranks.rank}", "")  # whoever is first with the sum connects to its neighbour
    ranks.store.wait([f"counted/{rank}" for rank in range(ranks.world)])
    dist.all_reduce(torch.ones(1), group=group)
    return [*counts, _sockets() - before]


def _sockets() -> int:
    return sum(os.readlink(f"/proc/self/fd/{number}").startswith("socket:") for number in _numbers())


def _numbers() -> list[str]:
    return [number for number in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{number}")]


def layouts(ranks: CaseRanks) -> dict[str, Any]:
    """Every way to lay these ranks out, with engines of one rank and of two: "tensor/data/engine ranks" → what I am."""
    found: dict[str, Any] = {}
    for tensor in (1, 2, 4):
        for engine_ranks in (1, 2):
            if ranks.world % tensor == 0:
                data = ranks.world // tensor
                found[f"{tensor}/{data}/{engine_ranks}"] = _seen(ranks, tensor, data, engine_ranks)
    return found


def _seen(ranks: CaseRanks, tensor: int, data: int, engine_ranks: int) -> dict[str, Any]:
    cluster = ranks.arrange(tensor=tensor, data=data, engine_ranks=engine_ranks)
    place = cluster.coordinates
    total = cluster.sum_over_data(torch.tensor([1.0 + place.data, 10.0]))
    value = Prompt(f"p{ranks.rank}", "", "", (ranks.rank,)), np.arange(ranks.rank + 1)
    gathered = cluster.gather_batch_group(value)
    return {
        "rank, world": [cluster.rank, cluster.world],
        "tensor, pipeline, data": [place.tensor, place.pipeline, place.data],
        "sizes": [cluster.tensor, cluster.pipeline, cluster.data],
        "engine, rank in it, engines": [cluster.engine, cluster.engine_rank, cluster.engines],
        "sum over data": total.tolist(),
        "replica": [[prompt.id, array.tolist()] for prompt, array in gathered],
        "groups": [g.size() for g in (cluster.tensor_group, cluster.replica_group, cluster.data_group)],
    }


# Of four ranks: every dimension, and experts over neighbours in each way.
HELD: list[dict[str, int]] = [
    {"tensor": 2, "pipeline": 2},
    {"tensor": 2, "context": 2, "engine_ranks": 2},
    {"context": 2, "pipeline": 2, "expert": 2},
    {"tensor": 2, "data": 2, "expert": 4, "expert_tensor": 1, "engine_ranks": 4},
    {"tensor": 2, "data": 2, "expert": 2, "engine_ranks": 2},
    {"pipeline": 2, "data": 2, "expert": 2},
    {"context": 4, "expert": 2},
]


def groups_held(ranks: CaseRanks) -> list[dict[str, list[list[int]]]]:
    """By layout and kind: who is in the group that this rank holds, and who is by the topology."""
    found = []
    for layout in HELD:
        cluster = ranks.arrange(**layout)
        held = {
            "tensor": cluster.tensor_group,
            "context": cluster.context_group,
            "data": cluster.data_group,
            "pipeline": cluster.pipeline_group,
            "tokens": cluster.tokens_group,
            "batch": cluster.batch_group,
            "replica": cluster.replica_group,
            "experts": cluster.expert_group,
            "expert_copies": cluster.expert_copies,
        }
        if cluster.engine_group is not None:
            held["engine"] = cluster.engine_group
        found.append(
            {
                kind: [dist.get_process_group_ranks(group), cluster.topology.group(kind, ranks.rank)]
                for kind, group in held.items()
            }
        )
    return found


def coordinates_told(ranks: CaseRanks) -> list[list[list[int]]]:
    """By layout: where Megatron says that this rank is, and where the topology does."""
    from megatron.core import parallel_state as megatron

    found = []
    for layout in HELD:
        place = ranks.arrange(**layout).coordinates
        told = [
            megatron.get_tensor_model_parallel_rank(),
            megatron.get_context_parallel_rank(),
            megatron.get_data_parallel_rank(),
            megatron.get_pipeline_model_parallel_rank(),
        ]
        found.append([told, [place.tensor, place.context, place.data, place.pipeline]])
    return found


def data_follows_from_the_number_of_ranks(ranks: CaseRanks) -> int:
    """`parallel.data` is not given: the ranks that tensor parallelism leaves over."""
    ranks.arrange()  # frees what the case before laid out
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    store = dist.PrefixStore("not-given", ranks.store)
    return arrange(CPU, ParallelOptions(), 1, 0, store).data
