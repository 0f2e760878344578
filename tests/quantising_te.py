"""Makes the linear layers of tests/fake_te compute as Transformer Engine's do in FP8: operands rounded to e4m3, and
copies of weights kept over micro-batches with both of their traps (tools/bringup/traps.py)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = 448.0  # of e4m3


def quantise(x: Tensor, blockwise: bool) -> Tensor:
    """To e4m3's grid: with one scale a tensor, or one for every 128 values of a row."""
    flat = x.detach().float().reshape(-1, 128 if blockwise and x.shape[-1] % 128 == 0 else x.numel())
    scale = flat.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / LARGEST
    return ((flat / scale).to(torch.float8_e4m3fn).float() * scale).reshape(x.shape).to(x.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, copy: Tensor, first: bool | None, blockwise: bool) -> Tensor:
        rounded = quantise(x, blockwise)
        ctx.save_for_backward(rounded, weight, copy)
        ctx.first, ctx.blockwise = first, blockwise
        return F.linear(rounded, copy)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, copy = ctx.saved_tensors
        gradient = quantise(gradients[0], ctx.blockwise)
        of_weight = gradient.flatten(0, -2).float().t() @ x.flatten(0, -2).float()
        if not hasattr(weight, "main_grad"):
            return gradient @ copy, of_weight.to(weight.dtype), None, None, None
        if ctx.first:
            weight.main_grad.copy_(of_weight)  # overwrites what others have summed
        else:
            weight.main_grad.add_(of_weight)
        weight.grad_added_to_main_grad = True
        return gradient @ copy, torch.zeros_like(weight), None, None, None


def _forward(self: Any, x: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    self._run(x, [self.weight], is_first_microbatch)
    if hasattr(self, "layer_norm_weight"):
        x = F.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps)
    recipe = FP8GlobalStateManager.recipe
    if recipe is None:
        return self._multiply(x)
    blockwise = type(recipe).__name__ == "Float8BlockScaling"
    if is_first_microbatch is None:
        copy = quantise(self.weight, blockwise)
    else:
        if is_first_microbatch or not hasattr(self, "_kept"):
            self._kept = quantise(self.weight, blockwise)
        copy = self._kept
    y = _Product.apply(x, self.weight, copy, is_first_microbatch, blockwise)
    return y if self.bias is None else y + self.bias


def install() -> None:
    import transformer_engine.pytorch as te

    te.Linear.forward = te.LayerNormLinear.forward = _forward
