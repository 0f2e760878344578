"""Experiment 5j: how far learner and engine are off in canaries, over 20 publishes with an update between each two.

The bound of a publish (weights/publish.py) must lie well beyond what is healthy: a false alarm ends a run. A canary is
64 tokens; beside it all tokens that were sampled count, since a run sees tens of thousands.

    --model DIR      weights of the user's own; otherwise made-up ones, whose logits are those of no trained model
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from a3po_megatron.config.weights import CANARY_BOUND
from a3po_megatron.ranks.backend import CUDA
from a3po_megatron.weights.publish import MEAN_SHARE

from .colocated import Colocated, colocate, logprobs_of, requests_of
from .rank import CLIPPED, HALF_BILLION, batch_of, make_model
from .report import Report
from .runner import MODEL

PUBLISHES = 20
LARGER = HALF_BILLION | {"num_hidden_layers": 28, "vocab_size": 151936}  # Qwen3-1.7B's sizes
# Updates move weights without making another model of them; the bound is this experiment's to judge.
SECTIONS = {"optimizer": {"lr": 1e-6}, "publish": {"canary_bound": 1e3}}
SHARES = (0.5, 0.9, 0.99, 0.999, 1.0)


def distribution_on(report: Report, both: Colocated, publishes: int = PUBLISHES, count: int = 64) -> None:
    requests, largest, means, apart, names = requests_of(both.facts.vocab, count), [], [], [], set()
    for _ in range(publishes):
        with both.residency.publishing():
            receipt = both.publish()
        largest.append(float(receipt.canary))
        means.append(float(receipt.canary_mean))
        names.add(receipt.weights)
        with both.residency.rollout():
            completions = both.sample(requests)
        with both.residency.training():
            old = both.scores(requests, completions)
            apart.append((old - logprobs_of(completions)).abs())
            pairs = [(tuple(r.prompt), tuple(c.tokens.tolist())) for r, c in zip(requests, completions, strict=True)]
            both.learner.update(batch_of(pairs, old, torch.linspace(-1, 1, len(pairs))), CLIPPED)
    tokens, bound = torch.cat(apart).double(), CANARY_BOUND["bfloat16"]
    report.holds("every publish was of other weights", len(names) == publishes)
    report.number("canary: largest |Δ log-prob| of each publish", largest)
    report.number("canary: mean of each", means)
    shares = {str(share): float(torch.quantile(tokens, share)) for share in SHARES}
    report.number(f"|Δ log-prob| of {len(tokens)} sampled tokens, by share below", shares)
    report.claim("canary: the largest of all, against the bound", max(largest), bound)
    report.claim("canary: the largest mean, against its bound", max(means), bound * MEAN_SHARE)
    report.headline(f"largest {max(largest):.3f}, mean {sum(means) / publishes:.4f} over {publishes} publishes")


def distribution(report: Report) -> None:
    given = os.environ.get(MODEL)
    report.number("model", Path(given).name if given else "made up")
    folder = Path(given) if given else make_model(LARGER)
    distribution_on(report, colocate(folder, CUDA, sections=SECTIONS))
