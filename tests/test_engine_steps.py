"""Engine steps that overlap, as on a GPU: nothing is left under way when a round of sampling has ended."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed import cases_engine_steps as cases
from tests.harness.ranks import run_ranks
from tests.harness.tiny_models import make_checkpoint


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What is left in flight, with our drain and without it."""
    folder = tmp_path_factory.mktemp("steps")
    make_checkpoint(folder / "m", "qwen3")
    found = (run_ranks(1, case, folder=folder, own=True) for case in (cases.drained, cases.before))
    return {name: by_rank[0] for by_case in found for name, by_rank in by_case.items()}


def test_no_step_is_left_in_flight_when_the_last_response_ends_on_a_stop_token(left: dict[str, dict[str, Any]]) -> None:
    """vLLM schedules a step before it has read the one before; with routing replay what is left over a reset of the
    cache ends the run: "auxiliary output generation changed with output in flight"."""
    assert left["drained"] == {"rounds": [[["stop", 3]] * 3] * 2, "in_flight": 0, "requests": False}
    assert left["before"]["in_flight"] == 3  # what this holds against
