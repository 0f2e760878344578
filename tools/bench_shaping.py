"""A3PO's token weights: one segmented sort against a top-k for every rollout.

    python tools/bench_shaping.py                    256 rollouts of 16,384 tokens
    python tools/bench_shaping.py --rollouts 64 --tokens 4096 --json out.json

Both must choose the same tokens; the loop is written as one would without a segmented sort. Prints times and the ratio.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor

from a3po_megatron.algorithm.shaping import rho, token_weights
from a3po_megatron.config import ShapingOptions


def by_rows(old: Tensor, lengths: list[int], positive: Tensor, step: int, options: ShapingOptions) -> Tensor:
    """torch.topk of every rollout by itself."""
    weights, (up, down) = torch.ones_like(old), rho(step, options)
    for row, part in enumerate(old.split(lengths)):
        start = sum(lengths[:row])
        count = max(1, int(options.fraction * len(part)))
        chosen = torch.topk(part, count, largest=not positive[row]).indices
        weights[start + chosen] = up if positive[row] else down
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=16384, help="of each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    lengths = [options.tokens] * options.rollouts
    old = -torch.rand(sum(lengths), generator=generator, dtype=torch.float64).float()  # ties are rare
    index = torch.repeat_interleave(torch.arange(options.rollouts), torch.tensor(lengths))
    positive = torch.rand(options.rollouts, generator=generator) < 0.5
    shaping, seconds = ShapingOptions(), {"segmented sort": [], "top-k a rollout": []}
    for _ in range(options.rounds):
        start = time.perf_counter()
        ours = token_weights(old, index, positive, 0, shaping)
        middle = time.perf_counter()
        theirs = by_rows(old, lengths, positive, 0, shaping)
        seconds["segmented sort"].append(middle - start)
        seconds["top-k a rollout"].append(time.perf_counter() - middle)
    same = float((ours == theirs).float().mean())
    best = {name: min(times) for name, times in seconds.items()}
    print(f"{options.rollouts} rollouts, {sum(lengths):,} tokens; {same:.6%} of the weights equal (the rest are ties)")
    for name, value in best.items():
        print(f"{name:18}{value:8.3f} s   {sum(lengths) / value / 1e6:7.1f} M tokens/s")
    ratio = best["top-k a rollout"] / best["segmented sort"]
    print(f"the loop takes {ratio:.2f}× as long")
    if options.json:
        report = {"tokens": sum(lengths), "seconds": best, "loop of sort": ratio, "equal": same}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
