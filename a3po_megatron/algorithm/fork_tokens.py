"""Fork tokens: of all response tokens of a step only those of highest entropy are trained on (arXiv 2506.01939).

    kept = the ceil(fraction * T) tokens of highest entropy, T over all replicas, and what is as uncertain as the last

The loss is divided by what is kept. Entropies are compared over all ranks, exactly: with a threshold of each replica
the result would follow the layout.
"""

from __future__ import annotations

import math

import torch

from ..batch import Batch
from ..config import ForkTokens
from .largest import Total, count, keys_of, threshold


@torch.no_grad()
def keep_forks(batch: Batch, options: ForkTokens, total: Total) -> Batch:
    """Takes all but the fork tokens out of a scored batch. Collective over the replicas."""
    assert batch.entropy is not None, "score the batch first"
    trained, keys = batch.is_trained(), keys_of(batch.entropy)
    wanted = math.ceil(options.fraction * count(trained, total))
    batch.trained = trained & (keys >= threshold(keys[trained], wanted, total))
    return batch
