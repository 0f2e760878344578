"""Dense decoders: Llama 3, Qwen2 and Qwen3, and what every family here shares with them.

Megatron's `linear_qkv` interleaves its rows by KV head, [q … q, k, v] a head; `linear_fc1` is [gate; up] of a rank's
own rows; vLLM's `qkv_proj` is a rank's own [q; k; v], its `gate_up_proj` as Megatron's. Transformer Engine fuses a norm
into the projection that follows it.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..facts import Family, ModelFacts, Param, Part

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
# What stands before the names of a layer's parameters: by its number in the model, or in Megatron's model chunk.
HF_LAYER, MEGATRON_LAYER, STORED_LAYER = "model.layers.{}.", "decoder.layers.{}.", "decoder.layers."
# A layer's modules as Megatron registers them, which is the order of its buffers.
REGISTERED = ("input_layernorm", "self_attention.linear_proj", "self_attention", "pre_mlp_layernorm", "mlp")
DERIVED = "rotary_emb.inv_freq"  # old checkpoints store these frequencies, which follow from config.json


def registered(param: Param) -> int:
    """Returns which of REGISTERED a layer's parameter belongs to."""
    return next(place for place, module in enumerate(REGISTERED) if param.learner.startswith(module))


def first(facts: ModelFacts) -> tuple[Param, ...]:
    """Returns what stands before the layers."""
    return (_vocabulary("embedding.word_embeddings.weight", EMBEDDING, facts),)


def last(facts: ModelFacts) -> tuple[Param, ...]:
    """Returns what stands behind the layers; a tied output layer as a copy of the embedding."""
    norm = Param("decoder.final_layernorm.weight", FINAL_NORM, (Part(FINAL_NORM, facts.hidden),), None)
    head = EMBEDDING if facts.tied else HEAD
    return norm, _vocabulary("output_layer.weight", head, facts, copy=facts.tied)


def _vocabulary(learner: str, hf: str, facts: ModelFacts, copy: bool = False) -> Param:
    return Param(learner, hf, (Part(hf, facts.vocab),), facts.hidden, "vocabulary", copy=copy)


def attention(facts: ModelFacts) -> Iterator[Param]:
    """Yields the parameters of a layer's attention, and the norm before it."""
    q, kv = facts.heads * facts.head_dim, facts.kv_heads * facts.head_dim
    name = "input_layernorm.weight"
    yield norm(name, facts.hidden, name, te="self_attention.linear_qkv.layer_norm_weight")
    for kind in ("weight", "bias") if facts.qkv_bias else ("weight",):
        yield Param(
            f"self_attention.linear_qkv.{kind}",
            f"self_attn.qkv_proj.{kind}",
            (
                Part(f"self_attn.q_proj.{kind}", q, facts.heads),
                Part(f"self_attn.k_proj.{kind}", kv, facts.kv_heads),
                Part(f"self_attn.v_proj.{kind}", kv, facts.kv_heads),
            ),
            facts.hidden if kind == "weight" else None,
            "rows",
            groups=facts.kv_heads,
            linear=kind == "weight",
        )
    if facts.qk_norm:
        yield norm("self_attn.q_norm.weight", facts.head_dim, "self_attention.q_layernorm.weight")
        yield norm("self_attn.k_norm.weight", facts.head_dim, "self_attention.k_layernorm.weight")
    output = "self_attn.o_proj.weight"
    parts = (Part(output, facts.hidden),)
    yield Param("self_attention.linear_proj.weight", output, parts, q, "columns", linear=True)


def norm(hf: str, size: int, learner: str, te: str | None = None) -> Param:
    return Param(learner, hf, (Part(hf, size),), None, te=te)


def _layer(facts: ModelFacts) -> tuple[Param, ...]:
    halves = (Part("mlp.gate_proj.weight", facts.ffn), Part("mlp.up_proj.weight", facts.ffn))
    down = (Part("mlp.down_proj.weight", facts.hidden),)
    return (
        *attention(facts),
        norm(
            "post_attention_layernorm.weight",
            facts.hidden,
            "pre_mlp_layernorm.weight",
            te="mlp.linear_fc1.layer_norm_weight",
        ),
        Param("mlp.linear_fc1.weight", "mlp.gate_up_proj.weight", halves, facts.hidden, "rows", linear=True),
        Param("mlp.linear_fc2.weight", "mlp.down_proj.weight", down, facts.ffn, "columns", linear=True),
    )


NEVER_NULL = ("hidden_act", "tie_word_embeddings", "rms_norm_eps", "max_position_embeddings")
QWEN_NEVER_NULL = (*NEVER_NULL, "use_sliding_window", "attention_dropout", "head_dim")

LLAMA = Family(  # Llama 3 and 3.1, R1-Distill-Llama
    architecture="LlamaForCausalLM",
    model_type="llama",
    layer=_layer,
    defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    not_null=(*NEVER_NULL, "attention_bias", "mlp_bias"),
    head_dim="divides",
)
QWEN2 = Family(  # Qwen2, Qwen2.5, R1-Distill-Qwen
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    layer=_layer,
    defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "num_key_value_heads": 32},
    not_null=QWEN_NEVER_NULL,
    qkv_bias=True,
    head_dim="share",
)
QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    layer=_layer,
    defaults={
        **{"rms_norm_eps": 1e-6, "max_position_embeddings": 32768},
        **{"num_key_value_heads": 32, "head_dim": 128},
    },
    not_null=(*QWEN_NEVER_NULL, "attention_bias"),
    qk_norm=True,
)
