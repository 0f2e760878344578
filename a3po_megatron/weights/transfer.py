"""Carries a route out (weights/route.py): from the learner's shards to the tensors that each engine rank needs.

Every bucket gets fresh memory: a tensor that was handed on is never overwritten, however long the engine holds it back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..model.cut import HfTensor, Piece
from .route import Bucket, Plan, expert_exchange, slices

Parameters = Mapping[tuple[int, str], Tensor]  # (model chunk, Megatron name) → shard
Allocate = Callable[[str, tuple[int, ...], torch.dtype, torch.device], Tensor]


def kept_in(tensor: HfTensor | Bucket, dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of a tensor where the model's is `dtype`."""
    return getattr(torch, tensor.dtype) if tensor.dtype else dtype


@dataclass(frozen=True)
class Groups:
    """The process groups of the hops, and this rank's place in its replica."""

    stage: int
    within: int
    stages: dist.ProcessGroup | None = None
    tensor: dist.ProcessGroup | None = None
    experts: dist.ProcessGroup | None = None


@dataclass
class Timings:
    """Seconds of a publish by what was done, over all buckets."""

    gather: float = 0.0  # packing shards and laying tensors out
    send: float = 0.0  # collectives
    load: float = 0.0  # the engine takes the tensors up
    resume: float = 0.0  # what was computed with the old weights is dropped
    receipt: float = 0.0  # checks and checksums


def fresh(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


@torch.no_grad()
def gather(
    plan: Plan,
    parameters: Parameters,
    groups: Groups,
    dtype: torch.dtype,
    allocate: Allocate = fresh,
    timings: Timings | None = None,
) -> Iterator[list[tuple[str, Tensor]]]:
    """Yields the HF tensors that this rank needs, in `dtype` or what they are kept in, bucket by bucket.

    A collective: all ranks of a replica must iterate to the end.
    """
    executor = _Executor(plan, parameters, groups, dtype, allocate, timings or Timings())
    for bucket in plan.buckets:
        yield executor.run(bucket)


class _Executor:
    def __init__(
        self,
        plan: Plan,
        parameters: Parameters,
        groups: Groups,
        dtype: torch.dtype,
        allocate: Allocate,
        timings: Timings,
    ) -> None:
        self.plan, self.parameters, self.groups = plan, parameters, groups
        self.model_dtype = self.dtype = dtype  # the latter is the bucket's
        self.allocate, self.timings = allocate, timings
        self.device = next(iter(parameters.values())).device
        self.me = plan.rank(groups.stage, groups.within)

    def run(self, bucket: Bucket) -> list[tuple[str, Tensor]]:
        start, sent = time.perf_counter(), self.timings.send
        self.dtype = kept_in(bucket, self.model_dtype)
        tensors = {
            tensor.name: self.allocate(tensor.name, tensor.shape, self.dtype, self.device)
            for tensor in bucket.tensors
            if self.plan.needs(self.me, tensor)
        }
        column = self._from_stage(bucket)
        self._lay_out(tensors, column)
        self._tensor_hop(bucket, column, tensors)
        self._expert_hop(bucket, column, tensors)
        # What collectives took under way counts as sending alone.
        self.timings.gather += time.perf_counter() - start - (self.timings.send - sent)
        return list(tensors.items())

    def _from_stage(self, bucket: Bucket) -> list[tuple[Piece, Tensor]]:
        """Returns this column's pieces with their values: of this rank's own parameters, or from the stage that has
        them."""
        column = [
            (piece, self.parameters[piece.key].narrow(piece.dim, piece.offset, piece.length))
            for piece in bucket.held[self.me]
        ]
        crossing = bucket.crossing[self.groups.within]
        if not crossing:
            return column
        sender = self.groups.stage == bucket.stage
        if sender:
            # `crossing` is in the order of what is held (route.py): so both sides lay the buffer out alike.
            travels = set(crossing)
            buffer = self._pack([values for piece, values in column if piece in travels])
        else:
            buffer = self._empty(sum(piece.numel for piece in crossing))
        group = self.groups.stages
        assert group is not None
        self._timed(lambda: dist.broadcast(buffer, dist.get_global_rank(group, bucket.stage), group=group))
        if not sender:
            # The broadcast goes to every stage: a tied embedding comes to the last one too, which has its slice.
            own = {piece.tensor for piece, _ in column}
            column += [(piece, values) for piece, values in self._unpack(buffer, crossing) if piece.tensor not in own]
        return column

    def _tensor_hop(self, bucket: Bucket, column: list[tuple[Piece, Tensor]], tensors: dict[str, Tensor]) -> None:
        members = self.plan.tensor_group(self.groups.within)
        cuts = [slices(self.plan, bucket, member) for member in members]
        if len(members) > 1 and any(cuts):
            values = self._chosen(column, cuts[members.index(self.groups.within)])
            self._all_gather(values, members, cuts, self.groups.tensor, tensors)

    def _expert_hop(self, bucket: Bucket, column: list[tuple[Piece, Tensor]], tensors: dict[str, Tensor]) -> None:
        members = self.plan.expert_group(self.groups.within)
        exchange = expert_exchange(self.plan, bucket, self.groups.stage, self.groups.within)
        if exchange is None:
            return
        if exchange.alike is not None:  # a share is packed once and not once a receiver
            mine = exchange.alike[members.index(self.groups.within)]
            self._all_gather(self._chosen(column, mine), members, exchange.alike, self.groups.experts, tensors)
            return
        sent, got = exchange.sent, exchange.got
        buffer = self._pack([v for pieces in sent for v in self._chosen(column, pieces)])
        sizes = [[sum(piece.numel for piece in pieces) for pieces in part] for part in (got, sent)]
        incoming = self._empty(sum(sizes[0]))
        group = self.groups.experts
        self._timed(lambda: dist.all_to_all_single(incoming, buffer, sizes[0], sizes[1], group=group))
        self._lay_out(tensors, self._unpack(incoming, [piece for pieces in got for piece in pieces]))

    def _all_gather(
        self,
        values: list[Tensor],
        members: list[int],
        given: list[list[Piece]],
        group: dist.ProcessGroup | None,
        tensors: dict[str, Tensor],
    ) -> None:
        sizes = [sum(piece.numel for piece in pieces) for pieces in given]
        # Shares differ by the rows that pad the vocabulary: the buffers do not, as NCCL and gloo want it.
        buffer = self._pack(values, max(sizes))
        buffers = [self._empty(max(sizes)) for _ in members]
        self._timed(lambda: dist.all_gather(buffers, buffer, group=group))
        for member, pieces, received in zip(members, given, buffers, strict=True):
            if member != self.groups.within:
                self._lay_out(tensors, self._unpack(received, pieces))

    def _chosen(self, column: list[tuple[Piece, Tensor]], pieces: list[Piece]) -> list[Tensor]:
        """Returns the column's values of some pieces.

        By slice and not by piece: the same slice of a tied embedding is another parameter on its other stage.
        """
        values = {(piece.tensor, piece.start, piece.dim): value for piece, value in column}
        return [values[piece.tensor, piece.start, piece.dim] for piece in pieces]

    def _lay_out(self, tensors: dict[str, Tensor], items: list[tuple[Piece, Tensor]]) -> None:
        for piece, values in items:
            if piece.tensor in tensors:  # else it only passes through, to a rank of the group that needs it
                tensors[piece.tensor].narrow(piece.dim, piece.start, piece.length).copy_(values)

    def _pack(self, values: list[Tensor], size: int | None = None) -> Tensor:
        """Lays values end to end in one contiguous buffer: gloo ignores strides."""
        buffer = self._empty(size if size is not None else sum(value.numel() for value in values))
        offset = 0
        for value in values:
            buffer[offset : offset + value.numel()].view(value.shape).copy_(value)
            offset += value.numel()
        return buffer

    def _unpack(self, buffer: Tensor, pieces: Sequence[Piece]) -> list[tuple[Piece, Tensor]]:
        parts, offset = [], 0
        for piece in pieces:
            shape = list(piece.shape)
            shape[piece.dim] = piece.length
            parts.append((piece, buffer[offset : offset + piece.numel].view(shape)))
            offset += piece.numel
        return parts

    def _empty(self, size: int) -> Tensor:
        return torch.empty(size, dtype=self.dtype, device=self.device)

    def _timed(self, collective: Callable[[], object]) -> None:
        start = time.perf_counter()
        collective()
        self.timings.send += time.perf_counter() - start
