"""The whole configuration, and the combinations of options that are refused because one of them has no effect."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from pydantic import Field

from .algorithm import AdvantageOptions, CorrectionOptions, ObjectiveOptions, ShapingOptions
from .checkpoint import CheckpointOptions
from .cluster import ClusterOptions, ParallelOptions
from .data import ARITHMETIC, DataOptions
from .learner import LearnerOptions, OptimizerOptions
from .model import MegatronOptions, ModelOptions
from .reward import RewardOptions
from .rollout import RolloutOptions
from .section import Section
from .telemetry import TelemetryOptions
from .train import TrainerOptions
from .weights import PublishOptions


class Config(Section):
    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: ModelOptions
    data: DataOptions
    parallel: ParallelOptions = ParallelOptions()
    rollout: RolloutOptions = RolloutOptions()
    reward: RewardOptions = RewardOptions()
    advantage: AdvantageOptions = AdvantageOptions()
    shaping: ShapingOptions = ShapingOptions()
    objective: ObjectiveOptions = ObjectiveOptions()
    correction: CorrectionOptions = CorrectionOptions()
    trainer: TrainerOptions = TrainerOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    learner: LearnerOptions = LearnerOptions()
    megatron: MegatronOptions = MegatronOptions()
    publish: PublishOptions = PublishOptions()
    checkpoint: CheckpointOptions = CheckpointOptions()
    telemetry: TelemetryOptions = TelemetryOptions()
    cluster: ClusterOptions = ClusterOptions()


class NoEffect(NamedTuple):
    """An option that was given explicitly although, with another option as it is, it changes nothing."""

    options: tuple[str, ...]
    when: Callable[[Config], bool]
    because: str


def _unshaped(config: Config) -> bool:
    return config.shaping.rho == 1 and (config.shaping.rho_negative or 1) == 1


WITHOUT_EFFECT = (
    NoEffect(
        ("shaping.fraction", "shaping.decay", "shaping.origin", "shaping.metric", "shaping.source", "shaping.rounding"),
        _unshaped,
        "shaping.rho is 1 (no shaping)",
    ),
    NoEffect(("shaping.source",), lambda c: c.shaping.metric != "probability", "shaping.metric is not probability"),
    NoEffect(("shaping.origin",), lambda c: c.shaping.decay == 0, "shaping.decay is 0"),
    NoEffect(
        ("reward.overlong_penalty",), lambda c: c.reward.overlong_tokens == 0, "reward.overlong_tokens is 0 (off)"
    ),
    NoEffect(("optimizer.momentum",), lambda c: c.optimizer.name != "sgd", "optimizer.name is not sgd"),
    NoEffect(("optimizer.betas", "optimizer.eps"), lambda c: c.optimizer.name == "sgd", "optimizer.name is sgd"),
    NoEffect(("optimizer.min_lr",), lambda c: c.optimizer.schedule != "cosine", "optimizer.schedule is constant"),
    NoEffect(
        ("publish.canary_tokens", "publish.canary_bound", "publish.witness_every"),
        lambda c: c.publish.canary_prompts == 0,
        "publish.canary_prompts is 0 (off)",
    ),
    NoEffect(("telemetry.texts_per_step",), lambda c: not c.telemetry.rollouts, "telemetry.rollouts is false"),
    NoEffect(
        ("data.problem_field", "data.answer_field", "data.id_field", "data.shuffle", "data.drop_long_prompts"),
        lambda c: c.data.path == ARITHMETIC,
        f"data.path is {ARITHMETIC}",
    ),
    NoEffect(
        ("advantage.ddof", "advantage.eps"), lambda c: not c.advantage.normalise_std, "advantage.normalise_std is false"
    ),
)
