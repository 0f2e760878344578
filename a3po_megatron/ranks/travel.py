"""Tensors of different lengths between the ranks of one group, on the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def gathered(value: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """Every rank's value [n, …], of which n may differ, by rank. Collective."""
    if group.size() == 1:
        return [value]
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(group.size())]
    dist.all_gather(counts, torch.tensor([len(value)]), group=group)
    longest = max(int(count) for count in counts)
    padded = value.new_zeros((longest, *value.shape[1:]))
    padded[: len(value)] = value
    values = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(values, padded, group=group)
    return [each[: int(count)] for each, count in zip(values, counts, strict=True)]


def exchanged(parts: Sequence[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """What every rank of the group has for this one, by rank; `parts`: what this one has for each, [n] of one type, of
    which n may differ. Collective."""
    if group.size() == 1:
        return list(parts)
    sizes = torch.tensor([len(part) for part in parts])
    coming = torch.empty_like(sizes)
    dist.all_to_all_single(coming, sizes, group=group)
    received = parts[0].new_empty(int(coming.sum()))
    dist.all_to_all_single(received, torch.cat(list(parts)), coming.tolist(), sizes.tolist(), group=group)
    return list(received.split(coming.tolist()))
