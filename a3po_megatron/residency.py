"""Who is in device memory when: a state machine whose transitions are asserted.

    publishing   parameters and engine weights, then the engine's cache too, for the canary
    rollout      the engine alone, or with the learner's parameters where both fit
    training     the learner alone

    start → publishing → rollout → training → publishing → …

What leaves comes first: gradients and optimizer away, then the engine's weights awake; the engine asleep, then the
learner back. vLLM asserts that the device's free memory grows while it falls asleep: nobody may take any meanwhile.

On a CPU nothing moves and everything stays resident; the order is held to all the same, so that a loop which is right
here is right where memory is short. `learner.offload` moves the learner on a CPU as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

from .errors import Interrupted
from .model.arena import Arena
from .ranks.backend import Backend
from .rollout.engine import Engine
from .telemetry.clock import CLOCK

_BEFORE = {"publishing": ("start", "training"), "rollout": ("publishing",), "training": ("rollout",)}


class Residency:
    def __init__(
        self, engine: Engine, arena: Arena, backend: Backend, offload: Literal["none", "optimizer", "all"]
    ) -> None:
        """`offload`: what of the learner leaves, gradients aside."""
        self.state = "start"
        self._engine, self._arena, self._backend = engine, arena, backend
        self._offload = offload

    @contextlib.contextmanager
    def publishing(self) -> Iterator[None]:
        with self._in("publishing"):
            if self._offload != "none":
                self._arena.gradients_away()
                self._arena.optimizer_away()
                self._arena.give_back()
            self._engine.wake()
            yield

    @contextlib.contextmanager
    def rollout(self) -> Iterator[None]:
        with self._in("rollout"):
            if self._offload == "all":
                self._arena.parameters_away()
                self._arena.give_back()
            try:
                yield
            except Interrupted:  # the learner is about to be saved
                self._engine.sleep()
                self._arena.parameters_back()
                raise
            self._measure()
            self._engine.sleep()

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        with self._in("training"):
            if self._offload != "none":
                self._arena.parameters_back()
                self._arena.gradients_back()
                self._arena.optimizer_back()
            yield

    @contextlib.contextmanager
    def _in(self, state: str) -> Iterator[None]:
        assert self.state in _BEFORE[state], f"residency: {state} cannot follow {self.state}"
        self.state = state
        CLOCK.bytes[state] = 0
        yield
        self._measure()

    def _measure(self) -> None:
        CLOCK.bytes[self.state] = max(CLOCK.bytes[self.state], self._backend.used_bytes())
