"""Attention over packed sequences on the CPU path: each attends to itself alone, however many are computed at once."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from a3po_megatron import compat

HEADS, KV_HEADS, WIDTH, SCALE = 4, 2, 8, 0.3


@pytest.fixture(scope="module")
def modules() -> Any:
    compat.prepare()  # before Megatron is imported
    from a3po_megatron.model import modules

    return modules


def exact(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    """Sequence by sequence, position by position."""
    rows, begin = [], 0
    for length in lengths:
        for t in range(length):
            for head in range(HEADS):
                of = head // (HEADS // KV_HEADS)
                seen = slice(begin, begin + t + 1)
                weights = torch.softmax(SCALE * key[seen, of] @ query[begin + t, head], dim=0)
                rows.append(weights @ value[seen, of])
        begin += length
    return torch.stack(rows).view(len(query), HEADS * WIDTH)


@pytest.mark.parametrize("lengths", [[5], [1, 1, 1], [3, 40, 2, 17, 39, 1, 30], [70, 20, 66, 3, 52, 51]])
def test_every_sequence_attends_to_itself_up_to_each_position_forward_and_backward(
    lengths: list[int], modules: Any
) -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    inputs = [torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True) for shape in shapes]
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    config = SimpleNamespace(softmax_scale=SCALE, context_parallel_size=1)
    attention = modules.PackedAttention(config, 1, None, "self")
    packing = SimpleNamespace(qkv_format="thd", cu_seqlens_q=ends)
    found = attention(*inputs, None, packed_seq_params=packing)
    pull = torch.randn(found.shape, generator=draw, dtype=torch.float64)
    gradients = torch.autograd.grad(found, inputs, pull)
    wanted = exact(*inputs, lengths)
    # float64, some hundred additions
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    for mine, theirs in zip(gradients, torch.autograd.grad(wanted, inputs, pull), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@given(st.lists(st.integers(1, 90), min_size=1, max_size=30))
def test_every_token_has_one_row_and_what_is_computed_beside_is_bounded(lengths: list[int]) -> None:
    compat.prepare()
    from a3po_megatron.model.modules import SHORT, side_by_side

    ends = (0, *itertools.accumulate(lengths))
    beside, back = side_by_side(ends)
    rows = torch.cat([each.flatten() for each in beside])
    assert torch.equal(rows[back], torch.arange(ends[-1]))
    assert sum(map(len, beside)) == len(lengths)
    for each in beside:
        longest = each.shape[1]
        shortest = min(len(set(row.tolist())) for row in each)
        assert shortest >= 0.75 * longest or longest <= SHORT
