"""Options that had another name, or another word for off, in an earlier version."""

from __future__ import annotations

RENAMED = {
    "optimizer.schedule": "lr_schedule.name",
    "optimizer.warmup_steps": "lr_schedule.warmup_steps",
    "optimizer.min_lr": "lr_schedule.min_lr",
    "correction.tis_cap": "correction.cap, and null, which was off, is correction.name: none",
    "reward.pool": "grader_pool.name",
    "reward.ray_address": "grader_pool.address",
    "reward.workers": "grader_pool.workers",
    "reward.timeout_seconds": "grader_pool.timeout_seconds",
    "reward.memory_bytes": "grader_pool.memory_bytes",
    "rollout.max_rounds": "rollout.max_batches",
}
# `null` is the default now; what it was, where that was something else.
NULL_WAS = {"objective.dual_clip": "off, which is 0 now"}
