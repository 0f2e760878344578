"""Routing replay: every token goes to the experts that the engine chose for it (R3, arXiv 2510.11370).

    chosen = the replayed experts;   p = the router's own probabilities, over the chosen alone

The choice is the engine's, the probabilities and their gradient are the learner's: Megatron's top-k runs over scores of
which all but the chosen are -inf, so that experts that the router would have chosen itself change no bit.

A `Replay` stands where Megatron's TopKRouter has its RouterReplay. Megatron's own class (0.16.1) keeps a list of routes
for recomputation, which grows with every forward, also of scoring, and is emptied only by a backward that the whole
process has been switched to: under 1F1B, where forward and backward passes alternate, it would have to be switched
twice a micro-batch. Here a micro-batch's routes are loaded before its forward through a model chunk, and once more when
the gradient of the chunk's output arrives, before anything is recomputed. No schedule of ours puts another micro-batch
through a chunk between these and the layers they are for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .micro_batch import MicroBatch


class Replay:
    """One router's experts for the tokens that it is about to see; without, it routes by itself."""

    experts: Tensor | None = None  # [t, k]
    counting = False
    rerouted: Tensor | None = None  # [t] bool, when counting: whether it would have chosen others

    def get_replay_topk(
        self,
        scores: Tensor,  # [t, experts]
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Megatron's call: the top k of the scores and their experts, [t, k] each."""
        if self.experts is None:
            return default_compute_topk(scores, topk, num_groups, group_topk)
        if self.experts.shape != (len(scores), topk):
            raise ValueError(f"routes of shape {tuple(self.experts.shape)} for {len(scores)} tokens and {topk} experts")
        experts = self.experts.to(scores.device, torch.int64)
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, experts, True)
        if self.counting:
            own = default_compute_topk(scores, topk, num_groups, group_topk)[1]
            self.rerouted = ~chosen.gather(1, own).all(dim=1)
        return default_compute_topk(scores.masked_fill(~chosen, float("-inf")), topk, num_groups, group_topk)


class ChunkReplay:
    """The routers of one model chunk."""

    def __init__(self, chunk: Any, tensor: tuple[int, int]) -> None:
        """`tensor`: tensor-parallel size and rank, among which sequence parallelism shares the tokens out."""
        self._share = tensor if chunk.config.sequence_parallel else (1, 0)
        self._replays: list[tuple[int, Replay]] = []  # with the layer, counted over the whole model
        for layer in chunk.decoder.layers:
            layer.mlp.router.router_replay = replay = Replay()
            self._replays.append((layer.layer_number - 1, replay))

    def load(self, batch: MicroBatch | None, counting: bool = False) -> None:
        """Makes the routers follow the micro-batch's routes; None, or one without: makes them route by themselves."""
        routes = None if batch is None or batch.routes is None else self._of_rank(batch.routes)
        for layer, replay in self._replays:
            replay.experts, replay.rerouted = None if routes is None else routes[:, layer], None
            replay.counting = counting

    def follow(self, batch: MicroBatch, output: Tensor) -> None:
        """After the forward: what the backward recomputes will follow the same routes."""

        def load(_: Tensor) -> None:
            self.load(batch)

        if output.requires_grad:
            output.register_hook(load)

    def count(self, batch: MicroBatch, rerouted: Tensor) -> None:
        """Adds to `rerouted` [B] of each rollout the (token, layer) pairs of the last forward that were rerouted."""
        flags = [replay.rerouted for _, replay in self._replays if replay.rerouted is not None]
        if batch.rollout is not None and flags:
            rollout, pairs = self._of_rank(batch.rollout).cpu(), torch.stack(flags).sum(dim=0).cpu()
            real = rollout >= 0
            rerouted.index_add_(0, rollout[real], pairs[real])

    def _of_rank(self, values: Tensor) -> Tensor:
        size, rank = self._share
        return values.chunk(size)[rank]
