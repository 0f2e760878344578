"""What the planner says that a rank holds all the time is what it holds, to the byte; and of every model, all of it."""

from __future__ import annotations

import pytest

from tests.distributed import cases_static as cases
from tests.harness.ranks import run_ranks
from tests.harness.tiny_models import make_checkpoint


@pytest.mark.parametrize("world", cases.LAYOUTS)
def test_weights_gradients_and_optimizer_of_real_ranks_are_as_planned_to_the_byte(
    world: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("static")
    for kind in ("qwen3", "qwen2", "qwen3_moe"):
        make_checkpoint(folder / kind, kind)
    make_checkpoint(folder / "qwen3_deep", "qwen3", num_hidden_layers=5)
    for by_layout in run_ranks(world, cases.measured, folder=folder)["measured"]:
        assert len(by_layout) == len(cases.LAYOUTS[world]) * 6
        for layout, (holds, planned) in by_layout.items():
            assert holds == planned, layout
