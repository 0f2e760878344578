"""Experiment 2: the loss's kernels (learner/fused_head.py, vocab_parallel.py, rows_triton.py).

    exact    against float64 at Qwen3's vocabulary and at one half of it, which is no multiple of 256, with tokens that
             are no multiple of a chunk and columns that only pad the vocabulary
    speed    the row kernels against the bytes they must move; the whole head against eager PyTorch and Liger

Needs torch and, on CUDA, Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from a3po_megatron.learner import rows
from a3po_megatron.learner.chunks import CHUNK_BYTES
from a3po_megatron.learner.fused_head import logprob_and_entropy as fused_head
from a3po_megatron.learner.vocab_parallel import logprob_and_entropy as vocab_parallel

from .measure import copy_bandwidth, largest, peak_bytes, relative, seconds
from .report import Report

VOCABULARIES = (151936, 75968)
WIDTH = 1024
# Whatever it is given, the head sums in float32: products of length H ≤ 4096 at unit scale err by some 1e-6, log-probs
# near −12 by as much again. tf32 products would err by 3e-4.
EXACT = {"logprob": 5e-5, "entropy": 5e-5, "d_weight": 2e-5, "d_hidden": 2e-5, "d_logits": 2e-5}
# bf16 rounds a value by 2^-9 of it at most. On CUDA the gradient of the logits is rounded before its products, and
# hidden's gradient is handed back in bf16, on either device.
ROUNDED = 2**-9
Head = Callable[..., tuple[Tensor, Tensor | None]]


def inputs(
    tokens: int, width: int, vocab: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [T, H], weight [V, H] at which logits have unit scale, targets [T]."""
    generator = torch.Generator(device).manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator, device=device).to(dtype)
    weight = (torch.randn(vocab, width, generator=generator, device=device) / width**0.5).to(dtype)
    return hidden, weight, torch.randint(0, vocab, (tokens,), generator=generator, device=device)


def reference(hidden: Tensor, weight: Tensor, targets: Tensor, asked: Tensor, temperature: float) -> dict[str, Tensor]:
    """Everything by autograd in float64; `asked` [2, T]: the gradients that come in for log-prob and entropy."""
    h, w = (value.detach().double().requires_grad_() for value in (hidden, weight))
    logits = h @ w.t()
    logits.retain_grad()
    logp = torch.log_softmax(logits / temperature, dim=-1)
    found = logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    (found[0] @ asked[0].double() + found[1] @ asked[1].double()).backward()
    assert h.grad is not None and w.grad is not None and logits.grad is not None
    values = {"logprob": found[0].detach(), "entropy": found[1].detach()}
    return values | {"d_hidden": h.grad, "d_weight": w.grad, "d_logits": logits.grad, "logits": logits.detach()}


def errors(
    tokens: int, width: int, vocab: int, dtype: torch.dtype, device: torch.device, pads: int = 64, chunk: int = 37
) -> dict[str, float]:
    """Of the fused head (weight gradient in float32, as Megatron's buffer is) and of the loss on logits."""
    hidden, weight, targets = inputs(tokens, width, vocab, dtype, device)
    asked = torch.randn(2, tokens, generator=torch.Generator(device).manual_seed(1), device=device)
    wanted = reference(hidden, weight, targets, asked, 0.8)
    padded = torch.cat(
        [weight, torch.full((pads, width), 1e3, dtype=dtype, device=device)]
    )  # would win if they counted
    h, w = hidden.clone().requires_grad_(), padded.requires_grad_()
    w.main_grad = torch.zeros(padded.shape, device=device)  # type: ignore[attr-defined]
    logprob, entropy = fused_head(h, w, targets, None, 0.8, chunk, vocab_size=vocab)
    assert entropy is not None
    (logprob @ asked[0] + entropy @ asked[1]).backward()
    assert h.grad is not None
    gradient: Tensor = w.main_grad  # type: ignore[attr-defined]
    found = {
        "logprob": largest(logprob, wanted["logprob"]),
        "entropy": largest(entropy, wanted["entropy"]),
        "d_hidden": relative(h.grad, wanted["d_hidden"]),
        "d_weight": relative(gradient[:vocab], wanted["d_weight"]),
        "padding": float(gradient[vocab:].abs().max()),
    }
    logits = wanted["logits"].float().requires_grad_()
    logprob, entropy = vocab_parallel(logits, targets, None, 0.8, chunk)
    assert entropy is not None
    (logprob @ asked[0] + entropy @ asked[1]).backward()
    assert logits.grad is not None
    return found | {
        "logprob of logits": largest(logprob, wanted["logprob"]),
        "entropy of logits": largest(entropy, wanted["entropy"]),
        "d_logits": relative(logits.grad, wanted["d_logits"]),
    }


def exact_on(
    report: Report, device: torch.device, vocabularies: tuple[int, ...] = VOCABULARIES, width: int = WIDTH
) -> None:
    worst = 0.0
    for vocab in vocabularies:
        for dtype in (torch.float32, torch.bfloat16):
            name = f"V {vocab}, {str(dtype).removeprefix('torch.')}"
            found = errors(181, width, vocab, dtype, device)
            report.number(name, found)
            for what, value in found.items():
                bound = 0.0 if what == "padding" else EXACT[what.removesuffix(" of logits")]
                if dtype == torch.bfloat16 and what in ("d_hidden", "d_weight"):
                    bound += ROUNDED * ((device.type == "cuda") + (what == "d_hidden"))
                report.claim(f"{name}: {what} against float64", value, bound)
            worst = max(worst, found["logprob"])
    report.headline(f"largest error of a log-prob {worst:.1e}")


def exact(report: Report) -> None:
    exact_on(report, torch.device("cuda"))


def speed(report: Report) -> None:
    device = torch.device("cuda")
    ceiling = copy_bandwidth(device)
    report.number("copy within the device, GB/s", ceiling / 1e9)
    shares = [row_speed(report, device, 4096, vocab, ceiling) for vocab in VOCABULARIES]
    for vocab in VOCABULARIES:
        head_speed(report, device, 8192, 4096, vocab)
    report.headline(f"row kernels at {min(shares):.0%} of the copy's bandwidth ({ceiling / 1e12:.2f} TB/s)")


def row_speed(report: Report, device: torch.device, tokens: int, vocab: int, ceiling: float) -> float:
    """The row kernels and eager PyTorch on float32 logits [T, V]; returns the kernels' share of the bandwidth."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(tokens, vocab, generator=generator, device=device)
    column = torch.randint(0, vocab, (tokens,), generator=generator, device=device)
    here, out = torch.ones(tokens, dtype=torch.bool, device=device), torch.zeros(4, tokens, device=device)
    asked = torch.randn(tokens, generator=generator, device=device)
    size, shares = x.numel() * 4, []
    for with_entropy in (False, True):
        rows.measure(x, here, column, with_entropy, out)
        _, entropy, peak, log_z = rows.combine(out.clone(), here, None)
        # The gradient is written over x, so that it is timed on its own output: the same bytes, finite values.
        kept, more = (peak, log_z, entropy), asked if with_entropy else None
        forward = seconds(lambda e=with_entropy: rows.measure(x, here, column, e, out), device)  # type: ignore[misc]
        backward = seconds(lambda k=kept, m=more: rows.gradient(x, here, column, k, asked, m), device)  # type: ignore[misc]
        x.normal_(generator=generator)
        name = f"rows T {tokens} V {vocab}" + " entropy" * with_entropy
        floor = size / ceiling, 2 * size / ceiling
        shares += [floor[0] / forward, floor[1] / backward]
        times = {"forward_ms": forward * 1e3, "backward_ms": backward * 1e3}
        report.number(name, times | {"of_bound_forward": shares[-2], "of_bound_backward": shares[-1]})

    def eager() -> None:
        leaf = x.detach().requires_grad_()
        logp = torch.log_softmax(leaf, dim=-1)
        (logp.gather(1, column[:, None])[:, 0] @ asked - (logp.exp() * logp).sum(-1) @ asked).backward()

    report.number(f"rows T {tokens} V {vocab} eager PyTorch, both ways, entropy, ms", seconds(eager, device, 5) * 1e3)
    # One read forward, one read and one write backward is all there is to do; what is left is the launch and the tail
    # of the grid. Below this the kernels move bytes twice.
    report.claim_above(f"rows, V {vocab}: share of the bandwidth bound", min(shares), 0.7)
    return min(shares)


def eager_head(hidden: Tensor, weight: Tensor, targets: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
    logp = torch.log_softmax((hidden @ weight.t()).float(), dim=-1)
    entropy = -(logp.exp() * logp).sum(-1) if with_entropy else None
    return logp.gather(1, targets[:, None])[:, 0], entropy


def head_speed(report: Report, device: torch.device, tokens: int, width: int, vocab: int) -> None:
    """From hidden states, in bf16, forward and backward: seconds and peak bytes of every arm."""
    hidden, weight, targets = inputs(tokens, width, vocab, torch.bfloat16, device)
    hidden.requires_grad_()
    weight.requires_grad_()
    gradient = torch.zeros(weight.shape, device=device)

    def run(head: Head, with_entropy: bool, into_main_grad: bool) -> None:
        hidden.grad = weight.grad = None
        weight.main_grad = gradient if into_main_grad else None  # type: ignore[attr-defined]
        logprob, entropy = head(hidden, weight, targets, with_entropy)
        (logprob.sum() if entropy is None else logprob.sum() + entropy.sum()).backward()
        hidden.grad = weight.grad = None

    def fused(h: Tensor, w: Tensor, t: Tensor, e: bool) -> tuple[Tensor, Tensor | None]:
        return fused_head(h, w, t, None, with_entropy=e)

    arms: dict[str, Callable[[], None]] = {
        "fused": lambda: run(fused, False, True),
        "fused, entropy": lambda: run(fused, True, True),
        "eager": lambda: run(eager_head, False, False),
        "eager, entropy": lambda: run(eager_head, True, False),
    }
    if (liger := _liger()) is not None:
        arms["liger"] = lambda: run(lambda h, w, t, _: (liger(w, h, t), None), False, False)
    else:
        report.left_out("Liger", "liger_kernel is not installed")
    name, logits = f"head T {tokens} H {width} V {vocab}", 4 * tokens * vocab
    found: dict[str, dict[str, Any]] = {}
    for arm, work in arms.items():
        try:
            peak = peak_bytes(work, device)
            found[arm] = {"ms": seconds(work, device, 5, 1) * 1e3, "peak_bytes": peak}
        except torch.OutOfMemoryError:
            found[arm] = {"ms": None, "peak_bytes": "out of memory"}
        report.number(f"{name}: {arm}", found[arm])
    for arm in ("fused", "fused, entropy"):
        if (peak := found[arm]["peak_bytes"]) is None:  # a CPU's memory is tools/bench_loss.py's
            continue
        report.number(f"{name}: {arm}, peak over the logits' bytes", peak / logits)
        # One chunk of logits in float32, once more in bf16, a quarter for statistics; hidden's gradient and a chunk of
        # it in float32. The weight's is Megatron's own buffer. Logits that are kept would show.
        report.claim(f"{name}: {arm}, peak bytes", peak, 1.75 * CHUNK_BYTES["cuda"] + 8 * tokens * width)
    if found["eager"]["ms"]:
        report.number(f"{name}: fused over eager, time", found["fused"]["ms"] / found["eager"]["ms"])


def _liger() -> Callable[..., Tensor] | None:
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda weight, hidden, targets: loss(weight, hidden, targets)
