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
        self._away = {key: tensor.detach().to("cpu", copy=True) for key, tensor in parameters.items()}

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
            held = tensor.detach().to("cpu", copy=True)
            tensor.data.copy_(self._away[key])
            self._away[key].copy_(held)
