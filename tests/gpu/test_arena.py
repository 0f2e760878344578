"""The learner's way out of device memory and back (experiment 3)."""

from __future__ import annotations

import pytest

from tests.gpu.experiments import NEEDS_GPU, shown

pytestmark = NEEDS_GPU


@pytest.mark.parametrize("name", ["3a", "3b"])
def test_an_optimizer_leaves_in_one_copy_and_its_next_step_is_equal_to_the_last_bit(name: str) -> None:
    numbers = shown(name)
    assert numbers["PYTORCH_CUDA_ALLOC_CONF"] == (None if name == "3a" else "expandable_segments:True")
    # A tenth of what PCIe 5 carries: anything above it is one pinned copy and no loop over tensors.
    assert numbers["GB/s, one block, pinned"]["away"] > 5 and numbers["GB/s, one block, pinned"]["back"] > 5


@pytest.mark.parametrize("name", ["3c", "3d"])
def test_a_whole_learner_leaves_nothing_behind_and_steps_as_if_it_had_stayed(name: str) -> None:
    assert shown(name)["bytes of the learner that leave"] > 5e9  # half a billion parameters, 18 bytes each
