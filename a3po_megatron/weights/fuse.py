"""Experts as the engine likes them best: all of a layer in one tensor, as transformers 5 packs them.

    mlp.experts.gate_up_proj [E, 2I, H]    mlp.experts.down_proj [E, H, I]

The experts' HF tensors are views into that memory from the beginning, so that nothing is copied, every one of them is
checked by itself, and the whole is handed on when its last part has passed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..model.family import Family
from .reshard import fresh

_PART = re.compile(r"(.*\.mlp\.experts\.)(\d+)\.(gate|up|down)_proj\.weight")


class FusedExperts:
    def __init__(self, family: Family) -> None:
        assert family.experts is not None
        self._experts, self._hidden = family.experts, family.hidden
        self._whole: dict[str, Tensor] = {}
        self._missing: dict[str, int] = {}

    def allocate(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for an HF tensor: an expert's is a view into its layer's."""
        part = _PART.fullmatch(name)
        if part is None:
            return fresh(name, shape, dtype, device)
        fused, count, ffn = self._fused(name), self._experts.count, self._experts.ffn
        if fused not in self._whole:
            whole = (count, self._hidden, ffn) if part[3] == "down" else (count, 2 * ffn, self._hidden)
            self._whole[fused] = torch.empty(whole, dtype=dtype, device=device)
            self._missing[fused] = count * (1 if part[3] == "down" else 2)
        expert = self._whole[fused][int(part[2])]
        if part[3] == "down":
            return expert
        return expert[:ffn] if part[3] == "gate" else expert[ffn:]

    def fuse(self, stream: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Hands on a stream of HF tensors, experts as whole layers as soon as their last part has come."""
        for name, tensor in stream:
            if _PART.fullmatch(name) is None:
                yield name, tensor
                continue
            fused = self._fused(name)
            self._missing[fused] -= 1
            if self._missing[fused] == 0:
                del self._missing[fused]
                yield fused, self._whole.pop(fused)

    @staticmethod
    def _fused(name: str) -> str:
        part = _PART.fullmatch(name)
        assert part is not None
        return part[1] + ("down_proj" if part[3] == "down" else "gate_up_proj")
