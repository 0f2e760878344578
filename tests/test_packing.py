"""Packing: every rollout once, no micro-batch above the limit, and tokens spread about evenly."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a3po_megatron.schedule.packing import pack

LIMIT = 100
LENGTHS = st.lists(st.integers(0, LIMIT), max_size=60)


def loads(bins: list[list[int]], lengths: list[int]) -> list[int]:
    return [sum(lengths[item] for item in items) for items in bins]


def smallest_largest_load(lengths: list[int], count: int) -> int:
    """The best balance of `count` bins there is, by trying every assignment."""
    best = sum(lengths)
    for places in itertools.product(range(count), repeat=len(lengths)):
        filled = [0] * count
        for length, place in zip(lengths, places, strict=True):
            filled[place] += length
        best = min(best, max(filled))
    return best


@settings(deadline=None)
@given(LENGTHS)
def test_every_item_lies_in_exactly_one_bin_and_no_bin_exceeds_the_limit(lengths: list[int]) -> None:
    bins = pack(lengths, LIMIT)
    assert sorted(itertools.chain(*bins)) == list(range(len(lengths)))
    assert all(bins), "no bin is empty"
    assert max(loads(bins, lengths), default=0) <= LIMIT


@settings(deadline=None)
@given(LENGTHS)
def test_items_ascend_within_bins_bins_by_their_first_item_and_equal_input_packs_equally(lengths: list[int]) -> None:
    bins = pack(lengths, LIMIT)
    assert bins == [sorted(items) for items in bins]
    assert [items[0] for items in bins] == sorted(items[0] for items in bins)
    assert pack(tuple(lengths), LIMIT) == bins


@pytest.mark.parametrize("seed", range(40))
def test_count_and_balance_against_trying_every_assignment(seed: int) -> None:
    draw = random.Random(seed)
    lengths = [draw.randint(1, LIMIT) for _ in range(draw.randint(1, 7))]
    bins = pack(lengths, LIMIT)
    fewest = next(n for n in range(1, 8) if smallest_largest_load(lengths, n) <= LIMIT)
    assert fewest <= len(bins) <= fewest + 1
    # Graham 1969: the longest-first rule stays within 4/3 - 1/(3m) of the best balance of m bins.
    best = smallest_largest_load(lengths, len(bins))
    assert max(loads(bins, lengths)) <= best * (4 / 3 - 1 / (3 * len(bins))) + 1e-9


@settings(deadline=None)
@given(st.lists(st.integers(1, LIMIT), min_size=1, max_size=200))
def test_never_twice_as_many_bins_as_the_tokens_need(lengths: list[int]) -> None:
    assert len(pack(lengths, LIMIT)) <= max(1, 2 * sum(lengths) / LIMIT + 1)


@settings(deadline=None)
@given(st.lists(st.integers(1, LIMIT), min_size=1, max_size=60))
def test_two_bins_differ_by_no_more_than_the_longest_item(lengths: list[int]) -> None:
    filled = loads(pack(lengths, LIMIT), lengths)
    assert max(filled) - min(filled) <= max(lengths)


def test_what_fits_into_one_bin_is_one_bin_and_nothing_is_no_bin() -> None:
    assert pack([], LIMIT) == []
    assert pack([60, 40], LIMIT) == [[0, 1]]
    assert pack([60, 41], LIMIT) == [[0], [1]]
    assert pack([50, 50, 50, 50], LIMIT) in ([[0, 1], [2, 3]], [[0, 2], [1, 3]], [[0, 3], [1, 2]])


@pytest.mark.parametrize("lengths", [[250], [250, 100], [100, 250, 99]])
def test_an_item_above_the_limit_is_packed_by_itself(lengths: list[int]) -> None:
    bins = pack(lengths, LIMIT)
    assert [lengths.index(250)] in bins
    assert sorted(itertools.chain(*bins)) == list(range(len(lengths)))
