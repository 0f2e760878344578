"""The whole configuration as a file gives it, and as a run has it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PrivateAttr

from .alerts import AlertsOptions
from .algorithm import (
    Advantage,
    AdvantageOptions,
    Correction,
    NoProcess,
    Process,
    ResolvedShaping,
    Shaping,
    ShapingOptions,
    TisOptions,
)
from .checkpoint import CheckpointOptions, CheckpointSettings
from .cluster import ClusterOptions, ClusterSettings, ParallelOptions, ParallelSettings
from .data import DataOptions
from .evaluation import EvaluationOptions
from .learner import AdamOptions, ConstantSchedule, LearnerOptions, LearnerSettings, Optimizer, Schedule
from .model import MegatronOptions, ModelOptions, ModelSettings
from .objective import ClippedOptions, ObjectiveOptions
from .regulariser import RegulariserOptions
from .reward import GraderPoolOptions, LocalPool, RewardOptions
from .rollout import RolloutOptions, RolloutSettings
from .sandbox import AutoSandbox, SandboxOptions
from .section import Section, option
from .slurm import SlurmOptions, SlurmSettings
from .telemetry import TelemetryOptions
from .train import TrainerOptions
from .weights import PublishOptions, PublishSettings


class Config(Section):
    """What a user says: None stands for what follows from other options, the model or the device."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = option(
        "run", "of the run: of its folder, and of its jobs"
    )
    method: str = option(
        "", "what sets the options of a method, where nothing else does: grpo, gspo, …; empty: nothing"
    )
    model: ModelOptions
    data: DataOptions
    parallel: ParallelOptions = ParallelOptions()
    rollout: RolloutOptions = RolloutOptions()
    reward: RewardOptions = RewardOptions()
    grader_pool: GraderPoolOptions = LocalPool()
    sandbox: SandboxOptions = AutoSandbox()
    advantage: Advantage = AdvantageOptions()
    process: Process = NoProcess()
    shaping: Shaping = ShapingOptions()
    objective: ObjectiveOptions = ClippedOptions()
    correction: Correction = TisOptions()
    regulariser: RegulariserOptions = RegulariserOptions()
    trainer: TrainerOptions = TrainerOptions()
    optimizer: Optimizer = AdamOptions()
    lr_schedule: Schedule = ConstantSchedule()
    learner: LearnerOptions = LearnerOptions()
    megatron: MegatronOptions = MegatronOptions()
    publish: PublishOptions = PublishOptions()
    checkpoint: CheckpointOptions = CheckpointOptions()
    evaluation: EvaluationOptions = EvaluationOptions()
    telemetry: TelemetryOptions = TelemetryOptions()
    alerts: AlertsOptions = AlertsOptions()
    cluster: ClusterOptions = ClusterOptions()
    slurm: SlurmOptions = SlurmOptions()


class Settings(Config):
    """What a run does: every option has its value, of which `resolve` (resolve.py) found those that were left open."""

    model: ModelSettings
    parallel: ParallelSettings
    rollout: RolloutSettings
    shaping: ResolvedShaping
    learner: LearnerSettings
    publish: PublishSettings
    checkpoint: CheckpointSettings
    cluster: ClusterSettings
    slurm: SlurmSettings
    _reasons: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def reasons(self) -> dict[str, str]:
        """Why options have the values that a plan gave them, by dotted option."""
        return self._reasons

    def because(self, reasons: dict[str, str]) -> Settings:
        """Returns the same with reasons."""
        other = self.model_copy()
        other._reasons = dict(reasons)
        return other

    @property
    def ranks(self) -> int:
        """How many processes a run has."""
        return self.parallel.ranks_of(self.parallel.data)
