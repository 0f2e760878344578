"""The learner's update equals the paper's, computed literally from the HF model, for every layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import cases_learner as cases
from tests.distributed.runner import run_ranks
from tests.tiny import make_checkpoint

BY_WORLD = {
    1: (cases.qwen3_tp1_dp1, cases.qwen2_tp1_dp1),
    2: (cases.qwen3_tp2_dp1, cases.qwen3_tp1_dp2, cases.qwen2_tp2_dp1),
    4: (cases.qwen3_tp2_dp2, cases.qwen2_tp2_dp2),
}


@pytest.mark.parametrize("world", BY_WORLD)
def test_one_update_equals_plain_pytorch_on_the_hf_model(world: int, tmp_path: Path) -> None:
    for kind in ("qwen3", "qwen2"):
        make_checkpoint(tmp_path / kind, kind)
    for name, by_rank in run_ranks(world, *BY_WORLD[world], folder=tmp_path).items():
        for rank, found in enumerate(by_rank):
            where = f"{name}, rank {rank}: {found}"
            # Float32 against float64: a few ulps (6e-8) after some hundred additions and two layers.
            assert found["score"] <= 1e-5, where
            assert found["loss"] <= 1e-6, where
            assert found["gradient"] <= 5e-6, where
            assert found["norm_sgd"] <= 1e-5, where
            assert found["norm"] <= 1e-5, where
            assert found["parameter"] <= 5e-7, where
            # Adam divides near-zero gradients by their own size: noise in them becomes a full step.
            assert found["second_loss"] <= 1e-4, where
            assert found["tensors"] in (24, 27), where  # every HF tensor of the two models
