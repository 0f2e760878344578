"""Which objective a section of options means: a line each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...config import (
    CispoOptions,
    ClippedOptions,
    Correction,
    GmpoOptions,
    GspoOptions,
    GspoTokenOptions,
    LuspoOptions,
    ReinforceOptions,
    SapoOptions,
    VespoOptions,
)
from ...config.section import Section
from ..token_loss import Objective, known
from .cispo import Cispo
from .clipped import Clipped
from .gmpo import Gmpo
from .gspo import Gspo
from .gspo_token import GspoToken
from .luspo import Luspo
from .reinforce import Reinforce
from .sapo import Sapo
from .vespo import Vespo

OBJECTIVES: dict[type[Section], Callable[[Any, Correction], Objective]] = {
    ClippedOptions: Clipped,
    GspoOptions: Gspo,
    GspoTokenOptions: GspoToken,
    LuspoOptions: Luspo,
    GmpoOptions: Gmpo,
    CispoOptions: Cispo,
    SapoOptions: Sapo,
    VespoOptions: Vespo,
    ReinforceOptions: Reinforce,
}


def objective_of(options: Section, correction: Correction) -> Objective:
    """Returns the objective of resolved options. Raises KeyError where it reports a metric that is not in the
    catalogue."""
    return known(OBJECTIVES[type(options)](options, correction))
