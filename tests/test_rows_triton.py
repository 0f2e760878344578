"""The Triton kernels of the loss, by Triton's interpreter on a CPU, and compiled for a GPU; on CUDA:
tests/gpu/test_rows.py."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from tests.harness.ranks import ROOT

CODE = """
from tests.harness.rows_of_logits import differences
for name, error in differences("cpu"):
    print(f"{error:.3e} {name}")
"""


def test_the_kernels_equal_the_plain_functions_for_any_number_of_columns_and_any_scale() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    ended = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=200, env=environment)
    assert ended.returncode == 0, ended.stderr[-3000:]
    lines = ended.stdout.splitlines()
    assert len(lines) == 5 * 3 * 2 * 3
    for line in lines:
        # Two float32 sums of up to 9,000 terms, in another order.
        assert float(line.split()[0]) <= 1e-5, line


@pytest.mark.parametrize("which", ["installed", "constraints/h200.txt"])
def test_the_kernels_compile_for_hopper_within_its_registers_and_spill_none(which: str) -> None:
    """`A3PO_TRITON_CUDA`: a folder with the Triton that GPUs run, which need not be the one installed here."""
    folder = []
    if which != "installed":
        if "A3PO_TRITON_CUDA" not in os.environ:
            pytest.skip("A3PO_TRITON_CUDA names no folder with the Triton of constraints/h200.txt")
        folder = [os.environ["A3PO_TRITON_CUDA"]]
    command = [sys.executable, "-m", "tests.harness.triton_ahead", *folder]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    if folder:
        pinned = re.search(r"^triton==(\S+)", (ROOT / "constraints/h200.txt").read_text(), re.MULTILINE)
        assert pinned
        assert found["triton"] == pinned[1]
    assert len(found["kernels"]) == 4
    for name, figures in found["kernels"].items():
        # Of 65,536 registers a multiprocessor: four warps with 128 each leave room for four blocks at a time.
        assert figures["registers"] <= 128, name
        assert figures["spilled"] == 0, name
        assert figures["shared"] <= 1024, name
