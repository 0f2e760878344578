"""Which rollouts share a packed micro-batch.

Longest first into the emptiest bin (Graham's LPT rule): bins end up within 4/3 of the best balance, in O(n log n). The
number of bins is the smallest with which no bin exceeds the limit.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def pack(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Splits items into bins of at most `limit` tokens, balanced by tokens.

    `lengths[i]` is item i's tokens; an item above the limit gets a bin to itself. Returns the bins' items in ascending
    order, bins ordered by their first item; empty for no items. Equal input gives equal output.
    """
    if not lengths:
        return []
    room = max(limit, max(lengths))
    count = max(1, -(-sum(lengths) // room))
    while True:
        bins = _balance(lengths, count)
        if all(sum(lengths[item] for item in items) <= room for items in bins):
            return sorted(sorted(items) for items in bins if items)
        count += 1


def _balance(lengths: Sequence[int], count: int) -> list[list[int]]:
    bins: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, index) for index in range(count)]
    for item in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        load, index = heapq.heappop(heap)
        bins[index].append(item)
        heapq.heappush(heap, (load + lengths[item], index))
    return bins
