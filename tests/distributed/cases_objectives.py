"""Objectives on real ranks, against tests/harness/literal_objectives.py (tests/test_objectives.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from a3po_megatron.algorithm.advantage import assemble
from a3po_megatron.algorithm.objectives.registry import objective_of
from a3po_megatron.algorithm.sums import Report
from a3po_megatron.algorithm.token_loss import normaliser_count
from a3po_megatron.config import Config, GmpoOptions, GspoOptions, GspoTokenOptions, LuspoOptions
from a3po_megatron.config.section import Section
from tests.distributed.cases_learner import STEP, TEMPERATURE, as_hf, batch_of, learner_in, literal_old, share
from tests.harness.literal_objectives import CASES, Rollouts, correction_beside, divided, drawn, literal
from tests.harness.ranks import CaseRanks
from tests.harness.tiny_models import hf_logprobs, hf_model, hf_tensors_of, literal_token_weights, make_collected

# World size → layouts
LAYOUTS: dict[int, tuple[dict[str, int], ...]] = {
    2: ({"data": 2}, {"context": 2}, {"tensor": 2}, {"pipeline": 2}),
    4: ({"tensor": 2, "context": 2}, {"context": 2, "data": 2}, {"context": 4}),
}
RATES = ("policy/clip_low_rate", "policy/clip_high_rate")


def over_context(ranks: CaseRanks) -> dict[str, Any]:
    """Differences from the whole on one rank, where the tokens of every rollout lie on two: by objective."""
    found = {}
    for name, (options, _, spread, _) in CASES.items():
        objective, data = objective_of(options, correction_beside(options)), drawn(spread)
        loss, reported = divided(objective, [data.batch(data.whole())])
        loss.backward()
        wanted = data.gradients()
        # The second micro-batch is one rollout of one token: nothing for rank 1.
        mine = [
            [(i, [t for t in tokens if t % 2 == ranks.rank]) for i, tokens in part]
            for part in (data.whole()[5:], data.whole()[:1], data.whole()[1:5])
        ]
        report, count, total = Report(objective.metrics), 0, torch.zeros((), dtype=torch.float64)
        batches = [data.batch(part, context=dist.group.WORLD) for part in mine]
        for batch in batches:
            count += normaliser_count(objective, batch)
        everywhere = torch.tensor([float(count)], dtype=torch.float64)
        dist.all_reduce(everywhere)
        for batch in batches:
            part, sums = objective(batch)
            (part / everywhere).backward()
            total += part.detach() / everywhere[0]
            report.sums += report.vector(sums, torch.device("cpu"))
        dist.all_reduce(total)
        dist.all_reduce(report.sums)
        metrics = report.metrics()
        places = [(i, t) for part in mine for i, tokens in part for t in tokens]
        gradients = data.gradients()
        found[name] = {
            "gradient": max(abs(gradients[i][t] - wanted[i][t]) for i, t in places),
            "loss": max(abs(float(total - loss.detach())), abs(float(metrics["learner/loss"]) - float(loss.detach()))),
            "rates": max(abs(float(metrics[r]) - float(reported[r])) for r in RATES),
        }
    return found


# Clip ranges that ratios of these rollouts leave on both sides.
WIDER: dict[str, Section] = {
    "gspo": GspoOptions(clip_low=0.05, clip_high=0.05),
    "gspo_token": GspoTokenOptions(clip_low=0.05, clip_high=0.05),
    "luspo": LuspoOptions(clip_low=0.05, clip_high=0.05),
    "gmpo": GmpoOptions(),
}
SOME = ("cispo", "clipped sequences", "gspo")


def on_hf(folder: Path, name: str) -> dict[str, Any]:
    """Loss, clip rates and gradients by the HF model in float64."""
    model, collected = hf_model(folder), make_collected(groups=5, size=4)
    whole = assemble(collected, Config.model_fields["advantage"].default, 1)
    old = [each.double() for each in literal_old(whole).split(whole.lengths.tolist())]
    positive = [rollout.verdict.outcome == "correct" for rollout in whole.rollouts]
    weights = literal_token_weights([each.float().tolist() for each in old], positive, STEP, 0.2, 2.0, 0.005)
    data = Rollouts(
        [hf_logprobs(model, r.prompt.tokens, r.tokens, TEMPERATURE) for r in whole.rollouts],
        old,
        [torch.from_numpy(rollout.logprobs).double() for rollout in whole.rollouts],
        [torch.tensor(each, dtype=torch.float64) for each in weights],
        whole.advantages.double().tolist(),
    )
    options = WIDER.get(name, CASES[name][0])
    exact: dict[str, Any] = literal(CASES[name][1], options, correction_beside(options), data)
    named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return exact | {"gradients": hf_tensors_of(named)}


def _updates(ranks: CaseRanks, names: tuple[str, ...], layouts: tuple[dict[str, int], ...]) -> dict[str, Any]:
    """Differences of one update from `on_hf`, by layout and objective."""
    folder, found, collected = ranks.folder / "qwen3", {}, make_collected(groups=5, size=4)
    for layout in layouts:
        cluster, learner = learner_in(ranks, folder, layout)
        mine = share(collected, cluster.coordinates.data, cluster.data)
        with torch.no_grad():
            kept = {key: value.clone() for key, value in learner.parameters().items()}
        for name in names:
            exact = ranks.once(f"objective-{name}", lambda name=name: on_hf(folder, name))
            options = WIDER.get(name, CASES[name][0])
            update = learner.update(batch_of(collected, mine), objective_of(options, correction_beside(options)))
            ours = as_hf(learner, {key: p.main_grad for key, p in learner.parameters().items()})
            gradients, reported = exact["gradients"], update.reported
            found[f"{layout} {name}"] = {
                "gradient": max(float((ours[n] - g).abs().max() / g.abs().max()) for n, g in gradients.items()),
                "loss": abs(float(reported["learner/loss"]) - exact["loss"]) / max(1.0, abs(exact["loss"])),
                "rates": max(abs(float(reported[r]) - exact[s]) for r, s in zip(RATES, ("low", "high"), strict=True)),
            }
            with torch.no_grad():
                for key, value in learner.parameters().items():
                    value.copy_(kept[key])
    return found


def some_updates(ranks: CaseRanks) -> dict[str, Any]:
    return _updates(ranks, SOME, LAYOUTS[ranks.world][:1])


def all_updates(ranks: CaseRanks) -> dict[str, Any]:
    return _updates(ranks, tuple(CASES), LAYOUTS[ranks.world])
