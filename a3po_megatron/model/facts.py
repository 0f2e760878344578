"""What a model is: its facts, and what a family of models has in common. Plain records, no torch.

A family (model/families/) is one record and one table: a `Param` for every parameter of a layer, with its name for
Megatron, for vLLM and in an HF checkpoint, what it is made of and how it is cut. Everything that asks which tensor lies
where reads that table through model/cut.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .rope import RopeScaling, Yarn

Cut = Literal[
    "whole",  # every rank of a tensor-parallel group holds all of it
    "rows",  # each holds its rows
    "columns",  # each holds its columns
    "vocabulary",  # rows, padded to a multiple of the ranks
]


@dataclass(frozen=True)
class Part:
    """One of the HF tensors that a parameter stacks."""

    name: str  # within the layer; {} stands for the expert's number
    rows: int
    heads: int | None = None  # the rows are so many heads, of which an engine's rank has one at least


@dataclass(frozen=True)
class Param:
    """One parameter, or one of every expert's. Names are within the layer; {} stands for the expert's number among
    those that a rank holds."""

    learner: str  # Megatron's name, as its local layers have it
    engine: str  # vLLM's
    parts: tuple[Part, ...]  # one below the other
    width: int | None  # columns; None: vectors
    cut: Cut = "whole"
    te: str | None = None  # Megatron's name with Transformer Engine's layers, where that is another
    stored: str | None = None  # in a Megatron checkpoint, where that is not Transformer Engine's
    groups: int | None = None  # Megatron interleaves the parts' rows by so many groups
    experts: int | None = None  # how many there are of it
    fused: str | None = None  # the HF tensor [experts, rows, columns] in which transformers 5 has all of them
    linear: bool = False  # a linear layer's weight: what computing in FP8 quantises
    buffer: bool = False  # no gradient: Megatron keeps it as a buffer
    dtype: str | None = None  # what it is kept in everywhere, whatever the model's dtype; None: as the model
    copy: bool = False  # of a tensor that has its place elsewhere: a tied output layer on another stage


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of every layer's MLP."""

    count: int
    per_token: int
    ffn: int  # hidden size of one expert
    norm_topk: bool  # the chosen experts' probabilities are made to sum to 1


@dataclass(frozen=True)
class ModelFacts:
    """The facts of one model. Sizes are those of the whole model."""

    architecture: str  # HF's class, by which its family is known
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool  # the output layer is the embedding
    qk_norm: bool  # RMSNorm on queries and keys, per head
    qkv_bias: bool
    norm_eps: float
    rope_theta: float
    max_positions: int  # the longest sequence
    eos: tuple[int, ...]
    rope_scaling: RopeScaling | Yarn | None = None
    experts: Experts | None = None


@dataclass(frozen=True)
class Family:
    """What the models of one HF architecture have in common, beside what their config.json says."""

    architecture: str
    model_type: str
    layer: Callable[[ModelFacts], tuple[Param, ...]]  # every parameter of a layer, in the order of a checkpoint
    defaults: Mapping[str, Any]  # what transformers' class takes for a field that config.json leaves out
    not_null: tuple[str, ...]  # fields that may be absent, but not null: transformers or vLLM fail on it
    qk_norm: bool = False
    qkv_bias: bool = False
    experts: bool = False
    # config.json's head_dim: free, free where the heads divide the hidden size, or that share and nothing else.
    head_dim: Literal["free", "divides", "share"] = "free"
    megatron: Callable[[ModelFacts], dict[str, Any]] = field(default=lambda facts: {})  # fields of TransformerConfig
