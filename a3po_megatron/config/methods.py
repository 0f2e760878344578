"""Methods by name: each sets the options that make it what it is, and what stands in a configuration goes first.

    method: gspo            objective.name gspo, no shaping, all groups
    objective: {name: …}    beside it: another objective in that method

What is no part of a method stays as it is by default, such as the correction for the sampler. Sources and formulas:
docs/objectives.md.
"""

from __future__ import annotations

from typing import Any

_PLAIN = {"shaping.name": "none"}
_ALL_GROUPS = {**_PLAIN, "rollout.dynamic_sampling": False}
# PPO's clip, as in the papers of those that do not say another one.
_PPO = {**_ALL_GROUPS, "objective.clip_low": 0.2, "objective.clip_high": 0.2, "objective.dual_clip": 0.0}

METHODS: dict[str, dict[str, Any]] = {
    "a3po": {},
    "dapo": _PLAIN,
    "grpo": {**_PPO, "objective.normaliser": "sequences"},
    "dr_grpo": {**_PPO, "objective.normaliser": "constant", "advantage.normalise_std": False},
    "gspo": {**_ALL_GROUPS, "objective.name": "gspo"},
    "cispo": {**_PLAIN, "objective.name": "cispo"},
    "sapo": {**_ALL_GROUPS, "objective.name": "sapo"},
    "gmpo": {**_ALL_GROUPS, "objective.name": "gmpo"},
    "luspo": {**_ALL_GROUPS, "objective.name": "luspo"},
    "vespo": {**_ALL_GROUPS, "objective.name": "vespo", "correction.name": "none"},
    "fork_tokens": {"shaping.name": "fork_tokens"},
    # The clip of the authors' runs, which hardly ever binds.
    "lp_reg": {
        **_ALL_GROUPS,
        "shaping.name": "lp_reg",
        "objective.clip_low": 1.0,
        "objective.clip_high": 9.0,
        "objective.dual_clip": 0.0,
    },
    "rloo": {**_PPO, "advantage.name": "leave_one_out"},
    "maxrl": {**_PPO, "advantage.name": "max_rl"},
    "psr": {**_PPO, "advantage.name": "signed", "advantage.negative_scale": 0.0},
    "nsr": {**_PPO, "advantage.name": "signed", "advantage.positive_scale": 0.0},
    "w_reinforce": {**_PPO, "advantage.name": "signed", "advantage.positive_scale": 0.1},
}
