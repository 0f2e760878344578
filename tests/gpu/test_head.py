"""The loss's kernels at a real vocabulary (experiment 2)."""

from __future__ import annotations

from tests.gpu.experiments import NEEDS_GPU, shown

pytestmark = NEEDS_GPU


def test_log_probs_entropy_and_gradients_are_exact_for_qwen3s_vocabulary_and_half_of_it() -> None:
    numbers = shown("2a")
    for vocab in (151936, 75968):
        found = numbers[f"V {vocab}, float32"]
        # Float32 sums against float64; products in tf32 would err by 3e-4.
        assert found["logprob"] <= 5e-5 and found["entropy"] <= 5e-5
        assert found["d_weight"] <= 2e-5 and found["d_hidden"] <= 2e-5 and found["padding"] == 0
        # bf16 operands: the gradient of the logits is rounded once, by 2^-9 at most; the sums stay in float32.
        assert numbers[f"V {vocab}, bfloat16"]["d_weight"] <= 2**-9 + 2e-5


def test_the_row_kernels_run_near_the_bandwidth_bound_and_the_head_holds_one_chunk() -> None:
    numbers = shown("2b")
    for vocab in (151936, 75968):
        rows = numbers[f"rows T 4096 V {vocab} entropy"]
        assert rows["of_bound_forward"] >= 0.7 and rows["of_bound_backward"] >= 0.7
