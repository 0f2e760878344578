"""Drives Megatron's schedules: packed micro-batches in, per-token results or accumulated gradients out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from ..model.modules import GPT
from ..ranks.groups import Ranks
from ..telemetry.clock import CLOCK
from .fused_head import logprob_and_entropy
from .micro_batch import MicroBatch
from .overlap import await_weight
from .proxy import proxy_logprobs
from .replay import ChunkReplay

Of = TypeVar("Of")
# (micro-batch, log-probs [R], entropy [R]) → (summed loss, number of tokens, sums to collect)
LossFunction = Callable[[MicroBatch, Tensor, Tensor | None], tuple[Tensor, int, Tensor]]


class Pipeline:
    """The model under Megatron's schedule. Every rank of a batch group must bring the same micro-batches; with virtual
    stages those of one call must be equally long, and as many as a multiple of the pipeline's size."""

    def __init__(
        self, ranks: Ranks, chunks: list[DistributedDataParallel], vocab_size: int, replay: bool = False
    ) -> None:
        self.ranks, self.chunks, self.vocab_size = ranks, chunks, vocab_size
        self.device = ranks.backend.local()
        at = ranks.tensor, ranks.coordinates.tensor
        self.replays = {chunk: ChunkReplay(chunk.module, at) for chunk in chunks if replay}
        for chunk in chunks:
            chunk.module.headless = True

    def forward(
        self,
        micro_batches: Sequence[MicroBatch],
        temperature: float,
        with_entropy: bool,
        rerouted: Tensor | None = None,  # [B] int64, counted up: see ChunkReplay.count; this rank's tokens and layers
        min_p: float = 0.0,  # with log-probs of the less noisy policy, too (proxy.py); 0: without
    ) -> Tensor:
        """Per-token results without gradient, [1 to 3, R] of all micro-batches, laid end to end: log-probs, entropies,
        log-probs of the less noisy policy."""

        def collect(batch: MicroBatch, model: GPT, hidden: Tensor) -> Tensor:
            given = batch, model, hidden, temperature
            logprobs, entropy = self._of_head(logprob_and_entropy, *given, with_entropy=with_entropy)
            proxy = self._of_head(proxy_logprobs, *given, min_p=min_p) if min_p else None
            return torch.stack([row for row in (logprobs, entropy, proxy) if row is not None])

        for chunk in self.chunks:
            chunk.eval()
        with torch.no_grad():
            outputs = self._run(micro_batches, collect, rerouted, forward_only=True, collect_non_loss_data=True)
        for chunk in self.chunks:
            chunk.train()
        tokens = sum(batch.targets.numel() for batch in micro_batches)
        result = torch.cat(outputs, dim=1).cpu() if outputs else torch.empty(1 + with_entropy + (min_p > 0), tokens)
        return self.from_last_stage(result)

    def forward_backward(
        self,
        micro_batches: Sequence[MicroBatch],
        temperature: float,
        loss_function: LossFunction,
        with_entropy: bool = False,
    ) -> list[Tensor]:
        """Accumulates gradients of the summed loss over the tokens of all ranks; returns what the loss collected."""

        def loss(batch: MicroBatch, model: GPT, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            values = self._of_head(logprob_and_entropy, batch, model, hidden, temperature, with_entropy=with_entropy)
            total, tokens, sums = loss_function(batch, *values)
            return total, torch.tensor(tokens, dtype=torch.int, device=self.device), sums

        return self._run(micro_batches, loss, forward_only=False)

    def _of_head(
        self,
        function: Callable[..., Of],  # logprob_and_entropy or proxy_logprobs
        batch: MicroBatch,
        model: GPT,
        hidden: Tensor,
        temperature: float,
        **options: Any,
    ) -> Of:
        return function(
            hidden[:, 0],  # [T, H], or this rank's share of T under sequence parallelism
            model.output_weight(),
            batch.targets,
            self.ranks.tensor_group if self.ranks.tensor > 1 else None,
            temperature,
            vocab_size=self.vocab_size,
            sequence_parallel=model.config.sequence_parallel,
            rows=batch.predicting,
            **options,
        )

    def _run(
        self,
        micro_batches: Sequence[MicroBatch],
        finish: Callable[..., Any],
        rerouted: Tensor | None = None,
        **options: Any,
    ) -> list[Any]:
        def step(batches: Iterator[MicroBatch], model: DistributedDataParallel) -> tuple[Tensor, Callable[..., Any]]:
            batch = next(batches).to(self.device)
            CLOCK.beat()
            replay = self.replays.get(model)
            if replay is not None:
                replay.load(batch, counting=rerouted is not None)
            hidden = model(batch.tokens, batch.positions, None, packed_seq_params=batch.packing)
            if model.module.post_process:
                await_weight(model, model.module.output_weight())
            if replay is not None:
                replay.follow(batch, hidden)
                if rerouted is not None:
                    replay.count(batch, rerouted)
            return hidden, lambda output, non_loss_data=False: finish(batch, model.module, output)

        try:
            return get_forward_backward_func()(
                forward_step_func=step,
                # Every model chunk reads the same micro-batches, each at its own pace.
                data_iterator=[iter(micro_batches) for _ in self.chunks]
                if len(self.chunks) > 1
                else iter(micro_batches),
                model=self.chunks,
                num_microbatches=len(micro_batches),
                # With virtual stages the length of all, which Megatron divides by the context ranks; else ignored.
                seq_length=micro_batches[0].tokens.shape[1] * self.ranks.context,
                micro_batch_size=1,
                **options,
            )
        finally:
            for replay in self.replays.values():
                replay.load(None)

    def from_last_stage(self, values: Tensor) -> Tensor:
        """The last pipeline stage's values, on every stage; all give a host tensor of the same shape."""
        group = self.ranks.pipeline_group
        if group.size() > 1:
            dist.broadcast(values, dist.get_global_rank(group, group.size() - 1), group=group)
        return values
