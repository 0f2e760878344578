"""One rank of a run of any size, built for real but without its memory: on torch's meta device, in a process group that
only says that it is there.

The model comes from model/build.py, the gradient buffers and the optimizer from Megatron, as in a run; what they hold
is compared with what static.py plans. Transformer Engine's layers need a GPU: the local ones have the same parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..config import AdamOptions, Settings
from ..errors import RequestError
from ..model.facts import ModelFacts
from ..ranks.backend import CPU, Backend
from ..ranks.topology import Topology, topology_of
from ..rollout.engine import local_experts
from .memory import memory_of
from .plan import Plan
from .static import static_of
from .traffic import collectives

if TYPE_CHECKING:
    import torch

GROWTH = (8, 64, 256, 1024)  # ranks


def built_rank(facts: ModelFacts, plan: Plan, rank: int) -> dict[str, Any]:
    """Returns what a rank holds, in bytes, planned and built; what it sends in a step; and whether all ranks plan the
    same publish."""
    settings = plan.settings
    planned, built = static_of(facts, settings, rank), _built(facts, settings, rank)
    topology = topology_of(settings.parallel, settings.rollout.tensor, settings.ranks)
    digests = _digests(facts, settings, topology)
    return {
        "rank": rank,
        "world": topology.world,
        **{name: {"planned": getattr(planned, name), "built": size} for name, size in built.items()},
        "collectives": [vars(each) for each in collectives(facts, settings, rank)],
        "publish": {"replicas": len(topology.groups("replica")), "digests": digests},
        "growth": growth(facts, settings),
    }


def number_of(which: str, world: int) -> int:
    """Returns the rank that is meant by first, middle, last or a number. Raises RequestError."""
    named = {"first": 0, "middle": world // 2, "last": world - 1}
    number = named.get(which, int(which) if which.isdecimal() else world)
    if number >= world:
        raise RequestError(f"--build {which}: expected first, middle, last, or a rank from 0 to {world - 1}")
    return number


def _built(facts: ModelFacts, settings: Settings, rank: int) -> dict[str, int | None]:
    """Bytes of what it holds; None where it takes a GPU's packages to build."""
    from ..compat import prepare

    prepare()
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from ..compat.megatron import prime
    from ..compat.megatron_cpu import on_device
    from ..learner.optimizer import optimizer_of
    from ..learner.overlap import data_parallel
    from ..model.build import build_model, transformer_config
    from ..model.layout import layout_of
    from ..ranks.groups import megatron_groups

    parallel, options = settings.parallel, settings.optimizer
    precision = {"precision": "bf16" if settings.model.dtype == "bfloat16" else "fp32"}
    local = {"expert_dispatcher": "alltoall", "fused_rope": False, "fused_swiglu": False, "bf16_layers": (0, 0)}
    learner = settings.learner.model_copy(update=precision | local)
    dist.init_process_group("fake", rank=rank, world_size=settings.ranks, store=FakeStore())
    try:
        megatron_groups(parallel, settings.trainer.seed, gloo=False)
        config = transformer_config(facts, parallel, settings.model, settings.megatron, learner)
        with torch.device("meta"), on_device("meta"):
            chunks = build_model(facts, layout_of(parallel), config, _Meta(**vars(CPU)))
            wrapped = data_parallel(chunks, config, learner, settings.optimizer.distributed)
            # Megatron's precision-aware optimizer, on the host too, is Transformer Engine's.
            plain = not isinstance(options, AdamOptions) or (options.moment_dtype == "float32" and not options.on_host)
            optimizer = optimizer_of(wrapped, options, config.params_dtype, gloo=False) if plain else None
            if optimizer is not None:
                prime(optimizer)
        buffers = [buffer for chunk in wrapped for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        weights = [buffer.param_data for buffer in buffers if buffer.param_data is not None]
        weights = weights or [p.data for chunk in wrapped for p in chunk.parameters()]
        return {
            "weights": sum(tensor.nbytes for tensor in weights),
            "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
            "optimizer": None if optimizer is None else _states(optimizer, weights),
        }
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _states(optimizer: Any, weights: Sequence[Any]) -> int:
    """Bytes of masters and moments that live in no parameter's storage; a step counter is no tensor of theirs."""
    parameters = {tensor.untyped_storage()._cdata for tensor in weights}
    found: dict[int, Any] = {}
    for each in getattr(optimizer, "chained_optimizers", [optimizer]):
        if each.optimizer is None:  # a rank without such parameters
            continue
        for group in each.optimizer.param_groups:
            for parameter in group["params"]:
                state = each.optimizer.state[parameter]
                for tensor in (parameter, *(value for value in state.values() if hasattr(value, "nbytes"))):
                    if tensor.dim() and tensor.untyped_storage()._cdata not in parameters:
                        found[id(tensor)] = tensor
    return sum(tensor.nbytes for tensor in found.values())


class _Meta(Backend):
    """As on a CPU, with nothing in it."""

    def local(self) -> torch.device:
        import torch

        return torch.device("meta")


def _digests(facts: ModelFacts, settings: Settings, topology: Topology) -> list[str]:
    """Of the publish plans of all replicas, each once: ranks of a replica have the same."""
    from ..model.cut import pieces, tensors
    from ..model.layout import layout_of
    from ..weights.route import WIDTHS, plan

    layout, rollout = layout_of(settings.parallel), settings.rollout
    by_rank = [pieces(facts, layout, place) for place in layout.places()]
    count = facts.experts.count if facts.experts else 0
    kinds = {
        tuple(local_experts(rank, rollout.tensor, rollout.expert, count) for rank in replica)
        for replica in topology.groups("replica")
    }
    names, itemsize = list(tensors(facts)), WIDTHS[settings.model.dtype]
    return [
        plan(layout, by_rank, names, settings.publish.bucket_bytes, itemsize, experts).digest()
        for experts in sorted(kinds)
    ]


def growth(facts: ModelFacts, settings: Settings) -> list[dict[str, int]]:
    """Returns what a rank holds and talks to where the same layout has more and more data-parallel ranks."""
    parallel, rows = settings.parallel, []
    for world in GROWTH:
        model = parallel.ranks_of(1)
        data = world // model
        if (
            world % model
            or world % settings.rollout.tensor
            or (parallel.context * data) % (parallel.stage_ranks() // parallel.tensor)
        ):
            continue
        rollout = settings.rollout.model_copy(update={"data": world // settings.rollout.tensor})
        other = settings.model_copy(update={"parallel": parallel.model_copy(update={"data": data}), "rollout": rollout})
        topology = topology_of(other.parallel, rollout.tensor, world)
        memory = memory_of(facts, other)
        rows.append(
            {
                "ranks": world,
                "optimizer": static_of(facts, other, 0).optimizer,
                "most": max(memory.total(phase) for phase in memory.phases),
                "gradient_ranks": topology.context * data,
                "decision": 2 * max(1, (world - 1).bit_length()),
            }
        )
    return rows
