"""Stands for DeepEP: its `Buffer` as Megatron-Core 0.16.1's fused_a2a.py calls it, over gloo, with what its kernels
demand of dtypes and shapes as assertions. Everybody gets everything, and keeps what is for him.

What it shows: that arguments, handles and gradients go where they belong. What it cannot: the kernels, their streams,
and how much memory and time they take.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .utils import EventOverlap


class Handle(NamedTuple):
    kept: list[Tensor]  # rank of the group → which of its tokens came here
    sent: Tensor  # [t, ranks] bool, which of this rank's tokens went where


class Buffer:
    def __init__(self, group: Any, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0) -> None:
        self.group, self.num_nvl_bytes, self.num_rdma_bytes = group, num_nvl_bytes, num_rdma_bytes

    @staticmethod
    def set_num_sms(count: int) -> None:
        assert count % 2 == 0

    @staticmethod
    def get_dispatch_config(ranks: int) -> Any:
        return SimpleNamespace(
            get_nvl_buffer_size_hint=lambda hidden, ranks: hidden, get_rdma_buffer_size_hint=lambda hidden, ranks: 0
        )

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int, **_: Any) -> tuple[Any, ...]:
        """Tokens for each rank, for each RDMA rank, for each expert, which token goes where, an event."""
        assert topk_idx.dtype == torch.int64 and topk_idx.is_contiguous()
        owners = topk_idx // (num_experts // self.group.size())
        there = torch.stack([(owners == rank).any(dim=1) for rank in range(self.group.size())], dim=1)
        return there.sum(0), None, torch.bincount(topk_idx.flatten(), minlength=num_experts), there, EventOverlap()

    def dispatch(
        self,
        x: Tensor,  # [t, H] bf16
        handle: Handle | None = None,
        topk_idx: Tensor | None = None,  # [t, k]
        topk_weights: Tensor | None = None,  # [t, k] float32
        num_tokens_per_expert: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        **_: Any,
    ) -> tuple[Any, ...]:
        """Rows for this rank, their experts counted from its first (-1: another's), their weights, rows for each of its
        experts, a handle, an event."""
        assert x.dtype == torch.bfloat16 and x.is_contiguous() and x.shape[1] * x.element_size() % 16 == 0
        here = self.group.rank()
        if handle is not None:
            parts = self._from_all(x)
            return torch.cat([p[k] for p, k in zip(parts, handle.kept, strict=True)]), None, None, None, None, _event()
        assert topk_idx is not None and topk_weights is not None and topk_weights.dtype == torch.float32
        assert num_tokens_per_expert is not None and is_token_in_rank is not None
        there = self._from_all((x, topk_idx, topk_weights, is_token_in_rank))
        kept = [where[:, here].nonzero()[:, 0] for *_, where in there]
        rows, experts, weights = (
            torch.cat([part[which][keep] for part, keep in zip(there, kept, strict=True)]) for which in range(3)
        )
        local = len(num_tokens_per_expert) // self.group.size()
        mine = (experts >= here * local) & (experts < (here + 1) * local)
        experts = torch.where(mine, experts - here * local, -1)
        counts = torch.bincount(experts[mine], minlength=local).tolist()
        return rows, experts, torch.where(mine, weights, 0.0), counts, Handle(kept, is_token_in_rank), _event()

    def combine(
        self, x: Tensor, handle: Handle, topk_weights: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Sums of what the ranks made of each of this rank's tokens, and of their weights."""
        assert x.dtype == torch.bfloat16 and x.is_contiguous()
        here, sizes = self.group.rank(), [len(keep) for keep in handle.kept]
        by_rank = self._from_all((x.split(sizes), None if topk_weights is None else topk_weights.split(sizes)))
        total = torch.zeros(len(handle.sent), x.shape[1])
        weights = None if topk_weights is None else torch.zeros(len(handle.sent), topk_weights.shape[1])
        for rank, (rows, of_weights) in enumerate(by_rank):
            places = handle.sent[:, rank].nonzero()[:, 0]
            total.index_add_(0, places, rows[here].float())
            if weights is not None:
                weights.index_add_(0, places, of_weights[here])
        return total.to(x.dtype), weights, _event()

    def _from_all(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.group.size()
        dist.all_gather_object(values, value, group=self.group)
        return values


def _event() -> EventOverlap:
    return EventOverlap()
