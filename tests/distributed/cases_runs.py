"""A whole run in ranks that stay, in a folder that was made ready (tests/harness/interrupted_runs.py)."""

from __future__ import annotations

import json
import os
from pathlib import Path

from a3po_megatron.config import Settings, load_resolved
from a3po_megatron.files.run_folder import RunFolder
from a3po_megatron.parts import build
from a3po_megatron.reward.beside import Beside
from a3po_megatron.reward.graders import graders_of
from a3po_megatron.run.stop import Interrupt
from a3po_megatron.train import train
from tests.harness.interrupting.draws import install_draws
from tests.harness.interrupting.sitecustomize import install
from tests.harness.ranks import CaseRanks

FOLDER, POINT = "A3PO_TEST_RUN", "A3PO_TEST_INTERRUPT"
_graders: dict[str, Beside] = {}


def graders_that_stay(settings: Settings) -> Beside:
    """Those of the run before in this rank, where they are the same: their processes hold nothing between two
    responses, and take a second to start."""
    asked = settings.model_dump_json(include={"reward", "grader_pool", "sandbox"})
    for other in _graders.keys() - {asked}:
        _graders.pop(other).__exit__(None, None, None)
    if asked not in _graders:
        _graders[asked] = graders_of(settings.reward, settings.grader_pool, settings.sandbox).__enter__()
    return _graders[asked]


def trains(ranks: CaseRanks) -> None:
    """As rank.py does, from the groups on. Where a point is given, a signal hits a rank there: it kills it, or is heard
    as in any rank, and these end with it."""
    folder = Path(os.environ[FOLDER])
    settings = load_resolved(RunFolder(folder).config)
    draws = os.environ.get("A3PO_TEST_DRAWS", "1") == "1"  # as interrupted_runs.environment has it
    take_out = install_draws() if draws else lambda: None
    interrupt, point = Interrupt(), json.loads(os.environ.get(POINT, "{}"))
    if point and point["signal"] != "SIGKILL":
        interrupt.install()
    if point and point["rank"] == ranks.rank:
        install(point)
    try:
        layout = settings.parallel.model_dump()
        made = ranks.arrange(**layout, engine_ranks=settings.rollout.tensor, seed=settings.trainer.seed)
        train(build(folder, settings, made, graders_that_stay(settings), interrupt=interrupt))
    finally:
        take_out()
