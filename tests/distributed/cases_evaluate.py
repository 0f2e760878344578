"""Evaluations in ranks that stay, in a folder that was made ready (tests/test_evaluate.py)."""

from __future__ import annotations

import os
from pathlib import Path

from a3po_megatron.config import load_resolved
from a3po_megatron.errors import Interrupted
from a3po_megatron.files.run_folder import RunFolder
from a3po_megatron.parts import build_serving
from a3po_megatron.run.stop import Interrupt
from a3po_megatron.serve import serve
from tests.distributed.cases_runs import graders_that_stay
from tests.harness.ranks import CaseRanks

FOLDER, STEPS = "A3PO_TEST_EVALUATION", "A3PO_TEST_STEPS"


class AfterSteps(Interrupt):
    """A signal comes after so many looks for one, of which there is one an engine step."""

    def __init__(self, steps: int) -> None:
        self.left = steps
        super().__init__()

    @property
    def signal(self) -> str | None:  # type: ignore[override]
        self.left -= 1
        return "SIGUSR1" if self.left < 0 else None

    @signal.setter
    def signal(self, value: str | None) -> None:
        pass


def evaluates(ranks: CaseRanks) -> str:
    """What a rank does after it has been connected; what it was interrupted with, if it was."""
    folder = Path(os.environ[FOLDER])
    settings = load_resolved(RunFolder(folder).config)
    interrupt = AfterSteps(int(os.environ[STEPS])) if STEPS in os.environ else Interrupt()
    made = ranks.arrange(**settings.parallel.model_dump(), engine_ranks=settings.rollout.tensor)
    try:
        serve(build_serving(folder, settings, made, graders_that_stay(settings), interrupt=interrupt))
    except Interrupted as error:
        return str(error)
    return ""
