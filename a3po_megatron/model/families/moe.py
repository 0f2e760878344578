"""Mixtures of experts: Qwen3's.

Megatron's local layers keep a rank's experts one by one, Transformer Engine's in one module; a checkpoint of Megatron
stacks them. vLLM has those of a layer in `w13_weight` [E, 2I, H], again [gate; up], and `w2_weight` [E, H, I]. Before
experts the norm stands alone in both of Megatron's schemes: the router reads its output, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..facts import Family, ModelFacts, Param, Part
from .dense import QWEN_NEVER_NULL, attention, norm

ROUTER = "mlp.gate"  # HF's and vLLM's name of what chooses the experts


def experts(facts: ModelFacts) -> Iterator[Param]:
    """Yields what stands in the place of a layer's MLP, and the norm before it."""
    assert facts.experts is not None
    count, ffn, hidden = facts.experts.count, facts.experts.ffn, facts.hidden
    yield norm("post_attention_layernorm.weight", hidden, "pre_mlp_layernorm.weight")
    router = f"{ROUTER}.weight"
    yield Param("mlp.router.weight", router, (Part(router, count),), hidden)
    one = "mlp.experts.{}."
    for fc, block, fused, halves, rows, width, cut in (
        ("linear_fc1", "w13_weight", "gate_up_proj", ("gate_proj", "up_proj"), ffn, hidden, "rows"),
        ("linear_fc2", "w2_weight", "down_proj", ("down_proj",), hidden, ffn, "columns"),
    ):
        yield Param(
            learner=f"mlp.experts.local_experts.{{}}.{fc}.weight",
            te=f"mlp.experts.{fc}.weight{{}}",
            stored=f"mlp.experts.experts.{fc}.weight",
            engine=f"mlp.experts.routed_experts.{block}.{{}}",
            fused=f"mlp.experts.{fused}",
            parts=tuple(Part(f"{one}{half}.weight", rows) for half in halves),
            width=width,
            cut=cut,  # type: ignore[arg-type]
            experts=count,
            linear=True,
        )


def _layer(facts: ModelFacts) -> tuple[Param, ...]:
    return *attention(facts), *experts(facts)


def _megatron(facts: ModelFacts) -> dict[str, Any]:
    assert facts.experts is not None
    return {
        "moe_router_score_function": "softmax",
        # HF takes the softmax over all experts and then, if norm_topk_prob, makes the chosen ones sum to 1: the same as
        # a softmax over the chosen logits.
        "moe_router_pre_softmax": not facts.experts.norm_topk,
    }


QWEN3_MOE = Family(
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    layer=_layer,
    defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "num_key_value_heads": 4},
    not_null=(*QWEN_NEVER_NULL, "attention_bias", "decoder_sparse_step", "norm_topk_prob", "num_key_value_heads"),
    qk_norm=True,
    experts=True,
    megatron=_megatron,
)
