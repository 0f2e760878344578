"""What the ranks of a run need in each phase, by what holds it: bytes of the fullest rank, and of a node's memory.

Weights, gradients and optimizer are exact (static.py); activations are formulas (activations.py); what libraries and
the device take are estimates, each with its source (overhead.py). On a CPU, device and host are one: everything is of
the rank's process, and nothing moves unless `learner.offload` says so.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from ..config import AdamOptions, Settings
from ..learner.chunks import CHUNK_BYTES
from ..model.cut import EngineRank, LearnerRank, Stored, held
from ..model.facts import ModelFacts
from ..model.layout import Layout, layout_of, padded_vocab
from ..model.precision import is_fp8, token_grain
from ..ranks.topology import Topology, topology_of
from ..schedule.packing import token_multiple
from ..weights.route import WIDTHS
from .activations import Share, in_flight, layer
from .cache import longest_sequence
from .overhead import ASLEEP, COMMUNICATOR, CONTEXT, CPU_PROCESS, GAPS, GRAPHS, HOST_PROCESS, LIBRARIES
from .shape import Shape, shape_of
from .static import Static, static_of
from .update import peak_of_update

IMBALANCE = 1.5  # tokens of the busiest rank's experts over the mean; nothing is dropped
PROFILED_TOKENS = 8192  # that vLLM takes in one step at least (rollout/vllm_engine.py)
SAMPLER_COPIES = 4  # of the logits, in float32: as computed, at their temperature, log-probs, sorted


class Phase(StrEnum):
    START = "start"
    ROLLOUT = "rollout"
    SCORE = "score"
    FIRST = "first update"  # like the others: moments are made at the start, with the optimizer (compat/megatron.py)
    UPDATE = "update"
    PUBLISH = "publish"
    CHECKPOINT = "checkpoint"


# What holds memory, and by which formula.
PARTS: dict[str, str] = {
    "weights": "static: Megatron's parameter buffers, with their padding",
    "gradients": "static: float32, as the parameter buffers",
    "optimizer": "static: masters and moments of this rank's share",
    "activations": "activations: what layers keep (FP8: quantised weights, too), times the micro-batches in flight",
    "loss": "fused head: one chunk of float32 logits and its gradient, hidden states, or one layer's work, if larger",
    "engine weights": "engine: vLLM's parameters on this rank",
    "KV cache": "engine: rollout.kv_cache_bytes",
    "engine work": "engine: activations of the largest step",
    "graphs, sampler": "engine: CUDA graphs, and float32 logits of rollout.max_sequences",
    "buffers": "publish: buckets, and the layer that is reloaded; pipeline: what travels; the head's unread gradient",
    "overhead": "overhead: context, libraries, communicators, what a sleeping engine keeps, the allocator's gaps",
}
Need = Mapping[str, int]  # bytes by part


@dataclass(frozen=True)
class Memory:
    """`phases`: of the rank that needs most in each. `host`: bytes of a node, by what holds them; empty on a CPU.
    `beside_cache`: the most that lies on a device while the engine's cache does."""

    phases: Mapping[Phase, Need]
    host: Mapping[str, int]
    beside_cache: int

    def total(self, phase: Phase) -> int:
        return sum(self.phases[phase].values())


def memory_of(facts: ModelFacts, settings: Settings, hopper: bool = True) -> Memory:
    """Returns what a run of these settings needs."""
    every = _fullest(facts, settings, hopper)
    phases: dict[Phase, Need] = {}
    for phase in Phase:
        phases[phase] = max((rank.need(phase) for rank in every), key=_together)
    host = _host(settings, max((rank.static for rank in every), key=_of_host))
    return Memory(phases, host, max(rank.beside_cache() for rank in every))


def needed(facts: ModelFacts, settings: Settings, phases: Sequence[Phase], hopper: bool = True) -> int:
    """Returns the most that some phases need, as `memory_of` says it of all."""
    every = _fullest(facts, settings, hopper)
    return max(_together(rank.need(phase)) for rank in every for phase in phases)


def _together(need: Need) -> int:
    return sum(need.values())


def predicted_bytes(facts: ModelFacts, settings: Settings) -> dict[str, int]:
    """Returns what each phase needs, by its name."""
    memory = memory_of(facts, settings)
    return {str(phase): memory.total(phase) for phase in Phase}


def _fullest(facts: ModelFacts, settings: Settings, hopper: bool) -> list[_Rank]:
    topology = topology_of(settings.parallel, settings.rollout.tensor, settings.ranks)
    stage_ranks = topology.learning // topology.pipeline
    stages = _stages(facts.layers, layout_of(settings.parallel))
    return [_Rank(facts, settings, topology, stage * stage_ranks, hopper) for stage in stages]


@functools.lru_cache(maxsize=256)
def _stages(layers: int, layout: Layout) -> list[int]:
    """Returns the stages of which one is the fullest: the ends, and of those with equally many layers the first, which
    has the most micro-batches in flight."""
    first: dict[tuple[int, ...], int] = {}
    for stage in range(1, layout.pipeline - 1):
        first.setdefault(tuple(map(len, layout.chunk_layers(layers, stage))), stage)
    return sorted({0, *first.values(), layout.pipeline - 1})


class _Rank:
    """The first rank of a stage, whose share is one of the largest."""

    def __init__(self, facts: ModelFacts, settings: Settings, topology: Topology, rank: int, hopper: bool) -> None:
        self.facts, self.settings, self.topology = facts, settings, topology
        self.on_gpu, self.stage = settings.cluster.device == "cuda", topology.coordinates(rank).pipeline
        self.static: Static = static_of(facts, settings, rank)
        self.shape: Shape = shape_of(facts, settings.learner, self.on_gpu)
        self.share, self.layout = share_of(facts, settings), layout_of(settings.parallel)
        self.vocab_rows = padded_vocab(facts.vocab, self.share.tensor) // self.share.tensor
        self.engine, self.offload = engine_weights(facts, settings), settings.learner.offload
        self.linear = _linear(facts, self.layout, self.stage) if self.share.fp8 else 0
        self.hopper = hopper
        self._known: dict[Phase, tuple[Need, ...]] = {}

    def need(self, phase: Phase) -> Need:
        """The worst of the moments that a phase has."""
        return max(self._every(phase), key=_together)

    def beside_cache(self) -> int:
        moments = itertools.chain.from_iterable(self._every(phase) for phase in Phase)
        return max(_together(need) - need["KV cache"] for need in moments if need["KV cache"])

    def _every(self, phase: Phase) -> tuple[Need, ...]:
        like = Phase.UPDATE if phase == Phase.FIRST else phase
        if like not in self._known:
            self._known[like] = tuple(self._moments(like))
        return self._known[like]

    def _moments(self, phase: Phase) -> Iterator[Need]:
        if phase == Phase.START:  # the engine is built first, on an empty device
            yield self._with(self._learner("none"), {} if self.on_gpu else self._awake())
            yield self._with(self._awake())
        elif phase in (Phase.SCORE, Phase.UPDATE):
            work = self._of_score() if phase == Phase.SCORE else self._of_update()
            moving = work["activations"] + work["loss"]
            yield self._with(self._learner("none"), {} if self.on_gpu else self._awake(), work, moving=moving)
        else:
            # A checkpoint is written from the host, while the engine samples on.
            beside = self._learner(self.offload if phase == Phase.ROLLOUT or self.offload == "none" else "optimizer")
            if phase == Phase.PUBLISH:
                weights = {"engine weights": self.engine, "buffers": self._of_publish() + beside["buffers"]}
                yield self._with(beside, weights, {} if self.on_gpu else self._awake())
                canary = self._of_score() if self.settings.publish.canary_prompts else {}
                yield self._with(beside, self._awake(), canary)
            else:
                yield self._with(beside, self._awake())

    def _with(self, *parts: Mapping[str, int], moving: int = 0) -> Need:
        need = dict.fromkeys(PARTS, 0)
        for each in parts:
            need |= each
        return need | {"overhead": self._overhead(moving)}

    def _learner(self, offload: str) -> dict[str, int]:
        """What is there of the learner; of the head also what stands for its weight's gradient, for good."""
        static, last = self.static, self.stage == self.topology.pipeline - 1
        here = {"buffers": self.vocab_rows * self.facts.hidden * self.share.itemsize if last else 0}
        if offload != "all":
            here["weights"] = static.weights
        if offload == "none":
            here |= {"gradients": static.gradients, "optimizer": static.optimizer}
        return here

    def _awake(self) -> dict[str, int]:
        rollout = self.settings.rollout
        sampler = SAMPLER_COPIES * 4 * rollout.max_sequences * self.facts.vocab
        return {
            "engine weights": self.engine,
            "KV cache": rollout.kv_cache_bytes,
            "engine work": engine_work(self.facts, self.settings),
            "graphs, sampler": sampler + (GRAPHS if self.on_gpu else 0),
        }

    def _of_update(self) -> dict[str, int]:
        layout, chunks = self.layout, self.layout.chunk_layers(self.facts.layers, self.stage)
        flight = in_flight(layout.pipeline, layout.virtual, self.stage, micro_batches_of(self.settings))
        head = self._head(backward=True) if self.stage == layout.pipeline - 1 else 0
        dense = [[self.facts.experts is None] * len(chunk) for chunk in chunks]
        peak = peak_of_update(self.shape, self.share, dense, flight, head)
        waiting = sum(count * len(chunk) for count, chunk in zip(flight, chunks, strict=True))
        quantised = self._quantised(1 if self.settings.learner.recompute == "full" else waiting)
        return {
            "activations": round(peak.activations) + quantised,
            "loss": round(peak.head + peak.work),
            "buffers": self._learner("all")["buffers"] + self._travels(),
        }

    def _quantised(self, layers: int) -> int:
        """With FP8 every micro-batch has its own quantised weights, in both layouts, until its backward: they are not
        kept from one to the next (model/build.py)."""
        if not self.share.fp8:
            return 0
        chunks = self.layout.chunk_layers(self.facts.layers, self.stage)
        return round(2 * self.linear * layers / sum(map(len, chunks)))

    def _of_score(self) -> dict[str, int]:
        """A forward without gradients: one layer at a time."""
        kept = layer(self.shape, self.share, dense=self.facts.experts is None)
        head = self._head(backward=False) if self.stage == self.topology.pipeline - 1 else 0
        return {
            "activations": round(kept.total + kept.work) + self._quantised(1),
            "loss": head,
            "buffers": self._learner("all")["buffers"] + self._travels(),
        }

    def _head(self, backward: bool) -> int:
        """Of learner/fused_head.py: a chunk of logits, its gradient in the weights' dtype, hidden states and theirs."""
        facts, share, rows = self.facts, self.share, self.vocab_rows
        whole = share.tokens * facts.hidden * share.itemsize
        chunk = min(CHUNK_BYTES[self.settings.cluster.device], 4 * rows * share.tokens)
        tokens = chunk // (4 * rows)
        gathered = whole if share.spread > 1 else 0
        statistics = 8 * 4 * share.tokens
        if not backward:
            return 2 * chunk + gathered + statistics
        return 2 * chunk + gathered + whole + 4 * tokens * facts.hidden + statistics

    def _travels(self) -> int:
        """Activations and gradients on their way between stages."""
        share = self.share
        width = 4 * share.itemsize * self.facts.hidden
        return width * share.tokens // share.spread if self.topology.pipeline > 1 else 0

    def _of_publish(self) -> int:
        """A bucket, or the largest tensor, as it is sent and as it comes; the layer of experts that an engine takes
        whole; and of the engine the layer that is reloaded, as it comes and as vLLM keeps it."""
        facts, itemsize = self.facts, self.share.itemsize
        model = sum(elements_of(facts)) * itemsize
        largest = max(facts.vocab * facts.hidden * itemsize, min(self.settings.publish.bucket_bytes, model))
        fused = 0
        if facts.experts is not None and self.settings.rollout.expert == 1:
            fused = 3 * facts.experts.count * facts.experts.ffn * facts.hidden * itemsize
        return 2 * largest + fused + 2 * (self.engine // facts.layers)

    def _overhead(self, moving: int) -> int:
        if not self.on_gpu:
            return CPU_PROCESS
        groups = [*_sizes(self.topology), self.topology.world]
        talks = sum(size > 1 for size in groups) * COMMUNICATOR
        kept = ASLEEP + (COMMUNICATOR if self.settings.rollout.tensor > 1 else 0)
        libraries = LIBRARIES["hopper" if self.hopper else "older"]
        return CONTEXT + libraries + talks + kept + round(GAPS * moving)


@functools.lru_cache(maxsize=8)
def elements_of(facts: ModelFacts) -> tuple[int, int]:
    """Returns the model's parameters outside experts, and within; a tied head counts once."""
    every = [(each.elements, each.param.experts is not None) for each in held(facts, Stored())]
    return sum(size for size, expert in every if not expert), sum(size for size, expert in every if expert)


@functools.lru_cache(maxsize=256)
def _linear(facts: ModelFacts, layout: Layout, stage: int) -> int:
    """Elements of the linear layers' weights on a rank of a stage."""
    every = held(facts, LearnerRank(layout, layout.place(stage, 0)))
    return sum(each.elements for each in every if each.param.linear)


def _sizes(topology: Topology) -> list[int]:
    """Of the groups in which a rank's tensors travel."""
    tokens = topology.context * topology.data
    dense = [topology.tensor, topology.context, tokens, topology.pipeline]
    copies = topology.tensor * tokens // (topology.expert * topology.expert_tensor)
    return [
        *dense,
        *([topology.expert, topology.expert_tensor * topology.expert, copies] if topology.expert > 1 else []),
    ]


def share_of(facts: ModelFacts, settings: Settings) -> Share:
    """Returns how the learner's fullest micro-batch lies on a rank: no packing is shorter than the longest sample."""
    parallel, learner = settings.parallel, settings.learner
    longest = settings.rollout.longest
    sequence = parallel.sequence and parallel.tensor > 1
    multiple = token_multiple(token_grain(learner.precision), parallel.tensor, sequence)
    tokens = -(-max(longest, learner.micro_batch_tokens) // parallel.context)
    recompute = {"none": frozenset[str](), "selective": frozenset({_selected(facts)}), "full": frozenset({"full"})}
    return Share(
        tokens=-(-tokens // multiple) * multiple,
        length=longest,
        tensor=parallel.tensor,
        sequence=sequence,
        expert_tensor=parallel.expert_tensor,
        itemsize=WIDTHS[settings.model.dtype],
        fp8=is_fp8(learner.precision),
        recompute=recompute[learner.recompute],
        imbalance=IMBALANCE if parallel.expert > 1 else 1.0,
    )


def _selected(facts: ModelFacts) -> str:
    """What `learner.recompute: selective` computes again (model/build.py)."""
    return "mlp" if facts.experts is None else "moe"


def micro_batches_of(settings: Settings) -> int:
    """Returns how many micro-batches of the largest kind a mini-batch may have on one replica."""
    trainer, parallel = settings.trainer, settings.parallel
    groups = -(-trainer.prompts_per_step // trainer.mini_batches)
    rollouts = -(-groups * trainer.rollouts_per_prompt // parallel.data)
    longest = settings.rollout.longest
    count = max(1, -(-rollouts // max(1, settings.learner.micro_batch_tokens // longest)))  # none is split
    return -(-count // parallel.pipeline) * parallel.pipeline if parallel.virtual > 1 else count


def engine_weights(facts: ModelFacts, settings: Settings) -> int:
    """Returns bytes of vLLM's parameters on one rank of an engine."""
    rollout, itemsize = settings.rollout, WIDTHS[settings.model.dtype]
    linear, plain = _engine_elements(facts, rollout.tensor, rollout.expert)
    if rollout.quantization != "none":  # a byte, and a float32 scale for 128 x 128 of them
        share = max(0, facts.layers - sum(rollout.bf16_layers)) / facts.layers
        return round(plain * itemsize + linear * (share * (1 + 4 / 128**2) + (1 - share) * itemsize))
    return (plain + linear) * itemsize


@functools.lru_cache(maxsize=64)  # of a plan every stage asks, and every size that is tried
def _engine_elements(facts: ModelFacts, tensor: int, expert: int) -> tuple[int, int]:
    """Of a rank: those of linear layers, and the others."""
    count = facts.experts.count if facts.experts else 0
    every = held(facts, EngineRank(tensor, 0, (0, count // expert)))
    linear = sum(each.elements for each in every if each.param.linear)
    return linear, sum(each.elements for each in every) - linear


def least_of_engine(facts: ModelFacts, settings: Settings) -> int:
    """Returns what an engine takes that is awake, without its cache, and with no learner beside it."""
    return engine_weights(facts, settings) + engine_work(facts, settings) + GRAPHS + CONTEXT + ASLEEP


def engine_work(facts: ModelFacts, settings: Settings) -> int:
    """Returns bytes of vLLM's activations at its largest step, a prefill."""
    rollout, itemsize = settings.rollout, WIDTHS[settings.model.dtype]
    tokens = max(longest_sequence(settings), PROFILED_TOKENS)
    queries = facts.heads * facts.head_dim + 2 * facts.kv_heads * facts.head_dim
    widths = 4.0 * facts.hidden + 2 * queries / rollout.tensor
    if facts.experts is None:
        widths += 3 * facts.ffn / rollout.tensor
    else:
        ffn = facts.experts.ffn / (1 if rollout.expert > 1 else rollout.tensor)
        rows = facts.experts.per_token * (IMBALANCE / rollout.expert if rollout.expert > 1 else 1)
        widths += rows * (3 * ffn + facts.hidden)
    return round(tokens * widths * itemsize)


def _saved(settings: Settings, static: Static) -> int:
    """Bytes of the copy that a checkpoint is written from: Megatron hands out narrower moments as float32."""
    own, optimizer = static.optimizer + static.host_optimizer, settings.optimizer
    if not isinstance(optimizer, AdamOptions) or optimizer.moment_dtype == "float32":
        return own
    return own * 12 // (4 + 2 * WIDTHS[optimizer.moment_dtype])


def _of_host(static: Static) -> int:
    return static.optimizer + static.host_optimizer + static.weights


def _host(settings: Settings, static: Static) -> dict[str, int]:
    """Bytes of one node."""
    if settings.cluster.device == "cpu":
        return {}
    ranks, offload = min(settings.slurm.tasks_per_node, settings.ranks), settings.learner.offload
    states = static.host_optimizer + (static.optimizer if offload != "none" else 0)
    reference = static.weights if settings.regulariser.kl > 0 else 0
    return {
        "processes": ranks * HOST_PROCESS,
        "optimizer": ranks * states,
        "weights": ranks * (static.weights if offload == "all" else 0),
        "reference model": ranks * reference,
        "checkpoint being written": ranks * _saved(settings, static),
    }
