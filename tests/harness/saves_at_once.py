"""What a run does in the background when it saves, here at once and step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from a3po_megatron.run.store import Saving, Share


def save(learner: Any, folder: Path) -> None:
    """A learner's weights and optimizer, as a run saves them; a collective. `folder` must not be there yet."""
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    write_whole(Saving(learner.sharded_state(), folder))


def write_whole(saving: Saving) -> Share:
    """Every rank writes its share, rank 0 completes the checkpoint; a collective. Returns this rank's share."""
    share = saving.write()
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, share)
    if dist.get_rank() == 0:
        saving.complete(shares)
    dist.barrier()
    return share
