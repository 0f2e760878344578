"""What `a3po doctor` says of programs: not installed is told from not configured, and from ready."""

from __future__ import annotations

from pathlib import Path

import pytest

from a3po_megatron.launch.doctor import tools
from a3po_megatron.reward.sandbox import choose
from a3po_megatron.reward.sandbox.interpreter import interpreter


@pytest.fixture
def bin_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder in PATH, with nothing in it."""
    interpreter()  # found by sys.executable, once
    monkeypatch.setattr(tools, "why_not", choose.why_not.__wrapped__)  # asked anew
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(tools, "installed", lambda name: None)
    monkeypatch.setattr(tools.sys, "executable", str(tmp_path / "nowhere/bin/python"))
    monkeypatch.setattr(tools.importlib.util, "find_spec", lambda name: None)
    return tmp_path


def program(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_what_is_not_there_is_not_installed(bin_folder: Path) -> None:
    found = dict(tools.rows())
    assert found["GPU"].startswith("none: the CPU path")
    for name in ("Slurm", "Ray", "ninja"):
        assert found[name].startswith("not installed"), name
    assert "bubblewrap (bwrap) is not installed" in found["sandbox"]


SLURM = 'if [ "$1" = --version ]; then echo slurm-wlm 22.05.8; exit; fi'
NO_SOURCE = "echo sinfo: error: x >&2; echo sinfo: fatal: no source >&2; exit 1"
NO_ANSWER = "slurm-wlm 22.05.8, but its controller gives no answer: no contact"


@pytest.mark.parametrize(
    ("name", "script", "says"),
    [
        ("sinfo", NO_SOURCE, "installed, but not configured on this machine: sinfo: fatal: no source"),
        ("sinfo", f"{SLURM}\necho no contact >&2; exit 1", NO_ANSWER),
        ("sinfo", f"{SLURM}\necho 'batch*'; echo h200", "slurm-wlm 22.05.8; partitions: batch, h200"),
        ("sinfo", SLURM, "slurm-wlm 22.05.8; partitions: none that you may use"),
        ("ninja", "echo 1.11.1", "1.11.1"),
        ("nvidia-smi", "echo no NVML; exit 9", "nvidia-smi is installed, but finds no driver or no GPU"),
    ],
)
def test_a_program_that_is_there_is_told_from_one_that_works(
    bin_folder: Path, name: str, script: str, says: str
) -> None:
    program(bin_folder, name, script)
    row = {"sinfo": "Slurm", "ninja": "ninja", "nvidia-smi": "GPU"}[name]
    assert dict(tools.rows())[row] == says


def test_which_sandboxes_hold_is_tried(bin_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(bin_folder, "bwrap", "echo No permissions >&2; exit 1")
    assert "bubblewrap does not hold: the sandbox did not start: No permissions" in tools.sandbox()
    monkeypatch.setattr(tools, "why_not", lambda kind: "")
    assert tools.sandbox() == "bubblewrap and landlock hold"
    monkeypatch.setattr(tools, "why_not", lambda kind: "Linux 5.4" if kind == "landlock" else "")
    assert tools.sandbox() == "bubblewrap holds; landlock does not hold: Linux 5.4"
    monkeypatch.setattr(tools, "why_not", lambda kind: "not here")
    assert tools.sandbox().startswith("none for programs of models (maths needs none): bubblewrap does not hold")


def test_ray_and_ninja_as_packages_are_told_from_what_they_need_besides(
    bin_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools, "installed", lambda name: "2.60.0")
    assert tools.ray().startswith("2.60.0; no cluster is named (RAY_ADDRESS)")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert tools.ray() == "2.60.0; RAY_ADDRESS names a cluster: 10.0.0.1:6379"
    monkeypatch.setattr(tools.importlib.util, "find_spec", lambda name: object())
    assert tools.ninja().startswith("installed as a package, but not in PATH")
