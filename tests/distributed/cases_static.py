"""Cases for what the planner says that ranks hold, against ranks that hold it (tests/test_static.py)."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from a3po_megatron.learner.learner import Learner
from a3po_megatron.learner.micro_batch import micro_batch
from a3po_megatron.model.read import read_facts
from a3po_megatron.preflight.activations import layer
from a3po_megatron.preflight.memory import share_of
from a3po_megatron.preflight.shape import shape_of
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
        ("demo", 1, 2, {}),  # as configs/demo.yaml has it
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


def kept(ranks: CaseRanks) -> dict[str, Any]:
    """Bytes that the backward of one layer waits for, measured and planned: of two depths, the difference."""
    tensor = ranks.world
    found: dict[str, Any] = {}
    for kind, parallel in (("qwen3", {}), ("qwen3", {"sequence": True}), ("qwen3_moe", {"sequence": True})):
        if tensor == 1 and parallel:
            parallel = {}
        for recompute in ("none", "selective", "full"):
            sizes = []
            for depth in (2, 4):
                folder = ranks.folder / f"{kind}_{depth}"
                cluster, facts = ranks.arrange(tensor, **parallel), read_facts(folder)
                options = settings(
                    folder,
                    tensor,
                    1,
                    parallel=parallel,
                    learner={"recompute": recompute, "micro_batch_tokens": TOKENS},
                    rollout={"max_prompt_tokens": 1, "max_tokens": TOKENS - 1},
                )
                sizes.append(_saved(Learner(cluster, facts, options), TOKENS))
            planned = layer(
                shape_of(facts, options.learner, on_gpu=False), share_of(facts, options), dense=facts.experts is None
            )
            found[f"{kind} tp{tensor} {parallel} {recompute}"] = [(sizes[1] - sizes[0]) / 2, planned.total]
    return found


TOKENS = 96


def _saved(learner: Learner, tokens: int) -> int:
    """Bytes of all storages that a forward keeps for its backward, parameters aside."""
    batch = micro_batch([([1] * 8, [2] * (tokens - 7))], [0])
    own = {p.untyped_storage().data_ptr() for p in learner.parameters().values()}
    storages: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage  # held, so that nobody else gets its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = learner.chunks[0](batch.tokens, batch.positions, None, packed_seq_params=batch.packing)
    size = sum(storage.nbytes() for storage in storages.values())
    del output
    return size
