"""Which rollouts share a packed micro-batch.

Longest first into the emptiest bin (Graham's LPT rule): bins end up within 4/3 of the best balance, in O(n log n). The
number of bins is the smallest with which this rule keeps every bin within the limit.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def pack(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Splits items into bins of at most `limit` tokens, balanced by tokens.

    `lengths[i]` is item i's tokens; an item above the limit gets a bin to itself. Returns the bins' items in ascending
    order, bins ordered by their first item; empty for no items. Equal input gives equal output.
    """
    alone = [[item] for item, length in enumerate(lengths) if length > limit]
    rest = [item for item, length in enumerate(lengths) if length <= limit]
    sizes = [lengths[item] for item in rest]
    count = max(-(-sum(sizes) // limit), 1 if sizes else 0)
    bins = longest_first(sizes, count)
    while any(sum(sizes[item] for item in items) > limit for items in bins):
        count += 1
        bins = longest_first(sizes, count)
    return sorted([*alone, *(sorted(rest[item] for item in items) for items in bins if items)])


def heaviest_first(bins: list[list[int]], lengths: Sequence[int]) -> list[list[int]]:
    """Bins by their tokens, so that the i-th of one rank is nearly as long as the i-th of another."""
    return sorted(bins, key=lambda items: -sum(lengths[item] for item in items))


def token_multiple(grain: int, tensor: int, sequence_parallel: bool) -> int:
    """Of which the tokens of a micro-batch on one context-parallel rank must be a multiple.

    Under sequence parallelism the tensor ranks share them out between layers; `grain` is what each rank's part must
    divide by (model/precision.py: 128 for blockwise FP8, 16 for tensorwise, 1 without).
    """
    return grain * (tensor if sequence_parallel else 1)


def longest_first(lengths: Sequence[float], count: int) -> list[list[int]]:
    """Splits items into so many bins: longest first, each into the emptiest one."""
    bins: list[list[int]] = [[] for _ in range(count)]
    heap = [(0.0, index) for index in range(count)]
    for item in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        load, index = heapq.heappop(heap)
        bins[index].append(item)
        heapq.heappush(heap, (load + lengths[item], index))
    return bins
