"""The demo's loop on CUDA, end to end (experiment 6)."""

from __future__ import annotations

from tests.gpu.experiments import NEEDS_GPU, shown

pytestmark = NEEDS_GPU


def test_the_demo_learns_on_a_gpu() -> None:
    first, last = shown("6")["correct rate, mean of the first and of the last five steps"]
    assert last - first >= 0.15  # as on a CPU: tests/test_demo.py
