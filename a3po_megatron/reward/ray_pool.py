"""Grades on all nodes of a job through Ray: one actor a node, each with a pool of killable processes (pool.py).

    rank ── its responses, dealt over the nodes ──▶ actor of a node ──▶ its GraderPool
         ◀── verdicts, in the order of the responses ──

Ranks share the actors, by name. An actor that dies takes nothing with it: its responses go to another one, once it is
up; where that dies over them, too, their verdict is `invalid`. Extra `ray`; the default stays the local pool, which
needs no second scheduler.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from ..batch import Answered, Step, Verdict
from ..errors import RequestError, RunFailed
from .pool import GraderPool

NAMESPACE = "a3po"
RESTART_SECONDS = 120.0  # that Ray may take to start an actor again


class _Node:
    """What runs as an actor: the local pool, on its node."""

    def __init__(self, make_pool: Callable[[], GraderPool]) -> None:
        self._pool = make_pool()
        self._pool.start()

    def ready(self) -> bool:
        return True

    def grade(self, items: Sequence[tuple[str, str] | Answered]) -> list[tuple[str, str, tuple[Step, ...]]]:
        return [(verdict.outcome, verdict.reason, verdict.steps) for verdict in self._pool.grade_all(items)]


class RayGraders:
    """A `Graders` (rollout/intake.py) over the nodes of a Ray cluster. Use it as a context manager.

    Raises RequestError where Ray is not installed, and RunFailed where no cluster answers at `address`.
    """

    def __init__(self, make_pool: Callable[[], GraderPool], address: str) -> None:
        try:
            import ray
        except ImportError as error:
            raise RequestError("grader_pool.name = ray needs Ray: pip install 'a3po-megatron[ray]'") from error
        self._ray, self._make_pool, self._address = ray, make_pool, address
        self._actors: list[Any] = []

    def __enter__(self) -> RayGraders:
        if not self._ray.is_initialized():
            options: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": "error"}
            if (node := os.environ.get("SLURMD_NODENAME")) is not None:
                # Ray finds its daemon on this node by address, and among several may look for the wrong one.
                options["_node_ip_address"] = socket.gethostbyname(node)
            try:
                self._ray.init(address=self._address, **options)
            except (ConnectionError, ValueError) as error:
                raise RunFailed(f"no Ray cluster answers at grader_pool.address = {self._address}: {error}") from error
        nodes = sorted(node["NodeID"] for node in self._ray.nodes() if node["Alive"])
        self._actors = [self._actor(node) for node in nodes]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._actors.clear()  # they end with the rank that made them

    def _actor(self, node: str) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return (
            self._ray.remote(_Node)
            .options(
                name=f"graders-{node}",
                get_if_exists=True,
                num_cpus=0,  # grading takes turns with training; the pool bounds its own processes
                max_restarts=-1,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True),
            )
            .remote(self._make_pool)
        )

    def grade_all(self, items: Sequence[tuple[str, str] | Answered]) -> list[Verdict]:
        """Verdicts of the (response, answer) pairs, in their order."""
        verdicts: list[Verdict | None] = [None] * len(items)
        for attempt in range(2):
            open_ = [number for number, verdict in enumerate(verdicts) if verdict is None]
            shares = [open_[k :: len(self._actors)] for k in range(len(self._actors))]
            # In the second round the shares go to other nodes.
            actors = self._actors[attempt:] + self._actors[:attempt]
            if attempt and open_:
                self._wait_for(actors)
            asked = [
                (share, actor.grade.remote([items[number] for number in share]))
                for share, actor in zip(shares, actors, strict=True)
                if share
            ]
            for share, answer in asked:
                try:
                    replies = self._ray.get(answer)
                except self._ray.exceptions.RayActorError:
                    continue
                for number, (outcome, reason, steps) in zip(share, replies, strict=True):
                    verdicts[number] = Verdict(outcome, reason, steps)
        return [verdict or Verdict("invalid", "the grader's node died twice") for verdict in verdicts]

    def _wait_for(self, actors: Sequence[Any]) -> None:
        """Waits for actors that are being started again: Ray turns away what asks them meanwhile. That question alone
        may be asked any number of times, since it is no response that could be what they die of."""
        answers = [actor.ready.options(max_task_retries=-1).remote() for actor in actors]
        self._ray.wait(answers, num_returns=len(answers), timeout=RESTART_SECONDS)
