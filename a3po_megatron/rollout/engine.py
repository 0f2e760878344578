"""What the loop needs of an inference engine. The engine of this package is vLLM (vllm_engine.py)."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..batch import Finish

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..model.cut import Piece


@dataclass(frozen=True)
class Request:
    """One response to sample. Every request is seeded: nothing is drawn from a shared stream."""

    prompt: Sequence[int]
    seed: int


@dataclass(frozen=True)
class Sampling:
    """What is drawn from, and how much at most."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1  # -1: all
    max_tokens: int = 1024


@dataclass(frozen=True)
class Completion:
    tokens: np.ndarray  # [n] int64, with the stop token if there is one
    logprobs: np.ndarray  # [n] float32, of the distribution that was sampled from
    finish: Finish
    routes: np.ndarray | None = None  # [T, L, k] (batch.Rollout); None: not asked for


def local_experts(rank: int, tensor: int, expert: int, count: int) -> tuple[int, int]:
    """First and last + 1 of the experts that a rank's part of its engine holds.

    An engine over `tensor` neighbouring ranks that is expert-parallel deals whole experts over them, in order; one that
    is not cuts every expert.
    """
    if expert == 1:
        return 0, count
    share = count // expert
    place = rank % tensor
    return place * share, (place + 1) * share


def in_order(finished: Iterable[list[tuple[int, Completion]]]) -> list[Completion]:
    """All completions of a `sample`, in the order of its requests."""
    return [completion for _, completion in sorted((done for step in finished for done in step), key=lambda d: d[0])]


class Engine(Protocol):
    dtype: torch.dtype  # of its weights
    receipt_strength: str
    weight_version: int  # of the weights it holds; set by a publish
    fused_experts: bool  # takes a layer's experts as one tensor (weights/fuse.py)

    def sample(
        self, requests: Iterable[Request | None], sampling: Sampling | None = None, room: int | None = None
    ) -> Generator[list[tuple[int, Completion]]]:
        """After every engine step, what it finished: (which request, its completion). Closing it drops the rest.

        requests: None in place of one: there is none now, ask again after the next step (an empty one where the engine
            has nothing to do); it has no number
        sampling: None: as the run's rollouts are sampled
        room: how many requests it holds at once, and so how far ahead it takes them; None: all
        """

    def probe(self, requests: Sequence[Request], max_tokens: int) -> list[Completion]:
        """Short completions at temperature 1 from the whole distribution, for the canary of a publish."""

    def load(self, stream: Iterable[tuple[str, Tensor]]) -> None:
        """Takes a whole set of HF-named weights."""

    def holdings(self) -> tuple[Sequence[Piece], Mapping[tuple[int, str], Tensor]]:
        """What this rank holds, read back from its own tensors; not for the strength `stream`."""

    def quantised(self, name: str, tensor: Tensor) -> Tensor:
        """What an HF tensor is in this engine: itself, or its codes where the engine quantises it."""

    def forget(self) -> None:
        """Drops everything that was computed with the weights before; from now on it can sample."""

    def sleep(self) -> None:
        """Gives device memory back, as far as this engine can; weights and cache are lost."""

    def wake(self) -> None:
        """Takes its weights' memory again, to be loaded; its cache's only with `forget`."""
