"""What makes a rank's process that has run cases like one that has not, and keeps it small while it runs them.

Python cannot free a model of Megatron's, nor what an exception once saw; and each group of ranks over gloo has a thread
that wakes up a hundred times a second, so that those of a few dozen layouts cost more than what is tested in them.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import inspect
import multiprocessing
import os
import random
import signal
import sys
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def hold_weakly() -> None:
    """Lets models go that nobody uses: Megatron's hooks hold their wrapper, and nodes of C++, where Python cannot see
    circles, hold the hooks."""
    from megatron.core.distributed import DistributedDataParallel

    make = DistributedDataParallel._make_backward_post_hook

    def make_weak(self: Any, parameter: Any) -> Callable[..., None]:
        wrapper = weakref.ref(self)
        return lambda *unused: make(wrapper(), parameter)(*unused)

    DistributedDataParallel._make_backward_post_hook = make_weak


def let_go() -> None:
    """Frees what only frames hold that have ended: some library keeps a traceback, and so all its callers' frames."""
    for each in gc.get_objects():
        if (
            isinstance(each, types.FrameType)
            and each.f_code.co_filename.startswith(str(ROOT))
            and not each.f_code.co_flags & inspect.CO_GENERATOR
        ):
            with contextlib.suppress(RuntimeError):  # it has not ended
                each.clear()
    gc.collect()


def leave_layout() -> None:
    """Ends all groups of ranks but that of all and vLLM's, which its next engine in this process uses. Collective."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    kept = {dist.group.WORLD}
    if "vllm.distributed.parallel_state" in sys.modules:
        from vllm.distributed.parallel_state import _groups

        for group in filter(None, (reference() for reference in _groups.values())):
            kept |= {group.cpu_group, group.device_group}
    dist.barrier()  # nobody is still in one of them
    for group in set(dist.distributed_c10d._world.pg_map) - kept:
        dist.destroy_process_group(group)
    let_go()


def disconnect() -> None:
    """Ends all groups of ranks, of whomever: the next cases make their own."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if "vllm.distributed.parallel_state" in sys.modules:
        from vllm import envs
        from vllm.distributed import parallel_state as of_vllm

        envs.disable_envs_cache()
        of_vllm.destroy_model_parallel()
        of_vllm.destroy_distributed_environment()
    if dist.is_initialized():
        dist.destroy_process_group()


def kept() -> Callable[[], None]:
    """What makes this process as it is now again, whatever cases did in it; what they imported stays."""
    import numpy as np
    import torch

    python, numpy, stream = random.getstate(), np.random.get_state(), torch.get_rng_state()
    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    path = list(sys.path)

    def as_new() -> None:
        from a3po_megatron.telemetry.clock import CLOCK

        let_go()  # of engines and learners, before what they are connected by
        disconnect()
        for child in multiprocessing.active_children():  # Megatron's writers of checkpoints
            child.kill()
            child.join()
        os.chdir(ROOT)
        sys.path[:] = path
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(stream)
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision(precision)
        torch.set_grad_enabled(True)
        torch.set_num_threads(1)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        CLOCK.__init__()  # type: ignore[misc]  # `phase` is a method of this one
        gc.collect()
        with contextlib.suppress(AttributeError):  # glibc's
            ctypes.CDLL(None).malloc_trim(0)

    return as_new
