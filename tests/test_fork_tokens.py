"""Fork tokens against a sort of all tokens, whatever the number of replicas."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch

from a3po_megatron.algorithm.fork_tokens import keep_forks
from a3po_megatron.algorithm.largest import Total
from a3po_megatron.algorithm.shaping import shape
from a3po_megatron.batch import Batch
from a3po_megatron.config import ForkTokens
from tests.test_correction import scored


def over(batches: list[Batch], act: Callable[[Batch, Total], Batch]) -> list[Batch]:
    """Each replica in a thread, which meets the others in every sum."""
    replicas = len(batches)
    barrier, parts, done = threading.Barrier(replicas), [torch.zeros(0)] * replicas, list(batches)

    def run(number: int) -> None:
        def total(values: torch.Tensor) -> torch.Tensor:
            parts[number] = values
            barrier.wait()
            whole = torch.stack(parts).sum(dim=0)
            barrier.wait()
            return whole

        done[number] = act(batches[number], total)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(replicas)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("fraction", [0.2, 0.05, 1.0])
@pytest.mark.parametrize("ties", [False, True])
def test_the_most_uncertain_tokens_of_all_replicas_are_kept(replicas: int, fraction: float, ties: bool) -> None:
    batches = [scored(groups=3 + number, seed=number) for number in range(replicas)]
    draw = np.random.default_rng(5)
    for number, batch in enumerate(batches):
        entropy = draw.gamma(0.3, 1.0, len(batch.rollout_index)).astype(np.float32)
        batch.entropy = torch.from_numpy(np.round(entropy, 1) if ties else entropy)
        if number == 1:
            batch.trained = torch.from_numpy(draw.random(len(entropy)) < 0.7)
    masks = [torch.ones_like(b.rollout_index, dtype=torch.bool) if b.trained is None else b.trained for b in batches]
    every = np.concatenate([b.entropy[m].numpy() for b, m in zip(batches, masks, strict=True) if b.entropy is not None])
    least = np.sort(every)[::-1][math.ceil(fraction * len(every)) - 1]
    kept = over(batches, lambda batch, total: keep_forks(batch, ForkTokens(fraction=fraction), total))
    for batch, mask in zip(kept, masks, strict=True):
        assert batch.trained is not None and batch.entropy is not None
        assert torch.equal(batch.trained, mask & (batch.entropy >= least))


def test_what_is_left_out_has_no_weight_and_what_is_kept_the_weight_one() -> None:
    batch = keep_forks(scored(), ForkTokens(), lambda values: values)
    shape(batch, 0, ForkTokens())
    assert batch.token_weights is not None and batch.trained is not None
    assert torch.equal(batch.token_weights, batch.trained.float()) and batch.rho == (1.0, 1.0)


def test_a_batch_without_tokens_stays_one() -> None:
    batch = scored()
    batch.trained = torch.zeros_like(batch.rollout_index, dtype=torch.bool)
    kept = keep_forks(batch, ForkTokens(), lambda values: values).trained
    assert kept is not None and not kept.any()
