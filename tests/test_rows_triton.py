"""The Triton kernels of the loss, by Triton's interpreter on a CPU; on CUDA: tests/gpu/test_rows.py."""

from __future__ import annotations

import os
import subprocess
import sys

CODE = """
from tests.rows_cases import differences
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
