"""The only place that constructs a Megatron model."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from ..config import MegatronOptions, ModelOptions, ParallelOptions
from ..errors import RequestError
from .family import Family
from .layout import check_layout, padded_vocab
from .modules import PackedAttention, RMSNorm

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# What the package decides besides the fields it sets: `megatron.extra` must not.
OWNED = {
    *("pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size", "context_parallel_size"),
    *(
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
        "sequence_parallel",
        "pipeline_model_parallel_layout",
    ),
    *("num_moe_experts", "fp16", "fp8", "fp4", "finalize_model_grads_func", "grad_scale_func", "no_sync_func"),
}


def transformer_config(
    family: Family, parallel: ParallelOptions, options: ModelOptions, megatron: MegatronOptions
) -> TransformerConfig:
    """Megatron's settings for this model and layout. Raises RequestError for a bad `megatron.extra`."""
    check_layout(family, parallel.tensor)
    dtype = DTYPES[options.dtype]
    ours: dict[str, Any] = {
        "num_layers": family.layers,
        "hidden_size": family.hidden,
        "ffn_hidden_size": family.ffn,
        "num_attention_heads": family.heads,
        "num_query_groups": family.kv_heads,
        "kv_channels": family.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": family.norm_eps,
        "qk_layernorm": family.qk_norm,
        "add_qkv_bias": family.qkv_bias,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": parallel.tensor,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "use_cpu_initialization": True,
        # Packed micro-batches differ in length; Megatron ties that to this dispatcher even in dense models.
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",
        # The loss is a sum over response tokens; Megatron divides gradients by their number over all ranks.
        "calculate_per_token_loss": True,
        # The fused kernels are CUDA's.
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "batch_p2p_sync": False,
    }
    free = [f.name for f in dataclasses.fields(TransformerConfig) if f.init and f.name not in OWNED | ours.keys()]
    for name in megatron.extra:
        if name in OWNED or name in ours:
            raise RequestError(f"megatron.extra.{name}: this field follows from the model and the other options")
        if name not in free:
            close = difflib.get_close_matches(name, free, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise RequestError(f"megatron.extra.{name}: Megatron's TransformerConfig has no such field{hint}")
    try:
        return TransformerConfig(**ours, **megatron.extra)
    except (AssertionError, TypeError, ValueError) as error:
        raise RequestError(f"megatron.extra: Megatron refuses this configuration: {error}") from error


def build_model(family: Family, config: TransformerConfig) -> GPTModel:
    """This rank's shard of the model, with weights that are still to be loaded."""
    model = GPTModel(
        config,
        _local_spec(config),
        vocab_size=padded_vocab(family, config.tensor_model_parallel_size),
        max_sequence_length=family.max_positions,
        share_embeddings_and_output_weights=family.tied,
        position_embedding_type="rope",
        rotary_base=int(family.rope_theta),
    )
    # Megatron takes an integer base and hard-codes scaled variants; the frequencies themselves are the truth.
    exponent = torch.arange(0, family.head_dim, 2, dtype=torch.float32) / family.head_dim
    model.rotary_pos_emb.inv_freq = 1.0 / (family.rope_theta**exponent)
    if config.bf16:
        model = model.bfloat16()
    return model


def _local_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    """Megatron's local layer spec with our norm and attention in place of the two that cannot do packed sequences."""
    layer: ModuleSpec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * config.num_layers, layer_norm=RMSNorm)
