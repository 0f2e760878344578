"""What each rank sees of the cluster (tests/test_cluster.py)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from a3po_megatron.batch import Prompt
from a3po_megatron.cluster import CPU, Cluster, arrange, same
from a3po_megatron.config import ParallelOptions
from a3po_megatron.errors import RunFailed
from tests.distributed.runner import Ranks

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
LATE = timedelta(seconds=1.5)


def failure(action: Callable[[], Any]) -> str:
    try:
        return f"no failure, but {action()!r}"
    except RunFailed as error:
        return str(error)


def operations(ranks: Ranks) -> dict[str, Any]:
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


def disagreements(ranks: Ranks) -> dict[str, Any]:
    """What a disagreement is reported as on this rank, and that the next decision is possible."""
    cluster = ranks.arrange(tensor=1, data=2)
    tags = ("checkpoint", "publish")
    found = {"tags": failure(lambda: cluster.agree(tags[ranks.rank], 1, sum))}
    found["after tags"] = cluster.agree("again", 1, sum)
    found["same"] = failure(lambda: cluster.agree("plan", f"digest-{ranks.rank}", same))
    found["after same"] = cluster.agree("again", 1, sum)
    return found


def absences(ranks: Ranks) -> dict[str, str]:
    """Each rank in turn comes to a decision alone: what it says after the time limit."""
    found = {}
    for alone in range(2):
        store = dist.PrefixStore(f"alone-{alone}", ranks.store)
        ranks.arrange()
        cluster = Cluster(CPU, ParallelOptions(), 1, store)
        dist.barrier()
        if ranks.rank == alone:
            store.set_timeout(LATE)
            found["alone"] = failure(functools.partial(cluster.agree, "time is up", True, any))
            store.set_timeout(timedelta(seconds=120))
        dist.barrier()
    return found


def layouts(ranks: Ranks) -> dict[str, Any]:
    """Every way to lay these ranks out, with engines of one rank and of two: "tensor/data/engine ranks" → what I am."""
    found: dict[str, Any] = {}
    for tensor in (1, 2, 4):
        for engine_ranks in (1, 2):
            if ranks.world % tensor == 0:
                data = ranks.world // tensor
                found[f"{tensor}/{data}/{engine_ranks}"] = _seen(ranks, tensor, data, engine_ranks)
    return found


def _seen(ranks: Ranks, tensor: int, data: int, engine_ranks: int) -> dict[str, Any]:
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


def data_follows_from_the_number_of_ranks(ranks: Ranks) -> int:
    """`parallel.data` is not given: the ranks that tensor parallelism leaves over."""
    ranks.arrange()  # frees what the case before laid out
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    store = dist.PrefixStore("not-given", ranks.store)
    return arrange(CPU, ParallelOptions(), 1, 0, store).data
