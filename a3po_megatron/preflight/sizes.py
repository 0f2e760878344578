"""Sizes that follow from memory: what a configuration leaves open is filled in from the plan, each with its reason.

On GPUs, with a band of 8 % of the device left free:

    learner.recompute           as little as the longest sample needs: none, selective, full
    learner.micro_batch_tokens  4, 2 or 1 times the longest sample, the most that still fits, up to 65,536
    learner.offload             none where that leaves a quarter of the device for the cache, or all that it wants; else
                                optimizer, likewise, else all
    rollout.kv_cache_bytes      what is left, up to what rollout.max_sequences of full length take, and at least what
                                the longest sequence takes, of benchmarks that a run asks itself, too
    rollout.max_sequences       as many as the cache holds at a quarter of their full length, 8 to 512: vLLM puts off
                                those for which there is no room
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from ..config import Config, Settings, resolve
from ..config.resolve import SIZES
from ..model.facts import ModelFacts
from ..model.precision import is_fp8
from ..ranks.backend import Backend
from .cache import BLOCK_TOKENS, STEP, cache_bytes_of_a_token, longest_sequence
from .gpus import Gpu
from .memory import Phase, memory_of, needed
from .overhead import gib
from .verdict import BAND

RECOMPUTE = ("none", "selective", "full")
MOST_TOKENS = 65536  # of a micro-batch: longer ones gain nothing
SEQUENCES = (8, 512)
GUESSED = 256  # sequences, for the cache that a layout must leave room for

TRAINING = (Phase.SCORE, Phase.UPDATE)


def with_sizes(config: Config, settings: Settings, sizes: Mapping[str, Any]) -> Settings:
    """Returns the settings of a configuration with other sizes where it leaves them open. Resolving it anew for every
    size that is tried would be most of a plan's time."""
    changed: dict[str, dict[str, Any]] = {}
    for option, value in sizes.items():
        section, _, name = option.partition(".")
        if _is_open(config, option):
            changed.setdefault(section, {})[name] = value
    sections = {name: getattr(settings, name).model_copy(update=values) for name, values in changed.items()}
    return settings.model_copy(update=sections)


def _is_open(config: Config, option: str) -> bool:
    section, _, name = option.partition(".")
    return getattr(getattr(config, section), name) is None


class Sized:
    """Settings with sizes filled in, and why."""

    def __init__(self, config: Config, facts: ModelFacts, backend: Backend, ranks: int | None, gpu: Gpu) -> None:
        self._config, self._facts, self._backend, self._ranks, self._gpu = config, facts, backend, ranks, gpu
        self.reasons: dict[str, str] = {}
        self._sizes = dict(SIZES)
        self._base = self._resolve()
        self._for(gpu, (1 - BAND) * gpu.memory)
        self.settings = self._resolve().because(self.reasons)

    def _resolve(self) -> Settings:
        return resolve(self._config, self._facts, self._backend, self._ranks, self._sizes)

    def _set(self, option: str, value: Any, why: str) -> None:
        if _is_open(self._config, option):
            self._sizes[option], self.reasons[option] = value, why

    def _with(self, sizes: dict[str, Any]) -> Settings:
        """With these sizes for the time being."""
        return with_sizes(self._config, self._base, self._sizes | sizes)

    def _for(self, gpu: Gpu, room: float) -> None:
        longest = self._base.rollout.longest
        self._size_micro_batch(room, longest, f"of {gib(gpu.memory)}, {BAND:.0%} left free")
        self._size_engine(gpu, room, longest)

    def _size_micro_batch(self, room: float, longest: int, of: str) -> None:
        """The least recomputation with which the longest sample fits; then the largest micro-batch."""

        @functools.cache
        def need(recompute: str, tokens: int) -> float:
            sizes = {"learner.recompute": recompute, "learner.micro_batch_tokens": tokens}
            return needed(self._facts, self._with(sizes), TRAINING, self._gpu.hopper)

        given = self._config.learner
        least = given.micro_batch_tokens or longest
        kinds: list[str] = [given.recompute] if given.recompute else list(RECOMPUTE)
        chosen = next((kind for kind in kinds if need(kind, least) <= room), kinds[-1])
        why = f"an update takes {gib(need(chosen, least))} {of}"
        if chosen != kinds[0]:
            before = kinds[kinds.index(chosen) - 1]
            why += f"; with {before} it takes {gib(need(before, least))}"
        self._set("learner.recompute", chosen, why)
        sizes = [longest * times for times in (4, 2, 1) if times == 1 or longest * times <= MOST_TOKENS]
        # With FP8 alone a larger micro-batch may need less: fewer of them keep fewer quantised weights.
        tried = sizes if need(chosen, least) <= room or is_fp8(self._base.learner.precision) else []
        tokens = next((size for size in tried if need(chosen, size) <= room), longest)
        why = f"{tokens // longest} times the longest sample ({longest}): an update takes {gib(need(chosen, tokens))}"
        self._set("learner.micro_batch_tokens", tokens, f"{why} {of}")

    def _size_engine(self, gpu: Gpu, room: float, longest: int) -> None:
        sequences = self._config.rollout.max_sequences
        token = cache_bytes_of_a_token(self._facts, self._base)
        guess = sequences or GUESSED
        wanted = min(guess, GUESSED) * longest * token // 2

        def of_sequences(length: int, count: int = 1) -> int:
            return count * -(-length // BLOCK_TOKENS["cuda"]) * BLOCK_TOKENS["cuda"] * token  # in their blocks

        least = of_sequences(longest_sequence(self._base))

        @functools.cache
        def free(offload: str, count: int) -> int:
            """What is left for the cache where it lies beside something."""
            options = {"learner.offload": offload, "rollout.kv_cache_bytes": 1, "rollout.max_sequences": count}
            return int(room - memory_of(self._facts, self._with(options), self._gpu.hopper).beside_cache)

        def cache_of(offload: str, count: int) -> int:
            most, left = of_sequences(longest, sequences or SEQUENCES[1]), free(offload, count)
            return max(least, most if most <= left else left // STEP * STEP)

        def held(cache: int) -> int:
            """Sequences of a quarter of their full length."""
            return (self._config.rollout.kv_cache_bytes or cache) // (token * max(1, longest // 4))

        if _is_open(self._config, "learner.offload"):
            enough = self._config.rollout.kv_cache_bytes or min(wanted, gpu.memory // 4)
            offload = next((kind for kind in ("none", "optimizer") if free(kind, guess) >= enough), "all")
            why = f"leaves {gib(max(0, free(offload, guess)))} beside the engine for its cache"
            self._set("learner.offload", offload, why)
        offload = self._config.learner.offload or self._sizes["learner.offload"]
        count = sequences or max(SEQUENCES[0], min(SEQUENCES[1], held(cache_of(offload, guess)) // 8 * 8))
        cache = cache_of(offload, count)  # whose float32 logits are many
        self._set("rollout.kv_cache_bytes", cache, f"{cache // token} tokens of {token} bytes on each rank")
        self._set("rollout.max_sequences", count, f"the cache holds {held(cache)} of a quarter of their full length")
