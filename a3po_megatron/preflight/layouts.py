"""`parallel.layout: auto`: the smallest layout that fits.

Tried in this order, with sizes as sizes.py fills them in; the first whose every phase leaves the band free is taken,
else the first that is tight:

    ranks that share a model     few before many: tensor x context x pipeline
    experts                      over few ranks before many; each expert is whole
    of equally many              tensor parallelism, within a node; then pipeline; then context
    engine                       rollout.tensor as given, then doubled up to a node, until an eighth of the device is
                                 left for its cache; else the one that leaves most

It is the smallest in memory, not the fastest: nothing here knows a second.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from ..config import AdamOptions, Config, ParallelOptions, resolve
from ..config.slurm_forms import bytes_of_memory
from ..errors import RequestError
from ..model.facts import ModelFacts
from ..model.layout import check_layout, layout_of
from ..model.precision import is_fp8
from ..ranks.backend import Backend
from ..ranks.topology import topology_of
from .gpus import Gpu
from .memory import Phase, elements_of, least_of_engine, memory_of, needed
from .overhead import ASLEEP, CONTEXT, NODE
from .sizes import RECOMPUTE, Sized, with_sizes
from .verdict import BAND

PARAMETER, STATE = 6, 12  # bytes of an element: with its gradient; of masters and moments
AUTO, TOKENS = "parallel.layout: auto", "learner.micro_batch_tokens"
PIPELINE_RANKS, CONTEXT_RANKS = 32, 8  # at most: beyond that most of a pipeline waits, and of attention travels
POWERS = tuple(2**power for power in range(8))

# One that does not fit: how well it is known (planned in full, by the least that an update needs, by a bound), what it
# needs, and itself
_Layout = tuple[int, float, Config]


def with_layout(
    config: Config, facts: ModelFacts, backend: Backend, ranks: int | None, gpu: Gpu
) -> tuple[Config, dict[str, str]]:
    """Returns the configuration with a layout in the place of `auto`, and why it is that one: the first that fits, else
    the first that is tight, else the one that comes nearest. Raises RequestError where no layout is possible."""
    if ranks is None:
        raise RequestError(f"{AUTO} takes a number of GPUs, and there is none: submit the run, or give the layout")
    search = _Search(config, facts, backend, ranks, gpu)
    for room, how in (((1 - BAND) * gpu.memory, "fits"), (gpu.memory, "is tight")):
        if (found := search.first(room)) is not None:
            return found, _reasons(config, found, f"of the smallest layout that {how}")
    if search.nearest is None:
        raise RequestError(f"{AUTO}: this model divides by no layout of {ranks} ranks")
    found = search.nearest[2]
    return found, _reasons(config, found, "of the layout that comes nearest: none fits")


class _Search:
    def __init__(self, config: Config, facts: ModelFacts, backend: Backend, ranks: int, gpu: Gpu) -> None:
        self._config, self._facts, self._backend, self._ranks, self._gpu = config, facts, backend, ranks, gpu
        self._node = bytes_of_memory(config.slurm.memory) or NODE
        self._elements = elements_of(facts)
        self.nearest: _Layout | None = None  # of those that were looked at

    def first(self, room: float) -> Config | None:
        """Returns the first layout that needs no more than `room`. What is quickly known comes first."""
        engines = _engines(self._config, self._facts, self._ranks)
        for parallel in _candidates(self._config, self._facts, self._ranks):
            asked = [_with(self._config, parallel, tensor) for tensor in engines]
            asked = [each for each in asked if _is_possible(each, self._facts, self._ranks)]
            if not asked:
                continue
            least = _least(self._elements, parallel, self._ranks, self._config)
            known = 2
            if least <= room:
                least, known = self._least_update(asked[0], room), 1
            if least > room:
                self._keep((known, least, asked[-1]))
                continue
            fitting = [each for each in asked if self._alone(each.rollout.tensor) <= room]
            if not fitting:  # in no other layout either
                self._keep((1, self._alone(asked[-1].rollout.tensor), asked[-1]))
                return None
            if (found := self._with_engine(fitting, room)) is not None:
                return found
        return None

    def _with_engine(self, asked: Sequence[Config], room: float) -> Config | None:
        """The first whose cache is an eighth of the device, else the one with the largest; None: none has room."""
        best: tuple[int, Config] | None = None
        for each in asked:
            sized = Sized(each, self._facts, self._backend, self._ranks, self._gpu)
            memory = memory_of(self._facts, sized.settings, self._gpu.hopper)
            most = max(memory.total(phase) for phase in Phase)
            if most > room or sum(memory.host.values()) > self._node:
                self._keep((0, most, each))
                continue
            cache = sized.settings.rollout.kv_cache_bytes
            best = max(best or (0, each), (cache, each), key=lambda found: found[0])
            if self._config.rollout.kv_cache_bytes or cache >= self._gpu.memory // 8:
                break
        return None if best is None else best[1]

    def _keep(self, other: _Layout) -> None:
        self.nearest = min(self.nearest or other, other, key=lambda each: each[:2])

    @functools.cache  # noqa: B019  a search lives as long as its answer takes
    def _alone(self, tensor: int) -> int:
        """What an engine of so many ranks needs by itself."""
        config = self._config.model_copy(update={"parallel": ParallelOptions()})
        return least_of_engine(self._facts, resolve(_with(config, {}, tensor), self._facts, self._backend, self._ranks))

    def _least_update(self, config: Config, room: float) -> float:
        """Returns the least that an update needs, whatever is computed again and however samples are packed, or
        something that `room` holds: with FP8 larger micro-batches, which are fewer, keep fewer quantised weights."""
        settings = resolve(config, self._facts, self._backend, self._ranks)
        longest = settings.rollout.longest
        least = math.inf
        for times in (1, 2, 4) if is_fp8(settings.learner.precision) else (1,):
            for kind in reversed(RECOMPUTE):  # the last one is nearly always the least
                each = with_sizes(config, settings, {TOKENS: times * longest, "learner.recompute": kind})
                least = min(least, needed(self._facts, each, [Phase.UPDATE], self._gpu.hopper))
                if least <= room:
                    return least
        return least


def _with(config: Config, parallel: dict[str, Any], tensor: int) -> Config:
    return config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update=parallel),
            "rollout": config.rollout.model_copy(update={"tensor": tensor}),
        }
    )


FILLED = ("tensor", "pipeline", "context", "expert", "expert_tensor", "sequence")


def _reasons(config: Config, found: Config, why: str) -> dict[str, str]:
    reasons = {f"parallel.{name}": why for name in FILLED if getattr(found.parallel, name) is not None}
    if found.rollout.tensor != config.rollout.tensor:
        reasons["rollout.tensor"] = f"{why}: over fewer ranks an engine's weights leave less room"
    return reasons


def _least(elements: tuple[int, int], parallel: dict[str, Any], ranks: int, config: Config) -> float:
    """Returns less than a rank needs at any time of an update: its parameters in the mean, with gradients and Adam's
    state, and what is there without any. It costs nothing to know."""
    (dense, experts), tensor, pipeline = elements, parallel["tensor"], parallel["pipeline"]
    spread = parallel["expert"] * (parallel["expert_tensor"] or tensor)
    own = dense / (tensor * pipeline) + experts / (spread * pipeline)
    adam = config.optimizer
    plain = isinstance(adam, AdamOptions) and adam.moment_dtype == "float32" and not adam.on_host
    state = STATE if plain else 0
    return PARAMETER * own + state * (dense + experts) / ranks + CONTEXT + ASLEEP


def _candidates(config: Config, facts: ModelFacts, ranks: int) -> Iterator[dict[str, Any]]:
    node = config.slurm.ranks_per_node()
    experts = [1] if facts.experts is None else [n for n in POWERS if facts.experts.count % n == 0]
    sizes = [n for n in POWERS if n <= ranks]
    stages = [n for n in sizes if n <= min(facts.layers, PIPELINE_RANKS)]
    shapes = itertools.product(
        [n for n in sizes if n <= node], stages, [n for n in sizes if n <= CONTEXT_RANKS], experts
    )
    for tensor, pipeline, context, expert in sorted(shapes, key=lambda s: (s[0] * s[1] * s[2], s[3], s[2], s[1])):
        if ranks % (tensor * pipeline * context) == 0 and expert <= ranks // pipeline:
            yield {
                "layout": "given",
                "tensor": tensor,
                "pipeline": pipeline,
                "context": context,
                "expert": expert,
                "expert_tensor": 1 if expert > 1 else None,
                "sequence": tensor > 1,
            }


def _engines(config: Config, facts: ModelFacts, ranks: int) -> list[int]:
    node = config.slurm.ranks_per_node()
    return [n for n in POWERS if config.rollout.tensor <= n <= min(node, ranks) and facts.heads % n == 0]


def _is_possible(config: Config, facts: ModelFacts, ranks: int) -> bool:
    """Whether model and ranks divide by the layout."""
    tensor, expert = config.rollout.tensor, config.rollout.expert
    if max(facts.kv_heads, tensor) % min(facts.kv_heads, tensor):
        return False
    if facts.experts is not None and ((expert == 1 and facts.experts.ffn % tensor) or expert not in (1, tensor)):
        return False
    try:
        topology_of(config.parallel, tensor, ranks)
        check_layout(facts, layout_of(config.parallel))
    except RequestError:
        return False
    return True
