"""Experiments of tools/bringup that need Megatron, in one rank that is there already (tests/harness/worlds.py).

A process of an experiment's own would import for ten seconds what it needs for two; how the runner starts and ends one,
tests/test_bringup.py shows of others.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from tests.harness import bringup_experiments
from tests.harness.ranks import Case, CaseRanks
from tools.bringup import rank
from tools.bringup.experiments import EXPERIMENTS
from tools.bringup.report import Report, summary
from tools.bringup.runner import _load

STAND_IN = ("fp8_on_stand_in", "traps_on_stand_in", "alignment_on_stand_in")
ORACLE = ("oracle_on_stand_in",)
ENGINE = ("engine_cycles_on_cpu", "mismatch_on_cpu")
LEARNER = ("learner_leaves_on_cpu",)


def _case(name: str) -> Case:
    def case(ranks: CaseRanks) -> dict[str, Any]:
        """What the experiment's report comes to."""
        rank._connected[:] = [dist.PrefixStore(name, ranks.store)]  # so it does not connect this process again
        report = Report()
        getattr(bringup_experiments, name)(report)
        return summary(report.lines)

    case.__qualname__ = case.__name__ = name
    return case


globals().update({name: _case(name) for name in (*STAND_IN, *ORACLE, *ENGINE, *LEARNER)})


def not_there(ranks: CaseRanks) -> list[str]:
    """Experiments whose function cannot be imported, or called."""
    return [each.id for each in EXPERIMENTS if not callable(_load(each.function))]
