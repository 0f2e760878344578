"""The vocab-parallel loss: dense values and gradients for any number of slices, and refusals."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from a3po_megatron.learner.vocab_parallel import logprob_and_entropy
from tests.distributed import cases_vocab_parallel as cases
from tests.harness.ranks import run_ranks


@pytest.mark.parametrize("world", [1, 2, 4])
def test_values_and_gradients_equal_dense_float64_whatever_the_slices(world: int) -> None:
    for rank, found in enumerate(run_ranks(world, cases.values_and_gradients)["values_and_gradients"]):
        where = f"rank {rank}: {found}"
        for name in ("logprob", "entropy", "gradient"):
            # The float32 sums of 67 terms lose a few of 24 bits; at a scale of 1e4 the exponent's argument does.
            assert found[f"float32/{name}"] <= 3e-5, where
        assert found["bfloat16/logprob"] <= 3e-5, where  # the inputs are rounded, the sums are not
        assert found["bfloat16/gradient"] <= 2e-2, where  # the gradient itself is rounded to 8 bits


def test_a_logit_of_minus_infinity_has_probability_zero_and_no_nan() -> None:
    logits = torch.tensor([[0.0, float("-inf"), 1.0]], requires_grad=True)
    logprobs, entropy = logprob_and_entropy(logits, torch.tensor([2]), None)
    (logprobs.sum() + entropy.sum()).backward()
    assert torch.isfinite(logits.grad).all()
    assert entropy.item() == pytest.approx(0.58220, abs=1e-4)


def test_no_tokens_at_all() -> None:
    logits = torch.zeros(0, 5, requires_grad=True)
    logprobs, _ = logprob_and_entropy(logits, torch.zeros(0, dtype=torch.int64), None)
    logprobs.sum().backward()
    assert logits.grad.shape == (0, 5)


@pytest.mark.parametrize(
    ("logits", "targets", "options", "message"),
    [
        (torch.zeros(2, 5), torch.tensor([0, 5]), {}, "outside the vocabulary"),
        (torch.zeros(2, 5), torch.tensor([0, 4]), {"vocab_size": 4}, "outside the vocabulary"),
        (torch.zeros(2, 5), torch.tensor([0, -1]), {}, "outside the vocabulary"),
        (torch.zeros(2, 5), torch.tensor([0]), {}, "must be"),
        (torch.zeros(2, 5), torch.tensor([0, 1]), {"temperature": 0.0}, "temperature"),
        (torch.zeros(2, 5), torch.tensor([0, 1]), {"vocab_size": 6}, "does not fit"),
    ],
)
def test_what_does_not_fit_is_refused(
    logits: torch.Tensor, targets: torch.Tensor, options: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        logprob_and_entropy(logits, targets, None, **options)


def test_the_contracts_import_without_megatron_vllm_or_each_other() -> None:
    """The fixed contracts import on their own: package __init__ files import nothing heavy."""
    code = (
        "import sys\n"
        "from a3po_megatron.algorithm.shaping import token_weights\n"
        "from a3po_megatron.algorithm.advantage import group_advantages\n"
        "from a3po_megatron.learner.vocab_parallel import logprob_and_entropy\n"
        "from a3po_megatron.config import ShapingOptions, AdvantageOptions\n"
        "from a3po_megatron.reward.math import grade\n"
        "bad = [m for m in ('megatron', 'vllm', 'transformers') if m in sys.modules]\n"
        "assert not bad, bad\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


def test_the_command_line_imports_no_torch() -> None:
    code = "import sys, a3po_megatron.cli, a3po_megatron.config; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0
