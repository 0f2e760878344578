"""vLLM's sleep allocator alone (experiment 4)."""

from __future__ import annotations

import pytest

from tests.gpu.experiments import NEEDS_GPU, shown

pytestmark = NEEDS_GPU


@pytest.mark.parametrize("name", ["4a", "4b"])
def test_pools_give_their_memory_back_and_graphs_replay_after_they_return(name: str) -> None:
    slept, woke = shown(name)["seconds to sleep, to wake"]
    assert slept < 5 and woke < 5  # nothing is copied: 2 GiB are unmapped and mapped
