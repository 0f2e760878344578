"""From the learner's shards to the tensors that each engine rank needs: a plan of bounded buckets, and its executor.

    plan      pure, the same on every rank of a replica: which HF tensors travel together, who holds which pieces of
              them, and what has to cross from whom to whom
    gather    carries it out; yields HF tensors in the order of the layers

A replica is a grid of pipeline stages × ranks within a stage (model/layout.py). A bucket holds tensors of one stage s,
and travels in at most three hops, each one packed collective over a group that Megatron has anyway:

    stages     rank (s, j) → (p, j) for every other stage p      broadcast over the pipeline group
    tensor     the slices of dense tensors                       all-gather over the tensor-parallel group
    experts    experts and their slices                          all-gather over the expert group, or all-to-all where
                                                                 ranks give or need different amounts

What a rank holds already is not sent to it: whole tensors (norms, routers) take no second hop, data-parallel copies of
dense weights never move, and a tied embedding stays on both ends of a pipeline of two (of more, the last stage gets its
slice again with the broadcast to those between). Only experts that some engine rank of the group needs travel. Within
a layer experts are taken round robin from the ranks that hold them, so that all have about the same to give in every
bucket. Every bucket gets fresh memory: a tensor that was handed on is never overwritten, however long the engine holds
it back.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..model.layout import EMBEDDING, HEAD, Layout, Piece

Parameters = Mapping[tuple[int, str], Tensor]  # (model chunk, Megatron name) → shard
Allocate = Callable[[str, tuple[int, ...], torch.dtype, torch.device], Tensor]
_EXPERT = re.compile(r"\.mlp\.experts\.(\d+)\.")


@functools.cache
def expert_of(name: str) -> int | None:
    """The number of the expert that an HF tensor belongs to."""
    found = _EXPERT.search(name)
    return int(found[1]) if found else None


@dataclass(frozen=True)
class Bucket:
    tensors: tuple[tuple[str, tuple[int, ...]], ...]  # HF name, shape; in the order of the layers
    stage: int  # whose ranks they come from
    held: tuple[tuple[Piece, ...], ...]  # per rank of the replica: its pieces of these tensors
    crossing: tuple[tuple[Piece, ...], ...]  # per rank within a stage: what it sends to the other stages


@dataclass(frozen=True)
class Plan:
    layout: Layout
    experts: tuple[tuple[int, int], ...]  # per rank of the replica: first and last + 1 of the experts it needs
    buckets: tuple[Bucket, ...]

    def digest(self) -> str:
        """A hash that is equal exactly where the plans are: ranks compare it before the first byte moves."""
        return hashlib.blake2b(repr(self).encode(), digest_size=16).hexdigest()

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """What one rank of the replica gets."""
        return {name: shape for b in self.buckets for name, shape in b.tensors if self.needs(rank, name)}

    def needs(self, rank: int, name: str) -> bool:
        expert = expert_of(name)
        return expert is None or self.experts[rank][0] <= expert < self.experts[rank][1]

    def tensor_group(self, within: int) -> list[int]:
        """The ranks of a stage that share dense tensors with one of them."""
        first = within // self.layout.tensor * self.layout.tensor
        return list(range(first, first + self.layout.tensor))

    def expert_group(self, within: int) -> list[int]:
        """The ranks of a stage that hold one copy of its experts together with one of them."""
        size = self.layout.etp * self.layout.expert
        return list(range(within // size * size, within // size * size + size))

    def rank(self, stage: int, within: int) -> int:
        return stage * self.layout.stage_ranks + within

    def received(self, rank: int, itemsize: int) -> int:
        """Bytes that a rank receives from others, by the plan."""
        stage, within = divmod(rank, self.layout.stage_ranks)
        total = 0
        for bucket in self.buckets:
            if stage != bucket.stage:
                total += sum(piece.numel for piece in bucket.crossing[within])
            for other in self.tensor_group(within):
                total += sum(p.numel for p in _slices(self, bucket, other)) if other != within else 0
            for other in self.expert_group(within):
                total += sum(p.numel for p in _experts(self, bucket, other, rank)) if other != within else 0
        return total * itemsize


def plan(
    layout: Layout,
    by_rank: Sequence[Sequence[Piece]],  # of a replica's ranks, stage after stage
    order: Sequence[str],  # HF names as they are to arrive
    bucket_bytes: int,
    itemsize: int,
    experts: Sequence[tuple[int, int]],  # per rank: first and last + 1 of the experts that its engine rank needs
) -> Plan:
    """Buckets of at most `bucket_bytes` (or one tensor, where that is larger), each of one stage.

    Raises ValueError for a tensor that nobody owns.
    """
    holders: dict[str, list[tuple[int, Piece]]] = {}
    for rank, mine in enumerate(by_rank):
        for piece in mine:
            holders.setdefault(piece.tensor, []).append((rank, piece))
    owners = {name: [rank for rank, piece in found if piece.owner] for name, found in holders.items()}
    if missing := [name for name in order if not owners.get(name)]:
        raise ValueError(f"no rank owns {missing[0]} ({len(missing)} tensors without an owner)")
    shell = Plan(layout, tuple(experts), ())
    buckets: list[Bucket] = []
    names: list[str] = []
    size, stage = 0, 0

    def close() -> None:
        if names:
            held: list[list[Piece]] = [[] for _ in by_rank]
            for name in names:
                for rank, piece in holders[name]:
                    held[rank].append(piece)
            tensors = tuple((name, holders[name][0][1].shape) for name in names)
            bucket = Bucket(tensors, stage, tuple(map(tuple, held)), ())
            crossing = tuple(_crossing(shell, bucket, within) for within in range(layout.stage_ranks))
            buckets.append(Bucket(tensors, stage, bucket.held, crossing))
            names.clear()

    for name in _dealt(order, layout.expert):
        bytes_here = torch.Size(holders[name][0][1].shape).numel() * itemsize
        where = owners[name][0] // layout.stage_ranks
        if names and (size + bytes_here > bucket_bytes or where != stage):
            close()
            size = 0
        stage = where
        names.append(name)
        size += bytes_here
    close()
    return Plan(layout, tuple(experts), tuple(buckets))


def _dealt(order: Sequence[str], expert_ranks: int) -> list[str]:
    """The same order of layers, the experts of each in turn from every rank: a turn's gates, then its ups, …"""
    found: list[str] = []
    for layer, group in itertools.groupby(order, _expert_layer):
        names = list(group)
        if layer is not None:
            parts = {name: _EXPERT.split(name) for name in names}  # prefix, number, kind
            kinds = list(dict.fromkeys(kind for _, _, kind in parts.values()))
            share = len({number for _, number, _ in parts.values()}) // expert_ranks
            places = {name: (int(number), kinds.index(kind)) for name, (_, number, kind) in parts.items()}
            names.sort(key=lambda name: (places[name][0] % share, places[name][1], places[name][0]))
        found += names
    return found


def _expert_layer(name: str) -> str | None:
    return _EXPERT.split(name)[0] if expert_of(name) is not None else None


def _crossing(plan: Plan, bucket: Bucket, within: int) -> tuple[Piece, ...]:
    """What (stage, within) sends down its column: what some other stage lacks and needs."""
    others = [p for p in range(plan.layout.pipeline) if p != bucket.stage]
    there = {p: {piece.tensor for piece in bucket.held[plan.rank(p, within)]} for p in others}

    def lacked(piece: Piece) -> bool:
        for stage in others:
            if piece.tensor in there[stage]:
                continue
            group = plan.expert_group(within) if expert_of(piece.tensor) is not None else [within]
            if any(plan.needs(plan.rank(stage, member), piece.tensor) for member in group):
                return True
        return False

    return tuple(piece for piece in bucket.held[plan.rank(bucket.stage, within)] if lacked(piece))


def _slices(plan: Plan, bucket: Bucket, within: int) -> list[Piece]:
    """What a column gives to its tensor-parallel group: its slices of dense tensors; all have whole ones already."""
    held = bucket.held[plan.rank(bucket.stage, within)]
    return [
        p for p in held if expert_of(p.tensor) is None and (p.length < p.shape[p.dim] or p.tensor in (EMBEDDING, HEAD))
    ]


def _experts(plan: Plan, bucket: Bucket, within: int, receiver: int) -> list[Piece]:
    """What a column gives to one rank of its expert group."""
    held = bucket.held[plan.rank(bucket.stage, within)]
    return [p for p in held if expert_of(p.tensor) is not None and plan.needs(receiver, p.tensor)]


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
) -> Iterator[tuple[str, Tensor]]:
    """The HF tensors that this rank needs, in `dtype`. A collective: all ranks of a replica must iterate to the end."""
    executor = _Executor(plan, parameters, groups, dtype, allocate, timings or Timings())
    for bucket in plan.buckets:
        yield from executor.run(bucket)


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
        self.dtype, self.allocate, self.timings = dtype, allocate, timings
        self.device = next(iter(parameters.values())).device
        self.me = plan.rank(groups.stage, groups.within)

    def run(self, bucket: Bucket) -> list[tuple[str, Tensor]]:
        start, sent = time.perf_counter(), self.timings.send
        tensors = {
            name: self.allocate(name, shape, self.dtype, self.device)
            for name, shape in bucket.tensors
            if self.plan.needs(self.me, name)
        }
        column = self._from_stage(bucket)
        self._lay_out(tensors, column)
        self._tensor_hop(bucket, column, tensors)
        self._expert_hop(bucket, column, tensors)
        self.timings.gather += time.perf_counter() - start - (self.timings.send - sent)
        return list(tensors.items())

    def _from_stage(self, bucket: Bucket) -> list[tuple[Piece, Tensor]]:
        """This column's pieces with their values: from this rank's own parameters, or from the stage that has them."""
        column = [
            (piece, self.parameters[piece.key].narrow(piece.dim, piece.offset, piece.length))
            for piece in bucket.held[self.me]
        ]
        crossing = bucket.crossing[self.groups.within]
        if not crossing:
            return column
        sender = self.groups.stage == bucket.stage
        if sender:
            travels = set(crossing)
            buffer = self._pack([values for piece, values in column if piece in travels])
        else:
            buffer = self._empty(sum(piece.numel for piece in crossing))
        group = self.groups.stages
        assert group is not None
        self._timed(lambda: dist.broadcast(buffer, dist.get_global_rank(group, bucket.stage), group=group))
        if not sender:
            own = {piece.tensor for piece, _ in column}
            column += [(piece, values) for piece, values in self._unpack(buffer, crossing) if piece.tensor not in own]
        return column

    def _tensor_hop(self, bucket: Bucket, column: list[tuple[Piece, Tensor]], tensors: dict[str, Tensor]) -> None:
        members = self.plan.tensor_group(self.groups.within)
        given = [_slices(self.plan, bucket, member) for member in members]
        if len(members) > 1 and any(given):
            values = self._chosen(column, given[members.index(self.groups.within)])
            self._all_gather(values, members, given, self.groups.tensor, tensors)

    def _expert_hop(self, bucket: Bucket, column: list[tuple[Piece, Tensor]], tensors: dict[str, Tensor]) -> None:
        members = self.plan.expert_group(self.groups.within)
        me = members.index(self.groups.within)
        # given[sender][receiver]: pieces
        receivers = [self.plan.rank(self.groups.stage, member) for member in members]
        given = [[_experts(self.plan, bucket, member, to) for to in receivers] for member in members]
        if not any(given[a][b] for a in range(len(members)) for b in range(len(members)) if a != b):
            return
        first = [by_receiver[0] for by_receiver in given]
        alike = all(pieces == mine for by_receiver, mine in zip(given, first, strict=True) for pieces in by_receiver)
        if alike and len({sum(piece.numel for piece in pieces) for pieces in first}) == 1:
            self._all_gather(self._chosen(column, first[me]), members, first, self.groups.experts, tensors)
            return
        sent = [[] if to == me else given[me][to] for to in range(len(members))]
        got = [[] if sender == me else given[sender][me] for sender in range(len(members))]
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
        """The column's values of the pieces that its source stage calls by these names."""
        values = {(piece.tensor, piece.start, piece.dim): value for piece, value in column}
        return [values[piece.tensor, piece.start, piece.dim] for piece in pieces]

    def _lay_out(self, tensors: dict[str, Tensor], items: list[tuple[Piece, Tensor]]) -> None:
        for piece, values in items:
            if piece.tensor in tensors:
                tensors[piece.tensor].narrow(piece.dim, piece.start, piece.length).copy_(values)

    def _pack(self, values: list[Tensor], size: int | None = None) -> Tensor:
        """Laid end to end in one contiguous buffer: gloo ignores strides."""
        buffer = self._empty(size if size is not None else sum(value.numel() for value in values))
        offset = 0
        for value in values:
            buffer[offset : offset + value.numel()].view(value.shape).copy_(value)
            offset += value.numel()
        return buffer

    def _unpack(self, buffer: Tensor, pieces: Sequence[Piece]) -> list[tuple[Piece, Tensor]]:
        found, offset = [], 0
        for piece in pieces:
            shape = list(piece.shape)
            shape[piece.dim] = piece.length
            found.append((piece, buffer[offset : offset + piece.numel].view(shape)))
            offset += piece.numel
        return found

    def _empty(self, size: int) -> Tensor:
        return torch.empty(size, dtype=self.dtype, device=self.device)

    def _timed(self, collective: Callable[[], object]) -> None:
        start = time.perf_counter()
        collective()
        self.timings.send += time.perf_counter() - start
