"""The learner's tensors out of device memory and back, while the engine has it.

    gradients     are dropped, and are zeros again when they come back
    optimizer     float32 masters and moments: one block of device memory, and its twin in pinned host memory
    parameters    the buffers that Megatron keeps them in anyway, and their twins

A tensor that is away is not gone: its data is a view into the twin, so that a checkpoint can be taken, and a weight
read, at any time. Whoever else looks into the block finds it again: its storage stays the same object, emptied.

    away     host ← device in one copy, tensors → host views, device storage emptied
    back     device storage filled in one copy on a stream of its own, tensors → device views, `ready` before their use

One block a kind, and one copy: many small ones reach a fraction of the link's bandwidth, and leave a device's memory in
pieces that the engine's cache does not fit into. The first journey puts the optimizer's tensors into one block; where
some of them live in the parameters' buffers already (float32 parameters are their own masters) they stay there.

Megatron's own `offload_to_cpu` moves tensor by tensor through pageable memory and replaces those shared masters by
copies, which the model never sees again (megatron-core 0.16.1, optimizer/distrib_optimizer.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 256  # bytes: what CUDA's allocator gives, and whole cache lines


def plan(sizes: Sequence[int], alignment: int = ALIGNMENT) -> tuple[list[int], int]:
    """Where tensors of these sizes (bytes) begin in one block, in their order, and how long it is."""
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // alignment) * alignment
    return offsets, end


class Block:
    """One block of device memory with its twin on the host, and the tensors that live in it."""

    def __init__(self, storage: torch.UntypedStorage, members: Sequence[Tensor], spans: Sequence[int]) -> None:
        """`spans[i]`: the byte at which members[i], contiguous, begins; all members are here."""
        self._storage, self.bytes, self.members = storage, storage.nbytes(), list(members)
        self._device = storage.device
        self._here = [_at(storage, begin, member) for begin, member in zip(spans, members, strict=True)]
        self._twin = torch.empty(self.bytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        twin = self._twin.untyped_storage()
        self._there = [_at(twin, begin, member) for begin, member in zip(spans, members, strict=True)]
        self._stream = torch.cuda.Stream() if self._device.type == "cuda" else None
        self._copied: Any = None  # the event after which a returning block is filled
        self.is_here = True

    @classmethod
    def gather(cls, members: Sequence[Tensor], device: torch.device) -> Block:
        """Tensors that have storages of their own, moved into one block, which begins away."""
        spans, size = plan([member.numel() * member.element_size() for member in members])
        # By way of the host: two copies of an optimizer need not fit on the device.
        block = cls(torch.empty(size, dtype=torch.uint8, device=device).untyped_storage(), members, spans)
        block._storage.resize_(0)
        for member, there in zip(members, block._there, strict=True):
            there.copy_(member.data)
            member.data = there
        block.is_here = False
        return block

    @torch.no_grad()
    def away(self) -> None:
        if not self.is_here:
            return
        self.ready()
        self._twin.copy_(_bytes(self._storage), non_blocking=True)
        if self._stream is not None:
            torch.cuda.current_stream().synchronize()  # before the memory is given away, and before anyone reads
        for member, there in zip(self.members, self._there, strict=True):
            member.data = there
        self._storage.resize_(0)
        self.is_here = False

    @torch.no_grad()
    def back(self) -> None:
        if self.is_here:
            return
        self._storage.resize_(self.bytes)
        if self._stream is None:
            _bytes(self._storage).copy_(self._twin)
        else:
            self._stream.wait_stream(torch.cuda.current_stream())  # whoever had this memory before
            with torch.cuda.stream(self._stream):
                _bytes(self._storage).copy_(self._twin, non_blocking=True)
                self._copied = self._stream.record_event()
        for member, here in zip(self.members, self._here, strict=True):
            member.data = here
        self.is_here = True

    def ready(self) -> None:
        """What comes after this call on the current stream sees a block that is filled."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
            self._copied = None


class Arena:
    """What of one learner can leave the device. Gradients are there, or not, with the rest of what training needs."""

    def __init__(self, chunks: Sequence[Any], optimizer: Any, device: torch.device) -> None:
        """`chunks`: Megatron's DistributedDataParallel modules; `optimizer`: its optimizer of them."""
        self._optimizer, self._device = optimizer, device
        self._buffers = [b for chunk in chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        self._parameters = [p for chunk in chunks for p in chunk.module.parameters()]
        self._gradients = [
            (b.grad_data.untyped_storage(), b.grad_data.untyped_storage().nbytes()) for b in self._buffers
        ]
        self._states: Block | None = None
        self._weights: list[Block] = []

    def gradients_away(self) -> None:
        for storage, _ in self._gradients:
            storage.resize_(0)

    def gradients_back(self) -> None:
        for (storage, size), buffer in zip(self._gradients, self._buffers, strict=True):
            if storage.nbytes() == 0:
                storage.resize_(size)
                buffer.grad_data.zero_()

    def optimizer_away(self) -> None:
        members = self._own_states()
        # A checkpoint that was loaded, and the first step of some optimizers, bring new tensors.
        if members and (self._states is None or not _same(self._states.members, members)):
            self._states = Block.gather(members, self._device)
        if self._states is not None:
            self._states.away()

    def optimizer_back(self) -> None:
        if self._states is not None:
            self._states.back()

    def parameters_away(self) -> None:
        if not self._weights:
            self._weights = self._weight_blocks()
        for block in self._weights:
            block.away()

    def parameters_back(self) -> None:
        for block in self._weights:
            block.back()
        for block in self._weights:
            block.ready()  # the next thing that happens is a forward

    def ready(self) -> None:
        """Before the optimizer's step: its states may still be on their way."""
        if self._states is not None:
            self._states.ready()

    def give_back(self) -> None:
        """Hands what torch's allocator keeps in reserve back to the device, for the engine to take."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _weight_blocks(self) -> list[Block]:
        everything = {id(t): t for t in (*self._parameters, *self._optimizer_tensors())}
        blocks: list[Block] = []
        inside: set[int] = set()
        for storage in self._parameter_storages():
            members = [t for t in everything.values() if _is_in(t, storage)]
            inside.update(map(id, members))
            blocks.append(Block(storage, members, [t.data.storage_offset() * t.element_size() for t in members]))
        # Without the distributed optimizer parameters have storages of their own.
        if loose := [p for p in self._parameters if id(p) not in inside]:
            blocks.append(Block.gather(loose, self._device))
            blocks[-1].back()
        return blocks

    def _own_states(self) -> list[Tensor]:
        """Masters and moments that live in no buffer of the parameters."""
        blocks = [*self._weights, *([self._states] if self._states is not None else [])]
        known = {id(member): block is self._states for block in blocks for member in block.members}
        storages, parameters = self._parameter_storages(), {id(p) for p in self._parameters}
        return [
            tensor
            for tensor in self._optimizer_tensors()
            if known.get(id(tensor), not any(_is_in(tensor, storage) for storage in storages))
            and id(tensor) not in parameters
        ]

    def _optimizer_tensors(self) -> list[Tensor]:
        """What the optimizer works on, each once; step counters, of no dimension, stay where they are."""
        found: dict[int, Tensor] = {}
        for optimizer in _torch_optimizers(self._optimizer):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    for tensor in (parameter, *optimizer.state.get(parameter, {}).values()):
                        if isinstance(tensor, Tensor) and tensor.dim() > 0:
                            found[id(tensor)] = tensor
        return list(found.values())

    def _parameter_storages(self) -> list[torch.UntypedStorage]:
        return _storages(b.param_data for b in self._buffers if b.param_data is not None)


def _is_in(tensor: Tensor, storage: torch.UntypedStorage) -> bool:
    return bool(tensor.data.untyped_storage()._cdata == storage._cdata)


def _torch_optimizers(optimizer: Any) -> list[Any]:
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [each.optimizer for each in chained if getattr(each, "optimizer", None) is not None]


def _same(before: Sequence[Tensor], now: Sequence[Tensor]) -> bool:
    return [id(tensor) for tensor in before] == [id(tensor) for tensor in now]


def _storages(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    """Their storages, each once."""
    found = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return list(found.values())


def _at(storage: torch.UntypedStorage, begin: int, like: Tensor) -> Tensor:
    """The tensor of `like`'s shape and dtype that begins at this byte of a storage."""
    view = torch.empty(0, dtype=like.dtype, device=storage.device)
    strides = [math.prod(like.shape[k + 1 :]) for k in range(like.dim())]
    return view.set_(storage, begin // like.element_size(), like.shape, strides)


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
