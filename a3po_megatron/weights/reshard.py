"""Shards → whole HF tensors: a plan of bounded buckets, and the executor that gathers them.

    plan      pure: which HF tensors travel together, and where each rank's pieces lie in its flat send buffer
    gather    one exchange per bucket over the ranks of a replica; nothing is sent where one rank holds everything

Buckets follow the order of the layers, because vLLM holds tensors back until a layer is complete. Every bucket gets
fresh memory: a tensor that was handed on is never overwritten.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..model.layout import Piece


@dataclass(frozen=True)
class Bucket:
    tensors: tuple[tuple[str, tuple[int, ...]], ...]  # HF name, shape; in the order of the layers
    pieces: tuple[tuple[Piece, ...], ...]  # per rank of the replica: what it sends, in the order of its buffer


@dataclass(frozen=True)
class Plan:
    buckets: tuple[Bucket, ...]

    def digest(self) -> str:
        """A hash that is equal exactly where the plans are: ranks compare it before the first byte moves."""
        return hashlib.blake2b(repr(self.buckets).encode(), digest_size=16).hexdigest()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for bucket in self.buckets for name, shape in bucket.tensors}


def plan(by_rank: Sequence[Sequence[Piece]], order: Sequence[str], bucket_bytes: int, itemsize: int) -> Plan:
    """Buckets of at most `bucket_bytes` (or one tensor, where that is larger) from the pieces of a replica's ranks.

    `order` names the tensors in the order in which they are to arrive. Raises ValueError for one that nobody owns.
    """
    owned: dict[str, list[list[Piece]]] = {}
    found: dict[str, tuple[int, ...]] = {}
    for rank, pieces in enumerate(by_rank):
        for piece in pieces:
            if piece.owner:
                found[piece.tensor] = piece.shape
                owned.setdefault(piece.tensor, [[] for _ in by_rank])[rank].append(piece)
    if missing := [name for name in order if name not in found]:
        raise ValueError(f"no rank owns {missing[0]} ({len(missing)} tensors without an owner)")
    shapes = {name: found[name] for name in order}
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
    plan: Plan, parameters: Mapping[tuple[int, str], Tensor], group: dist.ProcessGroup | None, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Whole HF tensors in `dtype`, on every rank of the replica. A collective: all of them must iterate to the end."""
    rank = 0 if group is None else group.rank()
    device = next(iter(parameters.values())).device
    for bucket in plan.buckets:
        shares = [sum(piece.numel for piece in pieces) for pieces in bucket.pieces]
        buffers = [torch.empty(share, dtype=dtype, device=device) for share in shares]
        offset = 0
        for piece in bucket.pieces[rank]:
            values = parameters[piece.key].narrow(piece.dim, piece.offset, piece.length)
            buffers[rank][offset : offset + piece.numel].view(values.shape).copy_(values)
            offset += piece.numel
        if group is not None and group.size() > 1:
            _exchange(buffers, shares, rank, group)
        tensors = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in bucket.tensors}
        for buffer, pieces in zip(buffers, bucket.pieces, strict=True):
            offset = 0
            for piece in pieces:
                target = tensors[piece.tensor].narrow(piece.dim, piece.start, piece.length)
                target.copy_(buffer[offset : offset + piece.numel].view(target.shape))
                offset += piece.numel
        yield from tensors.items()


def _exchange(buffers: list[Tensor], shares: list[int], rank: int, group: dist.ProcessGroup) -> None:
    """Every rank's buffer to every rank: one collective where all have the same share, else one per sender.

    A bucket of one pipeline stage has no share on the other stages' ranks: they send nothing.
    """
    if len(set(shares)) == 1:
        dist.all_gather(buffers, buffers[rank].clone(), group=group)
        return
    for sender, buffer in enumerate(buffers):
        if shares[sender]:
            dist.broadcast(buffer, dist.get_global_rank(group, sender), group=group)
