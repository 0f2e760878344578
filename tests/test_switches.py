"""The learner's throughput switches: each changes when or where something is computed, not what; and none is taken
where it would do nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from a3po_megatron import compat
from a3po_megatron.config import Config, MegatronOptions, Settings, unlike
from a3po_megatron.errors import RequestError
from a3po_megatron.files.run_folder import rollout_files
from a3po_megatron.launch.check import settle
from a3po_megatron.launch.check_learner import check_deep_ep
from a3po_megatron.model.read import read_facts
from a3po_megatron.ranks.backend import CPU, CUDA, Backend
from a3po_megatron.report.page import write_report
from a3po_megatron.report.read import read_rollouts
from tests.distributed import cases_switches as cases
from tests.harness import interrupted_runs as tools
from tests.harness.ranks import Case, run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("switches")
    cases.models(made)
    return made


@pytest.mark.parametrize("world", cases.LAYOUTS)
@pytest.mark.parametrize("case", [cases.switched, pytest.param(cases.all_switched, marks=pytest.mark.soak)])
def test_overlap_and_recomputation_change_no_bit_of_weights_scores_and_what_is_reported(
    case: Case, world: int, folder: Path
) -> None:
    for by_case in run_ranks(world, case, folder=folder, timeout=500)[case.__name__]:
        for name, found in by_case.items():
            switch = name.rpartition(", ")[2]
            assert found["equal"], name
            for (plain, norm), (other, other_norm) in zip(found["told"][:2], found["told"][2:], strict=True):
                assert plain == other, name
                assert other_norm == pytest.approx(norm, rel=1e-6), name  # summed over other shares, in float32
            if "reduce" in switch or switch == "all":
                assert found["buckets"] > 1, name
                assert found["in the backward"], name  # not all at once behind it
            assert found["passes"] == (1 if "reduce" in switch else 2), name


def test_adam_on_the_host_is_adamw_in_float64_but_for_rounding_and_its_weights_are_its_masters_rounded(
    folder: Path,
) -> None:
    (found,) = run_ranks(1, cases.adam_by_hand, folder=folder)["adam_by_hand"]
    assert found["masters"] < 1e-6  # float32, of values around 1
    assert found["rounded"] == 1.0
    assert found["steps"] == 2.0


@pytest.mark.parametrize("world", [1, 2])
def test_an_optimizer_on_the_host_trains_and_resumes_as_megatrons_own_does(world: int, folder: Path) -> None:
    for by_layout in run_ranks(world, cases.on_host, folder=folder)["on_host"]:
        for layout, found in by_layout.items():
            # Another kernel for the same arithmetic: float32's rounding, twice.
            assert found["apart"] < 1e-5, layout
            assert found["norms"][0] == pytest.approx(found["norms"][1], rel=1e-3), layout
            for ends, end in found["ends"].items():
                assert end["taken"], (layout, ends)
                on, _, by = ends.partition(" by ")
                if on == by:
                    assert end["weights"], (layout, ends)
                    assert end["after"] == 0.0, (layout, ends)
                else:
                    assert end["after"] < 1e-5, (layout, ends)


def test_old_logprobs_of_the_rollout_are_the_engines_and_take_no_pass_of_the_learner(folder: Path) -> None:
    (found,) = run_ranks(1, cases.unscored, folder=folder)["unscored"]
    assert found["old"] and found["entropy"]
    assert found["kinds"] == ["old_logprobs"]
    # What would compare the learner with the engine, or look at its entropies, is not there.
    assert set(found["metrics"].values()) == {None}
    assert found["mean"] < 0
    assert found["weights"] and found["told"]  # as where the same values came from a pass


def test_swiglu_in_one_piece_gives_the_same_gradients_in_float32(folder: Path) -> None:
    (found,) = run_ranks(1, cases.fused_swiglu, folder=folder)["fused_swiglu"]
    for kind, apart in found.items():
        assert apart < 5e-6, kind  # as test_learner.py allows of plain PyTorch


def asked(folder: Path, backend: Backend, kind: str = "qwen3", **sections: dict[str, Any]) -> Settings:
    parallel = {"data": 2} | sections.pop("parallel", {})
    given = {"model": {"path": str(folder / kind)}, "data": {"path": "builtin:arithmetic"}, "parallel": parallel}
    limits = {"max_prompt_tokens": 64, "max_tokens": 64} | sections.pop("rollout", {})
    trainer = {"prompts_per_step": 8, "mini_batches": 2} | sections.pop("trainer", {})
    config = Config.model_validate(given | {"rollout": limits, "trainer": trainer} | sections)
    return settle(config, backend)


ROLLOUT = {"old_logprobs": "rollout"}
UNCORRECTED = {"learner": ROLLOUT, "correction": {"name": "none"}}
BY_ROLLOUT = UNCORRECTED | {"shaping": {"source": "rollout"}}
GATHER = {"overlap_grad_reduce": True, "overlap_param_gather": True}
# What is asked for, of which backend, and what the refusal says; None: it is taken.
ASKED: list[tuple[Backend, dict[str, Any], str | None]] = [
    (CPU, {"learner": GATHER | {"recompute": "full", "fused_swiglu": True}}, None),
    (CUDA, {"learner": {"fused_rope": True}}, None),
    (CUDA, {"optimizer": {"moment_dtype": "bfloat16"}}, None),
    (CUDA, {"optimizer": {"on_host": True}}, None),
    (CUDA, {"kind": "qwen3_moe", "parallel": {"expert": 2}, "learner": {"expert_dispatcher": "flex"}}, None),
    (CPU, BY_ROLLOUT, None),
    (CPU, UNCORRECTED | {"shaping": {"name": "none"}}, None),
    (CPU, UNCORRECTED | {"shaping": {"rho": 1.0}}, None),
    (CPU, BY_ROLLOUT | {"regulariser": {"entropy": 0.01}}, None),
    (CPU, {"parallel": {"data": 1}, "learner": {"overlap_grad_reduce": True}}, "context = 1: there is nobody"),
    (CPU, {"learner": {"overlap_param_gather": True}}, "needs learner.overlap_grad_reduce: true"),
    (CPU, {"learner": GATHER, "optimizer": {"distributed": False}}, "needs optimizer.distributed: true"),
    (CPU, {"learner": GATHER, "trainer": {"mini_batches": 1}}, "no effect with one mini-batch"),
    (CPU, {"learner": {"fused_rope": True}}, "needs a GPU"),
    (CPU, {"optimizer": {"moment_dtype": "bfloat16"}}, "this run is on CPUs"),
    (CPU, {"optimizer": {"on_host": True}}, "this run is on CPUs"),
    (CUDA, {"optimizer": {"on_host": True, "distributed": False}}, "needs optimizer.distributed: true"),
    (CUDA, {"optimizer": {"on_host": True, "moment_dtype": "bfloat16"}}, "remove one of the two"),
    (CPU, {"kind": "qwen3_moe", "parallel": {"expert": 2}, "learner": {"expert_dispatcher": "flex"}}, "needs a GPU"),
    (CUDA, {"learner": {"expert_dispatcher": "flex"}}, "the model has no experts"),
    (CUDA, {"kind": "qwen3_moe", "learner": {"expert_dispatcher": "flex"}}, "tokens travel nowhere"),
    (CPU, {"learner": ROLLOUT, "shaping": {"name": "none"}}, "set correction.name: none"),
    (CPU, UNCORRECTED, "set shaping.source: rollout"),
    (CPU, UNCORRECTED | {"shaping": {"metric": "entropy"}}, "set shaping.metric: probability"),
    (CPU, BY_ROLLOUT | {"rollout": {"top_p": 0.9}}, "rollout.top_p off"),
    (CPU, BY_ROLLOUT | {"rollout": {"top_k": 20}}, "rollout.top_k off"),
    (CPU, UNCORRECTED | {"shaping": {"name": "fork_tokens"}}, "needs entropies"),
    (CPU, UNCORRECTED | {"shaping": {"name": "lp_reg"}}, "a pass of its own"),
    (CPU, BY_ROLLOUT | {"regulariser": {"kl": 0.1}}, "regulariser.kl"),
    (CPU, BY_ROLLOUT | {"regulariser": {"entropy_step": 0.1, "entropy_target": 0.2}}, "regulariser.entropy_target"),
    (CPU, BY_ROLLOUT | {"alerts": {"stop": ["mismatch"]}}, "alert mismatch"),
]


@pytest.mark.parametrize(("backend", "sections", "says"), ASKED)
def test_a_switch_is_taken_where_it_does_something_and_else_refused_by_name(
    backend: Backend, sections: dict[str, Any], says: str | None, folder: Path
) -> None:
    if says is None:
        asked(folder, backend, **sections)
        return
    with pytest.raises(RequestError, match=re.escape(says)):
        asked(folder, backend, **sections)


def test_a_dispatcher_of_deep_eps_is_refused_where_that_is_not_installed() -> None:
    check_deep_ep("alltoall")
    with pytest.raises(RequestError, match="needs the package deep_ep"):
        check_deep_ep("flex")


def test_recomputation_that_megatron_extra_asks_for_as_well_is_refused(folder: Path) -> None:
    compat.prepare()  # before Megatron is imported
    from a3po_megatron.model.build import transformer_config

    facts = read_facts(folder / "qwen3")
    settings = asked(folder, CPU, learner={"recompute": "full"})
    extra = MegatronOptions(extra={"recompute_num_layers": 2})
    with pytest.raises(RequestError, match="recompute_num_layers: this follows from"):
        transformer_config(facts, settings.parallel, settings.model, extra, settings.learner)


def test_a_run_may_resume_with_other_switches_of_when_and_where_and_not_of_what(folder: Path) -> None:
    before = asked(folder, CPU).model_dump(mode="json")
    assert not unlike(before, asked(folder, CPU, learner=GATHER | {"recompute": "full"}))
    assert len(unlike(before, asked(folder, CPU, learner={"fused_swiglu": True}))) == 1


@pytest.mark.parametrize("resumed", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_a_run_by_the_engines_log_probs_overlapped_and_recomputed_trains_resumes_and_reports(
    resumed: bool, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    switches = ("learner.old_logprobs=rollout", "correction.name=none", "shaping.source=rollout")
    switches += ("regulariser.entropy=0.001",)  # the update computes what it takes
    switches += ("learner.overlap_grad_reduce=true", "learner.overlap_param_gather=true", "learner.recompute=full")
    layout = (*tools.LAYOUTS["dp2"], "trainer.mini_batches=2", *switches)
    tools.trained_here(run, *layout, "trainer.steps=2")
    if resumed:
        tools.trained_here(run, *layout, "trainer.steps=3")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(2 + resumed))
    for row in rows:
        assert row["policy/entropy"] is None
        assert row["mismatch/kl_k3"] is None
        assert row["policy/old_logprob_mean"] < 0
        assert row["shaping/shaped_rate_positive"] is None or row["shaping/shaped_rate_positive"] > 0
    # The first mini-batch's ratio is the learner against the engine, in float32: noise, but not 0. Later steps have
    # groups that older weights sampled.
    assert 0 < rows[0]["policy/ratio_first_max"] < 1e-3
    rollouts = [each for files in rollout_files(run).values() for path in files for each in read_rollouts(path)]
    trained = [each for each in rollouts if each["old_logprobs"] is not None]
    assert trained and len(trained) < len(rollouts)
    assert all(each["old_logprobs"] == each["logprobs"] for each in trained)
    assert all(each["entropy"] is None for each in rollouts)
    assert write_report([run]).exists()
