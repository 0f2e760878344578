"""`parallel.layout: auto`: the smallest layout that fits.

Tried in this order, with sizes as sizes.py fills them in; the first whose every phase leaves the band free is taken:

    ranks that share a model     few before many: tensor x context x pipeline
    experts                      over few ranks before many; each expert is whole
    of equally many              tensor parallelism, within a node; then pipeline; then context
    engine                       rollout.tensor as given, then doubled up to a node

It is the smallest in memory, not the fastest: nothing here knows a second.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from ..config import Config
from ..errors import RequestError
from ..model.facts import ModelFacts
from ..model.layout import check_layout, layout_of
from ..ranks.backend import Backend
from ..ranks.topology import topology_of
from .gpus import Gpu
from .memory import Phase, memory_of
from .sizes import Sized
from .verdict import BAND

POWERS = tuple(2**power for power in range(8))


def with_layout(config: Config, facts: ModelFacts, backend: Backend, ranks: int | None, gpu: Gpu | None) -> Config:
    """Returns the configuration with a layout in the place of `auto`. Raises RequestError where none fits."""
    if config.parallel.layout == "given":
        return config
    if gpu is None or ranks is None:
        raise RequestError("parallel.layout: auto plans GPUs' memory, and this run has none: give the layout")
    room, nearest = (1 - BAND) * gpu.memory, float("inf")
    for parallel in _candidates(config, facts, ranks):
        for tensor in _engines(config, facts, ranks):
            asked = config.model_copy(
                update={
                    "parallel": config.parallel.model_copy(update=parallel),
                    "rollout": config.rollout.model_copy(update={"tensor": tensor}),
                }
            )
            if not _is_possible(asked, facts, ranks):
                continue
            sized = Sized(asked, facts, backend, ranks, gpu)
            memory = memory_of(facts, sized.settings, gpu.hopper)
            most = max(memory.total(phase) for phase in Phase)
            if most <= room:
                return asked
            nearest = min(nearest, most)
            if max(memory.total(phase) for phase in (Phase.SCORE, Phase.UPDATE)) > room:
                break  # the learner's memory does not depend on the engine's ranks
    raise RequestError(
        f"parallel.layout: auto: no layout of {ranks} {gpu.name} fits; the nearest needs {nearest / 2**30:.1f} GiB of "
        f"{room / 2**30:.1f} (with the band left free): ask for more nodes"
    )


def _candidates(config: Config, facts: ModelFacts, ranks: int) -> Iterator[dict[str, Any]]:
    node = config.slurm.ranks_per_node()
    experts = [1] if facts.experts is None else [n for n in POWERS if facts.experts.count % n == 0]
    sizes = [n for n in POWERS if n <= ranks]
    shapes = itertools.product([n for n in sizes if n <= node], sizes, sizes, experts)
    for tensor, pipeline, context, expert in sorted(shapes, key=lambda s: (s[0] * s[1] * s[2], s[3], s[2], s[1])):
        if ranks % (tensor * pipeline * context) == 0 and expert <= ranks // pipeline:
            yield {
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
