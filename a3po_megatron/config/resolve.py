"""From what a user says to what a run does: every option that was left open gets the value that follows.

Pure, and no check: what cannot work is refused by launch/check.py, which looks at the layout before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

from .algorithm import ShapingOptions
from .cluster import even_stages
from .objective import TokenObjective
from .sections import Config, Settings
from .weights import CANARY_BOUND, QUANTISED_BOUND


class Facts(Protocol):
    """What counts of a model (model/facts.py)."""

    @property
    def layers(self) -> int: ...


class Device(Protocol):
    """What counts of what the ranks run on (ranks/backend.py)."""

    @property
    def device(self) -> Literal["cpu", "cuda"]: ...
    @property
    def dtypes(self) -> tuple[str, ...]: ...
    @property
    def offload(self) -> Literal["none", "optimizer", "all"]: ...


# What a plan of memory would say (preflight/sizes.py) where memory is not short.
SIZES: dict[str, Any] = {
    "rollout.kv_cache_bytes": 256 << 20,
    "rollout.max_sequences": 256,
    "learner.micro_batch_tokens": 16384,
    "learner.recompute": "none",
}


def resolve(
    config: Config, facts: Facts, device: Device, ranks: int | None = None, sizes: Mapping[str, Any] = SIZES
) -> Settings:
    """The settings of a run of this model on such devices. `ranks`: how many there will be; None, on one machine: as
    few as the layout needs. `sizes`: by dotted option, of those that were left open."""
    parallel, shaping, rollout, trainer = config.parallel, config.shaping, config.rollout, config.trainer
    dtype = config.model.dtype or device.dtypes[0]
    precision = config.learner.precision or ("fp32" if dtype == "float32" else "bf16")
    data = parallel.data or (ranks or 0) // parallel.ranks_of(1) or parallel.fewest_data()
    exact = CANARY_BOUND[dtype] if not precision.startswith("fp8") else QUANTISED_BOUND
    rounded = exact if rollout.quantization == "none" else QUANTISED_BOUND
    repeatable = device.device == "cpu" or rollout.batch_invariant
    answers: dict[str, dict[str, Any]] = {
        "model": {"dtype": dtype},
        "cluster": {"device": device.device},
        "parallel": {
            "expert_tensor": parallel.expert_tensor or parallel.tensor,
            "stages": parallel.stages or even_stages(facts.layers, parallel.pipeline * parallel.virtual),
            "data": data,
        },
        "rollout": {"data": rollout.data or parallel.ranks_of(data) // rollout.tensor},
        "learner": {"precision": precision, "offload": config.learner.offload or device.offload},
        "publish": {
            "canary_bound": config.publish.canary_bound or rounded,
            "witness_bound": config.publish.witness_bound or config.publish.canary_bound or exact,
        },
        "checkpoint": {"replay": config.checkpoint.replay or ("exact" if repeatable else "all")},
        "trainer": {"mini_batches": trainer.updates(trainer.prompts_per_step)},
        "slurm": {"tasks_per_node": config.slurm.ranks_per_node()},
    }
    if isinstance(shaping, ShapingOptions) and shaping.rho_negative is None:
        answers["shaping"] = {"rho_negative": shaping.rho}
    if isinstance(config.objective, TokenObjective) and config.objective.constant is None:
        answers["objective"] = {"constant": rollout.max_tokens}  # Dr.GRPO's: the longest that a response can be
    for option, value in sizes.items():
        section, _, name = option.partition(".")
        if getattr(getattr(config, section), name) is None:
            answers[section][name] = value
    tree = config.model_dump()
    return Settings.model_validate({section: _with(values, answers.get(section)) for section, values in tree.items()})


def _with(values: Any, found: dict[str, Any] | None) -> Any:
    return values if found is None else {**values, **found}
