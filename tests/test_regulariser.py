"""What is added to an objective: against loops in float64, through the model in real layouts, and over a run."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from a3po_megatron.algorithm.kl import ESTIMATORS
from a3po_megatron.algorithm.objectives.registry import objective_of
from a3po_megatron.algorithm.regulariser import METRIC, Regularised, Regulariser
from a3po_megatron.batch import Batch, Pull
from a3po_megatron.config import (
    AdvantageOptions,
    ClippedOptions,
    GspoOptions,
    LeaveOneOut,
    NoCorrection,
    RegulariserOptions,
    TokenObjective,
    load_config,
)
from a3po_megatron.errors import RequestError
from a3po_megatron.files.run_folder import RunFolder
from a3po_megatron.learner.reference import Reference
from tests.distributed import cases_regulariser as cases
from tests.harness import interrupted_runs as tools
from tests.harness.literal_objectives import CONSTANT, Rollouts, divided, drawn
from tests.harness.ranks import Case, run_ranks
from tests.harness.tiny_models import make_checkpoint
from tests.test_correction import scored

OBJECTIVES = {
    "tokens": ClippedOptions(),
    "sequences": ClippedOptions(normaliser="sequences"),
    "constant": ClippedOptions(normaliser="constant", constant=CONSTANT),
    "of sequences": GspoOptions(),
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_mean_of_an_estimator_over_samples_is_the_divergence(estimator: str) -> None:
    """k1 and k3 exactly, by a sum over a small vocabulary; k2 nearly, for distributions that are near each other."""
    draw = np.random.default_rng(0)
    logits = draw.normal(size=7)
    p, q = (torch.log_softmax(torch.tensor(each), dim=0) for each in (logits, logits + 0.05 * draw.normal(size=7)))
    exact = float((p.exp() * (p - q)).sum())
    mean = float((p.exp() * ESTIMATORS[estimator](p - q)).sum())
    if estimator == "abs":
        assert mean == pytest.approx(float((p.exp() * (p - q).abs()).sum()))
    else:
        assert mean == pytest.approx(exact, rel=0.1 if estimator == "k2" else 1e-9)


def literal(kind: str, estimator: str, data: Rollouts, targets: list[list[float]], weights: list[list[float]]) -> float:
    """The sum that is added, rollout by rollout; its gradients are left in the log-probs. With an entropy of its own
    for each token: sin(log pi), so that its gradient is known."""
    options, total, tokens = OBJECTIVES[kind], torch.zeros((), dtype=torch.float64), 0
    for logprobs, target, weight in zip(data.logprobs, targets, weights, strict=True):
        part = torch.zeros((), dtype=torch.float64)
        for t in range(len(logprobs)):
            x = logprobs[t] - target[t]
            value = {"k1": x, "k2": x * x / 2, "k3": torch.exp(-x) - 1 + x, "abs": x if x.item() > 0 else -x}[estimator]
            part = part + weight[t] * value - 0.3 * torch.sin(logprobs[t])
        mean = getattr(options, "normaliser", "sequences") == "sequences"
        total, tokens = total + (part / len(logprobs) if mean else part), tokens + len(logprobs)
    per = {"tokens": tokens, "sequences": len(targets), "constant": len(targets) * CONSTANT}
    loss = total / per[getattr(options, "normaliser", "sequences")]
    loss.backward()
    return float(loss.detach())


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("cut", [1, 3])
def test_what_is_added_is_that_of_the_formula_however_a_batch_is_cut(kind: str, estimator: str, cut: int) -> None:
    options = OBJECTIVES[kind]
    data, draw = drawn(0.01, weighted=isinstance(options, TokenObjective)), np.random.default_rng(1)
    targets = [(v.detach().numpy() + draw.normal(0, 0.3, len(v))).tolist() for v in data.logprobs]
    weights = [np.where(draw.random(len(v)) < 0.5, draw.random(len(v)), 0.0).tolist() for v in data.logprobs]
    wanted = literal(kind, estimator, data, targets, weights)
    of_formula = data.gradients()
    alone, _ = divided(objective_of(options, NoCorrection()), [data.batch(data.whole())])
    alone.backward()
    of_objective = data.gradients()

    def batch(part: list[tuple[int, list[int]]]) -> Any:
        places = [(i, t) for i, tokens in part for t in tokens]
        target, weight = (
            torch.tensor([values[i][t] for i, t in places], dtype=torch.float64) for values in (targets, weights)
        )
        target = torch.where(weight > 0, target, float("-inf"))  # of what is not drawn the target may be anything
        made = data.batch(part)
        more = {"pulls": (Pull(estimator, target, weight),), "entropy": torch.sin(made.logprobs)}
        return data.batch(part, **more, entropy_weight=0.3)

    parts = [list(each) for each in np.array_split(np.arange(len(data.logprobs)), cut)]
    objective = Regularised(objective_of(options, NoCorrection()))
    loss, reported = divided(objective, [batch([data.whole()[i] for i in part]) for part in parts])
    loss.backward()
    assert reported[METRIC] == pytest.approx(wanted, rel=1e-12)
    assert float(loss.detach()) == pytest.approx(float(alone.detach()) + wanted, rel=1e-12)
    for ours, one, other in zip(data.gradients(), of_formula, of_objective, strict=True):
        assert ours == pytest.approx([a + b for a, b in zip(one, other, strict=True)], rel=1e-9, abs=1e-14)


def test_where_nothing_is_added_the_objective_is_as_it_was() -> None:
    data = drawn(0.5)
    plain, sums = divided(objective_of(ClippedOptions(), NoCorrection()), [data.batch(data.whole())])
    loss, reported = divided(Regularised(objective_of(ClippedOptions(), NoCorrection())), [data.batch(data.whole())])
    assert torch.equal(plain, loss) and reported == {**sums, METRIC: 0.0}


@pytest.mark.parametrize(
    ("world", "case", "layouts"),
    [
        (4, cases.one_layout, 1),
        pytest.param(2, cases.all_layouts, 4, marks=pytest.mark.soak),
        pytest.param(4, cases.all_layouts, 4, marks=pytest.mark.soak),
    ],
)
def test_scores_and_an_update_through_the_model_are_those_of_the_hf_model(
    world: int, case: Case, layouts: int, tmp_path: Path
) -> None:
    """By the reference, which has other weights; by the less noisy policy; with divergence, draw and entropy bonus."""
    make_checkpoint(tmp_path / "first", "qwen3")
    make_checkpoint(tmp_path / "now", "qwen3", seed=1)
    cut = 0.0
    for by_layout in run_ranks(world, case, folder=tmp_path)[case.__name__]:
        assert len(by_layout) == layouts
        for layout, apart in by_layout.items():
            drawn_here, wanted = apart.pop("drawn")
            cut += apart.pop("cut")
            assert drawn_here == wanted > 0 and apart.pop("moved") == 0, (layout, "the reference came and went")
            # float32 against float64, as of the objectives (tests/test_objectives.py)
            assert apart.pop("gradient") < 1e-5 and max(apart.values()) < 1e-5, (layout, apart)
    assert cut > 0


def test_weights_come_back_bit_for_bit_also_from_a_failure() -> None:
    parameters = {name: torch.randn(3, 4).to(torch.bfloat16) for name in "ab"}
    first = {name: tensor.clone() for name, tensor in parameters.items()}
    reference = Reference(parameters)
    for tensor in parameters.values():
        tensor.add_(1.0)
    later = {name: tensor.clone() for name, tensor in parameters.items()}
    for _ in range(2):
        with contextlib.suppress(KeyError), reference.in_place():
            assert all(torch.equal(parameters[name], first[name]) for name in parameters)
            raise KeyError
        assert all(torch.equal(parameters[name], later[name]) for name in parameters)


def alone(values: torch.Tensor) -> torch.Tensor:
    return values


def referred(**options: Any) -> tuple[Batch, Batch]:
    """A batch with log-probs of a reference, before and after."""
    batches = []
    for _ in range(2):
        batch = scored(groups=5, size=4)
        assert batch.old_logprobs is not None
        batch.reference_logprobs = batch.old_logprobs + 0.1 * torch.sin(torch.arange(len(batch.rollout_index)))
        batch.trained = (torch.arange(len(batch.rollout_index)) % 5 != 3) & (batch.rollout_index % 6 != 4)
        batches.append(batch)
    return batches[0], Regulariser(RegulariserOptions(**options), AdvantageOptions(), alone)(batches[1])


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_divergence_in_the_reward_changes_what_advantages_are_of_and_nothing_else(estimator: str) -> None:
    before, after = referred(kl=0.5, place="reward", estimator=estimator)
    assert before.old_logprobs is not None and before.reference_logprobs is not None and before.trained is not None
    paid: list[float | None] = []  # None: it is masked whole, and has no scores
    for i in range(len(before.rollouts)):
        mine = [t for t in range(len(before.rollout_index)) if before.rollout_index[t] == i and before.trained[t]]
        xs = [float(before.old_logprobs[t]) - float(before.reference_logprobs[t]) for t in mine]
        of = {"k1": lambda x: x, "k2": lambda x: x * x / 2, "k3": lambda x: math.exp(-x) - 1 + x}[estimator]
        paid.append(0.5 * math.fsum(map(of, xs)) if xs else None)
    assert None in paid
    for group in range(5):
        mine = [i for i in range(len(paid)) if before.group_index[i] == group]
        scored_ones = [paid[i] for i in mine if paid[i] is not None]
        usual = math.fsum(scored_ones) / len(scored_ones)
        values = np.array([float(before.rewards[i]) - (usual if paid[i] is None else paid[i]) for i in mine])
        wanted = (values - values.mean()) / (values.std(ddof=1) + 1e-6)
        assert after.advantages[mine].tolist() == pytest.approx(wanted.tolist(), abs=2e-5)
    assert torch.equal(before.rewards, after.rewards) and torch.equal(before.positive, after.positive)
    assert not after.pulls and after.entropy_weight == 0


def test_a_group_on_two_replicas_has_the_advantages_that_it_has_on_one() -> None:
    options = RegulariserOptions(kl=0.5, place="reward")
    _, whole = referred(kl=0.5, place="reward")

    def part(replica: int) -> Batch:
        batch, _ = referred(kl=0.5)
        mine = torch.arange(len(batch.rollouts)) % 2 == replica  # of every group some
        tokens = mine[batch.rollout_index]
        batch.rollouts = [r for r, m in zip(batch.rollouts, mine.tolist(), strict=True) if m]
        for name in ("rewards", "positive", "advantages", "lengths"):
            setattr(batch, name, getattr(batch, name)[mine])
        batch.rollout_index = torch.repeat_interleave(torch.arange(len(batch.rollouts)), batch.lengths)
        for name in ("old_logprobs", "reference_logprobs", "trained"):
            setattr(batch, name, getattr(batch, name)[tokens])
        return batch

    tables: list[torch.Tensor] = []

    def keep(table: torch.Tensor) -> list[torch.Tensor]:
        tables.append(table)
        return [table]

    for replica in (0, 1):
        Regulariser(options, AdvantageOptions(), alone, keep)(part(replica))
    for replica in (0, 1):
        here = Regulariser(options, AdvantageOptions(), alone, lambda _: tables, replica)(part(replica))
        assert torch.equal(here.advantages, whole.advantages[replica::2])


def test_a_divergence_in_the_loss_draws_every_token_to_the_reference() -> None:
    before, after = referred(kl=0.5, estimator="k1")
    (pull,) = after.pulls
    assert pull.estimator == "k1" and pull.weights.tolist() == [0.5] * len(before.rollout_index)
    assert pull.targets is after.reference_logprobs and torch.equal(before.advantages, after.advantages)


def test_the_bonus_of_a_target_goes_up_below_it_counts_there_and_survives_a_restart() -> None:
    options = RegulariserOptions(entropy=0.01, entropy_target=0.5, entropy_step=0.004)
    regulariser, weight = Regulariser(options, LeaveOneOut(), alone), 0.01
    for mean in (0.4, 0.3, 0.6, 0.7, 0.8, 0.9, 0.5, 0.2):
        batch = scored()
        batch.entropy = torch.full_like(batch.rollout_logprobs, mean)
        again = Regulariser(options, LeaveOneOut(), alone)
        again.restore(json.loads(json.dumps(regulariser.state())))
        regulariser = again
        mean = float(batch.entropy.double().mean())
        assert regulariser(batch).entropy_weight == pytest.approx(weight if mean <= 0.5 else 0.0)
        weight = max(0.0, weight + (0.004 if mean < 0.5 else -0.004 if mean > 0.5 else 0.0))
    assert weight == pytest.approx(0.006)
    nothing = scored()
    nothing.trained = torch.zeros(len(nothing.rollout_index), dtype=torch.bool)
    assert regulariser(nothing).entropy_weight == 0 and regulariser.state() == {"entropy_weight": pytest.approx(0.006)}


# A run draws to its first weights, takes divergence off rewards, and its bonus follows a target.
RUNS = {
    "loss": (
        "regulariser.kl=0.01",
        "regulariser.entropy=0.001",
        "method=lp_reg",
        "shaping={decay: null, fraction: 0.5}",
    ),
    "reward": (
        *("regulariser.kl=0.1", "regulariser.place=reward", "regulariser.estimator=k1"),
        *("regulariser.entropy_target=1.0", "regulariser.entropy_step=0.001"),
    ),
}


@pytest.mark.parametrize("kind", ["loss", pytest.param("reward", marks=pytest.mark.soak)])
def test_a_run_that_goes_on_from_a_checkpoint_is_as_an_undisturbed_one(kind: str, tmp_path: Path) -> None:
    plain, run, model = (tmp_path / name for name in ("plain", "run", "model"))
    shutil.copytree(tools.ROOT / load_config(tools.ROOT / "configs/arithmetic.yaml").model.path, model)
    mine = (*tools.LAYOUTS["tp2"], f"model.path={model}", "checkpoint.every_steps=2", "trainer.steps=3", *RUNS[kind])
    tools.trained_here(plain, *mine)
    shutil.copytree(plain, run, symlinks=True)
    shutil.rmtree(RunFolder(run).checkpoints / "step-000003")
    tools.trained_here(run, *mine)
    rows = [
        [json.loads(line) for line in RunFolder(tmp_path / name).metrics.read_text().splitlines()]
        for name in ("plain", "run")
    ]
    changing = ("perf/", "startup/", "memory/", "refit/seconds")
    kept = [[{k: v for k, v in row.items() if not k.startswith(changing)} for row in each] for each in rows]
    assert kept[0] == kept[1] and len(kept[0]) == 3
    divergences = [row["policy/kl_reference"] for row in kept[0]]
    assert divergences[0] < 1e-9 < divergences[1], "the first weights are those of the first step"
    assert any(row[METRIC] != 0 for row in kept[0]) or kind == "reward"
    if kind == "reward":
        assert [row["learner/entropy_weight"] > 0 for row in kept[0]] == [
            number > 0 and row["policy/entropy"] <= 1.0 for number, row in enumerate(kept[0])
        ]
    else:
        assert all(row["learner/entropy_weight"] == 0.001 for row in kept[0])
        assert sum(row["shaping/drawn_rate"] for row in kept[0]) > 0
    other = make_other(model)
    with pytest.raises(RequestError, match="the reference of regulariser.kl.* was another file"):
        tools.trained_here(run, *mine, "trainer.steps=5")
    assert other.is_file()


def make_other(model: Path) -> Path:
    """Changes one byte in the middle of a model's weights, in a tensor's first ones."""
    path = model / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8 + int.from_bytes(data[:8], "little")] ^= 1
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ["regulariser.kl=0.1", "regulariser.place=reward", "advantage.name=signed"],
            "advantage.name: signed does not look at rewards: set regulariser.place: loss",
        ),
        (
            ["regulariser.kl=0.1", "regulariser.place=reward", "advantage.name=max_rl"],
            "advantage.name: max_rl divides by what a group gets",
        ),
        (
            ["shaping={name: kl_cov, decay: null}", "trainer.mini_batches=1"],
            "which a step with one update never leaves: raise trainer.mini_batches",
        ),
        (
            ["shaping={name: lp_reg, decay: null}", "advantage.negative_scale=0"],
            "advantage.negative_scale: 0 leaves none",
        ),
        (
            ["shaping={name: clip_cov, decay: null, low: 5, high: 1}"],
            "shaping.low: 5 must be less than shaping.high: 1",
        ),
        (["regulariser.entropy_step=0.1"], "regulariser.entropy_step has no effect, because"),
    ],
)
def test_what_would_be_without_effect_is_refused_before_a_run(options: list[str], says: str, tmp_path: Path) -> None:
    ended = tools.launched_here(tmp_path / "run", *tools.LAYOUTS["dp2"], *options)
    assert ended.code == 2 and says in ended.err, ended.all


@pytest.mark.soak
@pytest.mark.parametrize(
    "options",
    [
        ["shaping={name: clip_cov, decay: null, low: 0.01, fraction: 0.05}"],
        ["shaping={name: kl_cov, decay: null, fraction: 0.05}"],
        *([f"regulariser.kl=0.01,regulariser.estimator={estimator}"] for estimator in ("k1", "k2", "k3")),
        ["regulariser.entropy=0.001"],
    ],
)
def test_each_of_them_trains(options: list[str], tmp_path: Path) -> None:
    """On the model of the second demo, which answers now and then."""
    words = [word for option in options for word in (option.split(",") if option.startswith("reg") else [option])]
    tools.trained_here(tmp_path / "run", *tools.LAYOUTS["tp2"], *words, "trainer.steps=2", "trainer.mini_batches=2")
    rows = [json.loads(line) for line in RunFolder(tmp_path / "run").metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1]
    assert all(math.isfinite(row["policy/grad_norm"]) and row["policy/grad_norm"] > 0 for row in rows)
    if "kl_cov" in options[0]:
        assert all(row["shaping/drawn_rate"] > 0 for row in rows)
    if "clip_cov" in options[0]:
        assert all(row["shaping/shaped_rate_positive"] + row["shaping/shaped_rate_negative"] >= 0 for row in rows)
