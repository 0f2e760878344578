"""Experiment 1, FP8: which token counts and sizes Transformer Engine takes, and in what words it refuses the others."""

from __future__ import annotations

from typing import Any

import torch

from a3po_megatron.model.precision import token_grain
from a3po_megatron.ranks.backend import CUDA, Backend

from .rank import TINY, alone, draw_sequences, make_learner, make_model
from .report import Report

TOKENS = (1, 4, 8, 16, 24, 40, 64, 100, 104, 112, 120, 128, 136, 144, 192, 256)
SIZES = ((128, 128), (144, 128), (128, 144), (136, 128), (120, 128), (128, 120))  # in, out


def recipes() -> dict[str, Any]:
    from transformer_engine.common import recipe

    e4m3 = {"fp8_format": recipe.Format.E4M3}
    return {
        "fp8-blockwise": recipe.Float8BlockScaling(**e4m3),
        "fp8-tensorwise": recipe.Float8CurrentScaling(**e4m3),
    }


def tries(recipe: Any, tokens: int, columns: int, rows: int, device: str) -> str:
    """One linear layer, forward and backward: `runs`, or where it was refused and in what words."""
    import transformer_engine.pytorch as te

    layer = te.Linear(columns, rows, bias=False, params_dtype=torch.bfloat16, device=device)
    with torch.no_grad():
        layer.weight.normal_(std=columns**-0.5)
    x = torch.randn(tokens, columns, dtype=torch.bfloat16, device=device, requires_grad=True)
    at = "forward"
    try:
        with te.fp8_autocast(enabled=True, fp8_recipe=recipe):
            y = layer(x)
        at = "backward"
        y.sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        assert x.grad is not None and bool(torch.isfinite(x.grad).all()), "the gradient is not finite"
    except (AssertionError, RuntimeError, ValueError) as error:
        return f"{at}: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
    return "runs"


def alignment_on(report: Report, backend: Backend) -> None:
    device, taken = backend.device, {}
    for name, recipe in recipes().items():
        found = {tokens: tries(recipe, tokens, 256, 256, device) for tokens in TOKENS}
        taken[name] = [tokens for tokens, outcome in found.items() if outcome == "runs"]
        report.number(f"{name}: tokens that run", taken[name])
        for tokens, outcome in found.items():
            if outcome != "runs":
                report.refusal(f"{name}: {tokens} tokens", outcome)
        # What schedule/packing.py pads to must run; what TE's own check forbids (tokens % 8) must not run silently.
        grain = token_grain(name)
        fits = [tokens for tokens in TOKENS if tokens % grain == 0]
        report.holds(f"{name}: every multiple of {grain} tokens runs", set(fits) <= set(taken[name]))
        report.holds(f"{name}: 100 tokens are refused", 100 not in taken[name])
        for columns, rows in SIZES:
            outcome = tries(recipe, 128, columns, rows, device)
            report.number(f"{name}: {columns} → {rows}", outcome)
        finer = min((tokens for tokens in taken[name] if tokens >= 8), default=0)
        report.number(f"{name}: smallest token count that runs", finer)
    lengths = [(3, 5), (1, 1), (50, 49), (64, 66), (127, 2)]
    cluster, folder = alone(backend), make_model(TINY)
    for name in taken:
        learner = make_learner(cluster, folder, learner={"precision": name, "micro_batch_tokens": 64})
        values = torch.cat(learner.logprobs(draw_sequences(TINY["vocab_size"], lengths)))
        report.holds(f"{name}: the learner's packs run, whatever the lengths", bool(torch.isfinite(values).all()))
    counts = ", ".join(f"{name} from {min(values, default=0)} tokens" for name, values in taken.items())
    report.headline(f"without sequence parallelism: {counts}; packs are padded to {token_grain('fp8-blockwise')}")


def alignment(report: Report) -> None:
    alignment_on(report, CUDA)
