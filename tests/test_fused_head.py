"""The fused head is a drop-in for the dense computation: values, gradients, memory, and what Megatron's buffers see."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch

from a3po_megatron.learner.fused_head import logprob_and_entropy
from tests.distributed import cases_fused_head as cases
from tests.harness.ranks import Case, run_ranks


@pytest.mark.parametrize("case", [cases.heads, pytest.param(cases.all_heads, marks=pytest.mark.soak)])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_values_and_gradients_equal_dense_float64_for_any_slices_rows_and_sequence_parallelism(
    world: int, case: Case
) -> None:
    for rank, found in enumerate(run_ranks(world, case)[case.__name__]):
        for name, error in found.items():
            rounded = name in ("bfloat16/hidden", "bfloat16/main_grad/hidden", "bfloat16/weight")
            # Gradients that are handed back in bfloat16 are rounded to 8 bits; all else is summed in float32.
            assert error <= (2e-2 if rounded else 3e-5), f"rank {rank}: {name} = {error:.1e}"


def random(tokens: int = 40, vocab: int = 300, width: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(vocab, width, generator=generator)
    return hidden, weight, torch.randint(0, vocab, (tokens,), generator=generator)


def test_the_number_of_chunks_does_not_change_the_gradient_of_the_weight() -> None:
    hidden, weight, targets = random(tokens=300)
    found = []
    for chunk in (1, 7, 64, 300):
        mine = weight.clone().requires_grad_()
        logprobs, entropy = logprob_and_entropy(hidden, mine, targets, None, chunk_tokens=chunk)
        assert entropy is not None
        (logprobs.sum() + 0.3 * entropy.sum()).backward()
        assert mine.grad is not None
        found.append(mine.grad)
    for other in found[1:]:
        assert float((other - found[0]).norm() / found[0].norm()) <= 1e-6


def test_a_tied_weight_gets_both_of_its_gradients_into_main_grad_through_megatrons_hook() -> None:
    """The hook's rule: what was added to main_grad is not added again, unless `zero_out_wgrad` says that zeros come."""
    hidden, weight, targets = random()
    tokens = torch.arange(40) % 300

    def total(of: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        scored, _ = logprob_and_entropy(states + of[tokens], of, targets, None, with_entropy=False)
        return scored.sum()

    plain = weight.clone().requires_grad_()
    total(plain, hidden).backward()
    tied = weight.clone().requires_grad_()
    tied.main_grad, tied.grad_added_to_main_grad, tied.zero_out_wgrad = torch.zeros_like(weight), False, True  # type: ignore[attr-defined]

    def hook(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        parameter.main_grad.add_(parameter.grad)  # type: ignore[attr-defined]
        parameter.grad = None

    tied.register_post_accumulate_grad_hook(hook)
    total(tied, hidden).backward()
    assert plain.grad is not None
    assert torch.allclose(tied.main_grad, plain.grad, rtol=1e-5, atol=1e-6)  # type: ignore[attr-defined]


@pytest.mark.parametrize("tied", [False, True])
def test_the_gradient_that_nobody_reads_is_one_piece_of_memory_for_all_micro_batches(tied: bool) -> None:
    """V x H a micro-batch would be a gigabyte of a large model. Where a tied embedding's is added, it stays zeros."""
    hidden, weight, targets = random()
    mine = weight.clone().requires_grad_()
    mine.main_grad, mine.grad_added_to_main_grad, mine.zero_out_wgrad = torch.zeros_like(weight), False, tied  # type: ignore[attr-defined]
    seen: list[torch.Tensor] = []

    def hook(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        seen.append(parameter.grad)
        parameter.grad = None

    mine.register_post_accumulate_grad_hook(hook)
    for _ in range(3):
        logprob_and_entropy(hidden, mine, targets, None)[0].sum().backward()
    assert len({gradient.data_ptr() for gradient in seen}) == 1
    if tied:
        (logprob_and_entropy(hidden, mine, targets, None)[0].sum() + mine[:5].sum()).backward()
        assert seen[-1].sum() == 5 * weight.shape[1]  # the embedding's gradient alone
        assert not seen[0].any()


def test_main_grad_of_another_dtype_is_refused_and_is_used_without_megatrons_hook() -> None:
    hidden, weight, targets = random()
    mine = weight.clone().requires_grad_()
    mine.main_grad = torch.zeros_like(weight)  # type: ignore[attr-defined]
    logprob_and_entropy(hidden, mine, targets, None)[0].sum().backward()
    assert mine.grad is None
    assert mine.main_grad.abs().sum() > 0  # type: ignore[attr-defined]
    mine.main_grad = torch.zeros_like(weight).bfloat16()  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="must be float32"):
        logprob_and_entropy(hidden, mine, targets, None)[0].sum().backward()


def test_no_rows_at_all_give_no_gradient_and_no_error() -> None:
    hidden, weight, _ = random()
    states, mine = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    nothing = torch.zeros(0, dtype=torch.int64)
    logprobs, _ = logprob_and_entropy(states, mine, nothing, None, rows=nothing)
    (logprobs.sum() * 0.0).backward()
    assert states.grad is not None and not states.grad.any()
    assert mine.grad is not None and not mine.grad.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.full((40,), 300)}, "outside the vocabulary"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, "one a token"),
        ({"rows": torch.tensor([40])}, "rows must lie"),
        ({"vocab_size": 301}, "does not fit"),
        ({"temperature": 0.0}, "temperature"),
        ({"weight": torch.zeros(300, 15)}, "hidden must be"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    hidden, weight, targets = random()
    given: dict[str, object] = {"hidden": hidden, "weight": weight, "targets": targets, "group": None, **change}
    with pytest.raises(ValueError, match=message):
        logprob_and_entropy(**given)  # type: ignore[arg-type]


PEAK = """
import sys
sys.path.insert(0, "tools")
from bench_loss import measure
row = measure("fused", 2048, 32, 40000, with_entropy=True, rounds=2, chunk_tokens=32)
print(row["peak_bytes"] / (4 * 2048 * 40000))
"""


def test_logits_are_never_held() -> None:
    """Logits would take 328 MB; two chunks of them take 10, and the rest is what any process gains by the way."""
    ended = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert float(ended.stdout) <= 0.15, ended.stdout


@pytest.mark.parametrize(
    ("dtype", "with_entropy", "buffer"),
    [(torch.float32, True, True), (torch.float32, False, False), (torch.bfloat16, True, True)],
)
def test_at_the_default_chunk_all_memory_ever_live_is_a_small_part_of_the_logits(
    dtype: torch.dtype, with_entropy: bool, buffer: bool
) -> None:
    """Every block that torch's allocator gave, as the profiler saw it; what backward returns counts here too.

    The vocabulary is Qwen3's at TP 2. The width is small: it makes the products cheap, and no logit smaller.
    """
    hidden, weight, targets = random(tokens=2048, vocab=75968, width=64)
    states, mine = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    if buffer:
        mine.main_grad, mine.grad_added_to_main_grad = torch.zeros(weight.shape), False  # type: ignore[attr-defined]
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        logprobs, entropy = logprob_and_entropy(states, mine, targets, None, with_entropy=with_entropy)
        (logprobs.sum() if entropy is None else logprobs.sum() + entropy.sum()).backward()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    peak = max(live) / (4 * 2048 * 75968)
    assert 0.03 < peak <= 0.15  # a chunk's work space is 0.04 of the logits: the profiler did see it
