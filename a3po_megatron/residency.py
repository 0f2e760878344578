"""Who is in device memory when: a state machine whose transitions are asserted.

    publishing   parameters and engine weights are there, nothing else
    rollout      the engine alone, with its cache
    training     the learner alone

    start → publishing → rollout → training → publishing → …

On a CPU nothing moves and everything stays resident; the order is held to all the same, so that a loop which is right
here is right where memory is short.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from .rollout.engine import Engine

_BEFORE = {"publishing": ("start", "training"), "rollout": ("publishing",), "training": ("rollout",)}


class Residency:
    def __init__(self, engine: Engine) -> None:
        self.state = "start"
        self._engine = engine

    @contextlib.contextmanager
    def publishing(self) -> Iterator[None]:
        self._enter("publishing")
        self._engine.wake()
        yield

    @contextlib.contextmanager
    def rollout(self) -> Iterator[None]:
        self._enter("rollout")
        yield
        self._engine.sleep()

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        self._enter("training")
        yield

    def _enter(self, state: str) -> None:
        assert self.state in _BEFORE[state], f"residency: {state} cannot follow {self.state}"
        self.state = state
