"""The most that a stage of the learner holds besides weights, gradients and optimizer while it updates.

Two moments compete: the loss, where the head's work space is held (last stage), and the backward of the layer that
works with most. At both, the activations of all micro-batches lie there that Megatron's schedule has in flight.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from .activations import Share, layer
from .shape import Shape


@dataclass(frozen=True)
class Peak:
    """Bytes of one rank."""

    activations: float
    head: float  # logits, or what stands in their place
    work: float  # of the layer whose backward it is; nothing at the loss

    @property
    def total(self) -> float:
        return self.activations + self.head + self.work


def peak_of_update(
    shape: Shape,
    share: Share,
    chunks: Sequence[Sequence[bool]],  # of each chunk its layers: dense or a mixture of experts
    flight: Sequence[int],  # micro-batches of each chunk that await their backward
    head: float = 0.0,  # what output layer and loss hold at the loss
) -> Peak:
    kept = {dense: layer(shape, share, dense) for dense in set(itertools.chain(*chunks))}
    saved = sum(count * sum(kept[dense].total for dense in chunk) for count, chunk in zip(flight, chunks, strict=True))
    if head:  # the final norm's input and output
        saved += 2 * share.itemsize * shape.hidden / share.spread * share.tokens
    work = max((each.work for each in kept.values()), default=0.0)
    return Peak(saved, head, 0.0) if head > work else Peak(saved, 0.0, work)
