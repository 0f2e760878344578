"""The learner on Megatron's Transformer Engine spec: updates, FP8, names and checkpoints; and tools/bringup's
experiments with it.

Transformer Engine's own Python runs; its kernels are stand-ins: tests/harness/te_on_cpu says what that can and
cannot show.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import cases_bringup
from tests.distributed import cases_te as cases
from tests.distributed import cases_te_switches as switched
from tests.harness.ranks import run_ranks

# Sums in another order than plain PyTorch's, and nothing more: as tools/bringup/te.py asks of a GPU.
WITHIN = 1.5
STORED = {"bf16": "torch.bfloat16", "fp8-blockwise": "Float8BlockwiseQTensor", "fp8-tensorwise": "Float8Tensor"}

# Megatron-Core 0.19 has the router's product, forward of float32, done by Transformer Engine, too.
ROUTED_BY_TE = version("megatron-core") >= "0.19"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("te")
    cases.make_models(made)
    return made


@pytest.fixture(scope="module")
def one_rank(folder: Path) -> dict[str, Any]:
    return run_ranks(1, *cases.chosen(1), folder=folder, te=True)


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> dict[str, Any]:
    return run_ranks(2, *cases.chosen(2), cases.named, cases.packed, cases.saved, folder=folder, te=True)


@pytest.mark.parametrize(
    ("world", "case"), [(world, case.__qualname__) for world in (1, 2) for case in cases.chosen(world)]
)
def test_the_gradient_is_that_of_float64_but_for_the_rounding_of_its_precision(
    world: int, case: str, one_rank: dict[str, Any], two_ranks: dict[str, Any]
) -> None:
    assert_gradient((one_rank, two_ranks)[world - 1][case])


def test_adam_steps_the_float32_masters_and_the_weights_are_those_in_bf16(
    one_rank: dict[str, Any], two_ranks: dict[str, Any]
) -> None:
    for by_case in (one_rank, two_ranks):
        for name, by_rank in by_case.items():
            if name not in ("named", "packed", "saved"):
                assert_masters(name, by_rank)


def test_every_product_of_linear_layers_is_computed_in_the_precision_that_was_asked_for(
    one_rank: dict[str, Any],
) -> None:
    for name, by_rank in one_rank.items():
        assert_products(name, by_rank)


@pytest.mark.soak
def test_and_so_it_is_with_what_others_imply(folder: Path) -> None:
    by_world = {world: run_ranks(world, *cases.chosen(world, implied=True), folder=folder, te=True) for world in (1, 2)}
    assert sum(map(len, by_world.values())) == len(cases.IMPLIED)
    for world, by_case in by_world.items():
        for name, by_rank in by_case.items():
            assert_gradient(by_rank)
            assert_masters(name, by_rank)
            if world == 1:
                assert_products(name, by_rank)


def assert_gradient(by_rank: list[Any]) -> None:
    for found in by_rank:
        assert found["missing"] == 0
        assert found["ours"] <= WITHIN * found["plain"], found
        # A gradient that is wrong by its own size is as far away as 1; rounding is far from that.
        assert found["plain"] < 0.3, found


def assert_masters(name: str, by_rank: list[Any]) -> None:
    for found in by_rank:
        assert found["step"] <= 2**-8, name  # half a unit in the last of bf16's 8 bits


def assert_products(name: str, by_rank: list[Any]) -> None:
    (found,) = by_rank
    precision = name.rpartition("_")[2] if "fp8" in name else "bf16"
    router = {"torch.float32", "torch.bfloat16"} if "experts" in name and ROUTED_BY_TE else set()
    assert found["calls"].keys() - router == {STORED[precision]} - router, name


def test_the_map_names_every_parameter_of_megatrons_transformer_engine_spec_and_no_other(
    two_ranks: dict[str, Any],
) -> None:
    assert two_ranks["named"] == [[], []]


def test_a_checkpoint_holds_transformer_engines_extra_states_and_goes_on_bit_for_bit(
    two_ranks: dict[str, Any],
) -> None:
    for equal in two_ranks["saved"]:
        assert equal == {"weights": True, "after a further step": True}


def test_packs_are_padded_to_what_the_recipe_takes_and_no_further(two_ranks: dict[str, Any]) -> None:
    # Two tensor ranks share the tokens of a pack between layers (sequence parallelism).
    for tokens in two_ranks["packed"]:
        real = sum(tokens["bf16"])
        for precision, multiple in (("bf16", 2), ("fp8-tensorwise", 32), ("fp8-blockwise", 256)):
            assert all(count % multiple == 0 for count in tokens[precision]), precision
            assert sum(tokens[precision]) < real + multiple * len(tokens[precision]), precision


@pytest.fixture(scope="module")
def experiments() -> dict[str, dict[str, Any]]:
    """Name → what an experiment reports, where all that it claims holds."""
    by_name = run_ranks(1, *(getattr(cases_bringup, name) for name in cases_bringup.STAND_IN), te=True)
    for name, (found,) in by_name.items():
        assert all(claim["holds"] for claim in found["claims"]), (name, found["claims"])
    return {name: found for name, (found,) in by_name.items()}


@pytest.mark.soak  # the gradient is held against float64 above, the oracle against transformers in test_bringup.py
def test_the_learner_stands_against_the_oracle_as_the_experiment_asks() -> None:
    ((found,),) = run_ranks(1, *(getattr(cases_bringup, name) for name in cases_bringup.ORACLE), te=True).values()
    assert all(claim["holds"] for claim in found["claims"]), found["claims"]
    assert found["numbers"]["sequences, response tokens, micro-batches"] == [10, 505, 2]
    assert len(found["claims"]) == 6


def test_fp8_as_rounding_alone_is_within_the_experiments_bounds_and_no_more_than_that(
    experiments: dict[str, dict[str, Any]],
) -> None:
    numbers = experiments["fp8_on_stand_in"]["numbers"]
    errors = {name: each["gradient"] for name, each in numbers.items() if isinstance(each, dict)}
    assert 0.15 < errors["fp8-blockwise"] < 0.25 and 0.15 < errors["fp8-tensorwise"] < 0.25  # as te.py's bounds say
    assert errors["fp8-blockwise, first and last layer in bf16"] < errors["fp8-blockwise"]


def test_both_cache_traps_show_where_layers_keep_copies_and_not_as_the_learner_is_built(
    experiments: dict[str, dict[str, Any]],
) -> None:
    numbers = experiments["traps_on_stand_in"]["numbers"]
    assert numbers["with copies"]["lost"] > 0.3 and numbers["ours"]["lost"] == 0


def test_refused_token_counts_are_recorded_word_for_word(experiments: dict[str, dict[str, Any]]) -> None:
    refusals = experiments["alignment_on_stand_in"]["refusals"]
    assert "divisible by 8" in refusals["fp8-blockwise: 100 tokens"]
    assert "cuBLASLt" in refusals["fp8-blockwise: 24 tokens"]


@pytest.fixture(scope="module")
def switches(folder: Path) -> dict[str, Any]:
    one = (*cases.SWITCHED, switched.fused_rope_is_run, switched.moments_by_hand)
    two = (switched.flex, switched.moments_saved, switched.host_saved)
    return run_ranks(1, *one, folder=folder, te=True) | run_ranks(2, *two, folder=folder, te=True)


def test_fused_rope_and_swiglu_and_recomputation_leave_the_gradient_within_the_rounding_of_its_precision(
    switches: dict[str, Any],
) -> None:
    for case in cases.SWITCHED:
        assert_gradient(switches[case.__qualname__])
        assert_masters(case.__qualname__, switches[case.__qualname__])
    (asked,) = switches["fused_rope_is_run"]
    assert asked > 0


def test_deep_eps_dispatcher_trains_as_megatrons_own(switches: dict[str, Any]) -> None:
    for by_case in switches["flex"]:
        for name, found in by_case.items():
            assert_gradient([found])
            assert (found["flex"] > 0) is name.endswith("flex"), name


def test_moments_in_bf16_are_adamws_rounded_between_steps_under_float32_masters(switches: dict[str, Any]) -> None:
    (found,) = switches["moments_by_hand"]
    assert found["masters"] < 1e-4  # of steps of LR = 0.01: where a moment is next to the middle of two bf16 numbers
    assert found["weights"] == found["held"] == 1.0


def test_moments_in_bf16_come_back_from_a_checkpoint_bit_for_bit(switches: dict[str, Any]) -> None:
    for found in switches["moments_saved"]:
        assert found == {"states": True, "after a further step": True}


def test_an_optimizer_on_the_host_and_transformer_engines_take_up_each_others_checkpoints(
    switches: dict[str, Any],
) -> None:
    for by_pair in switches["host_saved"]:
        assert len(by_pair) == 4
        for pair, found in by_pair.items():
            assert found["counts"] == [2, 3], pair
            before, _, after = pair.partition(" by ")
            # One of steps of LR = 0.01, of another kernel, rounded to bf16 where weights are around 1.
            assert found["apart"] <= (0.0 if before == after else 2**-7), pair
