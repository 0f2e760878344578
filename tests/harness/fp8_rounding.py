"""What FP8 alone changes: a Hugging Face model in float64 whose linear layers round their operands to e4m3, as the
recipes of Transformer Engine say and no more. Written from those recipes, with nothing of the package."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST, BLOCK = 448.0, 128  # of e4m3; of values that share a scale


def rounded(x: Tensor, rows: int, columns: int) -> Tensor:
    """x [M, K] on the grid of e4m3, with a scale for every `rows` × `columns` values; 0: all of them."""
    m, k = x.shape
    rows, columns = rows or m, columns or k
    padded = F.pad(x, (0, -k % columns, 0, -m % rows))
    tiles = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    scale = tiles.abs().amax(dim=(1, 3), keepdim=True).clamp(min=1e-30) / LARGEST
    return ((tiles / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale).reshape(padded.shape)[:m, :k]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, blockwise: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.blockwise = blockwise
        return rounded(x, *((1, BLOCK) if blockwise else (0, 0))) @ _weight(weight, blockwise).t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        by_row, by_column = ((1, BLOCK), (BLOCK, 1)) if ctx.blockwise else ((0, 0), (0, 0))
        of_x = rounded(gradients[0], *by_row) @ _weight(weight, ctx.blockwise)
        of_weight = rounded(gradients[0], *by_column).t() @ rounded(x, *by_column)
        return of_x, of_weight, None


def _weight(weight: Tensor, blockwise: bool) -> Tensor:
    return rounded(weight, *((BLOCK, BLOCK) if blockwise else (0, 0)))


@contextlib.contextmanager
def quantised(kept: Collection[Tensor], blockwise: bool) -> Iterator[None]:
    """Within the block every F.linear rounds its operands, but those with one of the `kept` weights."""
    plain, addresses = F.linear, {weight.data_ptr() for weight in kept}

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.data_ptr() in addresses:
            return plain(x, weight, bias)
        y = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, blockwise).view(*x.shape[:-1], -1)  # type: ignore[no-untyped-call]
        return y if bias is None else y + bias

    F.linear = linear
    try:
        yield
    finally:
        F.linear = plain
