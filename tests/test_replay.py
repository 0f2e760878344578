"""Routing replay: the learner's routers follow the experts that came with a rollout, in every layout and schedule."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from a3po_megatron.algorithm.advantage import assemble
from a3po_megatron.algorithm.statistics import batch_metrics, batch_sums
from a3po_megatron.batch import Segment
from a3po_megatron.config import AdvantageOptions, RolloutOptions
from a3po_megatron.errors import RequestError, RunFailed
from a3po_megatron.model.facts import Experts
from a3po_megatron.ranks.backend import CPU
from a3po_megatron.rollout.vllm_engine import checked_routes, engine_arguments
from a3po_megatron.telemetry.catalogue import METRICS
from a3po_megatron.telemetry.rollouts import rejected_entries, write_rejected
from tests.distributed.cases_replay import (
    CASES,
    EXPERTS,
    FURTHER,
    IMPLIED,
    LAYERS,
    PER_TOKEN,
    own_routes_change_nothing_elsewhere,
)
from tests.harness.ranks import Case, run_ranks
from tests.harness.tiny_models import make_checkpoint, make_collected

SIZES = {"num_hidden_layers": LAYERS, "num_experts": EXPERTS, "num_experts_per_tok": PER_TOKEN}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replay")
    make_checkpoint(folder / "moe", "qwen3_moe", **SIZES)
    make_checkpoint(folder / "moe_raw", "qwen3_moe_raw", **SIZES)
    make_checkpoint(folder / "wide", "qwen3_moe", hidden_size=128, moe_intermediate_size=64, **SIZES)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[int, dict[str, list[Any]]]:
    """Number of ranks → case → its result on every rank."""
    return {
        world: run_ranks(world, *chosen(world, implied=False), *FURTHER[world], folder=folder, timeout=500)
        for world in CASES
    }


def chosen(world: int, implied: bool) -> list[Case]:
    return [case for case in CASES[world] if (case.__name__ in IMPLIED) == implied]


def replayed(found: dict[int, dict[str, list[Any]]]) -> dict[str, dict[str, float]]:
    """(layout, rank) → differences."""
    return {
        f"{name}, rank {rank}": differences
        for by_case in found.values()
        for name, by_rank in by_case.items()
        for rank, differences in enumerate(by_rank)
        if name.startswith("replayed_")
    }


def test_log_probs_loss_and_gradients_along_injected_routes_are_those_of_transformers_in_every_layout_and_recomputation(
    found: dict[int, dict[str, list[Any]]],
) -> None:
    assert len(replayed(found)) == sum(world * len(chosen(world, implied=False)) for world in CASES)
    assert not (wrong := beyond_bounds(found)), wrong


@pytest.mark.soak
def test_and_so_they_are_in_the_layouts_that_others_imply(folder: Path) -> None:
    found = {world: run_ranks(world, *chosen(world, implied=True), folder=folder, timeout=500) for world in CASES}
    assert len(replayed(found)) == 1 * 1 + 2 * 9 + 4 * 3
    assert not (wrong := beyond_bounds(found)), wrong


def beyond_bounds(found: dict[int, dict[str, list[Any]]]) -> list[str]:
    # Float32 against float64, through five layers: tests/test_learner.py has the same bounds for those.
    bounds = {"score": 1e-5, "alone": 1e-5, "loss": 1e-6, "gradient": 1e-5}
    return [
        f"{name}: {what} = {differences[what]:.1e}"
        for name, differences in replayed(found).items()
        for what, bound in bounds.items()
        if not differences[what] <= bound  # not `>`: it would let NaN pass
    ]


def test_several_micro_batches_are_in_flight_in_every_pipeline(found: dict[int, dict[str, list[Any]]]) -> None:
    assert all(r["micro_batches"] >= 4 for name, r in replayed(found).items() if "pp2" in name)


def test_routers_are_trained_though_their_choice_is_not_theirs(found: dict[int, dict[str, list[Any]]]) -> None:
    assert all(r["gate"] > 1e-5 for r in replayed(found).values())


def test_rerouted_pairs_are_counted_exactly_over_tensor_context_pipeline_and_expert_parallel_ranks(
    found: dict[int, dict[str, list[Any]]],
) -> None:
    assert all(r["rerouted"] == 0 for r in replayed(found).values())
    case = found[1]["each_micro_batch_has_its_own"][0]
    assert sum(case["own"]) == 0
    injected, counted = case["flipped"]
    assert sum(injected) > 20
    assert injected == counted


def test_what_has_no_routes_routes_by_itself_and_nothing_stays_behind(
    found: dict[int, dict[str, list[Any]]],
) -> None:
    for name, r in replayed(found).items():
        assert r["moved"] == 0, name  # log-probs without routes, before and after some were replayed
        assert r["left"] == 0, name
    case = found[1]["each_micro_batch_has_its_own"][0]
    assert case["micro_batches"] >= 3
    assert case["bare"]  # every second one of a call, bit for bit
    assert not case["left"]
    assert found[1]["an_exception_leaves_nothing"] == [False]


def test_routes_that_the_router_would_choose_itself_in_any_order_change_no_bit(
    found: dict[int, dict[str, list[Any]]],
) -> None:
    for world in (1, 2):
        assert_own_routes_change_nothing(found[world]["own_routes_change_nothing"])


@pytest.mark.soak
def test_and_so_it_is_in_the_layouts_that_others_imply(folder: Path) -> None:
    case = own_routes_change_nothing_elsewhere
    for world in (1, 2):
        assert_own_routes_change_nothing(run_ranks(world, case, folder=folder)[case.__name__])


def assert_own_routes_change_nothing(by_rank: list[Any]) -> None:
    for by_layout in by_rank:
        assert by_layout
        assert all(equal == [True, True] for equal in by_layout.values()), by_layout


def test_routes_of_other_tokens_change_log_probs(found: dict[int, dict[str, list[Any]]]) -> None:
    assert found[1]["each_micro_batch_has_its_own"][0]["shuffled"] > 0.01  # nats; numerical noise is 1e-5


def test_a_rollout_without_routes_is_refused_by_name(found: dict[int, dict[str, list[Any]]]) -> None:
    said = found[1]["each_micro_batch_has_its_own"][0]["missing"]
    assert "p0#0" in said
    assert "rollout.routing_replay" in said


def test_the_canary_follows_the_engines_routes_and_shows_where_they_are_not_its_own(
    found: dict[int, dict[str, list[Any]]],
) -> None:
    for by_name in found[2]["canary"]:
        assert isinstance(by_name["as it says"], float), by_name
        assert by_name["as it says"] < 1e-5
        assert "differ by" in by_name["another way"]
        assert "differ by" in by_name["says nothing"]
        assert by_name["witness"] < 1e-5  # transformers routes by itself, and so did the learner for it


def test_the_loop_trains_along_the_real_engines_routes_and_says_in_every_row_how_many_were_not_the_learners(
    found: dict[int, dict[str, list[Any]]],
) -> None:
    for there in found[2]["the_loop"]:
        for row in there["rows"]:
            # One pair of a rollout is made up, of LAYERS for each of 3 to 25 tokens; no other differs.
            assert 1 / (25 * LAYERS) < row["mismatch/routes_rate"] < 1 / (3 * LAYERS)
            assert row["mismatch/logprob_abs_mean"] < 1e-5
            assert row["refit/canary"] < 1e-4
        assert {count for counts in there["scores"] for count in counts} == {1}


def test_a_step_that_is_done_again_takes_routes_and_their_rate_from_the_journal_bit_for_bit(
    found: dict[int, dict[str, list[Any]]],
) -> None:
    for there in found[2]["the_loop"]:
        assert there["shapes"]
        assert all(shape[1:] == [LAYERS, PER_TOKEN] for shape in there["shapes"])
        _, first, again = there["rows"]
        lasting = [name for name in first if not name.startswith(("perf/", "startup/", "memory/", "refit/seconds"))]
        assert {name: again[name] for name in lasting} == {name: first[name] for name in lasting}
        assert again["perf/recalled_groups"] > first["perf/recalled_groups"] == 0


# --- what the engine says ------------------------------------------------------------------------------------------


def facts(count: int = 8) -> Any:
    return SimpleNamespace(layers=3, experts=Experts(count, 2, 24, True))


def said(tokens: int = 4) -> np.ndarray:
    return np.tile(np.array([[5, 0]], np.uint8), (tokens, 3, 1))


def test_routes_of_the_right_shape_are_taken_as_they_are() -> None:
    assert np.array_equal(checked_routes(said(), 4, facts()), said())
    assert checked_routes(said(0), 0, facts()).shape == (0, 3, 2)
    highest = said()
    highest[1, 2] = [255, 254]
    assert np.array_equal(checked_routes(highest, 4, facts(256)), highest)


def test_routes_of_more_than_256_experts_have_two_bytes_and_reach_the_routers_as_they_are() -> None:
    """vLLM gives them as uint16, for which torch has few operations."""
    from a3po_megatron.learner.micro_batch import micro_batch  # Megatron is imported after its patches

    wide = said().astype(np.uint16)
    wide[1, 2] = [511, 300]
    assert np.array_equal(checked_routes(wide, 4, facts(512)), wide)
    with pytest.raises(RunFailed, match="uint8, not .* uint16"):
        checked_routes(said(), 4, facts(512))
    packed = micro_batch([((3, 4), (5, 6, 7))], [0], routed=[(0, wide)])
    assert packed.routes is not None
    assert packed.routes[:4].tolist() == wide.tolist()


def _altered(token: int, layer: int, experts: list[int]) -> np.ndarray:
    routes = said()
    routes[token, layer] = experts
    return routes


@pytest.mark.parametrize(
    ("routes", "named"),
    [
        (None, "no experts"),
        (said().tolist(), "no experts"),
        (said(3), "(3, 3, 2)"),
        (said(5), "(5, 3, 2)"),
        (said()[:, :2], "(4, 2, 2)"),
        (said()[:, :, :1], "(4, 3, 1)"),
        (said().astype(np.int64), "int64"),
        (_altered(2, 1, [8, 0]), "expert 8, of a model with 8"),
        (_altered(3, 2, [0, 0]), "twice, for token 3 in layer 2: [0, 0]"),
    ],
    ids=["none", "a list", "too few", "too many", "layers", "experts per token", "dtype", "range", "twice"],
)
def test_routes_that_the_engine_cannot_have_chosen_end_the_run_by_name(routes: Any, named: str) -> None:
    with pytest.raises(RunFailed, match="rollout.routing_replay: vLLM returned") as caught:
        checked_routes(routes, 4, facts())
    assert named in str(caught.value)


def test_vllm_is_asked_for_routes_only_where_they_are_replayed() -> None:
    from vllm.engine.arg_utils import EngineArgs  # takes seconds, which whoever runs other tests needs not spend

    fields = {field.name for field in dataclasses.fields(EngineArgs)}
    for replay in (False, True):
        options = RolloutOptions(routing_replay=replay)
        arguments = engine_arguments(Path("model"), options, torch.float32, CPU, 2)
        assert arguments.keys() <= fields
        assert arguments.get("enable_return_routed_experts", False) is replay
        assert "aux_output_config" not in arguments
    with pytest.raises(RequestError, match=r"rollout.engine_args.enable_prefix_caching: this follows"):
        engine_arguments(
            Path("model"),
            RolloutOptions(routing_replay=True, engine_args={"enable_prefix_caching": False}),
            torch.float32,
            CPU,
            2,
        )


def test_the_cpu_record_says_what_vllm_says_itself(tmp_path: Path) -> None:
    """What vLLM refuses, it refuses when it is configured: before it loads anything."""
    from vllm.engine.arg_utils import EngineArgs

    make_checkpoint(tmp_path / "wide", "qwen3_moe", hidden_size=128, moe_intermediate_size=64)
    options = RolloutOptions(routing_replay=True, max_tokens=8, max_prompt_tokens=8)
    arguments = engine_arguments(tmp_path / "wide", options, torch.float32, CPU, 2)
    assert CPU.returns_routes is False
    with pytest.raises(ValueError, match="requires Model Runner V2"):
        EngineArgs(**arguments).create_engine_config()


def test_the_rate_is_over_tokens_and_layers_of_what_the_current_weights_sampled_and_null_without_replay() -> None:
    batch = assemble(make_collected(groups=2, size=4), AdvantageOptions(), 1)
    batch.old_logprobs = batch.rollout_logprobs
    batch.entropy = batch.token_weights = torch.ones_like(batch.rollout_logprobs)
    assert batch_metrics(batch_sums(batch, 1), batch.rho)["mismatch/routes_rate"] is None
    for number, rollout in enumerate(batch.rollouts):
        rollout.routes = np.zeros((number + 1, 3, 2), np.uint8)
        rollout.segments = (Segment(len(rollout.tokens), 1 if number < 4 else 2),)
    batch.rerouted = torch.arange(len(batch.rollouts))
    for version, rerouted, pairs in ((1, 0 + 1 + 2 + 3, 3 * (1 + 2 + 3 + 4)), (2, 4 + 5 + 6 + 7, 3 * (5 + 6 + 7 + 8))):
        sums = batch_sums(batch, version)
        assert batch_metrics(sums + sums, batch.rho)["mismatch/routes_rate"] == pytest.approx(rerouted / pairs)
    assert batch_metrics(batch_sums(batch, 3), batch.rho)["mismatch/routes_rate"] is None
    assert "mismatch/routes_rate" in METRICS


def test_what_is_kept_of_a_rejected_update_holds_its_routes(tmp_path: Path) -> None:
    batch = assemble(make_collected(groups=2, size=4), AdvantageOptions(), 1)
    for number, rollout in enumerate(batch.rollouts[1:]):
        rollout.routes = np.full((number + 1, 3, 2), number, np.uint8)
    write_rejected(path := tmp_path / "rejected" / "batch.pt", rejected_entries(batch, 0))
    entries = torch.load(path)
    assert entries[0]["routes"] is None
    for entry, rollout in zip(entries[1:], batch.rollouts[1:], strict=True):
        assert torch.equal(entry["routes"], torch.from_numpy(rollout.routes))
