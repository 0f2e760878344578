"""Every setting of the package: one section per room, frozen, checked when read. Imports no torch."""

from __future__ import annotations

from .alerts import AlertsOptions
from .algorithm import (
    Advantage,
    AdvantageOptions,
    ClipCov,
    Correction,
    ForkTokens,
    IcePop,
    KlCov,
    LeaveOneOut,
    LpReg,
    MaxRl,
    NoCorrection,
    NoProcess,
    NoShaping,
    Process,
    RewardsToGo,
    SequenceMask,
    Shaping,
    ShapingOptions,
    Signed,
    SpanRewards,
    TisOptions,
)
from .checkpoint import CheckpointOptions
from .cluster import ClusterOptions, ParallelOptions, ParallelSettings, even_stages, stage_ranks
from .data import ARITHMETIC, DataOptions
from .evaluation import EvaluationOptions
from .learner import AdamOptions, CosineSchedule, LearnerOptions, LearnerSettings, Optimizer, Schedule, SgdOptions
from .load import config_of_model, data_options, load_config, load_resolved, resolved_text
from .model import MegatronOptions, ModelOptions, ModelSettings
from .objective import (
    CispoOptions,
    ClippedOptions,
    GmpoOptions,
    GspoOptions,
    GspoTokenOptions,
    LuspoOptions,
    ObjectiveOptions,
    ReinforceOptions,
    SapoOptions,
    SequenceObjective,
    TokenObjective,
    VespoOptions,
)
from .regulariser import RegulariserOptions
from .resolve import resolve
from .resume import lasting, unlike
from .reward import GraderPoolOptions, LocalPool, RayPool, RewardOptions
from .rollout import RolloutOptions, RolloutSettings
from .sandbox import AutoSandbox, RemoteSandbox, SandboxOptions
from .sections import Config, Settings
from .telemetry import TelemetryOptions
from .train import TrainerOptions
from .weights import PublishOptions, PublishSettings

__all__ = [
    "ARITHMETIC",
    "AdamOptions",
    "Advantage",
    "AdvantageOptions",
    "AlertsOptions",
    "AutoSandbox",
    "CheckpointOptions",
    "CispoOptions",
    "ClipCov",
    "ClippedOptions",
    "ClusterOptions",
    "Config",
    "Correction",
    "CosineSchedule",
    "DataOptions",
    "EvaluationOptions",
    "ForkTokens",
    "GmpoOptions",
    "GraderPoolOptions",
    "GspoOptions",
    "GspoTokenOptions",
    "IcePop",
    "KlCov",
    "LearnerOptions",
    "LearnerSettings",
    "LeaveOneOut",
    "LocalPool",
    "LpReg",
    "LuspoOptions",
    "MaxRl",
    "MegatronOptions",
    "ModelOptions",
    "ModelSettings",
    "NoCorrection",
    "NoProcess",
    "NoShaping",
    "ObjectiveOptions",
    "Optimizer",
    "ParallelOptions",
    "ParallelSettings",
    "Process",
    "PublishOptions",
    "PublishSettings",
    "RayPool",
    "RegulariserOptions",
    "ReinforceOptions",
    "RemoteSandbox",
    "RewardOptions",
    "RewardsToGo",
    "RolloutOptions",
    "RolloutSettings",
    "SandboxOptions",
    "SapoOptions",
    "Schedule",
    "SequenceMask",
    "SequenceObjective",
    "Settings",
    "SgdOptions",
    "Shaping",
    "ShapingOptions",
    "Signed",
    "SpanRewards",
    "TelemetryOptions",
    "TisOptions",
    "TokenObjective",
    "TrainerOptions",
    "VespoOptions",
    "config_of_model",
    "data_options",
    "even_stages",
    "lasting",
    "load_config",
    "load_resolved",
    "resolve",
    "resolved_text",
    "stage_ranks",
    "unlike",
]
