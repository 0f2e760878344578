"""The weights that a run began with, to score by: on the host, and in the learner's place for as long as that takes.

    in place     the learner's parameters and the reference change places, tensor by tensor; afterwards back again

So a device never holds both, and what the learner trains is bit for bit what it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class Reference:
    def __init__(self, parameters: Mapping[Any, Tensor]) -> None:
        """Of a learner whose parameters hold the reference now."""
        self._parameters = parameters
        self._away = {key: _on_host(tensor).copy_(tensor.detach()) for key, tensor in parameters.items()}
        largest = max((tensor.nbytes for tensor in parameters.values()), default=0)
        on_gpu = any(tensor.is_cuda for tensor in parameters.values())
        self._between = torch.empty(largest, dtype=torch.uint8, pin_memory=on_gpu)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for key, tensor in self._parameters.items():
            away = self._away[key]
            held = self._between[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            held.copy_(tensor)
            tensor.data.copy_(away)
            away.copy_(held)


def _on_host(tensor: Tensor) -> Tensor:
    """Memory of a tensor's form on the host, which a GPU copies to and from at full speed."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
