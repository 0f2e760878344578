"""Matrix products, of plain and quantised operands.

Layouts as Transformer Engine names them: TN is B Aᵀ (forward), NN is B A (gradient of the input), NT is Bᵀ A (gradient
of the weight). Hopper multiplies FP8 in TN only: an operand that is not to be transposed there is read from its
column-wise copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .quantised import stored

CALLS: list[str] = []  # of every product: what its operands are stored in


def _product(a: Any, turn_a: bool, b: Any, turn_b: bool) -> Tensor:
    left, right = stored(b, row_wise=not turn_b), stored(a, row_wise=turn_a)
    kinds = {type(each).__name__ if hasattr(each, "_fp8_dtype") else str(each.dtype) for each in (a, b)}
    kinds = {kind.removesuffix("Storage") for kind in kinds}  # without torch.Tensor's behaviour; the same data
    assert len(kinds) == 1, f"operands of two kinds: {kinds}"
    CALLS.append(kinds.pop())
    if turn_b:
        left = left.t()
    return left @ (right.t() if turn_a else right)


def generic_gemm(
    a: Any,
    turn_a: bool,
    b: Any,
    turn_b: bool,
    out: Tensor | None,
    quantizer: Any,
    out_dtype: Any,
    bias: Tensor | None,
    bias_dtype: Any,
    gelu: bool,
    gelu_in: Any,
    grad: bool,
    workspace: Tensor,
    workspace_bytes: int,
    accumulate: bool,
    split_accumulator: bool,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Any = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> tuple[Tensor, Tensor | None, None, Any]:
    from transformer_engine.pytorch.constants import TE_DType_To_Torch

    assert quantizer is None and not gelu and comm_overlap is None and alpha == 1.0
    found = _product(a, turn_a, b, turn_b)
    of_bias = None
    if bias is not None and bias.numel():
        if grad:
            of_bias = stored(b, row_wise=False).sum(0).to(TE_DType_To_Torch[bias_dtype])
        else:
            found = found + bias.detach().float()
    if not turn_b:
        found = found.view(*b.size()[:-1], found.shape[-1])
    if out is None:
        assert not accumulate
        return found.to(TE_DType_To_Torch[out_dtype]), of_bias, None, extra_output
    found = found.view(out.shape)
    out.add_(found) if accumulate else out.copy_(found)
    return out, of_bias, None, extra_output


def te_general_grouped_gemm(
    a: Sequence[Any],
    turn_a: bool,
    b: Sequence[Any],
    turn_b: bool,
    out: Sequence[Tensor],
    out_dtype: Any,
    splits: Sequence[int] | None,
    bias: Sequence[Tensor],
    bias_dtype: Any,
    single_output: bool,
    gelu_in: Any,
    grad: bool,
    workspaces: Sequence[Tensor],
    workspace_bytes: int,
    accumulate: bool,
    split_accumulator: bool,
    free_multiprocessors: int,
) -> Sequence[Tensor]:
    assert all(each.numel() == 0 for each in bias), "experts with biases"
    parts = out[0].split(list(splits or ())) if single_output else out
    for mine, other, into in zip(a, b, parts, strict=True):
        if 0 in (*mine.size(), *other.size()):
            if not accumulate:
                into.zero_()
            continue
        found = _product(mine, turn_a, other, turn_b).view(into.shape)
        into.add_(found) if accumulate else into.copy_(found)
    return bias
