"""The learner's memory on a device, given away while the engine has it, and taken back.

    gradients     are dropped, and are zeros again when they come back
    optimizer     float32 masters and moments: one block of device memory, and its twin in pinned host memory
    parameters    the buffers that Megatron keeps them in anyway, and their twins

    away     twin ← block in one copy, then the block's storage is emptied
    back     the storage is filled again in one copy, on a stream of its own; `ready` before anyone uses it

One block a kind, and one copy: many small ones reach a fraction of the link's bandwidth, and leave a device's memory in
pieces that the engine's cache does not fit into. The storage stays the same object, so that whatever views it finds it
again. The first journey puts the optimizer's tensors into one block; where some of them live in the parameters' buffers
already (float32 parameters are their own masters) they stay there.

Masters and moments that are away have their data in the twin: a checkpoint is taken of them as if they were there. The
parameters have not: a parameter whose data changes its device gets another node in autograd's graph (torch,
autograd/variable.cpp: set_data), without the hook by which its gradient reaches Megatron's buffers.

Megatron's own `offload_to_cpu` moves tensor by tensor through pageable memory and replaces those shared masters by
copies, which the model never sees again (megatron-core 0.16.1, optimizer/distrib_optimizer.py).
"""

from __future__ import annotations

import math
import weakref
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
    """One block of device memory and its twin on the host."""

    def __init__(self, storage: torch.UntypedStorage, size: int | None = None) -> None:
        """`size`: its bytes when it is here, if it is not yet."""
        self.storage, self.bytes, self.is_here = storage, storage.nbytes() if size is None else size, True
        on_gpu = storage.device.type == "cuda"
        self.twin = _pinned(self, self.bytes) if on_gpu else torch.empty(self.bytes, dtype=torch.uint8)
        self._stream = torch.cuda.Stream() if on_gpu else None
        self._copied: Any = None  # the event after which a returning block is filled

    @torch.no_grad()
    def away(self) -> None:
        if not self.is_here:
            return
        self.ready()
        self.twin.copy_(_bytes(self.storage), non_blocking=True)
        if self._stream is not None:
            torch.cuda.current_stream().synchronize()  # before the memory is given away, and before anyone reads
        self.storage.resize_(0)
        self.is_here = False

    @torch.no_grad()
    def back(self) -> None:
        if self.is_here:
            return
        self.storage.resize_(self.bytes)
        if self._stream is None:
            _bytes(self.storage).copy_(self.twin)
        else:
            self._stream.wait_stream(torch.cuda.current_stream())  # whoever had this memory before
            with torch.cuda.stream(self._stream):
                _bytes(self.storage).copy_(self.twin, non_blocking=True)
                self._copied = self._stream.record_event()
        self.is_here = True

    def ready(self) -> None:
        """What comes after this call on the current stream sees a block that is filled."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
            self._copied = None


class Gathered(Block):
    """Tensors that had storages of their own, in one block; those that are away have their data in the twin."""

    def __init__(self, members: Sequence[Tensor], device: torch.device) -> None:
        """Begins away: by way of the host, since two copies of an optimizer need not fit on the device."""
        self._spans, size = plan([member.numel() * member.element_size() for member in members])
        super().__init__(torch.UntypedStorage(0, device=device), size)
        self.members, self.is_here = list(members), False
        twin = self.twin.untyped_storage()
        for member, begin in zip(self.members, self._spans, strict=True):
            member.data = _at(twin, begin, member).copy_(member.data)

    def away(self) -> None:
        if self.is_here:
            super().away()
            self._point(self.twin.untyped_storage())

    def back(self) -> None:
        if not self.is_here:
            super().back()
            self._point(self.storage)

    def _point(self, storage: torch.UntypedStorage) -> None:
        for member, begin in zip(self.members, self._spans, strict=True):
            member.data = _at(storage, begin, member)


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
        self._states: Gathered | None = None
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
            if self._states is not None:
                self._states.away()  # whose place the new block takes
            self._states = Gathered(members, self._device)
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
        storages = self._parameter_storages()
        loose = [p for p in self._parameters if not any(_is_in(p, storage) for storage in storages)]
        if loose:  # without the distributed optimizer they have storages of their own: one now, on the same device
            spans, size = plan([p.numel() * p.element_size() for p in loose])
            storages.append(torch.empty(size, dtype=torch.uint8, device=self._device).untyped_storage())
            for parameter, begin in zip(loose, spans, strict=True):
                parameter.data = _at(storages[-1], begin, parameter).copy_(parameter.data)
        return [Block(storage) for storage in storages]

    def _own_states(self) -> list[Tensor]:
        """Masters and moments that live in no buffer of the parameters."""
        storages, parameters = self._parameter_storages(), {id(p) for p in self._parameters}
        return [
            tensor
            for tensor in self._optimizer_tensors()
            if tensor.device.type == self._device.type  # else on the host for good (compat/host_adam.py)
            and id(tensor) not in parameters
            and not any(_is_in(tensor, storage) for storage in storages)
        ]

    def _optimizer_tensors(self) -> list[Tensor]:
        """What the optimizer works on, each once; step counters, of no dimension, stay where they are."""
        by_id: dict[int, Tensor] = {}
        for optimizer in _torch_optimizers(self._optimizer):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    for tensor in (parameter, *optimizer.state.get(parameter, {}).values()):
                        if isinstance(tensor, Tensor) and tensor.dim() > 0:
                            by_id[id(tensor)] = tensor
        return list(by_id.values())

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
    by_address = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return list(by_address.values())


def _at(storage: torch.UntypedStorage, begin: int, like: Tensor) -> Tensor:
    """The tensor of `like`'s shape and dtype that begins at this byte of a storage."""
    view = torch.empty(0, dtype=like.dtype, device=storage.device)
    strides = [math.prod(like.shape[k + 1 :]) for k in range(like.dim())]
    return view.set_(storage, begin // like.element_size(), like.shape, strides)


def _pinned(owner: object, size: int) -> Tensor:
    """Host memory [size] uint8 that a GPU copies from and to at full speed, for as long as `owner` lives.

    Registered: torch's own pinned memory is rounded up to a power of 2, and kept when it is freed (pytorch#150517).
    """
    memory = torch.empty(size, dtype=torch.uint8)
    if size:
        runtime: Any = torch.cuda.cudart()
        torch.cuda.check_error(runtime.cudaHostRegister(memory.data_ptr(), size, 0))
        # What it is called with keeps the memory until then.
        weakref.finalize(owner, lambda kept: runtime.cudaHostUnregister(kept.data_ptr()), memory)
    return memory


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
