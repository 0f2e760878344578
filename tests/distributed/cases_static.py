"""Cases for what the planner says that ranks hold, against ranks that hold it (tests/test_static.py)."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from a3po_megatron.learner.learner import Learner
from a3po_megatron.model.read import read_facts
from a3po_megatron.preflight.static import static_of
from tests.distributed.cases_learner import settings
from tests.harness.ranks import CaseRanks

# World size → (model, tensor, data, further options of the layout)
LAYOUTS: dict[int, list[tuple[str, int, int, dict[str, Any]]]] = {
    1: [("qwen3", 1, 1, {}), ("qwen2", 1, 1, {}), ("qwen3_moe", 1, 1, {})],
    2: [
        ("qwen3", 2, 1, {}),
        ("qwen2", 1, 2, {}),
        ("qwen3", 1, 1, {"pipeline": 2}),
        ("qwen3", 1, 1, {"context": 2}),
        ("qwen3_moe", 1, 2, {"expert": 2}),
    ],
    4: [
        ("qwen3_deep", 1, 2, {"pipeline": 2, "virtual": 2}),
        ("qwen2", 2, 2, {"sequence": True}),
        ("qwen3_moe", 2, 2, {"expert": 2, "sequence": True}),
        ("qwen3_moe", 2, 2, {"expert": 4, "expert_tensor": 1, "sequence": True}),
    ],
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adam": {},
    "whole": {"distributed": False},
    "sgd": {"name": "sgd", "distributed": False, "momentum": 0.9},
}


def measured(ranks: CaseRanks) -> dict[str, Any]:
    """What every layout's rank holds, and what is planned for it."""
    found: dict[str, Any] = {}
    for kind, tensor, data, parallel in LAYOUTS[ranks.world]:
        cluster, facts = ranks.arrange(tensor, data=data, **parallel), read_facts(ranks.folder / kind)
        for dtype in ("float32", "bfloat16"):
            for name, optimizer in OPTIMIZERS.items():
                options = settings(
                    ranks.folder / kind, tensor, data, parallel=parallel, model={"dtype": dtype}, optimizer=optimizer
                )
                learner = Learner(cluster, facts, options)
                buffers = [b for chunk in learner.chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
                weights = [b.param_data for b in buffers if b.param_data is not None] or [
                    p.data for p in learner.parameters().values()
                ]
                holds = {
                    "weights": sum(tensor.nbytes for tensor in weights),
                    "gradients": sum(b.grad_data.nbytes for b in buffers),
                    "optimizer": sum(tensor.nbytes for tensor in learner.arena._own_states()),
                    "host_optimizer": 0,
                }
                planned = asdict(static_of(facts, options, cluster.rank))
                found[f"{kind} tp{tensor} dp{data} {parallel} {dtype} {name}"] = [holds, planned]
    return found
