"""Norms over rows, and the optimizer's functions over lists of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .quantised import quantize


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: Tensor | None, quantizer: Any, dtype: Any, margin: int, centred: bool
) -> tuple[Any, None, Tensor]:
    from transformer_engine.pytorch.constants import TE_DType_To_Torch

    assert out is None and not centred
    wide = x.detach().float()
    deviation = torch.rsqrt(wide.square().mean(-1) + eps)
    y = (wide * deviation[..., None] * weight.detach().float()).to(TE_DType_To_Torch[dtype])
    return (y if quantizer is None else quantize(y, quantizer)), None, deviation.reshape(-1)


def rmsnorm_bwd(
    gradient: Tensor, x: Tensor, deviation: Tensor, weight: Tensor, margin: int, centred: bool
) -> tuple[Tensor, Tensor]:
    assert not centred
    wide, of_y = x.detach().float(), gradient.float().view(x.shape)
    scale = deviation.view(*x.shape[:-1], 1)
    normed = wide * scale
    of_weight = (of_y * normed).reshape(-1, x.shape[-1]).sum(0)
    of_normed = of_y * weight.detach().float()
    of_x = scale * (of_normed - normed * (of_normed * normed).mean(-1, keepdim=True))
    return of_x.to(x.dtype), of_weight.to(weight.dtype)


def multi_tensor_adam(
    chunk: int, noop: Tensor, lists: Sequence[Sequence[Tensor]], rate: float, beta1: float, beta2: float, eps: float,
    step: int, decoupled: int, correct: int, decay: float,
) -> None:  # fmt: skip
    assert decoupled, "weight decay inside the gradient"
    for gradient, parameter, first, second in zip(*lists, strict=True):
        wide = gradient.float()
        first.mul_(beta1).add_(wide, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(wide, wide, value=1 - beta2)
        mean, square = (first / (1 - beta1**step), second / (1 - beta2**step)) if correct else (first, second)
        parameter.sub_(rate * (mean / (square.sqrt() + eps) + decay * parameter))


def multi_tensor_l2norm(
    chunk: int, noop: Tensor, lists: Sequence[Sequence[Tensor]], per_tensor: bool = False
) -> tuple[Tensor, Tensor | None]:
    norms = torch.stack([each.float().norm() for each in lists[0]])
    return norms.norm().view(1), norms if per_tensor else None


def multi_tensor_scale(chunk: int, noop: Tensor, lists: Sequence[Sequence[Tensor]], by: float) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * by)
