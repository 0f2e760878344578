"""The learner's way out of device memory and back: nothing stays behind, nothing changes. On a CPU, where the block and
its twin are both host memory; with CUDA: tests/gpu/test_arena.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from a3po_megatron.model.arena import ALIGNMENT, Block, Gathered, plan
from tests.distributed import cases_arena as cases
from tests.harness.ranks import run_ranks
from tests.harness.tiny_models import make_checkpoint


@given(st.lists(st.integers(min_value=0, max_value=10_000), max_size=50))
def test_tensors_lie_in_a_block_in_order_aligned_without_overlap_and_without_waste(sizes: list[int]) -> None:
    offsets, size = plan(sizes)
    for begin, length, end in zip(offsets, sizes, [*offsets, size][1:], strict=True):
        assert begin % ALIGNMENT == 0
        assert 0 <= end - begin - length < ALIGNMENT


def test_a_block_carries_tensors_of_any_dtype_and_shape_there_and_back_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(1)
    members = [
        torch.randn(3, 5, generator=generator),
        torch.randn(7, generator=generator).bfloat16(),
        torch.randint(-9, 9, (2, 1, 4), generator=generator),
        torch.zeros(0, 4),
        torch.tensor([float("nan"), float("inf"), -0.0]),
    ]
    wanted = [member.clone() for member in members]
    block = Gathered(members, torch.device("cpu"))
    for _ in range(3):
        assert not block.is_here and block.storage.nbytes() == 0
        assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(members, wanted, strict=True))
        block.back()
        block.ready()
        bits = [(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(members, wanted, strict=True) if a.numel()]
        assert all(torch.equal(a, b) for a, b in bits)
        members[0].add_(1)
        wanted[0].add_(1)
        block.away()


def test_a_parameter_that_left_and_returned_is_still_where_its_hooks_are() -> None:
    # Megatron's gradients travel by a hook on this node; to give a parameter data of another device makes a new one.
    buffer = torch.arange(8.0)
    parameter = torch.nn.Parameter(buffer[2:6])
    node = parameter.expand_as(parameter).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    block = Block(buffer.untyped_storage())
    block.away()
    assert parameter.device == buffer.device
    block.back()
    assert parameter.expand_as(parameter).grad_fn.next_functions[0][0] is node  # type: ignore[union-attr]
    assert parameter.data.untyped_storage()._cdata == buffer.untyped_storage()._cdata


def test_going_where_one_is_already_changes_nothing() -> None:
    member = torch.arange(4.0)
    block = Gathered([member], torch.device("cpu"))
    block.away()
    block.back()
    member.mul_(2)
    block.back()
    assert member.tolist() == [0, 2, 4, 6]


def test_what_shares_the_blocks_memory_finds_it_again() -> None:
    buffer = torch.arange(8.0)
    parameter, shard = buffer[2:6], buffer[4:8]  # as a float32 master shares a parameter's buffer
    block = Block(buffer.untyped_storage())
    block.away()
    assert buffer.untyped_storage().nbytes() == 0
    block.back()
    assert parameter.tolist() == [2, 3, 4, 5]
    shard.fill_(9)
    assert parameter.tolist() == [2, 3, 9, 9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("arena")
    for kind in ("qwen3", "qwen3_moe"):
        make_checkpoint(folder / kind, kind)
    make_checkpoint(folder / "qwen3_deep", "qwen3", num_hidden_layers=5)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(2, cases.leaves_and_returns, folder=folder, timeout=400)["leaves_and_returns"]


def test_a_learner_that_left_between_updates_is_bit_for_bit_the_one_that_stayed(found: list[dict[str, Any]]) -> None:
    for by_name in found:
        assert by_name.keys() == {*cases.CROSSING}
        assert_as_one_that_stayed(by_name)


def test_nothing_of_it_stays_behind(found: list[dict[str, Any]]) -> None:
    for by_name in found:
        assert_nothing_stays(by_name)


def test_its_weights_come_back_as_they_were_and_a_checkpoint_is_taken_while_its_optimizer_is_away(
    found: list[dict[str, Any]],
) -> None:
    for by_name in found:
        assert_comes_back(by_name)


@pytest.mark.soak
def test_and_so_it_does_where_others_imply_it(folder: Path) -> None:
    case = cases.leaves_and_returns_elsewhere
    for by_name in run_ranks(2, case, folder=folder, timeout=400)[case.__name__]:
        assert len(by_name) == len(cases.SAVED) - len(cases.CROSSING)
        for holds in (assert_as_one_that_stayed, assert_nothing_stays, assert_comes_back):
            holds(by_name)


def assert_as_one_that_stayed(by_name: dict[str, Any]) -> None:
    for name, each in by_name.items():
        assert each["rows"] and each["weights"], name


def assert_nothing_stays(by_name: dict[str, Any]) -> None:
    for name, each in by_name.items():
        for held in each["left"]:
            assert held == dict.fromkeys(held, 0), name
        # Masters and moments of their own moved, wherever there are any (momentum has moments, plain masters too).
        assert each["masters"] > 0, name


def assert_comes_back(by_name: dict[str, Any]) -> None:
    for name, each in by_name.items():
        assert all(each["readable"]), name
        assert each["checkpoint"] == [], name
        assert each["resumed"], name
