"""The training engine: scores rollouts with the weights that are being trained, and updates them.

    score    log pi_old and entropy of every response token that is trained on, before anything changes
    update   mini-batches in order, one optimiser step each, old log-probs fixed over all of them

Per mini-batch the loss is what the objective sums (algorithm/token_loss.py) divided by its normaliser over all ranks,
whatever the packing and the number of ranks. The objective names what it reports; nothing here knows a metric.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from torch import Tensor

from ..algorithm.sums import Report, largest_of_each
from ..algorithm.token_loss import Objective, TokenBatch, normaliser_count
from ..batch import SCORES, Batch, Pull, Rollout
from ..compat.megatron import GATHERED, prime
from ..config import LpReg, Settings
from ..errors import RequestError, RunFailed
from ..model.arena import Arena
from ..model.build import build_model, persistent_buffers, transformer_config
from ..model.cut import pieces
from ..model.facts import ModelFacts
from ..model.layout import layout_of
from ..model.precision import token_grain
from ..ranks.agree import first
from ..ranks.groups import Ranks
from ..run.store import SHARDING, load_sharded
from ..schedule.packing import heaviest_first, pack, token_multiple
from ..telemetry.catalogue import Phase
from ..telemetry.clock import phase
from ..weights.load import all_finite, load_shards
from .micro_batch import MicroBatch, PromptAndResponse, micro_batch
from .optimizer import optimizer_of, schedule_of
from .overlap import data_parallel, gathering
from .pipeline import Pipeline
from .reference import Reference

# What goes into one micro-batch: the arguments `sequences`, `starts` and `routed` of micro_batch
Content = tuple[Sequence[PromptAndResponse], Sequence[int], Sequence[tuple[int, np.ndarray]]]


@dataclass(frozen=True)
class Update:
    """What the updates of one step were, the same on every rank."""

    reported: dict[str, float | None]  # the objective's metrics; None: undefined
    gradient_norm: float | None  # mean over the mini-batches that were applied; None: none was
    learning_rate: float
    rejected: int  # mini-batches that were not applied
    padding: float | None  # share of what the model computed that is of no rollout; None: it computed nothing


class Learner:
    def __init__(self, ranks: Ranks, facts: ModelFacts, config: Settings, checkpoint: Path | None = None) -> None:
        """With the weights of `model.path`; where a run resumes, weights and optimizer from a checkpoint of its own."""
        self.ranks, self.facts = ranks, facts
        self.limit, self.temperature = config.learner.micro_batch_tokens, config.rollout.temperature
        self.layout = layout_of(config.parallel, ranks.backend.spec)
        self.pieces = pieces(facts, self.layout, self.layout.place(ranks.coordinates.pipeline, ranks.within))
        settings = transformer_config(
            facts, config.parallel, config.model, config.megatron, config.learner, ranks.backend
        )
        chunks = build_model(facts, self.layout, settings, ranks.backend)
        self.min_p = config.shaping.min_p if isinstance(config.shaping, LpReg) else 0.0
        has_reference = config.regulariser.kl > 0
        if checkpoint is None or has_reference:
            self._read(Path(config.model.path), _named(chunks))
        self.chunks = data_parallel(chunks, settings, config.learner, config.optimizer.distributed)
        self.optimizer = optimizer_of(self.chunks, config.optimizer, settings.params_dtype)
        prime(self.optimizer)
        self.schedule = schedule_of(self.optimizer, config.optimizer, config.lr_schedule, config.trainer.steps)
        settings.finalize_model_grads_func = finalize_model_grads
        settings.grad_scale_func = self.optimizer.scale_loss
        self.replay = config.rollout.routing_replay
        self.pipeline = Pipeline(ranks, self.chunks, facts.vocab, self.replay)
        self.arena = Arena(self.chunks, self.optimizer, ranks.backend.local())
        self.reference = Reference(self.parameters()) if has_reference else None
        self.scores_itself = config.learner.old_logprobs == "score"
        wanted = (True, self.scores_itself, self.min_p > 0, has_reference)
        self.score_kinds = tuple(itertools.compress(SCORES, wanted))  # what `score` gives
        if checkpoint is not None:
            self._load(checkpoint)
        grain = token_grain(config.learner.precision)
        self.multiple = token_multiple(grain, ranks.tensor, settings.sequence_parallel)

    def _read(self, folder: Path, parameters: dict[tuple[int, str], Tensor]) -> None:
        """Weights from an HF folder: the first rank that holds a shard reads it, and sends it to the others."""
        expert, shared = self.ranks.expert_copies, self.ranks.tokens_group
        copies = {key: shared if getattr(p, "allreduce", True) else expert for key, p in parameters.items()}
        mine = {key: parameters[key] for key, group in copies.items() if group.rank() == 0}
        failure = None
        try:
            load_shards(folder, self.facts, [piece for piece in self.pieces if piece.key in mine], mine)
        except RequestError as error:
            failure = str(error)
        if wrong := self.ranks.agree("weights read", failure, first):
            raise RequestError(wrong)
        for key, group in copies.items():
            if group.size() > 1:
                dist.broadcast(parameters[key].data, dist.get_global_rank(group, 0), group=group)

    def parameters(self) -> dict[tuple[int, str], Tensor]:
        """This rank's shard: (model chunk, Megatron name) → parameter or buffer."""
        return _named([chunk.module for chunk in self.chunks])

    def elements(self) -> int:
        """Returns the size of this rank's shard."""
        return sum(tensor.numel() for tensor in self.parameters().values())

    def broken(self) -> list[str]:
        """Returns the names of this rank's parameters that are not finite."""
        return [name for (_, name), tensor in self.parameters().items() if not all_finite(tensor.detach())]

    def sharded_state(self, loading: bool = False) -> dict[str, Any]:
        """Weights and optimizer as Megatron's sharded state dict: what a checkpoint stores of this rank."""
        self.arena.ready()
        GATHERED.clear()  # of a state that was not saved
        sharding = SHARDING | {"dp_cp_group": self.ranks.tokens_group}
        states = [chunk.module.sharded_state_dict(metadata=sharding) for chunk in self.chunks]
        state: dict[str, Any] = {self._chunk(number): each for number, each in enumerate(states)}
        # Megatron wants one chunk's state bare, and several by name.
        models = state if len(states) > 1 else states[0]
        optimizer = self.optimizer.sharded_state_dict(models, is_loading=loading, metadata=sharding)
        return state | {"optimizer": optimizer}

    def _load(self, checkpoint: Path) -> None:
        """Weights and optimizer from a checkpoint of a run, whatever its layout was. Collective."""
        loaded = load_sharded(self.sharded_state(loading=True), checkpoint)
        for number, chunk in enumerate(self.chunks):
            chunk.module.load_state_dict(loaded[self._chunk(number)])
        self.optimizer.load_state_dict(loaded["optimizer"])

    def _chunk(self, number: int) -> str:
        return f"model{number}" if len(self.chunks) > 1 else "model"

    def state(self) -> dict[str, Any]:
        return {"schedule_steps": self.schedule.num_steps}

    def restore(self, state: dict[str, Any]) -> None:
        self.schedule.num_steps = 0
        self.schedule.step(increment=state["schedule_steps"])

    def score(self, batch: Batch) -> Batch:
        """Adds old log-probs and entropies [T] of the training engine to the batch, finite or not; and what shaping
        and the regulariser want beside them.

        A batch that has them, from before an interruption, is left as it is. With `learner.old_logprobs: rollout` the
        engine's log-probs stand in their place, and nothing is computed.
        """
        with phase(Phase.SCORE):
            if batch.old_logprobs is not None:
                return batch
            if not self.scores_itself:
                batch.old_logprobs = torch.where(batch.is_trained(), batch.rollout_logprobs, 0.0)
                return batch
            micro_batches = self._micro_batches(batch, range(len(batch.rollouts)))
            rerouted = torch.zeros(len(batch.rollouts), dtype=torch.int64) if self.replay else None
            results = self.pipeline.forward(
                micro_batches, self.temperature, with_entropy=True, rerouted=rerouted, min_p=self.min_p
            )
            if rerouted is not None:  # the ranks of a batch group hold different tokens or layers of its rollouts
                batch.rerouted = self.ranks.sum_over_batch_group(rerouted)
            tokens = batch.rollout_index.numel()
            batch.old_logprobs, batch.entropy, *proxy = self._whole(micro_batches, results, tokens)
            batch.proxy_logprobs = proxy[0] if proxy else None
            if self.reference is not None:
                batch.reference_logprobs = self._by_reference(self.reference, micro_batches, tokens)
            return batch

    def _by_reference(self, reference: Reference, micro_batches: list[MicroBatch], tokens: int) -> Tensor:
        """Log-probs of the reference [T], which routes by itself."""
        own = [dataclasses.replace(part, routes=None, rollout=None) for part in micro_batches]
        self.arena.ready()
        with reference.in_place():
            results = self.pipeline.forward(own, self.temperature, with_entropy=False)
        return self._whole(own, results, tokens)[0]

    def logprobs(
        self, sequences: Sequence[PromptAndResponse], routes: Sequence[np.ndarray] | None = None
    ) -> list[Tensor]:
        """Log-probs at temperature 1 of each (prompt, response) pair's response tokens, on every rank.

        `routes`: of each pair, to be replayed; None: the learner routes by itself.
        """
        starts = itertools.accumulate((len(response) for _, response in sequences), initial=0)
        packed = self._packed([(sequences, list(starts)[:-1], list(enumerate(routes or [])))])
        lengths = [len(response) for _, response in sequences]
        values = self.pipeline.forward(packed, 1.0, with_entropy=False)
        return list(self._whole(packed, values, sum(lengths))[0].split(lengths))

    def _whole(self, micro_batches: list[MicroBatch], results: Tensor, tokens: int) -> Tensor:
        """Per-token results [K, R] of micro-batches, laid out as the batch's response tokens [K, tokens].

        Context-parallel ranks hold results of different tokens: 4 bytes a token travel between them.
        """
        whole = torch.zeros(len(results), tokens)
        whole[:, torch.cat([part.index for part in micro_batches])] = results
        return self.ranks.sum_over_context(whole)

    def update(self, batch: Batch, objective: Objective) -> Update:
        """One optimiser step per mini-batch. Collective.

        An update that is not finite on any rank is applied on none; `batch.rejected` names its mini-batch.
        """
        with phase(Phase.UPDATE), gathering(self.chunks):
            assert batch.old_logprobs is not None and batch.token_weights is not None, "score and shape the batch first"
            self.schedule.step(increment=1)
            whole, norms, held = Report(objective.metrics), [], 0
            for number in range(batch.mini_batches):
                chosen = torch.nonzero(batch.mini_batch == number)[:, 0].tolist()
                micro_batches = self._micro_batches(batch, chosen)
                held += sum(part.tokens.shape[1] for part in micro_batches)
                part = self._accumulate(micro_batches, batch, objective, number)
                whole.take(part.largest)
                if self._is_broken(part.sums):
                    batch.rejected.append(number)
                    continue
                whole.sums += part.sums
                norms.append(self._step(number))
            # Ranks of a tensor- or pipeline-parallel group computed the same sums.
            whole.sums = self.ranks.sum_over_tokens(whole.sums)
            whole.take(self.ranks.agree("largest values", whole.largest, largest_of_each))
            return Update(
                reported=whole.metrics(),
                gradient_norm=sum(norms) / len(norms) if norms else None,
                learning_rate=self.optimizer.param_groups[0]["lr"],
                rejected=len(batch.rejected),
                padding=self._padding(batch, held),
            )

    def _padding(self, batch: Batch, held: int) -> float | None:
        """`held`: tokens of this rank's micro-batches. Each context-parallel rank holds a part of every rollout."""
        read = sum(len(rollout.prompt.tokens) + len(rollout.tokens) - 1 for rollout in batch.rollouts)
        mine = read if self.ranks.coordinates.context == 0 else 0
        of_rollouts, all_tokens = self.ranks.sum_over_tokens(torch.tensor([mine, held], dtype=torch.float64)).tolist()
        return 1 - of_rollouts / all_tokens if all_tokens else None

    def _accumulate(self, micro_batches: list[MicroBatch], batch: Batch, objective: Objective, number: int) -> Report:
        """Gradients of one mini-batch; returns what the objective reports of its tokens: sums as on the last stage,
        maxima of this rank."""
        report = Report(objective.metrics)
        starts = _starts(batch)

        def loss(part: MicroBatch, logprobs: Tensor, entropy: Tensor | None) -> tuple[Tensor, int, Tensor]:
            tokens = self._token_batch(part, logprobs, entropy, batch, starts, number)
            total, sums = objective(tokens)
            if logprobs.numel() == 0:  # padding alone: a loss of 0 that still reaches every parameter
                total = total + logprobs.sum() * 0.0
            return total, normaliser_count(objective, tokens), report.vector(sums, logprobs.device)

        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        wants_entropy = batch.entropy_weight > 0
        collected = self.pipeline.forward_backward(micro_batches, self.temperature, loss, wants_entropy)
        sums = torch.stack(collected).sum(dim=0).cpu() if collected else torch.zeros_like(report.sums)
        report.sums = self.pipeline.from_last_stage(sums)
        return report

    def _token_batch(
        self, part: MicroBatch, logprobs: Tensor, entropy: Tensor | None, batch: Batch, starts: Tensor, number: int
    ) -> TokenBatch:
        assert batch.old_logprobs is not None and batch.token_weights is not None
        rollout = batch.rollout_index[part.index]
        values = {
            "old_logprobs": batch.old_logprobs[part.index],
            "rollout_logprobs": batch.rollout_logprobs[part.index],
            "advantages": batch.token_advantages(part.index),
            "token_weights": batch.token_weights[part.index],
            "rollout": rollout,
            "begins": part.index == starts[rollout],
        }
        device = logprobs.device
        pulls = [
            Pull(pull.estimator, pull.targets[part.index].to(device), pull.weights[part.index].to(device))
            for pull in batch.pulls
        ]
        return TokenBatch(
            logprobs=logprobs,
            **{name: value.to(device) for name, value in values.items()},
            pulls=tuple(pulls),
            entropy=entropy,
            entropy_weight=batch.entropy_weight,
            rollouts=len(batch.rollouts),
            mini_batch=number,
            context=self.ranks.context_group,
        )

    def _is_broken(self, sums: Tensor) -> bool:
        """Whether the loss or a gradient is not finite on any rank, or so large that its norm would not be."""
        buffers = [b for chunk in self.chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        sound = bool(torch.isfinite(sums).all()) and all(_is_usable(buffer.grad_data) for buffer in buffers)
        return bool(self.ranks.agree("update", not sound, any))

    def _step(self, number: int) -> float:
        self.arena.ready()
        _, norm, _ = self.optimizer.step()
        norm = float(norm)
        if not torch.isfinite(torch.tensor(norm)):  # reduced over all ranks: every rank sees the same number
            raise RunFailed(f"the gradient norm of mini-batch {number} is {norm}: the update cannot be trusted")
        return norm

    def _micro_batches(self, batch: Batch, chosen: Sequence[int]) -> list[MicroBatch]:
        """The chosen rollouts, packed, to predict what is trained on; at least one micro-batch, so that every rank
        joins every collective."""
        starts = (batch.lengths.cumsum(0) - batch.lengths).tolist()
        sequences = [(batch.rollouts[i].prompt.tokens, batch.rollouts[i].tokens) for i in chosen]
        grain = 2 * self.ranks.context if self.ranks.context > 1 else 1  # every sequence is padded to that
        lengths = [-(-(len(prompt) + len(response) - 1) // grain) * grain for prompt, response in sequences]
        bins = pack(lengths, self.limit)
        if self.layout.expert > 1:  # replicas exchange tokens in every micro-batch, and wait for the longest
            bins = heaviest_first(bins, lengths)
        routed = [(i, self._routes(batch.rollouts[i])) for i in chosen] if self.replay else []
        contents = [
            ([sequences[i] for i in items], [starts[chosen[i]] for i in items], [routed[i] for i in items if routed])
            for items in bins or [[]]
        ]
        parts = self._packed(contents)
        return parts if batch.trained is None else [part.only(batch.trained) for part in parts]

    def _routes(self, rollout: Rollout) -> np.ndarray:
        if rollout.routes is None:
            raise RunFailed(f"rollout {rollout.name} has no routes to replay (rollout.routing_replay)")
        return rollout.routes

    def _packed(self, contents: Sequence[Content]) -> list[MicroBatch]:
        """A micro-batch of each of the contents, then as many of padding alone as the layout needs.

        Experts exchange tokens between data-parallel ranks in every micro-batch, so all must run equally many. The
        interleaved schedule wants a multiple of the pipeline's size, and (model/build.py) all of one length; that of
        the longest will do, because all ranks between which activations travel hold the same micro-batches.
        """
        count, multiple = len(contents), self.multiple
        context = self.ranks.context, self.ranks.coordinates.context
        if self.layout.expert > 1:
            count = self.ranks.agree("micro-batches", count, max)
        if self.layout.virtual > 1:
            count = -(-count // self.layout.pipeline) * self.layout.pipeline
            multiple = max(micro_batch(held, at, multiple, context).tokens.shape[1] for held, at, _ in contents)
        packed = [micro_batch(held, at, multiple, context, routed) for held, at, routed in contents]
        return packed + [micro_batch([], [], multiple, context) for _ in range(count - len(packed))]


def _starts(batch: Batch) -> Tensor:
    """Where each rollout's first token that is trained on lies among the batch's response tokens [B]; of a rollout that
    has none, behind them all."""
    if batch.trained is None:
        return batch.lengths.cumsum(0) - batch.lengths
    places = torch.nonzero(batch.trained)[:, 0]
    starts = torch.full((len(batch.rollouts),), len(batch.trained))
    return starts.scatter_reduce_(0, batch.rollout_index[places], places, "amin")


def _is_usable(gradients: Tensor) -> bool:
    """Finite, and so small that the square of the norm of 1e11 of them still is in float32."""
    low, high = (float(extreme) for extreme in torch.aminmax(gradients)) if gradients.numel() else (0.0, 0.0)
    return -1e13 < low <= high < 1e13  # false for NaN


def _named(chunks: Sequence[torch.nn.Module]) -> dict[tuple[int, str], Tensor]:
    """What is loaded and published: (model chunk, Megatron name) → parameter, or buffer that the maps name."""
    tensors: dict[tuple[int, str], Tensor] = {}
    for number, chunk in enumerate(chunks):
        state = dict(chunk.named_parameters()) | persistent_buffers(chunk)
        tensors |= {(number, name): tensor for name, tensor in state.items()}
    return tensors
