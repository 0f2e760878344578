"""Engine steps that overlap, as on a GPU: nothing is left under way when a round of sampling has ended."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.harness.ranks import ROOT
from tests.harness.tiny_models import make_checkpoint


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What is left in flight, with our drain and without it."""
    folder = make_checkpoint(tmp_path_factory.mktemp("steps") / "m", "qwen3")
    command = [sys.executable, "-m", "tests.harness.overlapping_steps", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    drained, before = (json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"rounds"'))
    return {"drained": drained, "before": before}


def test_no_step_is_left_in_flight_when_the_last_response_ends_on_a_stop_token(left: dict[str, dict[str, Any]]) -> None:
    """vLLM schedules a step before it has read the one before; with routing replay what is left over a reset of the
    cache ends the run: "auxiliary output generation changed with output in flight"."""
    assert left["drained"] == {"rounds": [[["stop", 3]] * 3] * 2, "in_flight": 0, "requests": False}
    assert left["before"]["in_flight"] == 3  # what this holds against
