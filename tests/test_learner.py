"""The learner's update equals the paper's, computed literally from the HF model, for every family and layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import cases_learner
from tests.distributed.cases_learner import CASES
from tests.distributed.runner import run_ranks
from tests.tiny import KINDS, make_checkpoint


@pytest.mark.parametrize("world", CASES)
def test_one_update_equals_plain_pytorch_on_the_hf_model(world: int, tmp_path: Path) -> None:
    for kind in KINDS:
        make_checkpoint(tmp_path / kind, kind)
    for kind in ("qwen3", "qwen2", "qwen3_moe"):
        make_checkpoint(tmp_path / f"{kind}_deep", kind, num_hidden_layers=5)
    wrong = []
    for name, by_rank in run_ranks(world, *CASES[world], folder=tmp_path, timeout=500).items():
        for rank, found in enumerate(by_rank):
            bounds = {
                # Float32 against float64: a few ulps (6e-8) after some hundred additions and two layers.
                "score": 1e-5,
                "loss": 1e-6,
                "gradient": 5e-6,
                "norm_sgd": 1e-5,
                "norm": 1e-5,
                "parameter": 5e-7,
                # Adam divides near-zero gradients by their own size: noise in them becomes a full step.
                "second_loss": 1e-4,
                "missing": 0,
            }
            wrong += [f"{name}, rank {rank}: {k} = {found[k]:.1e} > {b:.0e}" for k, b in bounds.items() if found[k] > b]
    assert not wrong, wrong


def test_an_update_that_is_not_finite_on_one_rank_is_applied_on_none(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "qwen3", "qwen3")
    for by_layout in run_ranks(2, cases_learner.rejected_updates, folder=tmp_path)["rejected_updates"]:
        for layout, found in by_layout.items():
            assert found["rejected"] == [int(layout[-1])], layout
            assert found["metric"] == 1.0
            assert found["finite"], layout
            assert found["loss"] is not None
            assert found["moved"] == 0.0, layout  # bit for bit as if the mini-batch had never been
