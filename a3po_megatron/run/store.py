"""Megatron's distributed checkpoints: every rank writes its own shards, while the run goes on.

    Saving(…)   collective: plan who writes what, copy this rank's share aside
    write       every rank, in a thread: hash and write its share
    complete    rank 0, in a thread, when all have: write what says where everything lies

What a save costs the run is the copy: bounded by bytes, not by the disk. The threads are run/background.py's.
Megatron's own writer starts processes for every save, 8–11 s the first time on a CPU; this one puts the same bytes into
the same files from a thread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint import FileSystemWriter, Metadata
from torch.distributed.checkpoint.filesystem import FileSystem, _StoragePrefix
from torch.distributed.checkpoint.storage import WriteResult
from torch.serialization import get_crc32_options, set_crc32_options

from ..compat.megatron import GATHERED
from ..errors import RunFailed
from ..files.hashed import HashedFile, Written


class _HashedFiles(FileSystem):
    """Files that are hashed while they are written, and on the disk when they are closed."""

    def __init__(self) -> None:
        self.written: list[Written] = []
        self._open: HashedFile | None = None

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.written) + (self._open.bytes if self._open else 0)

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        self._open = file = HashedFile(Path(path))
        try:
            with file:
                yield file
        except RuntimeError as error:
            if file.failure is not None:  # torch's archive writer replaces it by one of its own
                raise file.failure from error
            raise
        self._open = None
        self.written.append(file.written())


def _share_out(state: Any) -> None:
    """Makes one of the ranks that hold a tensor the one that writes it, so that all write about as much. A collective.

    What only one rank holds, as it does the states of a distributed optimizer, counts first; only descriptions travel.
    """
    groups = [parallel_state.get_data_parallel_group(with_context_parallel=True)]
    # Experts that are not split as wide as the rest have copies on tensor-parallel neighbours too.
    copies = parallel_state.get_expert_data_parallel_group()
    if not {*dist.get_process_group_ranks(copies)} <= {*dist.get_process_group_ranks(groups[0])}:
        groups.append(copies)
    for group in groups:
        plan = determine_main_replica_uniform_distribution(state, group)
        distribute_main_replicas_with_precomputed_distribution(state, group, plan)


class _Staged(TorchDistSaveShardedStrategy):  # type: ignore[misc]  # Megatron has no types
    """Plans and copies; leaves the writing to whoever calls the request."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)
        self.results: list[WriteResult] = []
        self.files = _HashedFiles()
        self.metadata: Metadata | None = None  # on rank 0
        self.writer: FileSystemWriter

    def async_save(self, sharded_state_dict: Any, checkpoint_dir: str | Path, strategy: str = "") -> AsyncRequest:
        rank, world = dist.get_rank(), dist.get_world_size()
        _share_out(sharded_state_dict)
        keyed, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        copies = {tensor.untyped_storage().data_ptr() for tensor in GATHERED}
        for shards in keyed.values():
            for shard in shards:
                if isinstance(shard, ShardedTensor):
                    # Contiguous: a transposed view would be stored in its memory's order, which only torch's own
                    # reader undoes. A copy, unless it is one: the next update writes over the original.
                    live = shard.data.untyped_storage().data_ptr() not in copies
                    shard.data = shard.data.detach().to("cpu", copy=live).contiguous()
        GATHERED.clear()
        self.writer = FileSystemWriter(checkpoint_dir)
        self.writer.fs = self.files
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        # torch's `save`, cut open where bytes are written. Nothing is moved between ranks: each writes what it planned.
        planner.set_up_planner(mcore_to_pyt_state_dict(keyed, False), self.writer.storage_meta(), rank == 0)
        plan = planner.create_local_plan()
        plans: list[Any] | None = [None] * world if rank == 0 else None
        dist.gather_object(plan, plans)
        if plans is not None:
            _, self.metadata = planner.create_global_plan(plans)
        plan = dataclasses.replace(plan, storage_data=_StoragePrefix(f"__{rank}_"))

        def write() -> None:
            self.results = self.writer.write_data(plan, planner).wait()

        return AsyncRequest(write, (), [])


@dataclasses.dataclass(frozen=True)
class Share:
    """What one rank wrote: the files, and where each shard lies in them."""

    files: list[Written]
    results: list[WriteResult]


class Saving:
    """A checkpoint whose bytes were copied aside, so that the run may change them."""

    def __init__(self, state: dict[str, Any], folder: Path) -> None:
        """Plans and copies; `folder` exists, and is empty. A collective over all ranks."""
        self._strategy, self._folder = _Staged(), folder
        request = dist_checkpointing.save(
            state, str(folder), sharded_strategy=self._strategy, async_sharded_save=True, content_metadata=SHARDING
        )
        self._write_data = request.async_fn

    @property
    def bytes(self) -> int:
        """Written so far."""
        return self._strategy.files.bytes

    def write(self) -> Share:
        """Writes this rank's share: not a collective, for any thread. Raises RunFailed naming the file."""
        checksums = get_crc32_options()
        set_crc32_options(False)  # the archive's own checksum, which nothing reads: the file is hashed as a whole
        try:
            self._write_data()
        finally:
            set_crc32_options(checksums)
        return Share(list(self._strategy.files.written), self._strategy.results)

    def complete(self, shares: list[Share]) -> None:
        """On rank 0, once all ranks have written: what says where everything lies."""
        assert self._strategy.metadata is not None, "rank 0 has the plan of all"
        self._strategy.writer.finish(self._strategy.metadata, [share.results for share in shares])
        save_config(CheckpointingConfig("torch_dist", 1), str(self._folder))


# How the distributed optimizer's state is stored: as tensors like the parameters', so that any layout can read it.
SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}


def load_sharded(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fills a sharded state dict from a checkpoint of any layout. A collective over all ranks.

    Raises RunFailed naming what the checkpoint lacks.
    """
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(state, str(folder), strict="raise_all")
        return loaded
    except (dist_checkpointing.core.CheckpointingException, KeyError, RuntimeError) as error:
        raise RunFailed(f"{folder}: does not hold what this run needs: {error}") from error
