"""The learner's update equals the paper's, computed literally from the HF model, for every family and layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import cases_learner
from tests.distributed.cases_learner import CASES, CROSSING
from tests.harness.ranks import Case, run_ranks
from tests.harness.tiny_models import KINDS, make_checkpoint


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        make_checkpoint(folder / kind, kind)
    for kind in ("qwen3", "qwen2", "qwen3_moe"):
        make_checkpoint(folder / f"{kind}_deep", kind, num_hidden_layers=5)
    return folder


@pytest.mark.parametrize(
    ("world", "names"),
    [
        *CROSSING.items(),
        *(pytest.param(world, None, marks=pytest.mark.soak) for world in CROSSING),
    ],
)
def test_one_update_equals_plain_pytorch_on_the_hf_model(
    world: int, names: tuple[str, ...] | None, models: Path
) -> None:
    cases = [case for case in CASES[world] if names is None or case.__name__ in names]
    assert len(cases) == len(names or CASES[world])
    wrong = []
    for name, by_rank in run_ranks(world, *cases, folder=models, timeout=500).items():
        for rank, found in enumerate(by_rank):
            bounds = {
                # Float32 against float64: a few ulps (6e-8) after some hundred additions and two layers.
                "score": 1e-5,
                "loss": 1e-6,
                # Of transformers itself in float32: 1.5e-6 through two layers, 3.5e-6 through five, which these have;
                # thrice that, since processors multiply in different orders.
                "gradient": 1e-5 if "vp2" in name or "uneven" in name else 5e-6,
                "norm_sgd": 1e-5,
                "norm": 1e-5,
                "parameter": 5e-7,
                # Adam divides near-zero gradients by their own size: noise in them becomes a full step.
                "second_loss": 1e-4,
                "missing": 0,
                "padding": 0,  # adding zeros changes no bit
                "padding_share": 1e-6,  # counts in float32
            }
            asked = ("score", "loss", "gradient", "norm_sgd", "parameter") if name.startswith("share_") else bounds
            # Not `>`: it would let NaN pass.
            wrong += [f"{name}, rank {rank}: {k} = {found[k]:.1e}" for k in asked if not found[k] <= bounds[k]]
    assert not wrong, wrong


@pytest.mark.parametrize(
    ("case", "faults"),
    [
        (cases_learner.rejected_updates, 1),
        pytest.param(cases_learner.all_rejected_updates, len(cases_learner.FAULTS), marks=pytest.mark.soak),
    ],
)
def test_an_update_whose_loss_or_gradient_is_not_finite_on_one_rank_is_applied_on_none_in_any_layout(
    case: Case, faults: int, models: Path
) -> None:
    by_rank = run_ranks(2, case, folder=models)[case.__name__]
    assert len(by_rank[0]) == len(cases_learner.REJECTING) * faults
    for by_layout in by_rank:
        for layout, found in by_layout.items():
            assert found["rejected"] == [int(layout[-1])], layout
            assert found["metric"] == 1.0, layout
            assert found["trained"], layout  # the other two mini-batches did
            assert found["equal"], layout  # bit for bit as if the mini-batch had never been
            wanted, told = found["told"]
            assert told == wanted, layout
            if "overflow" in layout:
                assert found["gradients_finite"], layout  # the loss alone gives it away


ALL = pytest.param(cases_learner.all_whole_steps, marks=pytest.mark.soak)


@pytest.fixture(scope="module", params=[cases_learner.whole_steps, ALL], ids=lambda case: case.__name__)
def steps(request: pytest.FixtureRequest, models: Path) -> dict[str, Any]:
    case: Case = request.param
    found: dict[str, Any] = {}
    for world in cases_learner.STEPS:
        for by_layout in run_ranks(world, case, folder=models)[case.__name__]:
            for layout, step in by_layout.items():
                tokens = found.setdefault(layout, step | {"tokens": {}, "worst": []})
                for name, given in step["tokens"].items():  # the same on all ranks that hold the rollout, bit for bit
                    assert tokens["tokens"].setdefault(name, given)[1] == given[1], (layout, name)
                tokens["worst"].append((step["loss"], step["gradient"]))
    return found


def test_a_whole_step_of_score_shape_and_update_is_the_papers_under_tensor_context_pipeline_and_data_parallelism(
    steps: dict[str, Any],
) -> None:
    assert "tp2 cp2 pp1 dp1" in steps
    for layout, step in steps.items():
        for loss, gradient in step["worst"]:
            assert loss <= 1e-6, layout
            assert gradient <= 5e-6, layout


def test_across_layouts_only_tokens_next_to_the_threshold_may_change_sides(steps: dict[str, Any]) -> None:
    alone = steps["tp1 cp1 pp1 dp1"]["tokens"]
    for layout, step in steps.items():
        assert step["tokens"].keys() == alone.keys(), layout
        for name, (old, weights) in step["tokens"].items():
            old_alone, weights_alone = alone[name]
            assert max(abs(a - b) for a, b in zip(old, old_alone, strict=True)) < 1e-5, (layout, name)
            moved = [t for t, (a, b) in enumerate(zip(weights, weights_alone, strict=True)) if a != b]
            assert len(moved) % 2 == 0  # as many leave as come
            if moved:
                values = [old_alone[t] for t in moved]
                assert max(values) - min(values) < 1e-5, (layout, name)
