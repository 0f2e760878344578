"""Draws from every random stream of a rank in every update, as dropout would."""

from __future__ import annotations

from collections.abc import Callable


def install_draws() -> Callable[[], None]:
    """Returns what takes it out again."""
    from a3po_megatron.telemetry.clock import Clock

    announce = Clock._announce

    def announce_and_draw(clock: Clock) -> None:
        announce(clock)
        if clock._stack[-1] == "update":
            import random

            import numpy
            import torch
            from megatron.core.tensor_parallel import get_cuda_rng_tracker

            random.random()
            numpy.random.random()
            torch.rand(1)
            with get_cuda_rng_tracker().fork():
                torch.rand(1)

    def take_out() -> None:
        Clock._announce = announce  # type: ignore[method-assign]

    Clock._announce = announce_and_draw  # type: ignore[method-assign]
    return take_out
