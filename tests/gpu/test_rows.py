"""The Triton kernels of the loss on CUDA."""

from __future__ import annotations

import pytest
import torch

from tests.harness.rows_of_logits import differences

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def test_the_kernels_equal_the_plain_functions_on_cuda() -> None:
    for name, error in differences("cuda"):
        assert error <= 1e-5, name
