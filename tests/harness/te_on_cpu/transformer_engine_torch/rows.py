"""Norms over rows, rotary embeddings, and the optimizer's functions over lists of tensors."""

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


def fused_rope_forward(t: Tensor, freqs: Tensor, *of: Any) -> Tensor:
    cos, sin = _angles(t, freqs, *of)
    return (t.float() * cos + _turned(t.float()) * sin).to(t.dtype)


def fused_rope_backward(gradient: Tensor, freqs: Tensor, *of: Any) -> Tensor:
    cos, sin = _angles(gradient, freqs, *of)
    return (gradient.float() * cos - _turned(gradient.float() * sin)).to(gradient.dtype)


def _angles(
    t: Tensor,  # [T, heads, d], sequences end to end
    freqs: Tensor,  # [positions, 1, 1, d]
    starts: None,
    form: Any,
    interleaved: bool,
    ends: Tensor,  # [sequences + 1] int32
    context: int,
    rank: int,
) -> tuple[Tensor, Tensor]:
    assert form.name.endswith("THD") and starts is None and not interleaved and context == 1
    assert freqs.dtype == torch.float32 and freqs.shape[3] == t.shape[2] and ends.dtype == torch.int32
    lengths = ends.diff().tolist()
    angles = torch.cat([freqs[:length, 0] for length in lengths])  # [T, 1, d]
    assert len(angles) == len(t)
    return angles.cos(), angles.sin()


def _turned(t: Tensor) -> Tensor:
    first, second = t.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def multi_tensor_adam(
    chunk: int, noop: Tensor, lists: Sequence[Sequence[Tensor]], rate: float, beta1: float, beta2: float, eps: float,
    step: int, decoupled: int, correct: int, decay: float,
) -> None:  # fmt: skip
    """Lists of gradients, parameters, moments, and, where the optimizer has them, float32 masters."""
    assert decoupled, "weight decay inside the gradient"
    for gradient, parameter, first, second, *masters in zip(*lists, strict=True):
        assert first.dtype == second.dtype == torch.float32 and len(masters) == (parameter.dtype != torch.float32)
        wide = gradient.float()
        first.mul_(beta1).add_(wide, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(wide, wide, value=1 - beta2)
        mean, square = (first / (1 - beta1**step), second / (1 - beta2**step)) if correct else (first, second)
        main = masters[0] if masters else parameter
        main.sub_(rate * (mean / (square.sqrt() + eps) + decay * main))
        if masters:
            parameter.copy_(main)


def multi_tensor_l2norm(
    chunk: int, noop: Tensor, lists: Sequence[Sequence[Tensor]], per_tensor: bool = False
) -> tuple[Tensor, Tensor | None]:
    norms = torch.stack([each.float().norm() for each in lists[0]])
    return norms.norm().view(1), norms if per_tensor else None


def multi_tensor_scale(chunk: int, noop: Tensor, lists: Sequence[Sequence[Tensor]], by: float) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * by)
