"""Sizes on a CPU, where nothing is short: those of config/resolve.py, but a cache that holds two sequences."""

from __future__ import annotations

from ..config import Config, Settings, resolve
from ..config.resolve import SIZES
from ..model.facts import ModelFacts
from ..ranks.backend import Backend
from .cache import cache_bytes_of_a_token, longest_sequence
from .overhead import MIB

OPTION = "rollout.kv_cache_bytes"


def sized_on_cpu(config: Config, facts: ModelFacts, backend: Backend, ranks: int | None) -> Settings:
    settings = resolve(config, facts, backend, ranks)
    longest = longest_sequence(settings)
    needed = cache_bytes_of_a_token(facts, settings) * longest
    if config.rollout.kv_cache_bytes is not None or needed <= settings.rollout.kv_cache_bytes:
        return settings
    cache = -(-2 * needed // MIB) * MIB
    larger = resolve(config, facts, backend, ranks, SIZES | {OPTION: cache})
    return larger.because({OPTION: f"two sequences of {longest} tokens"})
