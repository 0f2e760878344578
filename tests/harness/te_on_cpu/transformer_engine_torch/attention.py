"""Causal attention over packed sequences, as cuDNN is asked for it."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def get_fused_attn_backend(*_: Any) -> Any:
    from . import NVTE_Fused_Attn_Backend

    return NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen


def _attend(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, scale: float) -> Tensor:
    """[T, heads, head_dim] of float32; every sequence by itself, key heads shared by groups of query heads."""
    found = []
    for begin, end in itertools.pairwise(ends.tolist()):
        parts = (x[begin:end].transpose(0, 1)[None] for x in (q, k, v))
        found.append(F.scaled_dot_product_attention(*parts, is_causal=True, scale=scale, enable_gqa=True)[0])
    return torch.cat(found, dim=1).transpose(0, 1).contiguous()


def _check(
    longest: tuple[int, int], dropout: float, layout: Any, bias: Any, mask: Any, softmax: Any, window: Any,
    ends: tuple[Tensor, Tensor], padded: tuple[Any, Any], tokens: int,
) -> None:  # fmt: skip
    assert layout.name == "NVTE_THD_THD_THD" and mask.name == "NVTE_PADDING_CAUSAL_MASK", (layout, mask)
    assert bias.name == "NVTE_NO_BIAS" and softmax.name == "NVTE_VANILLA_SOFTMAX" and dropout == 0.0
    assert tuple(window) in ((-1, 0), (-1, -1)), f"a window of {window}"
    for limit, mine, bounds in zip(longest, ends, padded, strict=True):
        assert mine.dtype == torch.int32 and bounds is not None and torch.equal(bounds, mine)
        assert int(mine[0]) == 0 and int(mine[-1]) == tokens, "padding must belong to a sequence"
        assert limit == int((mine[1:] - mine[:-1]).max()), "the longest sequence"


def fused_attn_fwd(
    longest_q: int, longest_k: int, training: bool, scale: float, dropout: float, fast_zero: bool, layout: Any,
    bias: Any, mask: Any, softmax: Any, window: Any, ends_q: Tensor, ends_k: Tensor, q: Tensor, k: Tensor, v: Tensor,
    dtype: torch.dtype, padded_q: Any, padded_k: Any, pages_k: Any, pages_v: Any, s_quantizer: Any, o_quantizer: Any,
    bias_values: Any, offset: Any, generator: Any, elements: int, return_max: bool, graph: bool,
) -> list[Tensor]:  # fmt: skip
    assert (pages_k, pages_v, s_quantizer, o_quantizer, bias_values, offset) == (None,) * 6 and not return_max
    bounds, ends = (padded_q, padded_k), (ends_q, ends_k)
    _check((longest_q, longest_k), dropout, layout, bias, mask, softmax, window, ends, bounds, len(q))
    found = _attend(q.detach().float(), k.detach().float(), v.detach().float(), ends_q, scale)
    return [found.to(q.dtype), torch.zeros(1), torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(
    longest_q: int, longest_k: int, scale: float, dropout: float, fast_zero: bool, layout: Any, bias: Any, mask: Any,
    softmax: Any, window: Any, deterministic: bool, ends_q: Tensor, ends_k: Tensor, q: Tensor, k: Tensor, v: Tensor,
    out: Tensor, gradient: Tensor, dtype: Any, gradient_dtype: Any, saved: Any, padded_q: Any, padded_k: Any,
    s_quantizer: Any, dp_quantizer: Any, dqkv_quantizer: Any, graph: bool,
) -> list[Tensor | None]:  # fmt: skip
    bounds, ends = (padded_q, padded_k), (ends_q, ends_k)
    _check((longest_q, longest_k), dropout, layout, bias, mask, softmax, window, ends, bounds, len(q))
    with torch.enable_grad():
        inputs = [x.detach().float().requires_grad_() for x in (q, k, v)]
        found = _attend(*inputs, ends_q, scale)
        gradients = torch.autograd.grad(found, inputs, gradient.float().view_as(found))
    return [*(each.to(q.dtype) for each in gradients), None, None]
