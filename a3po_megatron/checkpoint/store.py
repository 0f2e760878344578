"""Megatron's distributed checkpoints: every rank writes its own shards.

Megatron's own writer starts processes for every save, 8–11 s the first time on a CPU, to write in the background;
where a save is waited for anyway, torch's writer puts the same bytes into the same files from this process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed import checkpoint


class _Direct(TorchDistSaveShardedStrategy):
    """Writes from this process, with torch's writer."""

    def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
        # A transposed view would be stored in its memory's order, which only torch's own reader undoes.
        for tensor in nested_values(sharded_state_dict):
            if isinstance(tensor, ShardedTensor) and tensor.data is not None:
                tensor.data = tensor.data.contiguous()
        keyed, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        checkpoint.save(
            mcore_to_pyt_state_dict(keyed, False),
            storage_writer=checkpoint.FileSystemWriter(checkpoint_dir),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def save_sharded(state: dict[str, Any], folder: Path) -> None:
    """Writes a sharded state dict into an existing, empty folder. A collective over all ranks."""
    dist_checkpointing.save(state, str(folder), sharded_strategy=_Direct("torch_dist", 1))
