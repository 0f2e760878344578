"""Everything that differs between a CPU and CUDA, in one record (docs/backends.md). Imports no torch by itself."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..errors import RequestError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Backend:
    """What a kind of device asks for."""

    device: Literal["cpu", "cuda"]  # of weights, gradients and micro-batches; a batch itself stays on the host
    collectives: str  # of torch.distributed; objects and small host tensors always go over gloo
    spec: Literal["local", "te"]  # naming scheme and modules of the Megatron model
    dtypes: tuple[str, ...]  # of model.dtype that its attention takes
    fp8: bool  # whether learner.precision and rollout.quantization may ask for it
    receipt_strength: (
        str  # what a publish can prove: `engine` reads the engine's tensors back, `stream` what it was fed
    )
    offload: Literal["none", "optimizer", "all"]  # of the learner, while the engine samples (residency.py)
    sleeps: bool  # the engine gives device memory back while the learner trains
    packs_head: bool  # a tied output layer is a copy in the engine, which must be sent as a tensor of its own
    head_dims: tuple[int, ...] | None  # that its engine's attention takes; None: all
    experts_multiple: int  # of which the hidden size must be one, for the engine's experts
    returns_routes: bool  # whether its vLLM can say which experts it chose: that takes Model Runner V2, and so Triton
    engine_args: dict[str, Any] = field(default_factory=dict)  # vLLM arguments that the device demands

    def local(self) -> torch.device:
        """This rank's device."""
        import torch

        return torch.device("cpu") if self.device == "cpu" else torch.device("cuda", int(os.environ["LOCAL_RANK"]))

    def visible(self) -> int:
        """Devices that this process sees; 0 on a CPU."""
        import torch

        return 0 if self.device == "cpu" else torch.cuda.device_count()

    def used_bytes(self) -> int:
        """Memory in use now: of this process on a CPU, of the whole device on CUDA (vLLM's pools are not torch's)."""
        if self.device == "cpu":
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        import torch

        free, total = torch.cuda.mem_get_info()
        return total - free


CPU = Backend(
    device="cpu",
    collectives="gloo",
    spec="local",
    dtypes=("float32", "bfloat16"),
    fp8=False,
    # vLLM's CPU backend packs linear weights into an opaque layout when it loads them: they cannot be read back.
    receipt_strength="stream",
    offload="none",
    sleeps=False,
    packs_head=True,
    head_dims=(32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512),  # vllm 0.32.0, v1/attention/backends/cpu_attn.py
    experts_multiple=32,  # vllm 0.32.0, model_executor/layers/fused_moe/experts/cpu_moe.py
    returns_routes=False,  # Triton has no CPU backend
    engine_args={
        "enforce_eager": True,
        # A seeded request whose prompt is split over steps dies with "CPU Generator does not use offset".
        "enable_chunked_prefill": False,
    },
)
CUDA = Backend(
    device="cuda",
    collectives="cpu:gloo,cuda:nccl",
    spec="te",
    dtypes=("bfloat16",),  # cuDNN's attention over packed sequences takes no float32
    fp8=True,
    receipt_strength="engine",
    offload="optimizer",
    sleeps=True,
    packs_head=False,
    head_dims=None,
    experts_multiple=1,
    returns_routes=True,
    engine_args={
        "enable_sleep_mode": True,
        "async_scheduling": True,
        # Logits, and so sampling and log-probs, in float32 like the learner's: rounded to bf16 they are off by up to
        # 0.06 where they are larger than 16. vLLM multiplies bf16 and sums in float32 (layers/logits_processor.py).
        "hf_overrides": {"head_dtype": "float32"},
        # Else both are on where nvcc and ninja are found in PATH, and off elsewhere: other kernels on another node,
        # minutes of compilation, and engines that warm up side by side have hung in it (vllm issue 45917).
        "compilation_config": {"pass_config": {"fuse_allreduce_rms": False}},
        "enable_flashinfer_autotune": False,
        # The experts' kernels that keep their weights in the order in which they are read back and reloaded.
        "moe_backend": "triton",
        # Memory is asked for in bytes (rollout.kv_cache_bytes). vLLM still refuses to start where less than this share
        # of the device is free, whatever it needs.
        "gpu_memory_utilization": 0.1,
    },
)


def backend_of(device: str) -> Backend:
    return CUDA if device == "cuda" else CPU


def select_backend(wanted: str | None) -> Backend:
    """The record for this machine. Raises RequestError where it is not what was asked for: a run on GPUs must not go on
    without them."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted not in (None, device):
        remedy = (
            "torch finds none: see a3po doctor"
            if wanted == "cuda"
            else "torch finds a GPU: set CUDA_VISIBLE_DEVICES= (empty)"
        )
        raise RequestError(f"cluster.device is {wanted}, but {remedy}")
    return backend_of(device)
