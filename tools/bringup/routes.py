"""Experiment 5f: a mixture of experts whose learner follows the engine's routes, over two cycles of sleep and reload.

Responses end on a stop token: what is in flight when the last one does must not meet a new generation of routes.
"""

from __future__ import annotations

from a3po_megatron.ranks.backend import CUDA, Backend

from .colocated import colocate, in_flight, logprobs_of, requests_of, stopped_share, stops_of
from .engine import BF16_RATIO, gap
from .rank import MOE, make_model
from .report import Report

CYCLES = 2


def routes_on(report: Report, backend: Backend) -> None:
    both = colocate(make_model(MOE), backend, stops=stops_of(MOE["vocab_size"]), routing_replay=True)
    requests = requests_of(both.facts.vocab, 64)
    for number in range(CYCLES):
        with both.residency.publishing():
            receipt = both.publish()
        with both.residency.rollout():
            completions = both.sample(requests)
            left = in_flight(both.engine)
        with both.residency.training():
            found = {
                name: gap(logprobs_of(completions), both.scores(requests, completions, replayed))
                for name, replayed in (("by the engine's routes", True), ("by its own", False))
            }
        cycle = f"cycle {number + 1}"
        report.claim(f"{cycle}: steps left in vLLM's queue", left, 0)
        report.claim_above(f"{cycle}: share of responses that end on a stop token", stopped_share(completions), 0.5)
        report.holds(f"{cycle}: every response has its routes", all(c.routes is not None for c in completions))
        with_routes = found["by the engine's routes"]
        report.claim(f"{cycle}: mean exp |Δ log-prob|, replayed", with_routes["exp_abs_mean"], BF16_RATIO)
    for name, row in found.items():
        report.number(f"learner {name}", row)
    without = found["by its own"]
    report.holds(f"the receipt says `{backend.receipt_strength}`", receipt.strength == backend.receipt_strength)
    # Where no router is near a tie nothing is gained; nothing may be lost by it.
    report.claim("mean |Δ| replayed over that without", with_routes["abs_mean"] / without["abs_mean"], 1.05)
    report.headline(f"mean |Δ log-prob| {with_routes['abs_mean']:.4f} replayed, {without['abs_mean']:.4f} without")


def routes(report: Report) -> None:
    routes_on(report, CUDA)
