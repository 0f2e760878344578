"""Shards → whole HF tensors: a plan of bounded buckets, and the executor that gathers them.

    plan      pure: which HF tensors travel together, and where each rank's pieces lie in its flat send buffer
    gather    one all-gather per bucket over the ranks of a replica; nothing is sent where one rank holds everything

Buckets follow the order of the layers, because vLLM holds tensors back until a layer is complete. Every bucket gets
fresh memory: a tensor that was handed on is never overwritten.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..model.layout import Piece


@dataclass(frozen=True)
class Bucket:
    tensors: tuple[tuple[str, tuple[int, ...]], ...]  # HF name, shape; in the order of the layers
    pieces: tuple[tuple[Piece, ...], ...]  # per rank of the replica: what it sends, in the order of its buffer

    @property
    def elements(self) -> int:
        """Elements of one rank's send buffer: the largest share, so that the collective is regular."""
        return max(sum(piece.numel for piece in pieces) for pieces in self.pieces)


@dataclass(frozen=True)
class Plan:
    buckets: tuple[Bucket, ...]

    def digest(self) -> str:
        """A hash that is equal exactly where the plans are: ranks compare it before the first byte moves."""
        return hashlib.blake2b(repr(self.buckets).encode(), digest_size=16).hexdigest()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for bucket in self.buckets for name, shape in bucket.tensors}


def plan(by_rank: Sequence[Sequence[Piece]], bucket_bytes: int, itemsize: int) -> Plan:
    """Buckets of at most `bucket_bytes` (or one tensor, where that is larger) from the pieces of a replica's ranks."""
    owned: dict[str, list[list[Piece]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for rank, pieces in enumerate(by_rank):
        for piece in pieces:
            shapes.setdefault(piece.tensor, piece.shape)
            if piece.owner:
                owned.setdefault(piece.tensor, [[] for _ in by_rank])[rank].append(piece)
    buckets: list[Bucket] = []
    names: list[str] = []

    def close() -> None:
        if names:
            sent = tuple(tuple(p for name in names for p in owned[name][rank]) for rank in range(len(by_rank)))
            buckets.append(Bucket(tuple((name, shapes[name]) for name in names), sent))
            names.clear()

    size = 0
    for name, shape in shapes.items():
        bytes_here = torch.Size(shape).numel() * itemsize
        if names and size + bytes_here > bucket_bytes:
            close()
            size = 0
        names.append(name)
        size += bytes_here
    close()
    return Plan(tuple(buckets))


@torch.no_grad()
def gather(
    plan: Plan, parameters: dict[str, Tensor], group: dist.ProcessGroup | None, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Whole HF tensors in `dtype`, on every rank of the replica. A collective: all of them must iterate to the end."""
    ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
    device = next(iter(parameters.values())).device
    for bucket in plan.buckets:
        buffers = torch.empty(ranks, bucket.elements, dtype=dtype, device=device)
        offset = 0
        for piece in bucket.pieces[rank]:
            values = parameters[piece.parameter].narrow(piece.dim, piece.offset, piece.length)
            buffers[rank, offset : offset + piece.numel].view(values.shape).copy_(values)
            offset += piece.numel
        if ranks > 1:
            own = buffers[rank].clone()
            dist.all_gather(list(buffers), own, group=group)
        tensors = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in bucket.tensors}
        for sender, pieces in enumerate(bucket.pieces):
            offset = 0
            for piece in pieces:
                target = tensors[piece.tensor].narrow(piece.dim, piece.start, piece.length)
                target.copy_(buffers[sender, offset : offset + piece.numel].view(target.shape))
                offset += piece.numel
        yield from tensors.items()
