"""Who this rank is, who it shares the model with, what its device is like, and how all ranks decide together.

Ranks are laid out as Megatron lays them out, tensor parallel fastest, then context, data, pipeline:

    rank = tensor + TP * (context + CP * (data + DP * pipeline))

A *replica* is the smallest set of ranks that hold every weight together: the tensor × pipeline ranks, or, since experts
spread over context- and data-parallel neighbours, several times as many. A *batch group* is the tensor × context ×
pipeline ranks that train on the same rollouts. An *engine* is a run of `rollout.tensor` neighbouring ranks.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from .config import ClusterOptions, ParallelOptions
from .errors import RequestError, RunFailed


@dataclass(frozen=True)
class Backend:
    """Everything that differs between a CPU and CUDA, in one record (docs/backends.md)."""

    device: Literal["cpu", "cuda"]  # of weights, gradients and micro-batches; a batch itself stays on the host
    collectives: str  # of torch.distributed; objects and small host tensors always go over gloo
    spec: Literal["local", "te"]  # naming scheme and modules of the Megatron model
    dtypes: tuple[str, ...]  # of model.dtype that its attention takes
    fp8: bool  # whether learner.precision and rollout.quantization may ask for it
    receipt_strength: (
        str  # what a publish can prove: `engine` reads the engine's tensors back, `stream` what it was fed
    )
    offload: Literal["none", "optimizer", "all"]  # of the learner, while the engine samples (residency.py)
    sleeps: bool  # the engine gives device memory back while the learner trains
    packs_head: bool  # a tied output layer is a copy in the engine, which must be sent as a tensor of its own
    returns_routes: bool  # whether its vLLM can say which experts it chose: that takes Model Runner V2, and so Triton
    engine_args: dict[str, Any] = field(default_factory=dict)  # vLLM arguments that the device demands

    def local(self) -> torch.device:
        """This rank's device."""
        return torch.device("cpu") if self.device == "cpu" else torch.device("cuda", int(os.environ["LOCAL_RANK"]))

    def visible(self) -> int:
        """Devices that this process sees; 0 on a CPU."""
        return 0 if self.device == "cpu" else torch.cuda.device_count()

    def used_bytes(self) -> int:
        """Memory in use now: of this process on a CPU, of the whole device on CUDA (vLLM's pools are not torch's)."""
        if self.device == "cpu":
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        free, total = torch.cuda.mem_get_info()
        return total - free


CPU = Backend(
    device="cpu",
    collectives="gloo",
    spec="local",
    dtypes=("float32", "bfloat16"),
    fp8=False,
    # vLLM's CPU backend packs linear weights into an opaque layout when it loads them: they cannot be read back.
    receipt_strength="stream",
    offload="none",
    sleeps=False,
    packs_head=True,
    returns_routes=False,  # Triton has no CPU backend
    engine_args={
        "enforce_eager": True,
        # A seeded request whose prompt is split over steps dies with "CPU Generator does not use offset".
        "enable_chunked_prefill": False,
    },
)
CUDA = Backend(
    device="cuda",
    collectives="cpu:gloo,cuda:nccl",
    spec="te",
    dtypes=("bfloat16",),  # cuDNN's attention over packed sequences takes no float32
    fp8=True,
    receipt_strength="engine",
    offload="optimizer",
    sleeps=True,
    packs_head=False,
    returns_routes=True,
    engine_args={
        "enable_sleep_mode": True,
        "async_scheduling": True,
        # Logits, and so sampling and log-probs, in float32 like the learner's: rounded to bf16 they are off by up to
        # 0.06 where they are larger than 16. vLLM multiplies bf16 and sums in float32 (layers/logits_processor.py).
        "hf_overrides": {"head_dtype": "float32"},
        # Else both are on where nvcc and ninja are found in PATH, and off elsewhere: other kernels on another node,
        # minutes of compilation, and engines that warm up side by side have hung in it (vllm issue 45917).
        "compilation_config": {"pass_config": {"fuse_allreduce_rms": False}},
        "enable_flashinfer_autotune": False,
        # The experts' kernels that keep their weights in the order in which they are read back and reloaded.
        "moe_backend": "triton",
        # Memory is asked for in bytes (rollout.kv_cache_bytes). vLLM still refuses to start where less than this share
        # of the device is free, whatever it needs.
        "gpu_memory_utilization": 0.1,
    },
)


def backend_of(device: str) -> Backend:
    return CUDA if device == "cuda" else CPU


def select_backend(wanted: str | None) -> Backend:
    """The record for this machine. Raises RequestError where it is not what was asked for: a run on GPUs must not go on
    without them."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted not in (None, found):
        remedy = (
            "torch finds none: see a3po doctor"
            if wanted == "cuda"
            else "torch finds a GPU: set CUDA_VISIBLE_DEVICES= (empty)"
        )
        raise RequestError(f"cluster.device is {wanted}, but {remedy}")
    return backend_of(found)


@dataclass(frozen=True)
class Coordinates:
    tensor: int = 0
    pipeline: int = 0
    data: int = 0
    context: int = 0


class Cluster:
    """One rank's view of all ranks. Built once per process by `connect`."""

    def __init__(self, backend: Backend, parallel: ParallelOptions, engine_ranks: int, store: dist.Store) -> None:
        from megatron.core import parallel_state

        self.backend = backend
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.coordinates = Coordinates(
            tensor=parallel_state.get_tensor_model_parallel_rank(),
            pipeline=parallel_state.get_pipeline_model_parallel_rank(),
            data=parallel_state.get_data_parallel_rank(),
            context=parallel_state.get_context_parallel_rank(),
        )
        self.tensor_group = parallel_state.get_tensor_model_parallel_group()
        self.pipeline_group = parallel_state.get_pipeline_model_parallel_group()
        self.context_group = parallel_state.get_context_parallel_group()
        self.data_group = parallel_state.get_data_parallel_group()
        self.tokens_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self.context, self.data = parallel.context, self.data_group.size()
        self.batch_group = self._batch_group(parallel)
        self.expert_group = parallel_state.get_expert_tensor_and_model_parallel_group()
        # Ranks that hold the very same shard of an expert; of everything else it is `tokens_group`.
        self.expert_copies = parallel_state.get_expert_data_parallel_group()
        self.replica_group = self._replica_group(parallel)
        self.tensor, self.pipeline = parallel.tensor, parallel.pipeline
        self.engine, self.engine_rank = divmod(self.rank, engine_ranks)
        self.engines = self.world // engine_ranks
        self.engine_group = (
            self._own_group(list(range(first, first + engine_ranks)) for first in range(0, self.world, engine_ranks))
            if engine_ranks > 1
            else None
        )
        self.engine_leaders = self._engine_leaders(engine_ranks)
        # This rank's place among the ranks of its stage that hold one copy of the stage's weights.
        copy = self.coordinates.context + self.context * self.coordinates.data
        self.within = self.coordinates.tensor + self.tensor * (copy % self._neighbours(parallel))
        self._store, self._connection = dist.PrefixStore("agree", store), store
        self._round = 0

    def _engine_leaders(self, engine_ranks: int) -> list[int]:
        """The ranks that answer for what this rank's engine sampled: the first of every data-parallel rank it spans.

        All ranks of an engine hold all its completions, so that each replica can take its share without sending any.
        """
        first: dict[int, int] = {}
        for rank in range(self.engine * engine_ranks, (self.engine + 1) * engine_ranks):
            first.setdefault(rank // (self.tensor * self.context) % self.data, rank)
        return sorted(first.values())

    def _neighbours(self, parallel: ParallelOptions) -> int:
        """Context- and data-parallel ranks of one replica: more than one only where experts spread over them."""
        return parallel.stage_ranks() // parallel.tensor

    def _batch_group(self, parallel: ParallelOptions) -> dist.ProcessGroup:
        """The group of the ranks that train on the same rollouts, pipeline stage after stage."""
        from megatron.core import parallel_state

        if parallel.context == 1:
            return parallel_state.get_model_parallel_group()
        wide = parallel.tensor * parallel.context
        return self._own_group(
            [k + wide * (d + self.data * p) for p in range(parallel.pipeline) for k in range(wide)]
            for d in range(self.data)
        )

    def _replica_group(self, parallel: ParallelOptions) -> dist.ProcessGroup:
        """The group of this rank's replica, stage after stage, the ranks of a stage as in `within`."""
        from megatron.core import parallel_state

        neighbours = self._neighbours(parallel)
        if neighbours == 1:
            return parallel_state.get_model_parallel_group()
        tensor, copies = parallel.tensor, self.context * self.data
        return self._own_group(
            [
                t + tensor * (d + copies * p)
                for p in range(parallel.pipeline)
                for d in range(first, first + neighbours)
                for t in range(tensor)
            ]
            for first in range(0, copies, neighbours)
        )

    def _own_group(self, groups: Iterable[list[int]]) -> dist.ProcessGroup:
        """Makes all the groups, as every rank must, and returns the one that this rank is in."""
        made = [(ranks, dist.new_group(ranks)) for ranks in groups]
        return next(group for ranks, group in made if self.rank in ranks)

    def agree(self, tag: str, value: Any, op: Callable[[list[Any]], Any]) -> Any:
        """One decision of all ranks: every rank gives a JSON value and gets the same result.

        `op` makes the decision from the list of values by rank, on rank 0: any, all, min, max, sum, list, `same`, or a
        function of one's own. Raises RunFailed if the ranks are not all at `tag` (a rank-local decision would be a
        hang) or one does not come within the cluster's time limit. Goes through the store: no rank opens connections to
        all others.
        """
        self._round += 1
        key = f"{self._round}"
        self._store.set(f"{key}/{self.rank}", json.dumps([tag, value]))
        if self.rank == 0:
            given = []
            for rank in range(self.world):
                try:
                    given.append(json.loads(self._store.get(f"{key}/{rank}")))
                except dist.DistStoreError as error:
                    raise RunFailed(f"rank {rank} did not come to '{tag}' in time") from error
            self._store.set(key, json.dumps(_decide(tag, given, op)))
            for rank in range(self.world):
                self._store.delete_key(f"{key}/{rank}")
            self._store.delete_key(f"{self._round - 2}")  # everyone has read it: all have come to this round
        try:
            result = json.loads(self._store.get(key))
        except dist.DistStoreError as error:
            raise RunFailed(f"rank 0 did not decide '{tag}' in time") from error
        if "error" in result:
            raise RunFailed(result["error"])
        return result["value"]

    def store_of(self, name: str) -> dist.Store:
        """A part of the store by itself, through a connection of its own, for a thread."""
        return dist.PrefixStore(name, self._connection.clone())  # type: ignore[attr-defined]  # torch's stubs lack it

    def leave(self) -> None:
        """Every rank's last call: rank 0, which holds the store, leaves after all others have heard what it said."""
        self._store.set(f"left/{self.rank}", "")
        if self.rank == 0:
            self._store.wait([f"left/{rank}" for rank in range(self.world)])

    def gather_batch_group(self, value: Any) -> list[Any]:
        """Every rank's (picklable) value, over the ranks that train on the same rollouts."""
        if self.batch_group.size() == 1:
            return [value]
        values: list[Any] = [None] * self.batch_group.size()
        dist.all_gather_object(values, value, group=self.batch_group)
        return values

    def any_of_engine(self, flag: bool) -> bool:
        """Whether the flag is set on any rank of this rank's engine: they go through its steps together."""
        if self.engine_group is None:
            return flag
        value = torch.tensor([int(flag)], dtype=torch.int32)
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.engine_group)
        return bool(value)

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


def same(values: list[Any]) -> Any:
    """An operation for `agree`: the value that all ranks gave; ValueError if they differ."""
    for rank, value in enumerate(values):
        if value != values[0]:
            raise ValueError(f"{values[0]!r} on rank 0, {value!r} on rank {rank}")
    return values[0]


def first(reasons: list[str | None]) -> str | None:
    """An operation for `agree`: what the first rank says that says anything."""
    return next((reason for reason in reasons if reason), None)


def sum_lists(values: list[list[Any]]) -> list[Any]:
    """An operation for `agree`: all ranks' lists, one after the other."""
    return [item for value in values for item in value]


def _decide(tag: str, given: list[tuple[str, Any]], op: Callable[[list[Any]], Any]) -> dict[str, Any]:
    for rank, (other, _) in enumerate(given):
        if other != tag:
            return {"error": f"the ranks have lost step: rank 0 is at '{tag}', rank {rank} at '{other}'"}
    try:
        return {"value": op([value for _, value in given])}
    except Exception as error:  # whatever it is: the other ranks wait for an answer
        return {"error": f"the ranks cannot agree at '{tag}': {error}"}


def connect(parallel: ParallelOptions, options: ClusterOptions, engine_ranks: int, seed: int) -> Cluster:
    """Joins the other ranks (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) and builds Megatron's groups."""

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
        # The launcher of this machine listens already: nobody else can have the port.
        master_listen_fd=int(os.environ["A3PO_STORE_FD"]) if "A3PO_STORE_FD" in os.environ else None,
    )
    dist.init_process_group(backend.collectives, store=store, rank=rank, world_size=world, timeout=timeout)
    return arrange(backend, parallel, engine_ranks, seed, store)


def arrange(backend: Backend, parallel: ParallelOptions, engine_ranks: int, seed: int, store: dist.Store) -> Cluster:
    """Megatron's groups for `parallel` over the ranks that are connected already (tests lay them out many times)."""
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual if parallel.virtual > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
    )
    random.seed(seed)
    np.random.seed(seed % 2**32)
    tensor_parallel.model_parallel_cuda_manual_seed(seed + 1)
    return Cluster(backend, parallel, engine_ranks, store)
