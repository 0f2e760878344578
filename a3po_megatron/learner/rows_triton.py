"""The row functions of rows.py as two Triton kernels, for CUDA: one read of x, and one read and one write of it.

One program takes one row, in blocks; columns beyond the slice's own are masked, so that any number of columns is right
(151,936 / 2 is no multiple of 256). The statistics are kept online, with a running maximum m:

    Z ← Z e^(m - m') + Σ e^(x - m')         S ← (S + (m - m') Z) e^(m - m') + Σ (x - m') e^(x - m')

Run on CUDA by rows.py; on a CPU only by Triton's interpreter (tests/test_rows_triton.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # columns at once: 16 KB of float32 in registers and shared memory


@triton.jit
def _measure(x, column, here, out, columns, stride, tokens, WITH_ENTROPY: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    base = x + row.to(tl.int64) * stride
    peak = -float("inf")
    total = 0.0
    weighted = 0.0
    for begin in range(0, columns, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        values = tl.load(base + at, mask=at < columns, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(values, axis=0))
        safe = tl.where(higher == -float("inf"), 0.0, higher)  # a row of -inf alone has no probability, and no NaN
        shift = tl.where(peak == -float("inf"), 0.0, peak - safe)
        scale = tl.where(peak == -float("inf"), 0.0, tl.exp(shift))
        shifted = values - safe
        exponential = tl.exp(shifted)
        if WITH_ENTROPY:
            inside = tl.where(values == -float("inf"), 0.0, shifted * exponential)
            weighted = (weighted + shift * total) * scale + tl.sum(inside, axis=0)
        total = total * scale + tl.sum(exponential, axis=0)
        peak = higher
    target = tl.load(base + tl.load(column + row)).to(tl.float32)
    own = tl.load(here + row) != 0
    tl.store(out + row, peak)
    tl.store(out + tokens + row, total)
    tl.store(out + 2 * tokens + row, weighted)
    tl.store(out + 3 * tokens + row, tl.where(own, target - tl.where(peak == -float("inf"), 0.0, peak), 0.0))


@triton.jit
def _gradient(  # type: ignore[no-untyped-def]
    x, column, here, peak, log_z, entropy, of_logprob, of_entropy, columns, stride,
    WITH_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = x + row.to(tl.int64) * stride + at
    values = tl.load(place, mask=at < columns, other=-float("inf")).to(tl.float32)
    logp = values - tl.load(peak + row) - tl.load(log_z + row)
    probability = tl.exp(logp)
    wanted = tl.load(of_logprob + row)
    value = -wanted * probability
    if WITH_ENTROPY:
        # p (log p + H) is 0 at a logit of -inf, whatever the incoming gradient.
        spread = tl.where(probability == 0.0, 0.0, probability * (logp + tl.load(entropy + row)))
        value -= tl.load(of_entropy + row) * spread
    target = (at == tl.load(column + row)) & (tl.load(here + row) != 0)
    tl.store(place, value + tl.where(target, wanted, 0.0), mask=at < columns)


def measure(x: Tensor, here: Tensor, column: Tensor, with_entropy: bool, out: Tensor) -> None:
    """rows.measure; x [t, v] (rows may be strided) is left as it is."""
    tokens, columns = x.shape
    if tokens == 0:
        return
    rows = torch.empty((4, tokens), dtype=torch.float32, device=x.device)
    flags = here.to(torch.int8)
    _measure[(tokens,)](x, column, flags, rows, columns, x.stride(0), tokens, WITH_ENTROPY=with_entropy, BLOCK=BLOCK)
    out.copy_(rows)


def gradient(
    x: Tensor,
    here: Tensor,
    column: Tensor,
    kept: tuple[Tensor, Tensor, Tensor],
    of_logprob: Tensor,
    of_entropy: Tensor | None,
) -> Tensor:
    """rows.gradient, in x's memory."""
    tokens, columns = x.shape
    if tokens:
        rows = [values.contiguous() for values in (*kept, of_logprob, of_logprob if of_entropy is None else of_entropy)]
        grid = (tokens, triton.cdiv(columns, BLOCK))
        flags, entropy = here.to(torch.int8), of_entropy is not None
        _gradient[grid](x, column, flags, *rows, columns, x.stride(0), WITH_ENTROPY=entropy, BLOCK=BLOCK)
    return x
