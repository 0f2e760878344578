"""Every setting of the package: one section per room, frozen, checked when read. Imports no torch."""

from __future__ import annotations

from .algorithm import AdvantageOptions, CorrectionOptions, ObjectiveOptions, ShapingOptions
from .checkpoint import CheckpointOptions
from .cluster import ClusterOptions, ParallelOptions
from .config import Config, lasting, unlike
from .data import ARITHMETIC, DataOptions
from .learner import LearnerOptions, OptimizerOptions
from .load import data_options, load_config, load_resolved, resolved_text
from .model import MegatronOptions, ModelOptions
from .reward import RewardOptions
from .rollout import RolloutOptions
from .telemetry import TelemetryOptions
from .train import TrainerOptions
from .weights import PublishOptions

__all__ = [
    "ARITHMETIC",
    "AdvantageOptions",
    "CheckpointOptions",
    "ClusterOptions",
    "Config",
    "CorrectionOptions",
    "DataOptions",
    "LearnerOptions",
    "MegatronOptions",
    "ModelOptions",
    "ObjectiveOptions",
    "OptimizerOptions",
    "ParallelOptions",
    "PublishOptions",
    "RewardOptions",
    "RolloutOptions",
    "ShapingOptions",
    "TelemetryOptions",
    "TrainerOptions",
    "data_options",
    "lasting",
    "load_config",
    "load_resolved",
    "resolved_text",
    "unlike",
]
