"""A learner that goes on from a checkpoint is the one that was saved: weights, optimizer, and what they do next.

And how a checkpoint comes about: beside the run, whole on every rank or not at all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from a3po_megatron.compat.megatron import holders, owners
from tests.distributed import cases_resume as cases
from tests.harness.ranks import run_ranks
from tests.harness.tiny_models import make_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reload")
    for kind in ("qwen3", "qwen3_moe"):
        make_checkpoint(folder / kind, kind)
    make_checkpoint(folder / "qwen3_deep", "qwen3", num_hidden_layers=5)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, list[Any]]:
    """What every case found, on every rank."""
    meanwhile, saves = cases.goes_on_meanwhile, (cases.fails_on_one_rank, cases.keeps)
    return run_ranks(2, meanwhile, *saves, cases.goes_on, cases.goes_on_elsewhere, folder=folder)


def test_a_learner_goes_on_bit_for_bit_in_its_layout_and_equal_to_rounding_in_another(found: dict[str, Any]) -> None:
    points = {f"{name} 2" for name in cases.TRAINED} | {f"{name} 0" for name in cases.AT_ONCE}
    for by_rank in found["goes_on"]:
        assert by_rank.keys() == points
        assert all(there["rows"] and there["weights"] for there in by_rank.values()), by_rank
    for by_rank in found["goes_on_elsewhere"]:
        for name, there in by_rank.items():
            assert there["weights"], name
            assert there["unequal"] == [], name  # moments and float32 masters too, bit for bit
            # Two more steps: a step counter that all parameters share goes wrong in the second. Float32 sums in another
            # order differ by 1e-6; Adam divides near-zero gradients by their own size, which the second loss sees.
            bounds = (1e-2, 1e-2) if "bf16" in name else (1e-6, 1e-4)
            # Of what two steps moved the weights, the part by which they differ (found: 9e-7, and 0.02 in bfloat16). It
            # would be about 1 without the moments.
            assert there["apart"] < (0.1 if "bf16" in name else 1e-5), (name, there)
            for values in (there["loss"], there["norm"]):
                assert all(value <= bound for value, bound in zip(values, bounds, strict=True)), (name, there)


@pytest.mark.soak
def test_a_learner_goes_on_bit_for_bit_in_the_other_layouts_too(folder: Path) -> None:
    for by_rank in run_ranks(2, cases.goes_on_as_well, folder=folder)["goes_on_as_well"]:
        assert len(by_rank) == 2 * len(cases.SAVED) - len(cases.AT_ONCE) - len(cases.TRAINED)
        assert all(there["rows"] and there["weights"] for there in by_rank.values()), by_rank


def test_of_two_data_parallel_ranks_each_gathers_and_writes_about_half(found: dict[str, Any]) -> None:
    one, other = found["goes_on"]
    for name in (name for name in one if name.startswith("dp2")):
        whole = one[name]["written"] + other[name]["written"]
        for there in (one[name], other[name]):
            assert 0.4 < there["written"] / whole < 0.6, (name, there)
            assert there["gathered"] <= there["written"], name
            # To go on it reads about half of the moments and masters, most of what is written.
            assert there["asked"] < 0.6 * whole or "sgd" in name, name
            assert (there["gathered"] == 0) == ("sgd" in name), name  # a whole optimizer has nothing to gather


@given(st.lists(st.lists(st.integers(1, 2000), min_size=1, max_size=30), min_size=1, max_size=4), st.integers(1, 9))
def test_every_state_of_every_parameter_is_written_once_and_no_rank_writes_more_than_one_of_them_too_many(
    buckets: list[list[int]], size: int
) -> None:
    held = []
    for numels in buckets:
        share, begin = -(-sum(numels) // size), 0
        for numel in numels:
            held.append(holders(begin, begin + numel, share))
            assert [n for part in held[-1].values() for n in range(part.start, part.stop)] == list(range(numel))
            assert all(rank * share <= begin + part.start for rank, part in held[-1].items())
            assert all(begin + part.stop <= (rank + 1) * share for rank, part in held[-1].items())
            begin += numel
    numels = [numel for bucket in buckets for numel in bucket]
    loads = [0] * size
    for numel, parts, chosen in zip(numels, held, owners(held, size), strict=True):
        assert len(chosen) == 3
        if len(parts) == 1:
            assert {*chosen} == {*parts}  # nothing travels
        for rank in chosen:
            loads[rank] += numel
    padding = 3 * len(buckets)  # what a bucket's shares are rounded up by
    assert max(loads) <= sum(loads) / size + max(numels) + padding


def test_a_save_returns_before_a_byte_is_written_and_holds_the_state_of_then_bit_for_bit(found: dict[str, Any]) -> None:
    for there in found["goes_on_meanwhile"]:
        assert there == {
            "over at once": False,
            "over after an update": False,
            "bytes after an update": 0,
            "failure": None,
            "over in the end": True,
            "the update changed something": True,
            "weights": True,
            "unlike what is written at once": [],
        }


def test_a_share_that_one_rank_cannot_write_ends_the_run_on_all_ranks_and_nothing_is_left(
    found: dict[str, Any],
) -> None:
    one, other = found["fails_on_one_rank"]
    assert one == other  # every rank says the same
    for rank in (0, 1):
        for space in (0, 1 << 12):
            message = one[f"rank {rank}, {space} bytes"]
            assert message.startswith("the checkpoint of step 2 could not be written: "), message
            assert f"__{rank}_0.distcp: cannot write it: No space left on device" in message
            assert one[f"left of rank {rank}, {space} bytes"] == []
    assert one["with room"] == ["latest", "step-000002"]


def test_a_run_keeps_the_last_checkpoints_and_every_third_and_the_journals_since_the_oldest_of_the_last(
    found: dict[str, Any],
) -> None:
    for by_step in found["keeps"]:
        assert {step: there["saved"] for step, there in by_step.items()} == {
            "1": [1],
            "2": [1, 2],
            "3": [2, 3],
            "4": [3, 4],
            "5": [3, 4, 5],
        }
        for step, there in by_step.items():
            assert there["meanwhile"], f"the checkpoint of step {step} was not in place until the ranks came together"
            assert (there["step"], there["latest"]) == (int(step), f"step-{int(step):06d}")
            assert there["journals"] == list(range(max(1, int(step) - 1), int(step) + 1))
