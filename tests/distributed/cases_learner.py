"""Cases for the learner on real ranks, against plain PyTorch on the HF model in float64 (tests/test_learner.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from a3po_megatron.algorithm.advantage import assemble
from a3po_megatron.algorithm.shaping import shape
from a3po_megatron.batch import Batch, Collected
from a3po_megatron.config import Config
from a3po_megatron.learner.learner import Learner
from a3po_megatron.model.family import read_family
from a3po_megatron.model.layout import hf_tensors
from tests.distributed.runner import Case, Ranks
from tests.tiny import hf_logprobs, hf_model, hf_tensors_of, literal_token_weights, make_collected

TEMPERATURE, STEP, LR = 0.8, 20, 1e-2


def settings(folder: Path, tensor: int, data: int, **changes: dict[str, Any]) -> Config:
    return Config.model_validate(
        {
            "model": {"path": str(folder)},
            "data": {"path": "builtin:arithmetic"},
            "parallel": {"tensor": tensor, "data": data, **changes.get("parallel", {})},
            "rollout": {"temperature": TEMPERATURE},
            "optimizer": {"lr": LR, "weight_decay": 0.0, **changes.get("optimizer", {})},
            # Small, so that every mini-batch takes several micro-batches.
            "learner": {"micro_batch_tokens": changes.get("learner", {}).get("micro_batch_tokens", 64)},
            "trainer": {"steps": 10, "mini_batches": 1},
        }
    )


def literal_old(batch: Batch) -> torch.Tensor:
    """Old log-probs away from the current ones, so that ratios clip on either side and the dual clip bites."""
    generator = torch.Generator().manual_seed(3)
    return batch.rollout_logprobs + 0.4 * torch.randn(len(batch.rollout_logprobs), generator=generator)


def literal_loss(model: torch.nn.Module, collected: Collected, old: list[torch.Tensor]) -> torch.Tensor:
    """The paper's objective, rollout by rollout and token by token, from the HF model alone."""
    rollouts = [(group, r) for group in collected.groups for r in group.rollouts]
    positive = [r.verdict.outcome == "correct" for _, r in rollouts]
    weights = literal_token_weights([o.tolist() for o in old], positive, STEP, 0.2, 2.0, 0.005)
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for (group, rollout), old_logprobs, weight in zip(rollouts, old, weights, strict=True):
        rewards = torch.tensor([r.reward for r in group.rollouts], dtype=torch.float64)
        advantage = (rollout.reward - rewards.mean()) / (rewards.std(correction=1) + 1e-6)
        logprobs = hf_logprobs(model, rollout.prompt.tokens, rollout.tokens, TEMPERATURE)
        sampled = torch.from_numpy(rollout.logprobs).double()
        for t in range(len(rollout.tokens)):
            shaped = weight[t] * advantage
            ratio = torch.exp(logprobs[t] - old_logprobs[t].double())
            surrogate = torch.min(ratio * shaped, ratio.clamp(0.8, 1.28) * shaped)
            if shaped < 0:
                surrogate = torch.max(surrogate, 3.0 * shaped)
            correction = torch.exp(old_logprobs[t].double() - sampled[t]).clamp(max=2.0)
            total = total - surrogate * correction
            tokens += 1
    return total / tokens


def share(collected: Collected, replica: int, replicas: int) -> Collected:
    """What one replica's engines would have sampled."""
    return Collected(collected.groups[replica::replicas], [], collected.accepted, {})


def batch_of(collected: Collected, cluster: Any) -> Batch:
    """The replica's batch, with the literal old log-probs of the whole batch cut to it."""
    whole = assemble(collected, Config.model_fields["advantage"].default, 1)
    old = dict(zip((r.name for r in whole.rollouts), literal_old(whole).split(whole.lengths.tolist()), strict=True))
    batch = assemble(
        share(collected, cluster.coordinates.data, cluster.data), Config.model_fields["advantage"].default, 1
    )
    batch.old_logprobs = torch.cat([old[r.name] for r in batch.rollouts])
    batch.entropy = torch.zeros_like(batch.old_logprobs)
    return shape(batch, STEP, Config.model_fields["shaping"].default)


def as_hf(learner: Learner, values: dict[tuple[int, str], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Per-parameter tensors of all ranks of a replica, laid out as HF tensors."""
    group = learner.cluster.replica_group
    gathered: list[Any] = [None] * group.size()
    mine = [(p, values[p.key].detach().narrow(p.dim, p.offset, p.length).clone()) for p in learner.pieces if p.owner]
    dist.all_gather_object(gathered, mine, group=group)
    whole: dict[str, torch.Tensor] = {}
    for piece, part in (item for rank in gathered for item in rank):
        target = whole.setdefault(piece.tensor, torch.full(piece.shape, float("nan")))
        target.narrow(piece.dim, piece.start, piece.length).copy_(part)
    return whole


def one_update(ranks: Ranks, kind: str, tensor: int, data: int, **parallel: Any) -> dict[str, float]:
    """Differences of one layout's update from the reference."""
    folder = ranks.folder / kind
    layout = {name: value for name, value in parallel.items() if name != "micro_batch_tokens"}
    cluster = ranks.arrange(tensor, data=data, **layout)
    family = read_family(folder)
    collected = make_collected(groups=5, size=4)
    reference = hf_model(folder)
    whole = assemble(collected, Config.model_fields["advantage"].default, 1)
    old = list(literal_old(whole).split(whole.lengths.tolist()))
    loss = literal_loss(reference, collected, old)
    loss.backward()
    grads = hf_tensors_of({name: p.grad for name, p in reference.named_parameters() if p.grad is not None})
    norm = torch.sqrt(sum(g.square().sum() for g in grads.values()))

    limit = {"micro_batch_tokens": parallel.pop("micro_batch_tokens", 64)}

    def learner_with(**optimizer: Any) -> Learner:
        options = settings(folder, tensor, data, optimizer=optimizer, parallel=parallel, learner=limit)
        return Learner(cluster, family, options)

    results: dict[str, float] = {}
    # Gradients and parameters: SGD, where an error is not normalised away, without the distributed optimizer.
    learner = learner_with(name="sgd", distributed=False, clip_grad=0.0)
    scored = learner.score(batch_of(collected, cluster))
    with torch.no_grad():
        exact = torch.cat([hf_logprobs(reference, r.prompt.tokens, r.tokens, TEMPERATURE) for r in scored.rollouts])
    results["score"] = float((scored.old_logprobs - exact).abs().max())
    stats = learner.update(batch_of(collected, cluster))
    results["loss"] = abs(stats["learner/loss"] - float(loss))
    results["norm_sgd"] = abs(stats["policy/grad_norm"] / float(norm) - 1)
    ours = as_hf(learner, {key: p.main_grad for key, p in learner.parameters().items()})
    results["missing"] = len(hf_tensors(family).keys() ^ ours.keys())
    # An expert that no token chose has a gradient of exactly 0.
    results["gradient"] = max(
        float((ours[n] - g).abs().max() / g.abs().max().clamp(min=1e-9)) for n, g in grads.items()
    )
    moved = as_hf(learner, learner.parameters())
    with torch.no_grad():
        wanted = hf_tensors_of({name: p - LR * p.grad for name, p in reference.named_parameters()})
    results["parameter"] = max(float((moved[n] - w).abs().max()) for n, w in wanted.items())
    # The distributed optimizer: clipping and a second step.
    learner = learner_with()
    results["norm"] = abs(learner.update(batch_of(collected, cluster))["policy/grad_norm"] / float(norm) - 1)
    second = learner.update(batch_of(collected, cluster))["learner/loss"]
    adam = torch.optim.AdamW(reference.parameters(), lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
    adam.step()
    results["second_loss"] = abs(second - float(literal_loss(reference, collected, old)))
    return results


def whole_steps(ranks: Ranks) -> dict[str, Any]:
    """Score, shape and update in one go, for layouts of this many ranks: errors against the literal step, and what
    each rollout's tokens were given."""
    folder, found = ranks.folder / "qwen3", {}
    family, collected = read_family(folder), make_collected(groups=5, size=4)
    reference = hf_model(folder)
    rollouts = [r for group in collected.groups for r in group.rollouts]
    with torch.no_grad():
        exact = [hf_logprobs(reference, r.prompt.tokens, r.tokens, TEMPERATURE).float() for r in rollouts]
    loss = literal_loss(reference, collected, exact)
    loss.backward()
    grads = hf_tensors_of({name: p.grad for name, p in reference.named_parameters() if p.grad is not None})
    for tensor, context, pipeline, data in STEPS[ranks.world]:
        cluster = ranks.arrange(tensor, context=context, pipeline=pipeline, data=data)
        parallel = {"context": context, "pipeline": pipeline}
        options = settings(folder, tensor, data, parallel=parallel, optimizer={"name": "sgd", "distributed": False})
        learner = Learner(cluster, family, options)
        batch = learner.score(
            assemble(
                share(collected, cluster.coordinates.data, cluster.data), Config.model_fields["advantage"].default, 1
            )
        )
        shape(batch, STEP, Config.model_fields["shaping"].default)
        stats = learner.update(batch)
        ours = as_hf(learner, {key: p.main_grad for key, p in learner.parameters().items()})
        # main_grad holds the clipped gradient: what was clipped away is the norm's.
        scale = max(1.0, stats["policy/grad_norm"])
        errors = [float((ours[n] * scale - g).abs().max() / g.abs().max().clamp(min=1e-9)) for n, g in grads.items()]
        pieces = zip(
            batch.rollouts,
            *(v.split(batch.lengths.tolist()) for v in (batch.old_logprobs, batch.token_weights)),
            strict=True,
        )
        found[f"tp{tensor} cp{context} pp{pipeline} dp{data}"] = {
            "loss": abs(stats["learner/loss"] - float(loss)),
            "gradient": max(errors),
            "tokens": {r.name: [old.tolist(), weights.tolist()] for r, old, weights in pieces},
        }
    return found


# World size → (tensor, context, pipeline, data)
STEPS = {
    1: [(1, 1, 1, 1)],
    2: [(2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2)],
    4: [(2, 2, 1, 1), (1, 2, 1, 2), (1, 2, 2, 1), (1, 4, 1, 1)],
}


class Broken(Learner):
    """A learner whose gradient comes out as NaN, on rank 1 and in one mini-batch only."""

    breaks, calls = 0, 0  # which mini-batch

    def _accumulate(self, *args: Any) -> Any:
        found = super()._accumulate(*args)
        if self.cluster.rank == 1 and self.calls == self.breaks:
            next(iter(self.parameters().values())).main_grad.view(-1)[3] = float("nan")
        self.calls += 1
        return found


def rejected_updates(ranks: Ranks) -> dict[str, Any]:
    """Of two mini-batches one breaks on one rank: what every layout's ranks hold and say afterwards."""
    folder, found = ranks.folder / "qwen3", {}
    collected = make_collected(groups=4, size=4)
    for tensor, data, distributed in ((2, 1, True), (1, 2, True), (1, 2, False)):
        cluster, family = ranks.arrange(tensor, data=data), read_family(folder)
        options = settings(folder, tensor, data, optimizer={"distributed": distributed})

        def batch(cluster: Any = cluster) -> Batch:
            made = assemble(
                share(collected, cluster.coordinates.data, cluster.data), Config.model_fields["advantage"].default, 2
            )
            made.old_logprobs, made.entropy = made.rollout_logprobs.clone(), torch.zeros_like(made.rollout_logprobs)
            return shape(made, STEP, Config.model_fields["shaping"].default)

        for broken in (0, 1):
            sound, learner = Learner(cluster, family, options), Broken(cluster, family, options)
            learner.breaks = broken
            one, two = batch(), batch()
            # The sound learner never sees the broken mini-batch: nothing of it may be in the other's weights.
            one.mini_batch, one.mini_batches = torch.where(one.mini_batch == broken, 9, 0), 1
            sound.update(one)
            stats = learner.update(two)
            pairs = zip(sound.parameters().values(), learner.parameters().values(), strict=True)
            found[f"{tensor}x{data} {distributed} {broken}"] = {
                "rejected": two.rejected,
                "metric": stats["policy/rejected_updates"],
                "finite": all(bool(torch.isfinite(p).all()) for p in learner.parameters().values()),
                "moved": max(float((a - b).abs().max()) for a, b in pairs),
                "loss": stats["learner/loss"],
            }
    return found


# World size → name → (model, tensor, data, further options of the layout).
GRID: dict[int, dict[str, tuple[str, int, int, dict[str, Any]]]] = {
    1: {
        "qwen3_tp1": ("qwen3", 1, 1, {}),
        "qwen2_tp1": ("qwen2", 1, 1, {}),
        "llama_tp1": ("llama", 1, 1, {}),
        "llama31_tp1": ("llama31", 1, 1, {}),
        "moe_tp1": ("qwen3_moe", 1, 1, {}),
        "moe_raw_tp1": ("qwen3_moe_raw", 1, 1, {}),
    },
    2: {
        "qwen3_tp2": ("qwen3", 2, 1, {}),
        "qwen3_tp2_sp": ("qwen3", 2, 1, {"sequence": True}),
        "qwen3_dp2": ("qwen3", 1, 2, {}),
        "qwen3_pp2": ("qwen3", 1, 1, {"pipeline": 2}),
        "qwen3_pp2_vp2": ("qwen3_deep", 1, 1, {"pipeline": 2, "virtual": 2}),
        "qwen2_pp2_vp2": ("qwen2_deep", 1, 1, {"pipeline": 2, "virtual": 2, "stages": [1, 1, 2, 1]}),
        "qwen2_tp2": ("qwen2", 2, 1, {}),
        "llama31_pp2": ("llama31", 1, 1, {"pipeline": 2}),
        "moe_ep2": ("qwen3_moe", 1, 2, {"expert": 2}),
        "moe_tp2_sp": ("qwen3_moe", 2, 1, {"sequence": True}),
        "qwen3_cp2": ("qwen3", 1, 1, {"context": 2}),
        "qwen2_cp2": ("qwen2", 1, 1, {"context": 2}),
        "llama31_cp2": ("llama31", 1, 1, {"context": 2}),
        "moe_cp2_ep2": ("qwen3_moe", 1, 1, {"context": 2, "expert": 2}),
        "moe_tp2_ep2_etp1_sp": ("qwen3_moe", 2, 1, {"sequence": True, "expert": 2, "expert_tensor": 1}),
    },
    4: {
        "qwen3_tp2_dp2": ("qwen3", 2, 2, {}),
        "qwen3_cp4": ("qwen3", 1, 1, {"context": 4}),
        "qwen3_tp2_cp2": ("qwen3", 2, 1, {"context": 2}),
        "qwen3_tp2_cp2_sp": ("qwen3", 2, 1, {"context": 2, "sequence": True}),
        "qwen3_cp2_dp2": ("qwen3", 1, 2, {"context": 2}),
        "qwen2_cp2_pp2": ("qwen2", 1, 1, {"context": 2, "pipeline": 2}),
        "qwen3_cp2_pp2_vp2": ("qwen3_deep", 1, 1, {"context": 2, "pipeline": 2, "virtual": 2}),
        "moe_tp2_cp2_ep2_sp": ("qwen3_moe", 2, 1, {"context": 2, "expert": 2, "sequence": True}),
        "qwen3_tp2_dp2_sp": ("qwen3", 2, 2, {"sequence": True}),
        "qwen3_tp2_pp2": ("qwen3", 2, 1, {"pipeline": 2}),
        "qwen3_tp2_pp2_sp": ("qwen3", 2, 1, {"pipeline": 2, "sequence": True}),
        "qwen3_pp2_dp2": ("qwen3", 1, 2, {"pipeline": 2}),
        "qwen3_pp2_uneven_dp2": ("qwen3_deep", 1, 2, {"pipeline": 2, "stages": [2, 3]}),
        "qwen3_tp2_pp2_vp2_sp": ("qwen3_deep", 2, 1, {"pipeline": 2, "virtual": 2, "sequence": True}),
        "qwen3_pp2_vp2_dp2": ("qwen3_deep", 1, 2, {"pipeline": 2, "virtual": 2}),
        "qwen2_tp2_pp2_sp": ("qwen2", 2, 1, {"pipeline": 2, "sequence": True}),
        "moe_ep2_pp2": ("qwen3_moe", 1, 2, {"expert": 2, "pipeline": 2}),
        "moe_ep2_pp2_vp2": ("qwen3_moe_deep", 1, 2, {"expert": 2, "pipeline": 2, "virtual": 2}),
        "moe_tp2_dp2_ep2_sp": ("qwen3_moe", 2, 2, {"expert": 2, "sequence": True}),
        "moe_tp2_dp2_ep4_etp1_sp": ("qwen3_moe", 2, 2, {"expert": 4, "expert_tensor": 1, "sequence": True}),
    },
}


# One batch, split over ranks and micro-batches: 1 to 8 of them on a rank.
SPLITS = {
    f"split_dp{data}_{limit}": ("qwen3", 1, data, {"micro_batch_tokens": limit})
    for data in (1, 2, 4)
    for limit in (100_000, 150, 80, 48)
}
for _name, _cell in SPLITS.items():
    GRID[_cell[2]][_name] = _cell


def _case(name: str, kind: str, tensor: int, data: int, parallel: dict[str, Any]) -> Case:
    def case(ranks: Ranks) -> dict[str, float]:
        return one_update(ranks, kind, tensor, data, **parallel)

    case.__qualname__ = case.__name__ = name
    return case


CASES = {world: [_case(name, *cell) for name, cell in cells.items()] for world, cells in GRID.items()}
globals().update({case.__name__: case for cases in CASES.values() for case in cases})
