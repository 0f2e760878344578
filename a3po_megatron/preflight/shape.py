"""What of a decoder counts for its memory: a family's facts with what its implementation keeps for the backward.

Wider than model/facts.py: other people's runs, to which this planner is held (tools/plan_accuracy.py), have biases,
dropout, learned positions, latent attention and several kinds of layers, which none of our families has.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config import LearnerOptions
from ..model.facts import ModelFacts


@dataclass(frozen=True)
class Mixture:
    """Experts in the place of a layer's MLP."""

    count: int
    per_token: int
    ffn: int  # of one expert
    shared: int = 0  # of what every token passes beside them


@dataclass(frozen=True)
class Latent:
    """Latent attention (arXiv 2405.04434): queries, keys and values come out of compressed ones."""

    query_rank: int
    key_rank: int
    nope: int  # of a head's queries and keys, without position
    rope: int  # with
    value: int


@dataclass(frozen=True)
class Shape:
    """Sizes of the whole model."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool = False
    mixture: Mixture | None = None
    dense_layers: int = 0  # of a mixture of experts, those before it
    latent: Latent | None = None
    predicted: int = 0  # layers that predict further tokens (multi-token prediction)
    learned_positions: int = 0
    gated: bool = True  # SwiGLU
    fused_gate: bool = False  # in one kernel, which does not keep the gate's activation
    rope: bool = True
    fused_attention: bool = True  # no scores are kept
    hidden_dropout: bool = False
    attention_dropout: bool = False
    bias: bool = False  # of linear layers
    norm_bias: bool = False
    qk_norm: bool = False
    fused: bool = True  # Transformer Engine's kernels; False: torch's, step by step, as on a CPU

    @property
    def queries(self) -> int:
        """Width of all queries."""
        if self.latent is not None:
            return self.heads * (self.latent.nope + self.latent.rope)
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all keys."""
        return self.queries if self.latent is not None else self.kv_heads * self.head_dim

    @property
    def values(self) -> int:
        """Width of all values."""
        return self.heads * self.latent.value if self.latent is not None else self.kv_heads * self.head_dim

    @property
    def outputs(self) -> int:
        """Width of what attention gives."""
        return self.heads * (self.latent.value if self.latent is not None else self.head_dim)


def shape_of(facts: ModelFacts, learner: LearnerOptions, on_gpu: bool) -> Shape:
    """Returns the shape of a model of ours, as our learner computes it."""
    experts = facts.experts
    return Shape(
        layers=facts.layers,
        hidden=facts.hidden,
        heads=facts.heads,
        kv_heads=facts.kv_heads,
        head_dim=facts.head_dim,
        ffn=facts.ffn,
        vocab=facts.vocab,
        tied=facts.tied,
        mixture=Mixture(experts.count, experts.per_token, experts.ffn) if experts else None,
        fused_gate=learner.fused_swiglu,
        qk_norm=facts.qk_norm,
        fused=on_gpu,
    )
