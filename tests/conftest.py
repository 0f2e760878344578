"""For all tests: Ctrl-C arrives in what they start, also where a shell runs pytest in the background and ignores it.
Files that take long come first, so that of two processes none is left with one of them at the end."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

signal.signal(signal.SIGINT, signal.default_int_handler)

LONG = (
    *("test_circle", "test_learner", "test_resume", "test_evaluate", "test_readback", "test_replay", "test_launch"),
    *("test_te", "test_convert", "test_alerts_runs", "test_code", "test_convert_damage", "test_reload"),
    *("test_bringup", "test_start_signals", "test_process", "test_convert_hostile", "test_sandbox", "test_transfer"),
    *("test_arena", "test_config", "test_checkpoint", "test_mixed_run", "test_resume_faults", "test_regulariser"),
    *("test_families", "test_engine_config", "test_requests", "test_doctor_gpu", "test_judge"),
)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """To collect all files takes 15 s, and tests that have the machine to themselves stand in a few."""
    if not config.option.markexpr.startswith("alone ") or not collection_path.name.startswith("test_"):
        return None
    return True if "mark.alone" not in collection_path.read_text() else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))
