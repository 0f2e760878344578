"""The engine's cache of keys and values, as vllm 0.32.0 lays it out."""

from __future__ import annotations

from ..config import Settings
from ..model.cut import kv_heads_of_rank
from ..model.facts import ModelFacts
from ..weights.route import WIDTHS

STEP = 256 << 20  # of a cache whose size is chosen, bytes
BLOCK_TOKENS = {"cpu": 128, "cuda": 16}


def cache_bytes_of_a_token(facts: ModelFacts, settings: Settings) -> int:
    """Returns bytes of a token's keys and values on one rank of an engine."""
    heads = kv_heads_of_rank(facts.kv_heads, settings.rollout.tensor)
    return 2 * facts.layers * heads * facts.head_dim * WIDTHS[settings.model.dtype]


def longest_sequence(settings: Settings) -> int:
    """Returns the tokens of the longest sequence that an engine must take: training's, or one of the benchmarks that a
    run asks itself, whose prompts are taken to be as long as training's may be."""
    rollout, evaluation = settings.rollout, settings.evaluation
    responses = [rollout.max_tokens]
    if evaluation.every_steps:
        from ..evaluate.benchmarks import benchmark_of  # for which a run without does not wait

        every = [benchmark_of(name, settings) for name in evaluation.benchmarks]
        responses += [evaluation.max_tokens or each.max_tokens for each in every]
    return rollout.max_prompt_tokens + max(responses)


def cache_blocks(facts: ModelFacts, settings: Settings) -> int:
    """Returns how many blocks vLLM's cache has."""
    tokens = BLOCK_TOKENS[settings.cluster.device]
    return settings.rollout.kv_cache_bytes // (tokens * cache_bytes_of_a_token(facts, settings))
