"""Which options make a run that run: what may differ between its starts, and what may not."""

from __future__ import annotations

import contextlib
from typing import Any

from pydantic import ValidationError

from .sections import Settings

# What may differ between the starts of one run: the rest would make it another run. Sections stand for all they hold.
RESUME_MAY_CHANGE = {
    *(
        "name",
        "method",
        "parallel",
        "publish",
        "checkpoint",
        "evaluation",
        "telemetry",
        "alerts",
        "slurm",
        "grader_pool",
        "sandbox",
    ),
    *("data.cache",),
    *("cluster.gpu", "cluster.port", "cluster.timeout_seconds", "learner.micro_batch_tokens", "learner.offload"),
    *("learner.recompute", "learner.overlap_grad_reduce", "learner.overlap_param_gather", "learner.expert_dispatcher"),
    "optimizer.on_host",
    *("rollout.tensor", "rollout.expert", "rollout.data", "rollout.kv_cache_bytes", "rollout.max_sequences"),
    "reward.max_invalid_rate",
    *("trainer.steps", "trainer.max_empty_steps", "trainer.max_rejected_updates"),
}


def unlike(before: dict[str, Any], settings: Settings) -> list[str]:
    """Every option that keeps a run from going on as it is configured now: "option was …, is …"."""
    with contextlib.suppress(ValidationError):  # options that it did not have yet: as they are by default
        before = Settings.model_validate(before).model_dump(mode="json")
    then, now = _flat(before), _flat(settings.model_dump(mode="json"))
    fixed = lasting(before).keys() | lasting(settings.model_dump(mode="json")).keys()
    experts = {then.get("parallel.expert"), now["parallel.expert"]}
    reasons = {
        "trainer.steps": ", and the learning rate's schedule ends with it"
        if settings.lr_schedule.name == "cosine"
        else "",
        "parallel.expert": ", and Megatron's optimizer keeps experts that are spread apart" if 1 in experts else "",
        "cluster.device": ", and the names in a checkpoint follow from it",
    }
    if settings.learner.precision == "fp8-tensorwise":
        packs = ", and fp8-tensorwise would train a scored batch in other packs"
        reasons |= dict.fromkeys(["learner.micro_batch_tokens", *(n for n in now if n.startswith("parallel."))], packs)
    return [
        f"{name} was {then.get(name)!r}, is {now.get(name)!r}{reasons.get(name, '')}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name) and (reasons.get(name) or name in fixed)
    ]


def lasting(tree: dict[str, Any]) -> dict[str, Any]:
    """Of all options, by dotted name, those that stay what they are as long as a run lives."""
    return {n: value for n, value in _flat(tree).items() if not {n, n.partition(".")[0]} & RESUME_MAY_CHANGE}


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    sections = {name: values if isinstance(values, dict) else {"": values} for name, values in tree.items()}
    return {f"{s}.{name}" if name else s: value for s, values in sections.items() for name, value in values.items()}
