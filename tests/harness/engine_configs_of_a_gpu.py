"""In a process of its own: what vLLM makes of our arguments on a GPU, as JSON: case → its fields.

vLLM's `create_engine_config` is real; the platform is vLLM's own for CUDA, with the answers of an H200 node put in as
there is none here, and two C extensions are empty, which the configuration only looks for.

    python -m tests.harness.engine_configs_of_a_gpu
"""

from __future__ import annotations

import os
import sys
import types

from a3po_megatron.launch import environment

for name, value in (environment.SETTINGS | environment.ON_CUDA).items():
    os.environ.setdefault(name, value)
os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
for name in ("vllm._C_stable_libtorch", "vllm._moe_C_stable_libtorch"):
    sys.modules[name] = types.ModuleType(name)

import json  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from typing import Any  # noqa: E402
from unittest import mock  # noqa: E402

import torch  # noqa: E402
import vllm.platforms  # noqa: E402
from vllm.platforms import cuda  # noqa: E402
from vllm.platforms.interface import DeviceCapability  # noqa: E402


class H200(cuda.NonNvmlCudaPlatform):  # type: ignore[misc]
    """vLLM's platform for CUDA, told that it is on a node of eight H200."""

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> Any:
        return DeviceCapability(9, 0)

    @classmethod
    def has_device_capability(cls, capability: Any, device_id: int = 0) -> bool:
        return (capability if isinstance(capability, int) else 10 * capability[0] + capability[1]) <= 90

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return "NVIDIA H200"

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        return 141 << 30

    @classmethod
    def device_count(cls) -> int:
        return 8

    @classmethod
    def is_cumem_allocator_available(cls) -> bool:
        return True


vllm.platforms._current_platform = H200()  # before anything else of vLLM asks for it

import vllm.config.vllm  # noqa: E402

vllm.config.vllm.HAS_TRITON = True
for name in ("vllm.vllm_flash_attn", "vllm.vllm_flash_attn.flash_attn_interface"):
    sys.modules[name] = mock.MagicMock(__spec__=None)
ops = torch.library.Library("_C", "FRAGMENT")
for name in ("cutlass_scaled_mm_supports_block_fp8", "cutlass_scaled_mm_supports_fp8"):
    ops.define(f"{name}(int capability) -> bool")
    ops.impl(name, lambda capability: True, "CompositeExplicitAutograd")

from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.utils import flashinfer  # noqa: E402

from a3po_megatron.config import RolloutOptions  # noqa: E402
from a3po_megatron.ranks.backend import CUDA  # noqa: E402
from a3po_megatron.rollout.vllm_engine import engine_arguments  # noqa: E402
from tools.bringup.rank import MOE, TINY, make_model  # noqa: E402

FP8 = {"quantization": "fp8_per_block", "bf16_layers": (1, 1)}


def cases() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name, sizes of the model, rollout options: every set of arguments that we can produce."""
    for tensor in (1, 2):
        yield f"dense, tensor {tensor}", TINY, {"tensor": tensor}
        yield f"fp8, tensor {tensor}", TINY, {"tensor": tensor, **FP8}
        yield f"experts, tensor {tensor}", MOE, {"tensor": tensor}
    yield "dense, tensor 4", TINY | {"num_key_value_heads": 4}, {"tensor": 4}
    yield "experts, expert 2", MOE, {"tensor": 2, "expert": 2}
    yield "experts, replay", MOE, {"routing_replay": True}
    yield "dense, batch-invariant", TINY, {"batch_invariant": True}


def fields(folder: Any, layers: int, rollout: dict[str, Any], visible: int) -> dict[str, Any]:
    options = RolloutOptions(max_prompt_tokens=128, max_tokens=64, **rollout)
    with mock.patch.object(torch.cuda, "device_count", return_value=visible):
        arguments = engine_arguments(folder, options, torch.bfloat16, CUDA, layers)
        config = EngineArgs(**arguments).create_engine_config()
    return {
        "runner": "V2" if config.use_v2_model_runner else "V1",
        "overlapping steps": config.scheduler_config.async_scheduling and config.max_concurrent_batches,
        "graphs": config.compilation_config.cudagraph_mode.name,
        "fused all-reduce": config.compilation_config.pass_config.fuse_allreduce_rms,
        "own all-reduce": not config.parallel_config.disable_custom_all_reduce,
        "autotune": config.kernel_config.enable_flashinfer_autotune,
        "experts": config.kernel_config.moe_backend,
        "expert parallel": config.parallel_config.enable_expert_parallel,
        "sleep": config.model_config.enable_sleep_mode,
        "quantization": config.model_config.quantization,
        "head": str(config.model_config.head_dtype),
        "prefix cache": config.cache_config.enable_prefix_caching,
        "routes": config.aux_output_config.enable_return_routed_experts,
    }


def main() -> dict[str, Any]:
    """Every case where nvcc and ninja are found, so that FlashInfer counts as there, and where they are not."""
    models: dict[str, Any] = {}
    found = {}
    for name, sizes, rollout in cases():
        folder = models.setdefault(json.dumps(sizes), make_model(sizes))
        around = {"VLLM_BATCH_INVARIANT": "1"} if rollout.get("batch_invariant") else {}
        for visible in (1, 8) if rollout.get("tensor", 1) > 1 else (8,):
            for toolkit in ("without", "with"):
                there = mock.Mock(return_value=toolkit == "with")
                with mock.patch.dict(os.environ, around), mock.patch.object(flashinfer, "has_flashinfer", there):
                    case = f"{name}, {visible} visible, {toolkit} nvcc"
                    found[case] = fields(folder, sizes["num_hidden_layers"], rollout, visible)
    return found


if __name__ == "__main__":
    print(json.dumps(main()), flush=True)
    os._exit(0)
