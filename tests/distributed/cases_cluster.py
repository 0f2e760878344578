"""What each of two ranks sees of the cluster (tests/test_cluster.py)."""

from __future__ import annotations

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
            found["alone"] = failure(lambda: cluster.agree("time is up", True, any))
            store.set_timeout(timedelta(seconds=120))
        dist.barrier()
    return found


def layouts(ranks: Ranks) -> dict[str, Any]:
    """Coordinates, engines, replica and data-parallel sums for both ways to lay out two ranks."""
    found: dict[str, Any] = {}
    for name, tensor, data, engine_ranks in (
        ("tp2", 2, 1, 1),
        ("dp2", 1, 2, 1),
        ("tp2, engine of 2", 2, 1, 2),
        ("dp2, engine of 2", 1, 2, 2),
    ):
        cluster = ranks.arrange(tensor=tensor, data=data, engine_ranks=engine_ranks)
        place = cluster.coordinates
        total = cluster.sum_over_data(torch.tensor([1.0 + ranks.rank, 10.0]))
        value = Prompt(f"p{ranks.rank}", "", "", (ranks.rank,)), np.arange(ranks.rank + 1)
        gathered = cluster.gather_replica(value)
        found[name] = {
            "rank, world": [cluster.rank, cluster.world],
            "tensor, pipeline, data": [place.tensor, place.pipeline, place.data],
            "sizes": [cluster.tensor, cluster.pipeline, cluster.data],
            "engine, rank in it, engines": [cluster.engine, cluster.engine_rank, cluster.engines],
            "sum over data": total.tolist(),
            "replica": [[prompt.id, array.tolist()] for prompt, array in gathered],
            "groups": [g.size() for g in (cluster.tensor_group, cluster.replica_group, cluster.data_group)],
        }
    return found


def data_follows_from_the_number_of_ranks(ranks: Ranks) -> int:
    """`parallel.data` is not given: the ranks that tensor parallelism leaves over."""
    ranks.arrange()  # frees what the case before laid out
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    store = dist.PrefixStore("not-given", ranks.store)
    return arrange(CPU, ParallelOptions(), 1, 0, store).data
