"""Starts n real ranks once and runs many cases in them: starting a rank takes far longer than most cases do.

Ranks are forked off a process that has imported torch, Megatron-Core and transformers (6 s) and done nothing with them.
A case is a module-level function `case(ranks: Ranks) -> JSON value`, called on every rank with all of them connected
over gloo. `run_ranks` returns what each case returned on each rank, or raises with the traceback of the first failure.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

from a3po_megatron.launch.environment import die_with_parent
from a3po_megatron.launch.local import rendezvous

ROOT = Path(__file__).resolve().parents[2]
HARNESS = [str(ROOT / "tests/te_harness")]
PRELOADED = ["tests.distributed", "a3po_megatron.parts", "tests.tiny"]
Case = Callable[["Ranks"], Any]
T = TypeVar("T")


@dataclass
class Ranks:
    """What a case gets: this rank, the store all share, and a folder all can read and write."""

    rank: int
    world: int
    store: Any
    folder: Path

    def arrange(self, tensor: int = 1, **parallel: int) -> Any:
        """A Cluster for one layout, in place of the one before."""
        import dataclasses

        from megatron.core import parallel_state

        from a3po_megatron.config import ParallelOptions
        from a3po_megatron.ranks.backend import CPU
        from a3po_megatron.ranks.groups import arrange

        if parallel_state.is_initialized():
            parallel_state.destroy_model_parallel()
        engine_ranks = parallel.pop("engine_ranks", 1)
        import torch.distributed as dist

        self.rounds = getattr(self, "rounds", 0) + 1
        store = dist.PrefixStore(f"layout-{self.rounds}", self.store)
        backend = dataclasses.replace(CPU, spec=os.environ.get("A3PO_TEST_SPEC", "local"))
        return arrange(backend, ParallelOptions(tensor=tensor, **parallel), engine_ranks, 0, store)

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What `make` returns, made by one rank for all of them, and for whatever asks later in this folder.

        Collective. `name` must say all that the result follows from.
        """
        import torch
        import torch.distributed as dist

        path = self.folder / f"once-{name.replace('/', '-')}.pt"
        if self.rank == 0 and not path.exists():
            torch.save(make(), path)
        dist.barrier()
        return torch.load(path, weights_only=False)


def run_ranks(
    world: int, *cases: Case, folder: Path | None = None, timeout: float = 300, te: bool = False
) -> dict[str, list[Any]]:
    """Case name → its result on every rank. Raises AssertionError with the traceback of a case that failed.

    `te`: with the layer spec of Transformer Engine, of which tests/te_harness is a stand-in.
    """
    meeting = rendezvous(0)
    folder = folder or Path(tempfile.mkdtemp(prefix="ranks-"))
    for stale in folder.glob("rank-*.json"):  # of other ranks that ran in this folder
        stale.unlink()
    names = [f"{case.__module__}:{case.__qualname__}" for case in cases]
    # Transformer Engine must be found before anything imports Megatron-Core: such ranks start afresh.
    context = multiprocessing.get_context("spawn" if te else "forkserver")
    multiprocessing.set_forkserver_preload(PRELOADED)
    processes = []
    for rank in range(world):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(meeting.getsockname()[1]),
            "GLOO_SOCKET_IFNAME": "lo",
            "VLLM_HOST_IP": "127.0.0.1",
        }
        if te:
            environment |= {"A3PO_TEST_SPEC": "te", "NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "1"}
        arguments = (os.environ | environment, meeting if rank == 0 else None, folder, timeout, names)
        processes.append(context.Process(target=_main, args=arguments))
        with mock.patch.dict(os.environ, environment), mock.patch.object(sys, "path", [*HARNESS[not te :], *sys.path]):
            processes[-1].start()
    meeting.close()
    try:
        for process in processes:
            process.join(timeout)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
    results = []
    for rank in range(world):
        path = folder / f"rank-{rank}.json"
        if not path.exists():
            raise AssertionError(f"rank {rank} died:\n{(folder / f'rank-{rank}.log').read_text()[-4000:]}")
        results.append(json.loads(path.read_text()))
    for rank, result in enumerate(results):
        if result["error"]:
            raise AssertionError(f"on rank {rank} of {world}, {result['error']}")
    return {
        case.__qualname__: [result["values"][name] for result in results]
        for case, name in zip(cases, names, strict=True)
    }


def _main(
    environment: dict[str, str], meeting: socket.socket | None, folder: Path, timeout: float, names: list[str]
) -> None:
    os.environ.clear()  # of the server's first days, not of the test
    os.environ.update(environment)
    os.chdir(ROOT)
    die_with_parent()
    log = os.open(folder / f"rank-{environment['RANK']}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import faulthandler
    import importlib
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    values: dict[str, Any] = {}
    error = ""
    faulthandler.dump_traceback_later(timeout - 5, exit=True)  # a hang ends with every thread's stack in the log
    try:
        torch.set_num_threads(1)
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # The port is listened on since before this process was started: nobody else can have it.
        listening = meeting.detach() if meeting else None
        store = dist.TCPStore(address, port, world, rank == 0, timedelta(seconds=120), master_listen_fd=listening)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=120))
        ranks = Ranks(rank, world, dist.PrefixStore("cases", store), folder)
        for name in names:
            module, _, function = name.partition(":")
            error = f"{name} failed:\n"
            print(f"case {name}", flush=True)
            values[name] = getattr(importlib.import_module(module), function)(ranks)
        error = ""
        dist.barrier()
    except BaseException:
        error += traceback.format_exc()
    (folder / f"rank-{rank}.json").write_text(json.dumps({"values": values, "error": error}))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(bool(error))
