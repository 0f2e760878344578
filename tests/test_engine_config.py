"""What vLLM's own configuration makes of our arguments on a GPU (engine_configs.py): a table of what must hold."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.harness.ranks import ROOT

ALWAYS = {
    "runner": "V2",
    "overlapping steps": 2,
    "graphs": "FULL_AND_PIECEWISE",
    "fused all-reduce": False,  # of FlashInfer, which is there or not by what PATH holds
    "autotune": False,
    "experts": "triton",  # kernels that keep their weights in the order in which they are read back
    "sleep": True,
    "head": "torch.float32",
    "prefix cache": True,
}


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    command = [sys.executable, "-m", "tests.harness.engine_configs_of_a_gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_set_of_arguments_gives_the_engine_that_the_loop_counts_on(found: dict[str, dict[str, Any]]) -> None:
    assert len(found) == 30
    for case, fields in found.items():
        assert {name: fields[name] for name in ALWAYS} == ALWAYS, case
        assert fields["quantization"] == ("fp8_per_block" if case.startswith("fp8") else None), case
        assert fields["routes"] is ("replay" in case), case
        assert fields["expert parallel"] is ("expert 2" in case), case


def test_the_engine_is_the_same_with_and_without_a_compiler_in_the_path(found: dict[str, dict[str, Any]]) -> None:
    for case, fields in found.items():
        assert fields == found[case.replace("with nvcc", "without nvcc")], case


def test_vllms_own_all_reduce_is_off_exactly_where_ranks_of_an_engine_see_one_device_each(
    found: dict[str, dict[str, Any]],
) -> None:
    for case, fields in found.items():
        assert fields["own all-reduce"] is ("1 visible" not in case), case
