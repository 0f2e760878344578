"""Vocab-parallel log-probs and entropy over real ranks, against a dense float64 computation."""

from __future__ import annotations

import itertools

import torch

from a3po_megatron.learner.vocab_parallel import logprob_and_entropy
from tests.harness.ranks import CaseRanks


def dense(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float, g: torch.Tensor, h: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = logits.double().clone().requires_grad_()
    logp = torch.log_softmax(x / temperature, dim=-1)
    chosen = logp.gather(1, targets[:, None])[:, 0]
    entropy = -(logp.exp() * logp).sum(-1)
    total = (chosen * g).sum() + ((entropy * h).sum() if h is not None else 0)
    total.backward()
    return chosen.detach(), entropy.detach(), x.grad


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-30))


def values_and_gradients(ranks: CaseRanks) -> dict[str, float]:
    """Worst relative errors over temperatures, scales, chunks, paddings and dtypes."""
    group, world, rank = torch.distributed.group.WORLD, ranks.world, ranks.rank
    worst: dict[str, float] = {}
    vocab, tokens = 67, 23
    columns = -(-vocab // world) + 3  # the last slice is padded, by more than rounding up
    for dtype, scale, temperature, chunk, entropy in itertools.product(
        (torch.float32, torch.bfloat16), (1.0, 40.0, 1e4), (0.7, 1.0, 1.3), (None, 5), (True, False)
    ):
        torch.manual_seed(7)
        logits = (torch.randn(tokens, vocab) * scale).to(dtype)
        targets = torch.randint(0, vocab, (tokens,))
        targets[:4] = torch.tensor([0, vocab - 1, 1, 2])
        g, h = torch.randn(tokens), torch.randn(tokens)
        padded = torch.full((tokens, columns * world), 3.0 * scale, dtype=dtype)  # padding that would win if it counted
        padded[:, :vocab] = logits
        mine = padded[:, rank * columns : (rank + 1) * columns].clone().requires_grad_()
        before = mine.detach().clone()
        found, found_entropy = logprob_and_entropy(
            mine, targets, group, temperature, chunk, vocab_size=vocab, with_entropy=entropy
        )
        total = (found * g).sum()
        if found_entropy is not None:
            total = total + (found_entropy * h).sum()
        total.backward()
        assert (found_entropy is not None) == entropy
        assert torch.equal(mine.detach(), before), "the caller's logits were modified"
        want, want_entropy, want_grad = dense(logits, targets, temperature, g.double(), h.double() if entropy else None)
        whole = torch.zeros(tokens, columns * world, dtype=torch.float64)
        whole[:, :vocab] = want_grad
        key = f"{str(dtype).removeprefix('torch.')}"
        # At 1e4 gradients may vanish: a slice without any is compared absolutely.
        ours, theirs = mine.grad, whole[:, rank * columns : (rank + 1) * columns]
        error = float((ours.double() - theirs).norm() / whole.norm().clamp(min=1e-3))
        entries = {"logprob": relative(found.detach(), want), "gradient": error}
        if found_entropy is not None:
            entries["entropy"] = float(
                (found_entropy.detach().double() - want_entropy).norm() / want_entropy.norm().clamp(min=1e-3)
            )
        for name, value in entries.items():
            worst[f"{key}/{name}"] = max(worst.get(f"{key}/{name}", 0.0), value)
    return worst
