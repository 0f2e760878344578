"""For all tests: Ctrl-C arrives in what they start, also where a shell runs pytest in the background and ignores it.
Files that take long come first, so that of two processes none is left with one of them at the end."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

signal.signal(signal.SIGINT, signal.default_int_handler)

LONG = (
    *("test_launch", "test_evaluate", "test_learner", "test_circle", "test_code", "test_te", "test_readback"),
    *("test_bringup", "test_convert_damage", "test_resume", "test_alerts_runs", "test_replay", "test_transfer"),
    *("test_reload", "test_convert_hostile", "test_sandbox", "test_switches", "test_convert", "test_start_signals"),
    *("test_resume_faults", "test_process", "test_worlds", "test_report", "test_checkpoint", "test_static"),
    *("test_doctor_gpu", "test_fused_head", "test_engine_config", "test_files", "test_profile", "test_arena"),
    *("test_regulariser", "test_mixed_run", "test_reward_field", "test_layout", "test_cluster", "test_config"),
    *("test_families", "test_objectives", "test_rows_triton", "test_imports", "test_balance", "test_judge"),
)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """To collect all files takes 15 s, and tests that have the machine to themselves stand in a few."""
    if not config.option.markexpr.startswith("alone ") or not collection_path.name.startswith("test_"):
        return None
    return True if "mark.alone" not in collection_path.read_text() else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))
