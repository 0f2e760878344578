"""The whole configuration, and the combinations of options that are refused because one of them has no effect."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, ValidationError

from .algorithm import AdvantageOptions, CorrectionOptions, ObjectiveOptions, ShapingOptions
from .checkpoint import CheckpointOptions
from .cluster import ClusterOptions, ParallelOptions
from .data import ARITHMETIC, DataOptions
from .learner import LearnerOptions, OptimizerOptions
from .model import MegatronOptions, ModelOptions
from .reward import RewardOptions
from .rollout import RolloutOptions
from .section import Section, option
from .slurm import SlurmOptions
from .telemetry import TelemetryOptions
from .train import TrainerOptions
from .weights import PublishOptions


class Config(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = option(
        "run", "of the run: of its folder, and of its jobs"
    )
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
    slurm: SlurmOptions = SlurmOptions()

    def on(self, device: Literal["cpu", "cuda"]) -> Config:
        """The same run, on such devices and no others, with what follows from them."""
        replay = self.checkpoint.replay or ("exact" if device == "cpu" or self.rollout.batch_invariant else "all")
        checkpoint = self.checkpoint.model_copy(update={"replay": replay})
        cluster = self.cluster.model_copy(update={"device": device})
        dtype = self.model.dtype or ("float32" if device == "cpu" else "bfloat16")
        model = self.model.model_copy(update={"dtype": dtype})
        return self.model_copy(update={"cluster": cluster, "checkpoint": checkpoint, "model": model})


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
    NoEffect(("reward.ray_address",), lambda c: c.reward.pool != "ray", "reward.pool is not ray"),
    NoEffect(("optimizer.momentum",), lambda c: c.optimizer.name != "sgd", "optimizer.name is not sgd"),
    NoEffect(("optimizer.betas", "optimizer.eps"), lambda c: c.optimizer.name == "sgd", "optimizer.name is sgd"),
    NoEffect(
        ("learner.bf16_layers",),
        lambda c: not (c.learner.precision or "").startswith("fp8"),
        "learner.precision is not FP8",
    ),
    NoEffect(("rollout.bf16_layers",), lambda c: c.rollout.quantization is None, "rollout.quantization is not set"),
    NoEffect(("optimizer.min_lr",), lambda c: c.optimizer.schedule != "cosine", "optimizer.schedule is constant"),
    NoEffect(
        ("publish.canary_tokens", "publish.canary_bound", "publish.witness_every"),
        lambda c: c.publish.canary_prompts == 0,
        "publish.canary_prompts is 0 (off)",
    ),
    NoEffect(("telemetry.texts_per_step",), lambda c: not c.telemetry.rollouts, "telemetry.rollouts is false"),
    NoEffect(
        (
            *("data.problem_field", "data.answer_field", "data.id_field", "data.shuffle", "data.drop_long_prompts"),
            *("data.duplicates", "data.conflicts", "data.unreadable_golds", "data.cache"),
        ),
        lambda c: c.data.path == ARITHMETIC,
        f"data.path is {ARITHMETIC}",
    ),
    NoEffect(("data.weights",), lambda c: isinstance(c.data.path, str), "data.path names one source"),
    NoEffect(
        ("data.template_file", "data.template_arguments", "data.system"),
        lambda c: c.data.template != "chat",
        "data.template is not chat",
    ),
    NoEffect(
        ("advantage.ddof", "advantage.eps"), lambda c: not c.advantage.normalise_std, "advantage.normalise_std is false"
    ),
)


# What may differ between the starts of one run: the rest would make it another run. Sections stand for all they hold.
RESUME_MAY_CHANGE = {
    *("name", "parallel", "publish", "checkpoint", "telemetry", "slurm"),
    *("data.cache",),
    *("cluster.port", "cluster.timeout_seconds", "learner.micro_batch_tokens", "learner.offload"),
    *("rollout.tensor", "rollout.expert", "rollout.data", "rollout.kv_cache_bytes", "rollout.max_sequences"),
    *(
        "reward.pool",
        "reward.ray_address",
        "reward.workers",
        "reward.timeout_seconds",
        "reward.memory_bytes",
        "reward.max_invalid_rate",
    ),
    *("trainer.steps", "trainer.max_empty_steps", "trainer.max_rejected_updates"),
}


def unlike(before: dict[str, Any], config: Config) -> list[str]:
    """Every option that keeps a run from going on as it is configured now: "option was …, is …"."""
    with contextlib.suppress(ValidationError):  # options that it did not have yet: as they are by default
        before = Config.model_validate(before).model_dump(mode="json")
    then, now = _flat(before), _flat(config.model_dump(mode="json"))
    kept = lasting(before).keys() | lasting(config.model_dump(mode="json")).keys()
    devices = {then.get("cluster.device"), now["cluster.device"]}
    if None in devices:
        kept -= {"cluster.device"}
    if None in (then.get("model.dtype"), now["model.dtype"]):
        kept -= {"model.dtype"}
    experts = {then.get("parallel.expert"), now["parallel.expert"]}
    reasons = {
        "trainer.steps": ", and the learning rate's schedule ends with it"
        if config.optimizer.schedule == "cosine"
        else "",
        "parallel.expert": ", and Megatron's optimizer keeps experts that are spread apart" if 1 in experts else "",
        "cluster.device": "" if None in devices else ", and the names in a checkpoint follow from it",
    }
    if config.learner.precision == "fp8-tensorwise":
        packs = ", and fp8-tensorwise would train a scored batch in other packs"
        reasons |= dict.fromkeys(["learner.micro_batch_tokens", *(n for n in now if n.startswith("parallel."))], packs)
    return [
        f"{name} was {then.get(name)!r}, is {now.get(name)!r}{reasons.get(name, '')}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name) and (reasons.get(name) or name in kept)
    ]


def lasting(tree: dict[str, Any]) -> dict[str, Any]:
    """Of all options, by dotted name, those that stay what they are as long as a run lives."""
    return {n: value for n, value in _flat(tree).items() if not {n, n.partition(".")[0]} & RESUME_MAY_CHANGE}


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    sections = {name: values if isinstance(values, dict) else {"": values} for name, values in tree.items()}
    return {f"{s}.{name}" if name else s: value for s, values in sections.items() for name, value in values.items()}
