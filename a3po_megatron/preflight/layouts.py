"""`parallel.layout: auto`: the smallest layout that fits.

Tried in this order, with sizes as sizes.py fills them in; the first whose every phase leaves the band free is taken:

    ranks that share a model     few before many: tensor x context x pipeline
    experts                      over few ranks before many; each expert is whole
    of equally many              tensor parallelism, within a node; then pipeline; then context
    engine                       rollout.tensor as given, then doubled up to a node, until an eighth of the device is
                                 left for its cache; else the one that leaves most

It is the smallest in memory, not the fastest: nothing here knows a second.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from ..config import AdamOptions, Config, resolve
from ..config.resolve import SIZES
from ..config.slurm_forms import bytes_of_memory
from ..errors import RequestError
from ..model.facts import ModelFacts
from ..model.layout import check_layout, layout_of
from ..ranks.backend import Backend
from ..ranks.topology import topology_of
from .gpus import Gpu
from .memory import Phase, elements_of, least_of_engine, memory_of, needed
from .overhead import ASLEEP, CONTEXT, NODE
from .sizes import Sized
from .verdict import BAND

PARAMETER, STATE = 6, 12  # bytes of an element: with its gradient; of masters and moments
AUTO = "parallel.layout: auto"
PIPELINE_RANKS, CONTEXT_RANKS = 32, 8  # at most: beyond that most of a pipeline waits, and of attention travels
POWERS = tuple(2**power for power in range(8))

# One that does not fit: whether it is known by a bound alone, what it needs, and itself
_Layout = tuple[bool, float, Config]


def with_layout(
    config: Config, facts: ModelFacts, backend: Backend, ranks: int | None, gpu: Gpu
) -> tuple[Config, dict[str, str]]:
    """Returns the configuration with a layout in the place of `auto`, and why it is that one: the first that fits, else
    the one that needs least. Raises RequestError where no layout is possible."""
    if ranks is None:
        raise RequestError(f"{AUTO} takes a number of GPUs, and there is none: submit the run, or give the layout")
    room, node = (1 - BAND) * gpu.memory, bytes_of_memory(config.slurm.memory) or NODE
    dense, experts = elements_of(facts)
    engines = _engines(config, facts, ranks)
    alone: dict[int, int] = {}  # what an engine of so many ranks needs by itself
    nearest: _Layout | None = None
    for parallel in _candidates(config, facts, ranks):
        asked = [each for tensor in engines if _is_possible(each := _with(config, parallel, tensor), facts, ranks)]
        if not asked:
            continue
        # What is quickly known comes first.
        least, exact = _least(dense, experts, parallel, ranks, config), False
        if least <= room:
            least, exact = _least_update(asked[0], facts, backend, ranks, gpu), True
        if least > room:
            nearest = _nearer(nearest, (not exact, least, asked[-1]))
            continue
        for each in asked:
            if each.rollout.tensor not in alone:
                alone[each.rollout.tensor] = least_of_engine(facts, resolve(each, facts, backend, ranks))
        fitting = [each for each in asked if alone[each.rollout.tensor] <= room]
        if not fitting:  # in no other layout either
            return asked[-1], _reasons(config, asked[-1], "of the smallest layout in which the learner fits: no engine")
        best: tuple[int, Config] | None = None
        for each in fitting:
            sized = Sized(each, facts, backend, ranks, gpu)
            memory = memory_of(facts, sized.settings, gpu.hopper)
            most = max(memory.total(phase) for phase in Phase)
            if most > room or sum(memory.host.values()) > node:
                nearest = _nearer(nearest, (False, most, each))
                continue
            cache = sized.settings.rollout.kv_cache_bytes
            best = max(best or (0, each), (cache, each), key=lambda found: found[0])
            if config.rollout.kv_cache_bytes or cache >= gpu.memory // 8:
                break
        if best is not None:
            return best[1], _reasons(config, best[1], "of the smallest layout that fits")
    if nearest is None:
        raise RequestError(f"{AUTO}: this model divides by no layout of {ranks} ranks")
    return nearest[2], _reasons(config, nearest[2], "of the layout that needs least: none fits")


def _nearer(
    nearest: tuple[bool, float, Config] | None, other: tuple[bool, float, Config]
) -> tuple[bool, float, Config]:
    """Of two layouts that do not fit: whether that is a bound alone, what it needs, and itself."""
    return min(nearest or other, other, key=lambda each: each[:2])


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
        reasons["rollout.tensor"] = "so that an engine's weights leave room for its cache"
    return reasons


def _least_update(config: Config, facts: ModelFacts, backend: Backend, ranks: int, gpu: Gpu) -> float:
    """Returns what an update needs that recomputes as much as it may, on one sample at a time."""
    sizes = SIZES | {"learner.recompute": "full", "learner.micro_batch_tokens": 1}
    return needed(facts, resolve(config, facts, backend, ranks, sizes), [Phase.UPDATE], gpu.hopper)


def _least(dense: int, experts: int, parallel: dict[str, Any], ranks: int, config: Config) -> float:
    """Returns less than a rank needs at any time of an update: its parameters in the mean, with gradients and Adam's
    state, and what is there without any. It costs nothing to know."""
    tensor, pipeline = parallel["tensor"], parallel["pipeline"]
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
