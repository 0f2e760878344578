"""The fused head over real ranks, against a dense float64 computation (tests/test_fused_head.py)."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from a3po_megatron.learner.fused_head import logprob_and_entropy
from tests.distributed.cases_vocab_parallel import relative
from tests.harness.ranks import CaseRanks

VOCAB, HIDDEN, TOKENS = 67, 24, 20


def dense(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor | None,
    temperature: float,
    g: Tensor,
    h: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, entropies, and the gradients of hidden and weight, in float64 from the same inputs."""
    x, w = (value.double().clone().requires_grad_() for value in (hidden, weight))
    chosen = x if rows is None else x[rows]
    logp = torch.log_softmax(chosen @ w.t() / temperature, dim=-1)
    taken, entropy = logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    ((taken * g).sum() + ((entropy * h).sum() if h is not None else 0)).backward()
    assert x.grad is not None and w.grad is not None
    return taken.detach(), entropy.detach(), x.grad, w.grad


def heads(ranks: CaseRanks) -> dict[str, float]:
    """A fourth of all (of one rank's, half), in which any two of the dimensions take every pair of values."""
    return _heads(ranks, every=False)


def all_heads(ranks: CaseRanks) -> dict[str, float]:
    return _heads(ranks, every=True)


SCALES, TEMPERATURES = (0.2, 8.0, 2000.0), (0.7, 1.0, 1.3)  # logits up to 1e4


def _heads(ranks: CaseRanks, every: bool) -> dict[str, float]:
    """Worst relative errors over dtypes, temperatures, scales, chunks, rows, sequence parallelism and main_grad."""
    world, rank, group = ranks.world, ranks.rank, torch.distributed.group.WORLD
    columns = -(-VOCAB // world) + 3  # the last slice is padded, by more than rounding up
    worst: dict[str, float] = {}
    for dtype, scale, temperature, chunk, entropy, sequence, picked, buffer in itertools.product(
        (torch.float32, torch.bfloat16),
        SCALES,
        TEMPERATURES,
        (None, 3),
        (True, False),
        (False, True) if world > 1 else (False,),
        (False, True),
        (False, True),
    ):
        if (temperature, chunk) == (1.3, None) or (scale == 8.0 and temperature == 0.7):
            continue  # a covering choice
        odd = (dtype == torch.bfloat16) + entropy + picked + SCALES.index(scale)
        even = sequence + buffer + (chunk is None) + TEMPERATURES.index(temperature)
        if not every and (odd % 2 == 0 or (world > 1 and even % 2 == 1)):
            continue
        torch.manual_seed(3)
        hidden, weight = torch.randn(TOKENS, HIDDEN).to(dtype), (torch.randn(VOCAB, HIDDEN) * scale).to(dtype)
        rows = torch.tensor([0, 4, 5, 11, 19]) if picked else None
        count = TOKENS if rows is None else len(rows)
        targets = torch.randint(0, VOCAB, (count,))
        # With chosen rows all targets lie in the first slice: the other ranks hold none.
        targets[:3] = torch.tensor([0, VOCAB - 1, 1])
        targets = torch.arange(count) % 3 if picked else targets
        g, h = torch.randn(count), torch.randn(count) if entropy else None
        padded = torch.full((columns * world, HIDDEN), 3.0 * scale, dtype=dtype)  # would win if it counted
        padded[:VOCAB] = weight
        mine = padded[rank * columns : (rank + 1) * columns].clone().requires_grad_()
        share = slice(rank * TOKENS // world, (rank + 1) * TOKENS // world) if sequence else slice(None)
        here = hidden[share].clone().requires_grad_()
        if buffer:
            mine.main_grad = torch.full(mine.shape, 0.5)  # type: ignore[attr-defined]
            mine.grad_added_to_main_grad = False  # type: ignore[attr-defined]
        found, found_entropy = logprob_and_entropy(
            here,
            mine,
            targets,
            group,
            temperature,
            chunk,
            vocab_size=VOCAB,
            with_entropy=entropy,
            sequence_parallel=sequence,
            rows=rows,
        )
        total = (found * g).sum()
        if found_entropy is not None and h is not None:
            total = total + (found_entropy * h).sum()
        total.backward()
        want, want_entropy, want_hidden, want_weight = dense(
            hidden, weight, targets, rows, temperature, g.double(), None if h is None else h.double()
        )
        whole = torch.zeros(columns * world, HIDDEN, dtype=torch.float64)
        whole[:VOCAB] = want_weight
        if buffer:
            assert mine.grad_added_to_main_grad  # type: ignore[attr-defined]
            ours = mine.main_grad - 0.5  # type: ignore[attr-defined]
        else:
            assert mine.grad is not None
            ours = mine.grad
        assert here.grad is not None
        assert found_entropy is None or entropy
        slice_of = whole[rank * columns : (rank + 1) * columns]
        errors = {
            "logprob": relative(found.detach(), want),
            "hidden": float((here.grad.double() - want_hidden[share]).norm() / want_hidden.norm().clamp(min=1e-3)),
            # 0.5 and its rounding lie under what was accumulated.
            "weight": float((ours.double() - slice_of).norm() / whole.norm().clamp(min=1.0 if buffer else 1e-3)),
        }
        if found_entropy is not None:
            errors["entropy"] = float(
                (found_entropy.detach() - want_entropy).norm() / want_entropy.norm().clamp(min=1e-3)
            )
        where = str(dtype).removeprefix("torch.") + ("/main_grad" if buffer else "")
        for name, value in errors.items():
            worst[f"{where}/{name}"] = max(worst.get(f"{where}/{name}", 0.0), value)
    return worst
