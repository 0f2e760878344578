"""Cases that fail, die, hang or leave something behind: what becomes of ranks that stay (tests/test_worlds.py)."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from tests.harness.ranks import CaseRanks


def fails_on_rank_1(ranks: CaseRanks) -> None:
    if ranks.rank == 1:
        raise ValueError("what it was")
    dist.barrier()  # waits for it


def dies_on_rank_1(ranks: CaseRanks) -> None:
    print("last words", flush=True)
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def hangs_on_rank_1(ranks: CaseRanks) -> None:
    if ranks.rank == 1:
        waits_for_ever()
    dist.barrier()


def waits_for_ever() -> None:
    while True:
        time.sleep(1)


def returns_no_json(ranks: CaseRanks) -> object:
    return object()


def seen(ranks: CaseRanks) -> dict[str, Any]:
    """What a case can see of this process."""
    from megatron.core import parallel_state

    return {
        "process": os.getpid(),
        "environment": dict(sorted(os.environ.items())),
        "folder": os.getcwd(),
        "path": list(sys.path),
        "python": random.random(),
        "numpy": float(np.random.rand()),
        "torch": float(torch.rand(())),
        "threads": torch.get_num_threads(),
        "dtype": str(torch.get_default_dtype()),
        "precision": torch.get_float32_matmul_precision(),
        "gradients": torch.is_grad_enabled(),
        "handlers": [str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "groups": len(dist.distributed_c10d._world.pg_map),
        "megatron": parallel_state.is_initialized(),
        "said before": ranks.store.check(["said"]),
    }


def leaves_everything_behind(ranks: CaseRanks) -> None:
    ranks.arrange(tensor=ranks.world)
    ranks.store.set("said", "something")
    os.environ["LEFT_BEHIND"] = "1"
    del os.environ["HOME"]
    os.chdir("/")
    sys.path.insert(0, "/")
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7)
    torch.set_num_threads(2)
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("medium")
    torch.set_grad_enabled(False)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])


def adds_up(ranks: CaseRanks) -> float:
    """Over a group of all and one of Megatron's, made anew."""
    total = torch.tensor([1.0 + ranks.rank])
    dist.all_reduce(total)
    dist.all_reduce(total, group=ranks.arrange(tensor=ranks.world).tensor_group)
    return float(total)
