"""The end of a save, beside the run: every rank writes its share, and rank 0 puts the whole in place when all have.

The ranks' threads meet in torch's store, each through a connection of its own: neither a collective nor the run's own
questions to the store wait for them. So a checkpoint is in place as soon as it is on the disk, however long the rollout
lasts that the run is in meanwhile.
"""

from __future__ import annotations

import base64
import pickle
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from ..errors import A3POError

POLL_SECONDS = 0.05


class Background:
    def __init__(
        self,
        store: dist.Store,  # of this save alone
        write: Callable[[], Any],  # this rank's share, (picklable) what it wrote
        end: Callable[[list[Any], str | None], None],  # on rank 0: what all ranks wrote, and what failed, if anything
    ) -> None:
        self.failure: str | None = None  # what went wrong: of any rank on rank 0, of this rank elsewhere
        self.seconds = 0.0  # until it was in place
        self._store, self._end = store, end
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._thread = threading.Thread(target=self._run, args=(write,), name="checkpoint", daemon=True)
        self._begun = time.monotonic()
        self._thread.start()

    @property
    def over(self) -> bool:
        """Whether this rank has nothing more to do for it; on rank 0: whether it is in place, or failed."""
        return not self._thread.is_alive()

    def wait(self, beat: Callable[[], None], written: Callable[[], int]) -> None:
        """Until it is over. `beat` is called while the number of bytes `written` grows."""
        while self._thread.is_alive():
            before = written()
            self._thread.join(1.0)
            if written() > before:
                beat()

    def _run(self, write: Callable[[], Any]) -> None:
        share, self.failure = _attempt(f"rank {self._rank} cannot write its share", write)
        said = base64.b64encode(pickle.dumps((share, self.failure))).decode()  # the store takes text
        self._store.set(f"{self._rank}", said)
        if self._rank == 0:
            shares, failures = zip(*(self._heard(rank) for rank in range(self._world)), strict=True)
            failed = next((failure for failure in failures if failure), None)
            _, self.failure = _attempt("it cannot be put in place", lambda: self._end(list(shares), failed))
        self.seconds = time.monotonic() - self._begun

    def _heard(self, rank: int) -> tuple[Any, str | None]:
        while not self._store.check([f"{rank}"]):  # a rank that is gone ends this process too
            time.sleep(POLL_SECONDS)
        share, failure = pickle.loads(base64.b64decode(self._store.get(f"{rank}")))
        self._store.delete_key(f"{rank}")
        return share, failure


def _attempt(what: str, work: Callable[[], Any]) -> tuple[Any, str | None]:
    """What it returns, and what went wrong: in a thread nobody else would hear of it."""
    try:
        return work(), None
    except A3POError as error:
        return None, str(error)
    except Exception as error:
        return None, f"{what}: {type(error).__name__}: {error}"
