"""vLLM 0.32.0 inside the learner's process: its process-wide side effects are undone, its silent traps closed.

| what | symptom without it | cause |
|---|---|---|
| `process_state_kept` | the learner's random stream restarts, its thread count changes and `torch.set_num_threads` is a no-op; its collectives no longer end with an error, its kernels compile in one thread | building an engine seeds python, numpy, torch and CUDA, sets and replaces the thread setting on a CPU, takes `NCCL_ASYNC_ERROR_HANDLING` out of the environment and sets `TORCHINDUCTOR_COMPILE_THREADS` |
| `keep_process_group` | after an engine is freed every collective of the learner fails: no process group | the engine core destroys torch's default process group, although it was given it |
| `name_shared_memory` | the second run on a machine with `rollout.tensor` > 1 dies with `create shm in SHMManager failed. errno: 17` | the CPU communicator's segments have the same name in every run and are left behind |
| `ask_for_tiles` | a bf16 engine on a CPU with AMX dies in its first step: illegal instruction | the CPU attention runs tile instructions, whose state Linux gives only to processes that asked for it; oneDNN asks at its first use, which may come later |
| `map_experts` | `rollout.expert` > 1 on a CPU: segmentation fault in `cpu_fused_moe` | the CPU experts hand global expert numbers to a kernel that has the local experts only (`expert_map` is ignored) |
| `drop_expert_kernels` | after a reload a mixture of experts still uses the experts it had, silently | the CPU backend packs experts into a kernel object once and does not make it anew |
| `drop_requests` | after an exception between two engine steps the next call never returns | its requests stay in the scheduler |
| | with routing replay the canary after the first rollout dies: `auxiliary output generation changed with output in flight` | with async scheduling step N + 1 is scheduled before the output of N is read; when the last response of N ends on a stop token, nothing is unfinished and N + 1 stays in the queue (v1/engine/core.py), over sleep and the reset of the prefix cache |
"""  # noqa: E501

from __future__ import annotations

import contextlib
import glob
import inspect
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

_VARIABLES = ("NCCL_ASYNC_ERROR_HANDLING", "TORCHINDUCTOR_COMPILE_THREADS")


@contextlib.contextmanager
def process_state_kept() -> Iterator[None]:
    """Restores random states, thread count, `torch.set_num_threads` and the environment's variables after the block."""
    variables = {name: os.environ.get(name) for name in _VARIABLES}
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    precision = torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads  # first: the engine's own does nothing
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if devices:
            torch.cuda.set_rng_state_all(devices)
        for name, value in variables.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def keep_process_group() -> None:
    """An engine that ends leaves torch.distributed as it found it: the groups are the trainer's."""
    from vllm.v1.engine import core

    core.cleanup_dist_env_and_memory = lambda shutdown_ray=False: None


def name_shared_memory(started: float | None) -> None:
    """Gives the segments of an engine over several ranks this run's name, which is where its ranks meet and when they
    were started, and unlinks them once all ranks hold them."""
    try:
        from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed
    except ImportError:  # vLLM for CUDA has no CPU communicator
        return
    if hasattr(_CPUSHMDistributed, "theirs"):
        return
    name, init = _CPUSHMDistributed.make_group_name, _CPUSHMDistributed._init_cpu_shm

    def make_group_name(communicator: Any) -> str:
        run = f"{os.environ['MASTER_PORT']}-{started or 0}"
        return f"a3po-{run}{name(communicator)}".replace("/", "_")  # a segment's name is a file's, in /dev/shm

    def init_cpu_shm(self: Any) -> int:
        handle = init(self)  # ends with a barrier: every rank has mapped every segment
        for segment in Path("/dev/shm").glob(f"{glob.escape(self.group_name)}_*"):
            segment.unlink(missing_ok=True)
        return handle

    _CPUSHMDistributed.theirs = name  # type: ignore[attr-defined]
    _CPUSHMDistributed.make_group_name = staticmethod(make_group_name)  # type: ignore[method-assign,assignment]
    _CPUSHMDistributed._init_cpu_shm = init_cpu_shm  # type: ignore[method-assign]


def ask_for_tiles() -> None:
    """Asks Linux for the registers of AMX, for this process and good, where the CPU has them."""
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


def map_experts() -> None:
    """Lets the CPU backend's experts be dealt over ranks: the choice of another rank's expert has weight 0 here."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    apply = CPUUnquantizedExperts.apply
    if getattr(apply, "maps_experts", False):
        return
    names = list(inspect.signature(apply).parameters)

    def mapped(*args: Any, **kwargs: Any) -> None:
        arguments = dict(zip(names, args, strict=False)) | kwargs
        expert_map = arguments["expert_map"]
        if expert_map is not None:
            # The kernel has no word for "not here": such a choice names the first expert, with weight 0.
            local = expert_map[arguments["topk_ids"].long()]
            arguments["topk_weights"] = arguments["topk_weights"] * (local >= 0)
            arguments["topk_ids"] = local.clamp(min=0).to(arguments["topk_ids"].dtype)
        apply(**arguments)

    mapped.maps_experts = True  # type: ignore[attr-defined]
    CPUUnquantizedExperts.apply = mapped  # type: ignore[method-assign]


def drop_expert_kernels(model: torch.nn.Module) -> None:
    """Lets the next reload of a model on the CPU backend pack its experts again."""
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None  # type: ignore[union-attr]


def drop_requests(engine: Any) -> None:
    """Removes every request of a vLLM `LLMEngine`, and waits for steps that are still under way. On all of its ranks
    alike."""
    engine.abort_request(list(engine.output_processor.request_states), internal=True)
    core = engine.engine_core.engine_core
    while core.batch_queue or core.scheduler.has_requests():  # an empty step more says who has finished
        engine.step()
