"""Floating-point operations of training, as Megatron-LM counts them (training/training.py:
num_floating_point_operations): products of weights and attention, forward and twice that backward; no norms, no router,
nothing that is recomputed.

    6 · T · (weights that a token meets, the head among them, the embedding not)  +  6 · S · layers · heads · head_dim

T tokens of all sequences, S the sum of their lengths squared: half of it is masked, and counts half.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..model.facts import ModelFacts


def training_flops(facts: ModelFacts, lengths: Iterable[int]) -> int:
    """Of one forward and backward over sequences of these lengths, in tokens."""
    tokens = squares = 0
    for length in lengths:
        tokens += length
        squares += length * length
    queries, keys = facts.heads * facts.head_dim, facts.kv_heads * facts.head_dim
    attention = facts.hidden * (2 * queries + 2 * keys)
    ffn = facts.ffn if facts.experts is None else facts.experts.ffn * facts.experts.per_token
    layer = attention + 3 * facts.hidden * ffn
    return 6 * tokens * (facts.layers * layer + facts.hidden * facts.vocab) + 6 * squares * facts.layers * queries
