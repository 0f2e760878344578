"""What `a3po doctor` asks of libraries and of the driver, step by step, in a process of its own
(probe.run_child).

Each step says that it begins and what it found; one that raises is a finding, one that does not come back is known by
name. A step imports what it needs itself: where a package is missing the others still answer.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MARK = "a3po-doctor "  # before a step's lines, among whatever libraries print


def compiler(variables: Mapping[str, str]) -> str | None:
    """What Triton would compile with (triton/runtime/build.py)."""
    if (program := variables.get("CC")) is not None:
        return shutil.which(program, path=variables.get("PATH"))
    return next((path for name in ("gcc", "clang") if (path := shutil.which(name, path=variables.get("PATH")))), None)


def nvcc(variables: Mapping[str, str]) -> str | None:
    """The compiler that FlashInfer and DeepGEMM would run (vllm/utils/flashinfer.py, _flashinfer_nvcc_path)."""
    home = variables.get("CUDA_HOME") or variables.get("CUDA_PATH")
    if not home:
        on_path = shutil.which("nvcc", path=variables.get("PATH"))
        home = str(Path(on_path).parents[1]) if on_path else "/usr/local/cuda"
    return shutil.which(f"{home}/bin/nvcc")


def _child_torch() -> dict[str, Any]:
    import torch

    return {"version": torch.__version__}


def _child_device() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        torch.cuda.init()  # raises what is wrong
    return {"count": torch.cuda.device_count(), "sum": float(torch.ones(8, device="cuda").sum())}


def _child_nccl() -> dict[str, Any]:
    import torch

    return {"version": ".".join(map(str, torch.cuda.nccl.version()))}


def _child_peers() -> dict[str, Any]:
    import torch

    pairs = itertools.combinations(range(torch.cuda.device_count()), 2)
    able = torch.cuda.can_device_access_peer
    return {"without": [pair for pair in pairs if not (able(*pair) and able(*reversed(pair)))]}


def _child_engine() -> dict[str, Any]:
    from ...compat import cuda

    cuda.preload(Path(sysconfig.get_path("purelib")))  # as ranks do
    import transformer_engine.pytorch  # noqa: F401

    return {}


def _child_cudnn() -> dict[str, Any]:
    from transformer_engine.pytorch.utils import get_cudnn_version

    maps = Path("/proc/self/maps")
    paths = re.findall(r"(/\S*/libcudnn\.so\S*)", maps.read_text()) if maps.exists() else []
    return {"version": ".".join(map(str, get_cudnn_version())), "paths": sorted(set(paths))}


def _child_fp8() -> dict[str, Any]:
    from transformer_engine.pytorch.quantization import check_fp8_block_scaling_support

    able, reason = check_fp8_block_scaling_support()
    return {"blockwise": "" if able else reason}


def _child_triton() -> dict[str, Any]:
    """Compiles the loss's kernels and runs them on two logits: log-prob and entropy of an even chance."""
    import torch

    from ...learner.vocab_parallel import logprob_and_entropy

    target = torch.zeros(1, dtype=torch.int64, device="cuda")
    outputs = logprob_and_entropy(torch.zeros(1, 2, device="cuda"), target, None)
    return {"found": [float(each) for each in outputs if each is not None]}


def _child_tools() -> dict[str, Any]:
    """Where FlashInfer and DeepGEMM, which compile when they run, would find what they compile with."""
    return {"nvcc": nvcc(os.environ), "ninja": shutil.which("ninja"), "cc": compiler(os.environ)}


def _child_flashinfer() -> dict[str, Any]:
    """What vLLM will decide by: the package, and its compiled kernels or nvcc and ninja (vllm/utils/flashinfer.py)."""
    from vllm.utils.flashinfer import has_flashinfer

    return {"there": bool(has_flashinfer())}


def _child_deep_gemm() -> dict[str, Any]:
    """Imports what vLLM would (vllm/utils/deep_gemm.py, _import_deep_gemm): there a failure is only a warning, and the
    kernel stays chosen."""
    from importlib import import_module

    from vllm.utils.import_utils import has_deep_gemm

    if not has_deep_gemm():
        return {"there": False}
    try:
        import_module("deep_gemm")
    except ImportError:
        import_module("vllm.third_party.deep_gemm")
    return {"there": True}


STEPS: tuple[tuple[str, Callable[[], dict[str, Any]]], ...] = (
    ("torch", _child_torch),
    ("nccl", _child_nccl),
    ("engine", _child_engine),  # before the device: it can be imported without one
    ("cudnn", _child_cudnn),
    ("device", _child_device),
    ("triton", _child_triton),
    ("peers", _child_peers),
    ("fp8", _child_fp8),
    ("tools", _child_tools),
    ("flashinfer", _child_flashinfer),
    ("deep_gemm", _child_deep_gemm),
)


def _child() -> None:
    for name, step in STEPS:
        print(MARK + json.dumps([name, None]), flush=True)
        try:
            facts = step()
        except Exception as error:
            facts = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        print(MARK + json.dumps([name, facts]), flush=True)


if __name__ == "__main__":
    _child()
