"""Which HF tensors travel together, who holds which pieces of them, and what has to cross from whom to whom. Pure.

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
bucket. The plan is the same on every rank of a replica; weights/transfer.py carries it out.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..model.cut import HfTensor, Piece
from ..model.layout import Layout

WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes of what a tensor may be kept in


@dataclass(frozen=True)
class Bucket:
    tensors: tuple[HfTensor, ...]  # in the order of the layers
    stage: int  # whose ranks they come from
    held: tuple[tuple[Piece, ...], ...]  # per rank of the replica: its pieces of these tensors
    crossing: tuple[tuple[Piece, ...], ...]  # per rank within a stage: what it sends to the other stages

    @property
    def dtype(self) -> str | None:
        """What all its tensors are kept in, whatever the model's dtype; None: as the model."""
        return self.tensors[0].dtype


@dataclass(frozen=True)
class Plan:
    layout: Layout
    experts: tuple[tuple[int, int], ...]  # per rank of the replica: first and last + 1 of the experts it needs
    buckets: tuple[Bucket, ...]

    def digest(self) -> str:
        """Returns a hash that is equal where the plans are: ranks compare it before the first byte moves."""
        # Of its repr, which holds every field: hash() of the same text is another number in every process.
        return hashlib.blake2b(repr(self).encode(), digest_size=16).hexdigest()

    def tensors(self, rank: int) -> list[HfTensor]:
        """Returns what one rank of the replica gets."""
        return [tensor for bucket in self.buckets for tensor in bucket.tensors if self.needs(rank, tensor)]

    def needs(self, rank: int, tensor: HfTensor) -> bool:
        first, end = self.experts[rank]
        return tensor.expert is None or first <= tensor.expert < end

    def tensor_group(self, within: int) -> list[int]:
        """Returns the ranks of a stage that share dense tensors with one of them."""
        first = within // self.layout.tensor * self.layout.tensor
        return list(range(first, first + self.layout.tensor))

    def expert_group(self, within: int) -> list[int]:
        """Returns the ranks of a stage that hold one copy of its experts together with one of them."""
        size = self.layout.etp * self.layout.expert
        return list(range(within // size * size, within // size * size + size))

    def rank(self, stage: int, within: int) -> int:
        return stage * self.layout.stage_ranks + within

    def received(self, rank: int) -> dict[str | None, int]:
        """Counts the elements that a rank receives from others, by the plan: of tensors that are kept in a dtype (None:
        in the model's)."""
        stage, within = divmod(rank, self.layout.stage_ranks)
        elements: dict[str | None, int] = {}
        for bucket in self.buckets:
            total = 0
            if stage != bucket.stage:
                total += sum(piece.numel for piece in bucket.crossing[within])
            for other in self.tensor_group(within):
                total += sum(p.numel for p in slices(self, bucket, other)) if other != within else 0
            for other in self.expert_group(within):
                total += sum(p.numel for p in expert_pieces(self, bucket, other, rank)) if other != within else 0
            elements[bucket.dtype] = elements.get(bucket.dtype, 0) + total
        return elements


def plan(
    layout: Layout,
    by_rank: Sequence[Sequence[Piece]],  # of a replica's ranks, stage after stage
    order: Sequence[str],  # HF names as they are to arrive
    bucket_bytes: int,
    itemsize: int,  # bytes of an element of the model's dtype
    experts: Sequence[tuple[int, int]],  # per rank: first and last + 1 of the experts that its engine rank needs
) -> Plan:
    """Plans buckets of at most `bucket_bytes` (or one tensor, where that is larger), each of one stage.

    Raises ValueError for a tensor that nobody owns.
    """
    holders: dict[str, list[tuple[int, Piece]]] = {}
    for rank, mine in enumerate(by_rank):
        for piece in mine:
            holders.setdefault(piece.tensor, []).append((rank, piece))
    tensors = {name: pieces_held[0][1].hf for name, pieces_held in holders.items()}
    owners = {name: [rank for rank, piece in pieces_held if piece.owner] for name, pieces_held in holders.items()}
    if missing := [name for name in order if not owners.get(name)]:
        raise ValueError(f"no rank owns {missing[0]} ({len(missing)} tensors without an owner)")
    # Who needs what, and who shares with whom, goes by no bucket: it is asked while they are made.
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
            bucket = Bucket(tuple(tensors[name] for name in names), stage, tuple(map(tuple, held)), ())
            crossing = tuple(_crossing(shell, bucket, within) for within in range(layout.stage_ranks))
            buckets.append(replace(bucket, crossing=crossing))
            names.clear()

    for tensor in _dealt([tensors[name] for name in order], layout.expert):
        bytes_here = tensor.numel * (WIDTHS[tensor.dtype] if tensor.dtype else itemsize)
        # All owners of a tensor stand on one stage: the copy of a tied embedding on the last one owns nothing.
        where = owners[tensor.name][0] // layout.stage_ranks
        # One collective packs a bucket into one buffer: of one dtype.
        alike = not names or (where == stage and tensor.dtype == tensors[names[0]].dtype)
        if not alike or (names and size + bytes_here > bucket_bytes):
            close()
            size = 0
        stage = where
        names.append(tensor.name)
        size += bytes_here
    close()
    return Plan(layout, tuple(experts), tuple(buckets))


def _dealt(order: Sequence[HfTensor], expert_ranks: int) -> list[HfTensor]:
    """Keeps the order of layers, and takes the experts of each in turn from every rank: a turn's gates, its ups, …"""
    in_order: list[HfTensor] = []
    for layer, group in itertools.groupby(order, lambda tensor: None if tensor.expert is None else tensor.layer):
        tensors = list(group)
        if layer is not None:
            # A rank holds `share` neighbouring experts: the number within its share is an expert's turn.
            share = len({tensor.expert for tensor in tensors}) // expert_ranks
            tensors.sort(key=lambda tensor: ((tensor.expert or 0) % share, tensor.kind, tensor.expert))
        in_order += tensors
    return in_order


def _crossing(plan: Plan, bucket: Bucket, within: int) -> tuple[Piece, ...]:
    """Returns what (stage, within) sends down its column: what some other stage lacks and needs."""
    others = [p for p in range(plan.layout.pipeline) if p != bucket.stage]
    there = {p: {piece.tensor for piece in bucket.held[plan.rank(p, within)]} for p in others}

    def lacked(piece: Piece) -> bool:
        for stage in others:
            if piece.tensor in there[stage]:
                continue
            # An expert comes for all of its group: the next hop takes it on from the column that got it.
            group = [within] if piece.hf.expert is None else plan.expert_group(within)
            if any(plan.needs(plan.rank(stage, member), piece.hf) for member in group):
                return True
        return False

    return tuple(piece for piece in bucket.held[plan.rank(bucket.stage, within)] if lacked(piece))


def slices(plan: Plan, bucket: Bucket, within: int) -> list[Piece]:
    """Returns what a column gives to its tensor-parallel group: slices of dense tensors; all have the whole ones."""
    held = bucket.held[plan.rank(bucket.stage, within)]
    return [piece for piece in held if piece.hf.expert is None and piece.hf.cut != "whole"]


@dataclass(frozen=True)
class Exchange:
    """What the ranks of an expert group give each other of one bucket, as one of them sees it."""

    sent: list[list[Piece]]  # to each member, none to itself
    got: list[list[Piece]]  # from each member
    alike: list[list[Piece]] | None  # what each gives, where every receiver gets the same and all give as much


def expert_exchange(plan: Plan, bucket: Bucket, stage: int, within: int) -> Exchange | None:
    """None where nothing has to move, the same on all members. Looks at each piece of the bucket once, not at all pairs
    of members."""
    members = plan.expert_group(within)
    held = [_experts_of(bucket.held[plan.rank(bucket.stage, member)]) for member in members]
    needed_by = _needed_by(tuple(plan.experts[plan.rank(stage, member)] for member in members))
    if not any(other != sender for sender, its in enumerate(held) for e, _ in its for other in needed_by[e][:2]):
        return None
    if all(len(needed_by[e]) in (0, len(members)) for its in held for e, _ in its):
        shares = [[piece for e, piece in its if needed_by[e]] for its in held]
        if len({sum(piece.numel for piece in share) for share in shares}) == 1:
            return Exchange([], [], shares)
    me = members.index(within)
    sent: list[list[Piece]] = [[] for _ in members]
    for e, piece in held[me]:
        for other in needed_by[e]:
            if other != me:
                sent[other].append(piece)
    got = [[piece for e, piece in its if other != me and me in needed_by[e]] for other, its in enumerate(held)]
    return Exchange(sent, got, None)


@functools.lru_cache(maxsize=8)
def _needed_by(needs: tuple[tuple[int, int], ...]) -> dict[int, tuple[int, ...]]:
    """Expert → which members need it, in order; `needs`: first and last + 1 of what each needs."""
    experts: dict[int, list[int]] = collections.defaultdict(list)
    for member, (first, end) in enumerate(needs):
        for expert in range(first, end):
            experts[expert].append(member)
    return collections.defaultdict(tuple, {expert: tuple(who) for expert, who in experts.items()})


def _experts_of(held: Sequence[Piece]) -> list[tuple[int, Piece]]:
    return [(piece.hf.expert, piece) for piece in held if piece.hf.expert is not None]


def expert_pieces(plan: Plan, bucket: Bucket, within: int, receiver: int) -> list[Piece]:
    """Returns what a column gives to one rank of its expert group."""
    held = bucket.held[plan.rank(bucket.stage, within)]
    return [piece for piece in held if piece.hf.expert is not None and plan.needs(receiver, piece.hf)]
