"""This rank's groups (topology.py says who is in them), its device, and how all ranks decide together."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ..config import ClusterOptions, ParallelOptions
from ..errors import RunFailed
from .agree import decide
from .backend import Backend, select_backend
from .handoff import Handoff
from .topology import Kind, topology_of
from .travel import exchanged, gathered
from .tree import Missing, Tree


class Ranks:
    """One rank's view of all ranks. Built once per process by `connect`."""

    def __init__(self, backend: Backend, parallel: ParallelOptions, engine_ranks: int, store: dist.Store) -> None:
        from megatron.core import parallel_state

        self.backend = backend
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.topology = topology_of(parallel, engine_ranks, self.world)
        self.coordinates = self.topology.coordinates(self.rank)
        self.tensor, self.pipeline = parallel.tensor, parallel.pipeline
        self.context, self.data = parallel.context, self.topology.data
        self.tensor_group = parallel_state.get_tensor_model_parallel_group()
        self.pipeline_group = parallel_state.get_pipeline_model_parallel_group()
        self.context_group = parallel_state.get_context_parallel_group()
        self.data_group = parallel_state.get_data_parallel_group()
        self.tokens_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        model = parallel_state.get_model_parallel_group()
        self.batch_group = model if parallel.context == 1 else self._own_group("batch")
        self.expert_group = parallel_state.get_expert_tensor_and_model_parallel_group()
        # Ranks that hold the very same shard of an expert; of everything else it is `tokens_group`.
        self.expert_copies = parallel_state.get_expert_data_parallel_group()
        self.replica_group = model if self.topology.spread == 1 else self._own_group("replica")
        self.engine, self.engine_rank = self.topology.engine(self.rank)
        self.engines = self.topology.engines
        self.engine_group = self._own_group("engine") if engine_ranks > 1 else None
        self.engine_leaders = self.topology.leaders(self.engine)
        self.within = self.topology.within(self.rank)
        decisions: Any = dist.PrefixStore("agree", store)  # torch's stubs lack its time limit
        self._tree = Tree(decisions, self.rank, self.world, (dist.DistStoreError,))
        self._connection = store
        self._round = 0

    def _own_group(self, kind: Kind) -> dist.ProcessGroup:
        """Makes all groups of a kind that Megatron has none of, as every rank must, and returns this rank's."""
        made = [(ranks, dist.new_group(ranks)) for ranks in self.topology.groups(kind)]
        mine: dist.ProcessGroup = next(group for ranks, group in made if self.rank in ranks)
        return mine

    def agree(self, tag: str, value: Any, op: Callable[[list[Any]], Any]) -> Any:
        """One decision of all ranks: every rank gives a JSON value and gets the same result.

        `op` makes the decision from the list of values by rank, on rank 0: any, all, min, max, sum, list, `same`, or a
        function of one's own. Raises RunFailed if the ranks are not all at `tag` (a rank-local decision would be a
        hang) or one does not come within the ranks's time limit. Goes through the store, along a tree: no rank opens
        connections to all others, and none hears each of them.
        """
        self._round += 1
        name = f"{self._round}"
        try:
            said = self._tree.up(name, [tag, value])
            if said is not None:
                self._tree.answer(name, decide(tag, said, op))
                self._tree.forget([f"{self._round - 2}"])  # everyone has read it: all have come to this round
        except Missing as missing:
            self._tree.answer(name, {"error": f"rank {missing.rank} did not come to '{tag}' in time"})
        try:
            result = self._tree.answered(name)
        except Missing as missing:
            raise RunFailed(f"rank {missing.rank} did not decide '{tag}' in time") from missing
        if "error" in result:
            raise RunFailed(result["error"])
        return result["value"]

    def store_of(self, name: str) -> dist.Store:
        """A part of the store by itself, through a connection of its own, for a thread."""
        return dist.PrefixStore(name, self._connection.clone())  # type: ignore[attr-defined]  # torch's stubs lack it

    def end(self) -> None:
        """Every rank's last call: rank 0, which holds the store, leaves after all others have heard what it said."""
        try:
            self._tree.up("left", None)
        except Missing as missing:
            raise RunFailed(f"rank {missing.rank} did not come to the end in time") from missing

    def gather_batch_group(self, value: Any) -> list[Any]:
        """Every rank's (picklable) value, over the ranks that train on the same rollouts."""
        if self.batch_group.size() == 1:
            return [value]
        values: list[Any] = [None] * self.batch_group.size()
        dist.all_gather_object(values, value, group=self.batch_group)
        return values

    def gather_bytes(self, value: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's bytes [n] uint8, over the ranks that train on the same rollouts."""
        return gathered(value, self.batch_group)

    def gather_over_data(self, value: torch.Tensor) -> list[torch.Tensor]:
        """Every replica's value [n, …], of which n may differ; the ranks of a batch group must give the same one."""
        return gathered(value, self.data_group)

    def exchange_over_data(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What every replica has for this one; `parts`: what this one has for each, [n] of one type. The ranks of a
        batch group must give the same."""
        return exchanged(parts, self.data_group)

    def any_of_engine(self, flag: bool) -> bool:
        """Whether the flag is set on any rank of this rank's engine: they go through its steps together."""
        if self.engine_group is None:
            return flag
        value = torch.tensor([int(flag)], dtype=torch.int32)
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.engine_group)
        return bool(value)

    def told_by_engine(self, number: int) -> int:
        """What the first rank of this rank's engine says: the others' number does not count."""
        if self.engine_group is None:
            return number
        value = torch.tensor([number], dtype=torch.int64)
        dist.broadcast(value, group=self.engine_group, group_src=0)
        return int(value)

    def sum_over_tokens(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks that hold different tokens: context- and data-parallel ones."""
        if self.data * self.context > 1:
            dist.all_reduce(values, group=self.tokens_group)
        return values

    def sum_over_context(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks that hold parts of the same sequences."""
        if self.context > 1:
            dist.all_reduce(values, group=self.context_group)
        return values

    def sum_over_batch_group(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks that train on the same rollouts."""
        if self.batch_group.size() > 1:
            dist.all_reduce(values, group=self.batch_group)
        return values

    def sum_over_data(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over data-parallel ranks; the ranks of a batch group must hold the same values."""
        if self.data > 1:
            dist.all_reduce(values, group=self.data_group)
        return values


def connect(
    parallel: ParallelOptions,
    options: ClusterOptions,
    engine_ranks: int,
    seed: int,
    met: Callable[[Any], None] = lambda store: None,
) -> Ranks:
    """Joins the other ranks (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) and builds Megatron's groups.

    `met`: called before it waits for them, with a part of the store by itself, over a connection of its own
    """
    backend = select_backend(options.device)
    if backend.device == "cuda":
        torch.cuda.set_device(backend.local())
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    timeout = timedelta(seconds=options.timeout_seconds)
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world,
        is_master=rank == 0,
        timeout=timeout,
        wait_for_workers=False,  # the group does; who never comes is seen by those that have
        # The launcher of this machine listens already: nobody else can have the port.
        master_listen_fd=Handoff.of().store_fd,
    )
    met(dist.PrefixStore("beats", store.clone()))  # type: ignore[attr-defined]  # torch's stubs lack it
    dist.init_process_group(backend.collectives, store=store, rank=rank, world_size=world, timeout=timeout)
    return arrange(backend, parallel, engine_ranks, seed, store)


def arrange(backend: Backend, parallel: ParallelOptions, engine_ranks: int, seed: int, store: dist.Store) -> Ranks:
    """Megatron's groups for `parallel` over the ranks that are connected already (tests lay them out many times)."""
    megatron_groups(parallel, seed)
    return Ranks(backend, parallel, engine_ranks, store)


def megatron_groups(parallel: ParallelOptions, seed: int, gloo: bool = True) -> None:
    """Makes Megatron's groups, and seeds what it draws. `gloo`: groups for the host's tensors, too."""
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual if parallel.virtual > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        create_gloo_process_groups=gloo,
    )
    random.seed(seed)
    np.random.seed(seed % 2**32)
    tensor_parallel.model_parallel_cuda_manual_seed(seed + 1)
