"""Time and peak memory of log-prob, entropy and their gradients, from hidden states: four ways, one process each.

    python tools/bench_loss.py                       T 2048, H 1024, V 75,968 (Qwen3's vocabulary at TP 2), float32
    python tools/bench_loss.py --tokens 1024 2048 --hidden 1024 --vocab 151936 --tp 1 2 4 --entropy --json out.json

    dense       torch: hidden Wᵀ, log_softmax, gather; autograd keeps what it wants
    chunked     the same, a chunk of tokens at a time, each recomputed (torch.utils.checkpoint) and backward at once
    unfused     logits in memory, then learner/vocab_parallel.py
    fused       learner/fused_head.py
    products    nothing but the four matrix products that any recomputing head needs: what time is measured against

`tp` divides the vocabulary, as on one of so many ranks; their collectives (16 bytes a token) are left out. Peak memory
is what the process's resident set grew by beyond inputs and gradients; time is the smallest of the rounds.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from a3po_megatron.learner.fused_head import logprob_and_entropy as fused_head
from a3po_megatron.learner.vocab_parallel import logprob_and_entropy as vocab_parallel

ARMS = ("dense", "chunked", "unfused", "fused", "products")
Result = tuple[Tensor, Tensor | None]


def dense(hidden: Tensor, weight: Tensor, targets: Tensor, with_entropy: bool) -> Result:
    logp = torch.log_softmax(hidden @ weight.t(), dim=-1)
    entropy = -(logp.exp() * logp).sum(-1) if with_entropy else None
    return logp.gather(1, targets[:, None])[:, 0], entropy


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor, with_entropy: bool) -> None:
    """Every chunk's loss is done with, backward too, before the next: its logits live no longer."""
    for rows in torch.arange(len(hidden)).split(80):
        logprobs, entropy = checkpoint(dense, hidden[rows], weight, targets[rows], with_entropy, use_reentrant=False)
        (logprobs.sum() if entropy is None else logprobs.sum() + entropy.sum()).backward()
    return None


def unfused(hidden: Tensor, weight: Tensor, targets: Tensor, with_entropy: bool) -> Result:
    return vocab_parallel(hidden @ weight.t(), targets, None, with_entropy=with_entropy)


def status(field: str) -> int:
    """Bytes, from /proc/self/status."""
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(field))


def measure(
    arm: str,
    tokens: int,
    width: int,
    vocab: int,
    with_entropy: bool = False,
    rounds: int = 3,
    chunk_tokens: int | None = None,
) -> dict[str, Any]:
    """Seconds and peak bytes of one arm, forward and backward, in this process."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).requires_grad_()
    weight = (torch.randn(vocab, width, generator=generator) / width**0.5).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    # Gradients belong to the inputs' side: they are there, and touched, before anything is measured.
    hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
    if arm == "fused":
        weight.main_grad, weight.grad_added_to_main_grad = weight.grad, False  # type: ignore[attr-defined]
        weight.grad = None

    def fused(h: Tensor, w: Tensor, t: Tensor, e: bool) -> Result:
        return fused_head(h, w, t, None, chunk_tokens=chunk_tokens, with_entropy=e)

    heads: dict[str, Callable[..., Result]] = {"dense": dense, "unfused": unfused, "fused": fused}

    def once() -> None:
        if arm in ("products", "chunked"):
            products(hidden, weight) if arm == "products" else chunked(hidden, weight, targets, with_entropy)
            return
        logprobs, entropy = heads[arm](hidden, weight, targets, with_entropy)
        (logprobs.sum() if entropy is None else logprobs.sum() + entropy.sum()).backward()
        if arm == "fused":
            weight.grad = None  # as Megatron's hook does: nobody reads it

    seconds, peaks = [], []
    for _ in range(rounds):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of the resident set
        before, start = status("VmRSS"), time.perf_counter()
        once()
        seconds.append(time.perf_counter() - start)
        peaks.append(status("VmHWM") - before)
    return {"seconds": min(seconds), "peak_bytes": max(peaks[1:] or peaks)}


@torch.no_grad()
def products(hidden: Tensor, weight: Tensor) -> None:
    """x, x again, d hidden and d weight, a chunk at a time into the same memory."""
    x = torch.empty(80, len(weight))
    assert weight.grad is not None
    for part in hidden.split(80):
        here = x[: len(part)]
        torch.mm(part, weight.t(), out=here)
        torch.mm(part, weight.t(), out=here)
        torch.mm(here, weight)
        weight.grad.addmm_(here.t(), part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048])
    parser.add_argument("--hidden", type=int, nargs="+", default=[1024])
    parser.add_argument("--vocab", type=int, nargs="+", default=[75968])
    parser.add_argument("--tp", type=int, nargs="+", default=[1])
    parser.add_argument("--entropy", action="store_true", help="with the gradient of the entropy too")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(**json.loads(options.one))))
        return
    rows: list[dict[str, Any]] = []
    for tokens, width, vocab, tp in itertools.product(options.tokens, options.hidden, options.vocab, options.tp):
        columns = -(-vocab // tp)
        print(f"\nT {tokens}, H {width}, V {vocab}, tp {tp}: logits {4 * tokens * columns / 1e6:.0f} MB in float32")
        print(f"{'arm':10}{'seconds':>9}{'of products':>13}{'peak MB':>9}{'of logits':>11}")
        found = {}
        for arm in reversed(options.arms):  # the products first: the others are measured against them
            ask = {"arm": arm, "tokens": tokens, "width": width, "vocab": columns}
            ask |= {"with_entropy": options.entropy, "rounds": options.rounds}
            words = [sys.executable, __file__, "--one", json.dumps(ask)]
            ended = subprocess.run(words, capture_output=True, text=True, timeout=1800)
            if ended.returncode:
                raise SystemExit(f"{arm} failed:\n{ended.stderr[-2000:]}")
            found[arm] = json.loads(ended.stdout)
        for arm in options.arms:
            row = {"arm": arm, "tokens": tokens, "hidden": width, "vocab": vocab, "tp": tp, **found[arm]}
            row["of_logits"] = row["peak_bytes"] / (4 * tokens * columns)
            row["of_products"] = row["seconds"] / found["products"]["seconds"] if "products" in found else None
            rows.append(row)
            ratio = f"{row['of_products']:12.2f}×" if row["of_products"] else f"{'':13}"
            print(f"{arm:10}{row['seconds']:9.2f}{ratio}{row['peak_bytes'] / 1e6:9.0f}{row['of_logits']:10.3f}×")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
