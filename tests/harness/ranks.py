"""Runs cases in n real ranks, which stay for the next ones (worlds.py): a start takes longer than most cases do.

A case is a module-level function `case(ranks: CaseRanks) -> JSON value`, called on every rank with all of them
connected over gloo. `run_ranks` returns what each case returned on each rank, or raises with the traceback of the first
failure.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tests.harness import tidying
from tests.harness.worlds import ROOT, Task, World, world_of

__all__ = ["ROOT", "Case", "CaseRanks", "run_ranks"]

Case = Callable[["CaseRanks"], Any]
T = TypeVar("T")


@dataclass
class CaseRanks:
    """What a case gets: this rank, the store all share, and a folder all can read and write."""

    rank: int
    world: int
    store: Any
    folder: Path

    def arrange(self, tensor: int = 1, *, seed: int = 0, **parallel: int) -> Any:
        """The ranks of one layout, in place of the one before."""
        import dataclasses

        from megatron.core import parallel_state

        from a3po_megatron.config import ParallelOptions
        from a3po_megatron.ranks.backend import CPU
        from a3po_megatron.ranks.groups import arrange

        if parallel_state.is_initialized():
            tidying.leave_layout()
        engine_ranks = parallel.pop("engine_ranks", 1)
        import torch.distributed as dist

        self.rounds = getattr(self, "rounds", 0) + 1
        store = dist.PrefixStore(f"layout-{self.rounds}", self.store)
        backend = dataclasses.replace(CPU, spec=os.environ.get("A3PO_TEST_SPEC", "local"))
        return arrange(backend, ParallelOptions(tensor=tensor, **parallel), engine_ranks, seed, store)

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
    world: int,
    *cases: Case,
    folder: Path | None = None,
    timeout: float = 300,
    te: bool = False,
    fresh: bool = False,
    own: bool = False,
) -> dict[str, list[Any]]:
    """Case name → its result on every rank. Raises AssertionError with the traceback of a case that failed.

    `own`: in processes that do nothing before and after, `fresh`: and that have imported nothing; say why. `te`: with
    the layer spec of Transformer Engine, of which tests/harness/te_on_cpu is a stand-in.
    """
    folder = folder or Path(tempfile.mkdtemp(prefix="ranks-"))
    for stale in folder.glob("rank-*.log"):  # of other ranks that ran in this folder
        stale.unlink()
    names = [f"{case.__module__}:{case.__qualname__}" for case in cases]
    task = Task(names, folder, timeout, dict(os.environ))
    if fresh or own:
        new = World(world, folder, te, fresh)
        try:
            results = new.run(task)
        finally:
            new.end()
    else:
        results = world_of(world, folder, te).run(task)
    return {case.__qualname__: [result[name] for result in results] for case, name in zip(cases, names, strict=True)}
