"""FP8 codes and scales, written into the tensors that Transformer Engine's quantisers make, and read back.

Blockwise (`Float8BlockQuantizer`): 1 × 128 or 128 × 128 values share a scale. The row-wise copy is cut along the last
dimension; the column-wise copy is cut along the rows and stored transposed, unless it is COMPACT (for gathers).
Scales of 1 × 128 blocks are stored with the blocks' dimension first and the other padded to a multiple of 4.

Tensorwise (`Float8CurrentScalingQuantizer`): one scale a tensor; `_transpose` holds the same codes transposed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
LARGEST = 448.0  # of e4m3
E4M3 = torch.float8_e4m3fn


def _scale(largest: Tensor, quantizer: Any) -> Tensor:
    """What values are multiplied by before they are rounded. Zeros keep 1."""
    assert not quantizer.force_pow_2_scales, "scales of powers of 2 (NVTE_FP8_BLOCK_SCALING_FP32_SCALES is to be 1)"
    return torch.where(largest > 0, LARGEST / largest.clamp(min=quantizer.amax_epsilon or 1e-38), 1.0)


def _blocks(x: Tensor, rows: int, quantizer: Any) -> tuple[Tensor, Tensor]:
    """Codes of x [M, K] as bytes, and the inverse scales of its blocks of `rows` × 128: [⌈M/rows⌉, ⌈K/128⌉]."""
    m, k = x.shape
    padded = F.pad(x, (0, -k % BLOCK, 0, -m % rows))
    tiles = padded.view(-1, rows, padded.shape[1] // BLOCK, BLOCK)
    scale = _scale(tiles.abs().amax(dim=(1, 3), keepdim=True), quantizer)
    codes = (tiles * scale).to(E4M3).view(padded.shape)[:m, :k].contiguous()
    return codes.view(torch.uint8), 1 / scale[:, 0, :, 0]


def _put(into: Tensor, values: Tensor) -> None:
    """Scales into a tensor that is padded."""
    into.zero_()
    into[: values.shape[0], : values.shape[1]].copy_(values)


def _blockwise(x: Tensor, quantizer: Any, out: Any) -> None:
    assert out._fp8_dtype.name == "kFloat8E4M3"
    square = quantizer.block_scaling_dim == 2
    compact = quantizer.all_gather_usage
    rows = BLOCK if square else 1
    if out._rowwise_data is not None:
        codes, inverse = _blocks(x, rows, quantizer)
        out._rowwise_data.copy_(codes.view(out._rowwise_data.shape))
        _put(out._rowwise_scale_inv, inverse if square or compact else inverse.t())
    if out._columnwise_data is not None:
        codes, inverse = _blocks(x.t().contiguous(), rows, quantizer)
        codes = codes.t().contiguous() if compact and not square else codes
        out._columnwise_data.copy_(codes.view(out._columnwise_data.shape))
        _put(out._columnwise_scale_inv, inverse if square else inverse.t())


def _tensorwise(x: Tensor, quantizer: Any, out: Any) -> None:
    scale = _scale(x.abs().amax() if x.numel() else x.new_zeros(()), quantizer)
    codes = (x * scale).to(E4M3).view(torch.uint8)
    out._scale_inv.copy_((1 / scale).view(1))
    if out._data is not None:
        out._data.copy_(codes.view(out._data.shape))
    if out._transpose is not None:
        out._transpose.copy_(codes.t().contiguous().view(out._transpose.shape))
        out._transpose_invalid = False


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    assert noop is None, "a flag that skips the update"
    out = quantizer.make_empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) if output is None else output
    x = tensor.detach().float().reshape(-1, tensor.shape[-1])
    if type(quantizer).__name__ == "Float8BlockQuantizer":
        _blockwise(x, quantizer, out)
    else:
        assert type(quantizer).__name__ == "Float8CurrentScalingQuantizer", type(quantizer).__name__
        _tensorwise(x, quantizer, out)
    return out


def split_quantize(tensor: Tensor, splits: Sequence[int], quantizers: Sequence[Any], **_: Any) -> list[Any]:
    return [quantize(part, each) for part, each in zip(tensor.split(list(splits)), quantizers, strict=True)]


def bgrad_quantize(gradient: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    of_bias = gradient.float().reshape(-1, gradient.shape[-1]).sum(0).to(gradient.dtype)
    return of_bias, quantize(gradient, quantizer)


def fp8_transpose(codes: Tensor, dtype: Any, *, out: Tensor | None = None) -> Tensor:
    turned = codes.reshape(-1, codes.shape[-1]).t().contiguous().view(codes.shape[-1], *codes.shape[:-1])
    return turned if out is None else out.copy_(turned)


def dequantize(tensor: Any, dtype: Any) -> Tensor:
    from transformer_engine.pytorch.constants import TE_DType_To_Torch

    return (tensor._data.view(E4M3).float() * tensor._scale_inv).to(TE_DType_To_Torch[dtype])


def _spread(inverse: Tensor, m: int, k: int, rows: int) -> Tensor:
    """Inverse scales [⌈M/rows⌉, ⌈K/128⌉] for every value of [M, K]."""
    inverse = inverse[: -(-m // rows), : -(-k // BLOCK)]
    return inverse.repeat_interleave(rows, 0)[:m].repeat_interleave(BLOCK, 1)[:, :k]


def stored(tensor: Any, row_wise: bool) -> Tensor:
    """The values [M, K] of the copy that a product reads, in float32. A plain tensor has one copy."""
    if not hasattr(tensor, "_fp8_dtype"):
        return tensor.detach().float().reshape(-1, tensor.shape[-1])
    which = "row-wise" if row_wise else "column-wise"
    if hasattr(tensor, "_rowwise_data"):
        assert tensor._is_gemm_ready_format(), "a compact copy in a product"
        codes = tensor._rowwise_data if row_wise else tensor._columnwise_data
        inverse = tensor._rowwise_scale_inv if row_wise else tensor._columnwise_scale_inv
        assert codes is not None and inverse is not None, f"the product reads the {which} copy, which is not there"
        # As stored: the column-wise copy is the transposed matrix.
        codes = codes.reshape(-1, codes.shape[-1]) if row_wise else codes.reshape(codes.shape[0], -1)
        square = tensor._is_2D_scaled
        values = codes.view(E4M3).float()
        values = values * _spread(inverse if square else inverse.t(), *codes.shape, BLOCK if square else 1)
        leading = codes.shape[1]
    else:
        codes = tensor._data if row_wise else tensor._transpose
        fresh = row_wise or not tensor._transpose_invalid
        assert codes is not None and fresh, f"the product reads the {which} copy, which is not there"
        codes = codes.reshape(-1, codes.shape[-1]) if row_wise else codes.reshape(codes.shape[0], -1)
        values, leading = codes.view(E4M3).float() * tensor._scale_inv, codes.shape[1]
    # common/gemm/cublaslt_gemm.cu: leading dimensions of FP8 operands.
    assert leading % 16 == 0, f"leading dimension {leading} of an FP8 operand: cuBLASLt takes multiples of 16"
    return values if row_wise else values.t()
