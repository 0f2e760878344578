"""A fake of the torch.distributed collectives that weights/transfer.py uses, between the threads of one process.

Real ranks are processes, and a test machine has room for about four of them, while the replicas of interest have up to
32 ranks. Here every rank is a thread, a group is a barrier, and a collective copies from the other threads' buffers
after it has compared what everybody came with. What differs with a backend (streams, devices, connections) it cannot
show: tests/distributed uses gloo for that.

It counts what every rank receives. Ranks run with deterministic algorithms, under which memory that nobody wrote holds
NaN: so elements that are received and mean nothing, as the padding of an all-gather, are told from those that do.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from a3po_megatron.model.layout import Layout
from a3po_megatron.weights.transfer import Groups

Result = TypeVar("Result")


@dataclass(frozen=True)
class Call:
    group: str
    kind: str
    sizes: tuple[Any, ...]  # of everything that the group's ranks exchange


@dataclass(frozen=True)
class _Offer:
    kind: str
    sizes: tuple[Any, ...]
    buffer: Tensor


class FakeGroup:
    def __init__(self, name: str, ranks: Sequence[int]) -> None:
        self.name, self.ranks = name, list(ranks)  # global ranks, in the order of the group
        self.barrier = threading.Barrier(len(ranks))
        self.offers: list[_Offer | None] = [None] * len(ranks)


class FakeDist:
    """Stands in for the module torch.distributed, of all ranks that `run` starts."""

    def __init__(self, timeout: float = 60.0) -> None:
        self.timeout = timeout
        self.calls: dict[int, list[Call]] = defaultdict(list)
        self.received: dict[int, int] = defaultdict(int)  # elements from other ranks, by receiver
        self.padding: dict[int, int] = defaultdict(int)  # of those that came, the ones that mean nothing: not counted
        self._groups: list[FakeGroup] = []
        self._thread = threading.local()

    def new_group(self, name: str, ranks: Sequence[int]) -> FakeGroup:
        self._groups.append(FakeGroup(name, ranks))
        return self._groups[-1]

    def run(self, ranks: Iterable[int], work: Callable[[int], Result]) -> list[Result]:
        """work(rank) on all ranks at once. Raises the first error that is not just another rank's absence."""
        results: dict[int, Result] = {}
        errors: list[BaseException] = []

        def body(rank: int) -> None:
            self._thread.rank = rank
            try:
                results[rank] = work(rank)
            except BaseException as error:  # to be raised where it is seen
                errors.append(error)
                for group in self._groups:
                    group.barrier.abort()

        threads = {rank: threading.Thread(target=body, args=(rank,), daemon=True) for rank in ranks}
        torch.use_deterministic_algorithms(True)  # fills memory that nobody wrote
        try:
            for thread in threads.values():
                thread.start()
            for thread in threads.values():
                thread.join()
        finally:
            torch.use_deterministic_algorithms(False)
        for error in sorted(errors, key=lambda error: isinstance(error, TimeoutError)):
            raise error
        return [results[rank] for rank in threads]

    # --- the names of torch.distributed ------------------------------------------------------------------------

    def get_global_rank(self, group: FakeGroup, rank: int) -> int:
        return group.ranks[rank]

    def broadcast(self, buffer: Tensor, source: int, group: FakeGroup | None = None) -> None:
        assert group is not None and source in group.ranks, f"rank {source} is not in the group"
        offers = self._meet(group, _Offer("broadcast", (source, buffer.numel()), buffer))
        self._same_sizes(group, offers)
        if self._thread.rank != source:
            buffer.copy_(offers[group.ranks.index(source)].buffer)
            self._count(buffer)
        self._part(group, offers[0])

    def all_gather(self, buffers: list[Tensor], buffer: Tensor, group: FakeGroup | None = None) -> None:
        assert group is not None
        sizes = tuple(part.numel() for part in buffers)
        assert sizes == (buffer.numel(),) * len(group.ranks), f"all_gather of {buffer.numel()} elements into {sizes}"
        self._check(*buffers)
        offers = self._meet(group, _Offer("all_gather", sizes, buffer))
        self._same_sizes(group, offers)
        for rank, part, offer in zip(group.ranks, buffers, offers, strict=True):
            part.copy_(offer.buffer)
            if rank != self._thread.rank:
                self._count(part)
        self._part(group, offers[0])

    def all_to_all_single(
        self, output: Tensor, buffer: Tensor, got: list[int], sent: list[int], group: FakeGroup | None = None
    ) -> None:
        assert group is not None
        assert len(got) == len(sent) == len(group.ranks)
        assert (output.numel(), buffer.numel()) == (sum(got), sum(sent)), "buffers and splits differ in size"
        self._check(output)
        me = group.ranks.index(self._thread.rank)
        offers = self._meet(group, _Offer("all_to_all_single", tuple(sent), buffer))
        parts = [torch.split(offer.buffer, list(offer.sizes))[me] for offer in offers]
        assert [part.numel() for part in parts] == got, f"{group.name}: others send {parts}, wanted {got}"
        for number, (target, part) in enumerate(zip(torch.split(output, got), parts, strict=True)):
            target.copy_(part)
            if number != me:
                self._count(target)
        self._part(group, _Offer("all_to_all_single", tuple(offer.sizes for offer in offers), buffer))

    # --- how ranks meet ----------------------------------------------------------------------------------------

    def _meet(self, group: FakeGroup, offer: _Offer) -> list[_Offer]:
        """What all ranks of the group came with, once all have come."""
        self._check(offer.buffer)
        me = group.ranks.index(self._thread.rank)
        group.offers[me] = offer
        self._wait(group, offer.kind)
        offers = [other for other in group.offers if other is not None]
        for rank, other in zip(group.ranks, offers, strict=True):
            if (other.kind, other.buffer.dtype) != (offer.kind, offer.buffer.dtype):
                raise AssertionError(
                    f"{group.name}: rank {self._thread.rank} calls {offer.kind} in {offer.buffer.dtype}, "
                    f"rank {rank} calls {other.kind} in {other.buffer.dtype}"
                )
        return offers

    def _part(self, group: FakeGroup, agreed: _Offer) -> None:
        """Nobody goes on before all have read."""
        self._wait(group, agreed.kind)
        self.calls[self._thread.rank].append(Call(group.name, agreed.kind, agreed.sizes))

    def _wait(self, group: FakeGroup, kind: str) -> None:
        try:
            group.barrier.wait(self.timeout)
        except threading.BrokenBarrierError:
            message = f"{group.name}: rank {self._thread.rank} calls {kind}, not all others came"
            raise TimeoutError(message) from None

    @staticmethod
    def _check(*buffers: Tensor) -> None:
        assert all(part.dim() == 1 and part.is_contiguous() for part in buffers), "a buffer is not contiguous"

    @staticmethod
    def _same_sizes(group: FakeGroup, offers: list[_Offer]) -> None:
        sizes = [offer.sizes for offer in offers]
        assert len(set(sizes)) == 1, f"{group.name}: {offers[0].kind} with sizes (by rank) {sizes}"

    def _count(self, part: Tensor) -> None:
        padding = int(part.isnan().sum())
        self.padding[self._thread.rank] += padding
        self.received[self._thread.rank] += part.numel() - padding


def replica_groups(fake: FakeDist, layout: Layout, global_rank: Callable[[int], int]) -> list[Groups]:
    """Every rank's groups, by what Megatron's groups are; a group of one rank is None: nobody may use it."""
    places = layout.places()
    keys: dict[str, list[Any]] = {
        "stages": [rank % layout.stage_ranks for rank in range(len(places))],
        "tensor": [(place.pipeline, place.data) for place in places],
        "experts": [(place.pipeline, place.copy) for place in places],
    }
    made: dict[tuple[str, Any], Any] = {}
    for name, of_rank in keys.items():
        for key in dict.fromkeys(of_rank):
            members = [global_rank(rank) for rank, other in enumerate(of_rank) if other == key]
            made[name, key] = fake.new_group(f"{name} {key}", members) if len(members) > 1 else None
    return [
        Groups(place.pipeline, rank % layout.stage_ranks, **{name: made[name, keys[name][rank]] for name in keys})
        for rank, place in enumerate(places)
    ]
