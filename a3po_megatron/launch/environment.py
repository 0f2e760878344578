"""What a rank's process needs around it. Imports nothing heavy: it runs before everything else."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import A3POError, Interrupted, RequestError, RunFailed
from ..files.replace import write_whole
from ..files.run_folder import rank_file
from ..ranks.handoff import Handoff

if TYPE_CHECKING:
    from ..config import Settings

SETTINGS = {
    "OMP_NUM_THREADS": "1",  # several ranks share the cores of one machine
    "HF_HUB_OFFLINE": "1",  # models and tokenizers are local folders; nothing is fetched while training
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TORCH_GLOO_LAZY_INIT": "1",  # ranks connect when they first talk: each with all others would be world² connections
}
ON_CPU = {
    # torch.compile inside vLLM and Megatron: minutes of compilation, and a C++ compiler, for nothing at these sizes.
    "TORCHDYNAMO_DISABLE": "1",
}
# FlashInfer counts as there where nvcc and ninja are found: what draws, reduces, multiplies must not follow that.
FLASHINFER = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
    "VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER": "0",
}
ON_CUDA = {
    "NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "1",  # model/precision.py
    "VLLM_USE_DEEP_GEMM_E8M0": "0",  # the same in the engine: scales of float32
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron's sequence parallelism orders its kernels by it
    **FLASHINFER,
}
CUDA = 13  # of torch, Transformer Engine and vLLM in constraints/h200.txt
BATCH_INVARIANT = "VLLM_BATCH_INVARIANT"  # read at imports; sets what cuBLAS and NCCL read at theirs
WORDS_BYTES = 1 << 16  # what a pipe takes without a reader


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched() -> bool:
    """Whether a launcher of ours started this rank, made the run folder ready, and listens to last words."""
    return launched_here() or Handoff.of().words_dir is not None


def launched_here() -> bool:
    """Whether that launcher is on this machine."""
    return Handoff.of().words_fd is not None


def since_start() -> float:
    """Seconds since the command that started the ranks."""
    started = Handoff.of().started
    return 0.0 if started is None else max(0.0, time.time() - started)


def adopt_slurm() -> None:
    """Under srun: which rank this task is. Its device is counted among those that it sees.

    What another launcher says comes first only if it runs inside of the task: torchrun, or ours. Else a RANK is that of
    the shell from which srun was called, the same for all tasks.
    """
    within = launched_here() or "TORCHELASTIC_RUN_ID" in os.environ
    if "SLURM_PROCID" not in os.environ or ("RANK" in os.environ and (within or os.environ["SLURM_NTASKS"] == "1")):
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    local = "0" if len(visible) == 1 and visible[0] else os.environ["SLURM_LOCALID"]
    place = {"RANK": os.environ["SLURM_PROCID"], "WORLD_SIZE": os.environ["SLURM_NTASKS"], "LOCAL_RANK": local}
    if place.items() <= os.environ.items():
        return  # adopted before
    os.environ |= place
    node = os.environ.get("SLURMD_NODENAME", "?")
    print(
        f"rank {rank()} of {world()}, local rank {local}, node {node}, devices {','.join(visible) or 'none'}",
        flush=True,
    )


def prepare() -> None:
    """Sets what must be set before torch, Megatron and vLLM are imported; what the user has set stays."""
    adopt_slurm()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # whatever the user has set: the engine lives in this process
    for name, value in variables().items():
        os.environ.setdefault(name, value)


def of_run(settings: Settings) -> dict[str, str]:
    """What else its ranks' environment must hold before anything is imported."""
    return {BATCH_INVARIANT: "1"} if settings.rollout.batch_invariant else {}


def variables(device: str | None = None, container: bool = False) -> dict[str, str]:
    """What a rank's environment needs on this machine; `container`: it has packages of its own."""
    if device == "cpu" or (device is None and not sees_gpu()):
        return SETTINGS | ON_CPU
    site = Path(sysconfig.get_path("purelib"))
    return SETTINGS | ON_CUDA | ({} if container else cuda_settings(site))


def sees_gpu() -> bool:
    """Whether this process would find an NVIDIA GPU, as far as that can be said without importing torch."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1") and Path("/dev/nvidiactl").exists()


def cuda_settings(site: Path, toolkit: Path = Path("/usr/local/cuda")) -> dict[str, str]:
    """Where libraries must look for CUDA's, if `site` holds their packages. Which of them are loaded first:
    compat/cuda.py."""
    if not (site / "nvidia" / "cudnn").is_dir():
        return {}
    packaged = site / "nvidia" / "cu13"
    # vLLM takes DeepGEMM for FP8 as soon as it is installed, and DeepGEMM ends the run where it finds no toolkit.
    home = {"CUDA_HOME": str(packaged)} if (packaged / "bin/nvcc").exists() and release(toolkit) != CUDA else {}
    return {
        **home,
        # TE 2.11 loads a cuDNN of CUDNN_HOME, CUDA_HOME or the system before the one that torch was built with, and two
        # in one process fail with CUDNN_STATUS_SUBLIBRARY_LOADING_FAILED (transformer_engine/common/__init__.py).
        "CUDNN_HOME": str(site / "nvidia" / "cudnn"),
        # Where TE's kernels that are compiled at run time find CUDA's headers: it knows only the packages of CUDA 12.
        "NVTE_CUDA_INCLUDE_DIR": str(site / "nvidia" / "cu13" / "include"),
    }


def release(toolkit: Path) -> int | None:
    """The major version of the CUDA toolkit in a folder; None: there is none that says."""
    try:
        return int(json.loads((toolkit / "version.json").read_text())["cuda"]["version"].split(".")[0])
    except (OSError, ValueError, KeyError, TypeError):
        return None


_LIBC = ctypes.CDLL(None)  # loaded here, because `die_with_parent` runs between fork and exec


def die_with_parent() -> None:
    """The kernel kills this process when its parent ends (Linux), so that no rank outlives its launcher.

    Meant as a subprocess's `preexec_fn`: set any later, it would miss a launcher that dies while the rank imports.
    """
    if sys.platform == "linux":
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def report_failures(folder: Path, main: Callable[[Path], None]) -> None:
    """Runs a rank's main program, and tells the launcher what it failed of.

    The process ends with os._exit: a failed rank must not wait for collectives or engine threads in interpreter
    shutdown, while others wait for it.
    """
    code = 0
    try:
        main(folder)
    except A3POError as error:
        kinds = {RequestError: "request", Interrupted: "interrupted"}
        kind = next((name for each, name in kinds.items() if isinstance(error, each)), "run")
        code = CODES[last_words(kind, str(error))]
        traceback.print_exc()
    except BaseException as error:  # the rank's last words, whatever it died of
        code = CODES[last_words("crash", f"{type(error).__name__}: {error}")]
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):  # the log's disk may be full: that must not be what the rank ends with
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


CODES = {  # what a rank may end of
    "request": RequestError.exit_code,
    "run": RunFailed.exit_code,
    "crash": RunFailed.exit_code,
    "interrupted": Interrupted.exit_code,
}
_SPEAKING = threading.Lock()  # the watchdog's thread speaks too
_said: list[str] = []


def last_words(kind: str, message: str) -> str:
    """Hands the launcher what this rank ends with: through a pipe, since a disk may be full; from another node, which
    no pipe reaches, in a file.

    Only the first words count, whose kind is returned: of ranks that leave because the run stands still, one is the
    first to be gone, and then what the others wait for fails.
    """
    with _SPEAKING:
        if not _said:
            _said.append(kind)
            try:
                _hand_over(json.dumps({"kind": kind, "message": message[: WORDS_BYTES // 8]}) + "\n")
            except OSError as error:
                with contextlib.suppress(OSError):
                    print(f"no last words: {error}", file=sys.stderr, flush=True)
        return _said[0]


def _hand_over(words: str) -> None:
    told = Handoff.of()
    if told.words_fd is not None:
        os.write(told.words_fd, words.encode())
    elif told.words_dir is not None:
        write_whole(rank_file(told.words_dir, rank(), "words"), words)
