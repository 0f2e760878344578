"""Rollouts dealt over real replicas (tests/test_balance.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from a3po_megatron.algorithm.advantage import assemble
from a3po_megatron.algorithm.objectives.registry import objective_of
from a3po_megatron.algorithm.shaping import shape
from a3po_megatron.batch import Batch, Collected, Step, Verdict
from a3po_megatron.config import AdvantageOptions, ClippedOptions, Config, ShapingOptions, TisOptions
from a3po_megatron.rollout.balance import Balance, gather_rollouts
from tests.distributed.cases_learner import STEP, as_hf, learner_in, share
from tests.harness.ranks import CaseRanks
from tests.harness.tiny_models import make_collected

# World size → layouts
LAYOUTS: dict[int, tuple[dict[str, int], ...]] = {
    2: ({"data": 2},),
    4: ({"data": 2, "tensor": 2}, {"data": 4}, {"data": 2, "context": 2}, {"data": 2, "pipeline": 2}),
}
PER_TOKEN = ("rollout_logprobs", "process_advantages", "token_positive", "trained")
PER_ROLLOUT = ("mini_batch", "rewards", "positive", "advantages", "lengths")


def uneven() -> Collected:
    """Groups of which every second has only long rollouts, so that one of two replicas has nearly all tokens."""
    collected = make_collected(groups=6, size=4)
    draw = np.random.default_rng(4)
    for number, group in enumerate(collected.groups):
        for rollout in group.rollouts:
            length = int(draw.integers(20, 30)) if number % 2 else int(draw.integers(1, 4))
            rollout.tokens = draw.integers(0, 60, length)
            rollout.logprobs = draw.normal(-2, 1, length).astype(np.float32)
            rollout.segments = (type(rollout.segments[0])(length, 1),)
            rollout.text = f"é \ud83d {rollout.name}"
            steps = (Step(0, 2, float(draw.normal())),) if rollout.sample else ()
            rollout.verdict = Verdict(rollout.verdict.outcome, "a reason" if rollout.sample == 1 else "", steps)
            rollout.routes = draw.integers(0, 9, (length + 1, 2, 3)).astype(np.uint16)
    return collected


def batch_of(collected: Collected) -> Batch:
    batch = assemble(collected, AdvantageOptions(), 2)
    batch.process_advantages = torch.sin(batch.rollout_logprobs)
    batch.token_positive = batch.process_advantages > 0
    batch.masked = torch.tensor([rollout.sample == 2 for rollout in batch.rollouts])
    batch.trained = ~batch.masked[batch.rollout_index]
    return batch


def by_name(batch: Batch) -> dict[str, dict[str, Any]]:
    """What a batch says of every rollout."""
    ends = batch.lengths.cumsum(0).tolist()
    said = {}
    for row, rollout in enumerate(batch.rollouts):
        tokens = slice(ends[row] - len(rollout.tokens), ends[row])
        said[rollout.name] = {
            **{name: getattr(batch, name)[row].item() for name in PER_ROLLOUT},
            **{name: getattr(batch, name)[tokens].tolist() for name in PER_TOKEN if getattr(batch, name) is not None},
            "trained": batch.is_trained()[tokens].tolist(),
            "masked": batch.masked is not None and bool(batch.masked[row]),
            "tokens": rollout.tokens.tolist(),
            "routes": None if rollout.routes is None else rollout.routes.tolist(),
            "rest": repr(
                [rollout.prompt, rollout.text, rollout.verdict, rollout.segments, rollout.finish, rollout.seed]
            ),
        }
    return said


def dealt(ranks: CaseRanks) -> dict[str, Any]:
    """Of each layout: what all replicas say of rollouts before and after, and of results that come home."""
    found: dict[str, Any] = {}
    for layout in LAYOUTS[ranks.world]:
        cluster = ranks.arrange(**layout)
        collected = uneven()
        prompts = {group.prompt.index: group.prompt for group in collected.groups}
        balance = Balance(cluster, prompts.__getitem__, 1e9)
        batch = balance(batch_of(share(collected, cluster.coordinates.data, cluster.data)))
        after = by_name(batch)
        tokens = sum(len(r.prompt.tokens) + len(r.tokens) - 1 for r in batch.rollouts)
        batch.old_logprobs, batch.entropy = batch.rollout_logprobs * 2, batch.rollout_logprobs * 3
        batch.token_weights, batch.advantages = batch.rollout_logprobs * 5, batch.advantages * 7
        home = balance.home(batch)
        whole = batch_of(share(uneven(), cluster.coordinates.data, cluster.data))
        found[str(layout)] = {
            "replica": cluster.coordinates.data,
            "order": [(r.prompt.index, r.sample) for r in batch.rollouts],
            "before": by_name(batch_of(uneven())),
            "after": after,
            "tokens": tokens,
            "imbalance": batch.imbalance,
            "home": [r.name for r in home.rollouts] == [r.name for r in whole.rollouts]
            and all(
                torch.equal(getattr(home, name), whole.rollout_logprobs * factor)
                for name, factor in {"old_logprobs": 2, "entropy": 3, "token_weights": 5}.items()
            )
            and torch.equal(home.advantages, whole.advantages * 7),
        }
    return found


def gathers(ranks: CaseRanks) -> list[str]:
    """What the ranks of a replica have after each brought its own."""
    cluster, collected = ranks.arrange(tensor=2), uneven()
    prompts = {group.prompt.index: group.prompt for group in collected.groups}
    mine = [rollout for group in collected.groups[ranks.rank :: 2] for rollout in group.rollouts]
    return [rollout.name for rollout in gather_rollouts(cluster, mine if ranks.rank else [], prompts.__getitem__)]


def updates(ranks: CaseRanks) -> dict[str, float]:
    """Gradients of an update with rollouts where they were, and dealt: largest difference of any parameter, by layout
    and model, over the largest gradient."""
    found = {}
    cells = [("qwen3", layout) for layout in LAYOUTS[ranks.world]]
    cells += [("qwen3_moe", {"data": 2, "expert": 2})] if ranks.world == 2 else []
    for kind, layout in cells:
        gradients: list[dict[str, torch.Tensor]] = []
        for dealing in (False, True):
            cluster, learner = learner_in(ranks, ranks.folder / kind, layout)
            collected = uneven()
            for rollout in (each for group in collected.groups for each in group.rollouts):
                rollout.routes = None
            prompts = {group.prompt.index: group.prompt for group in collected.groups}
            batch = assemble(share(collected, cluster.coordinates.data, cluster.data), AdvantageOptions(), 1)
            if dealing:
                batch = Balance(cluster, prompts.__getitem__, 1e9)(batch)
            batch.old_logprobs = batch.rollout_logprobs + 0.1 * torch.sin(batch.rollout_logprobs * 50)
            batch.entropy = torch.zeros_like(batch.old_logprobs)
            batch = shape(batch, STEP, Config.model_fields["shaping"].default or ShapingOptions())
            learner.update(batch, objective_of(ClippedOptions(), TisOptions()))
            gradients.append(as_hf(learner, {key: p.main_grad for key, p in learner.parameters().items()}))
        found[f"{kind} {layout}"] = max(
            float((gradients[0][name] - each).abs().max() / gradients[0][name].abs().max().clamp(min=1e-8))
            for name, each in gradients[1].items()
        )
    return found
