"""What is added to an objective, on real ranks, against the HF model in float64 (tests/test_regulariser.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from a3po_megatron.algorithm.advantage import assemble
from a3po_megatron.algorithm.objectives.registry import objective_of
from a3po_megatron.algorithm.regulariser import METRIC, Regularised, Regulariser
from a3po_megatron.algorithm.restraint import restrain
from a3po_megatron.algorithm.shaping import shape
from a3po_megatron.batch import Batch, Collected
from a3po_megatron.config import AdvantageOptions, ClippedOptions, LpReg, NoCorrection, RegulariserOptions
from a3po_megatron.learner.learner import Learner
from a3po_megatron.model.read import read_facts
from a3po_megatron.weights.load import load_shards
from tests.distributed.cases_learner import TEMPERATURE, as_hf, settings, share
from tests.distributed.cases_objectives import LAYOUTS
from tests.harness.ranks import CaseRanks
from tests.harness.tiny_models import hf_model, hf_tensors_of, make_collected

LP_REG = LpReg(fraction=0.3, min_p=0.05, kl=0.7)
REGULARISER = RegulariserOptions(kl=0.3, estimator="k2", entropy=0.2)
CLIPPED = ClippedOptions()


def distributions(model: torch.nn.Module, rollout: Any) -> torch.Tensor:
    """Log-probs of the whole vocabulary at every response token, by transformers."""
    prompt = rollout.prompt.tokens
    tokens = torch.tensor([[*prompt, *rollout.tokens.tolist()]])
    return torch.log_softmax(model(tokens).logits[0, len(prompt) - 1 : -1] / TEMPERATURE, dim=-1)


def less_noisy(logprobs: torch.Tensor, target: int, min_p: float) -> float:
    """The log-prob of a token where all that is less likely than min_p times the likeliest one is cut off."""
    p = logprobs.detach().exp().tolist()
    kept = [each for each in p if each >= min_p * max(p)]
    return float("-inf") if p[target] not in kept else float(torch.tensor(p[target] / sum(kept)).log())


def on_hf(folder: Path, collected: Collected) -> dict[str, Any]:
    """Scores by rollout, and loss and gradients of one update, token by token."""
    whole = assemble(collected, AdvantageOptions(), 1)
    now, first = hf_model(folder / "now"), hf_model(folder / "first")
    scores: dict[str, dict[str, list[float]]] = {}
    tokens = []  # (old, advantage, log-prob, entropy, reference, less noisy)
    for rollout, advantage in zip(whole.rollouts, whole.advantages.tolist(), strict=True):
        logprobs, before = distributions(now, rollout), distributions(first, rollout).detach()
        mine: dict[str, list[float]] = {name: [] for name in ("old_logprobs", "entropy", "reference", "proxy")}
        for t, target in enumerate(rollout.tokens.tolist()):
            logprob, entropy = logprobs[t, target], -(logprobs[t].exp() * logprobs[t]).sum()
            proxy = less_noisy(logprobs[t], target, LP_REG.min_p)
            values = (float(logprob), float(entropy), float(before[t, target]), proxy)
            for name, value in zip(mine, values, strict=True):
                mine[name].append(value)
            tokens.append((float(logprob), advantage, logprob, entropy, float(before[t, target]), proxy))
        scores[rollout.name] = mine
    bad = sorted(old for old, advantage, *_ in tokens if advantage < 0)
    least = bad[max(1, int(LP_REG.fraction * len(bad))) - 1]
    total, added, drawn = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64), 0
    for old, advantage, logprob, entropy, reference, proxy in tokens:
        total = total - torch.exp(logprob - old) * advantage
        added = added + REGULARISER.kl * (logprob - reference) ** 2 / 2 - REGULARISER.entropy * entropy
        if advantage < 0 and old <= least and proxy > old:
            added, drawn = added + LP_REG.kl * (torch.exp(proxy - logprob) - 1 - (proxy - logprob)), drawn + 1
    ((total + added) / len(tokens)).backward()
    named = {name: p.grad.clone() for name, p in now.named_parameters() if p.grad is not None}
    return {
        "scores": scores,
        "gradients": hf_tensors_of(named),
        "added": float(added.detach()) / len(tokens),
        "drawn": drawn,
    }


def _updates(ranks: CaseRanks, layouts: tuple[dict[str, int], ...]) -> dict[str, Any]:
    """How far scores, gradients and metric are from `on_hf`, by layout."""
    collected, found = make_collected(groups=5, size=4), {}
    exact = ranks.once("regularised", lambda: on_hf(ranks.folder, collected))
    for layout in layouts:
        cluster = ranks.arrange(**layout)
        more = {name: size for name, size in layout.items() if name not in ("tensor", "data")}
        sgd = {"name": "sgd", "distributed": False, "clip_grad": 0.0}
        plain = settings(
            ranks.folder / "first", layout.get("tensor", 1), layout.get("data", 1), parallel=more, optimizer=sgd
        )
        config = plain.model_copy(update={"shaping": LP_REG, "regulariser": REGULARISER})
        facts = read_facts(ranks.folder / "first")
        learner = Learner(cluster, facts, config)
        load_shards(ranks.folder / "now", facts, learner.pieces, learner.parameters())
        kept = {key: value.detach().clone() for key, value in learner.parameters().items()}
        batch = assemble(share(collected, cluster.coordinates.data, cluster.data), AdvantageOptions(), 1)
        batch = learner.score(batch)
        moved = [key for key, value in learner.parameters().items() if not torch.equal(value, kept[key])]
        apart = _scores_apart(batch, exact["scores"])
        batch = Regulariser(REGULARISER, AdvantageOptions(), cluster.sum_over_data)(batch)
        batch = restrain(shape(batch, 0, LP_REG), LP_REG, cluster.sum_over_data)
        assert batch.restrained is not None
        drawn = cluster.sum_over_data(batch.restrained.sum()[None].double())
        update = learner.update(batch, Regularised(objective_of(CLIPPED, NoCorrection())))
        ours = as_hf(learner, {key: p.main_grad for key, p in learner.parameters().items()})
        gradients = exact["gradients"]
        found[str(layout)] = apart | {
            "moved": len(moved),
            "gradient": max(float((ours[n] - g).abs().max() / g.abs().max()) for n, g in gradients.items()),
            "added": abs(float(update.reported[METRIC] or 0.0) - exact["added"]),
            "drawn": (int(drawn), exact["drawn"]),
        }
    return found


def _scores_apart(batch: Batch, exact: dict[str, dict[str, list[float]]]) -> dict[str, float]:
    """Largest differences of a batch's scores, by kind; of the less noisy policy also how many are cut off."""
    apart = {}
    of_batch = {"old_logprobs": "old_logprobs", "entropy": "entropy", "reference": "reference_logprobs"}
    for name, kind in (of_batch | {"proxy": "proxy_logprobs"}).items():
        wanted = torch.tensor([value for r in batch.rollouts for value in exact[r.name][name]], dtype=torch.float64)
        ours = batch.scores()[kind].double()
        assert torch.equal(torch.isfinite(wanted), torch.isfinite(ours)), name
        there = torch.isfinite(wanted)
        apart[name] = float((ours - wanted)[there].abs().max()) if there.any() else 0.0
        if name == "proxy":
            apart["cut"] = float((~there).sum())
    return apart


def one_layout(ranks: CaseRanks) -> dict[str, Any]:
    return _updates(ranks, LAYOUTS[ranks.world][:1])


def all_layouts(ranks: CaseRanks) -> dict[str, Any]:
    return _updates(ranks, (*LAYOUTS[ranks.world], *([{"tensor": 2, "pipeline": 2}] if ranks.world == 4 else [])))
