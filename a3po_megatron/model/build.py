"""The only place that constructs a Megatron model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Container, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from ..compat.megatron import output_layer_without_apex
from ..config import LearnerOptions, MegatronOptions, ModelSettings, ParallelOptions
from ..config.passed import check_passed
from ..errors import RequestError
from ..ranks.backend import CPU, Backend
from .cut import LearnerRank, Piece, cut, family_of
from .facts import ModelFacts
from .layout import Layout, check_layout, layout_of, padded_vocab
from .modules import GPT, PackedAttention, RMSNorm
from .precision import megatron_settings
from .rope import Yarn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_AS_DTYPE = LearnerOptions()


# What the package decides besides the fields it sets: `megatron.extra` must not.
OWNED = {
    *("pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size", "context_parallel_size"),
    *(
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
        "sequence_parallel",
        "pipeline_model_parallel_layout",
        "microbatch_group_size_per_vp_stage",
    ),
    "moe_enable_routing_replay",  # learner/replay.py stands in its place
    *("num_moe_experts", "fp16", "fp8", "fp4", "finalize_model_grads_func", "grad_scale_func", "no_sync_func"),
}


def transformer_config(
    facts: ModelFacts,
    parallel: ParallelOptions,
    options: ModelSettings,
    megatron: MegatronOptions,
    learner: LearnerOptions = _AS_DTYPE,
    backend: Backend = CPU,
) -> TransformerConfig:
    """Megatron's settings for this model and layout. Raises RequestError for a bad `megatron.extra`."""
    layout = layout_of(parallel)
    check_layout(facts, layout)
    dtype = DTYPES[options.dtype]
    ours: dict[str, Any] = {
        "num_layers": facts.layers,
        "hidden_size": facts.hidden,
        "ffn_hidden_size": facts.ffn,
        "num_attention_heads": facts.heads,
        "num_query_groups": facts.kv_heads,
        "kv_channels": facts.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": facts.norm_eps,
        "qk_layernorm": facts.qk_norm,
        "add_qkv_bias": facts.qkv_bias,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "softmax_scale": softmax_scale(facts),
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "context_parallel_size": parallel.context,
        "sequence_parallel": parallel.sequence,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "use_cpu_initialization": backend.device == "cpu",
        # Packed micro-batches differ in length; Megatron ties that to this dispatcher even in dense models.
        "variable_seq_lengths": parallel.virtual == 1,
        "moe_token_dispatcher_type": learner.expert_dispatcher,
        # Where there are two stages with virtual ones, each is the other's previous and its next. Megatron's batched
        # exchange, and always its exchange of shapes, sends to the previous one first and receives from the previous
        # one first: activations and gradients change places, unnoticed where they are equally long. Unbatched they are
        # kept apart, and micro-batches of one length (learner/learner.py) need no exchange of shapes.
        "batch_p2p_comm": parallel.virtual == 1,
        # The loss is a sum over response tokens; Megatron divides gradients by their number over all ranks.
        "calculate_per_token_loss": True,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        # Fused, these two let learner and engine drift apart: others measured it on 6 % of the steps without them, and
        # on all steps with every fusion (NeMo-RL issue 1801).
        "bias_activation_fusion": learner.fused_swiglu,
        "apply_rope_fusion": learner.fused_rope,
        # Weight gradients are summed in float32: by Transformer Engine's products themselves, else by the hooks of
        # Megatron's buffers.
        "gradient_accumulation_fusion": backend.spec == "te",
        # Off, Transformer Engine's first backward would overwrite what others have summed (model/precision.py).
        "disable_parameter_transpose_cache": backend.spec == "te",
        "batch_p2p_sync": False,
    }
    if parallel.pipeline > 1:
        ours["pipeline_model_parallel_layout"] = _stages(facts, layout)
    ours |= _recomputed(learner.recompute or "none", facts.experts is not None)
    if learner.expert_dispatcher == "flex":
        ours["moe_flex_dispatcher_backend"] = "deepep"
    if facts.experts is not None:
        ours |= {
            "num_moe_experts": facts.experts.count,
            "moe_router_topk": facts.experts.per_token,
            "moe_ffn_hidden_size": facts.experts.ffn,
            "moe_router_dtype": "fp32",
            "moe_router_load_balancing_type": "none",
            "expert_model_parallel_size": parallel.expert,
            "expert_tensor_parallel_size": layout.etp,
            "moe_grouped_gemm": backend.spec == "te",
        }
    ours |= family_of(facts).megatron(facts) | megatron_settings(learner, facts.experts is not None)
    fields = [field.name for field in dataclasses.fields(TransformerConfig) if field.init]
    check_passed("megatron.extra", megatron.extra, fields, OWNED | ours.keys(), "Megatron's TransformerConfig")
    try:
        return TransformerConfig(**ours, **megatron.extra)
    except (AssertionError, TypeError, ValueError) as error:
        raise RequestError(f"megatron.extra: Megatron refuses this configuration: {error}") from error


def _recomputed(what: str, experts: bool) -> dict[str, Any]:
    """Megatron's settings for activations that are computed again. Attention is fused, and keeps little to begin with:
    most of what a layer keeps is the MLP's."""
    if what == "none":
        return {}
    if what == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {"recompute_granularity": "selective", "recompute_modules": ["moe" if experts else "mlp"]}


def build_model(facts: ModelFacts, layout: Layout, config: TransformerConfig, backend: Backend = CPU) -> list[GPT]:
    """This rank's model chunks (one, without virtual stages), with weights that are still to be loaded."""
    spec = _te_spec if backend.spec == "te" else _local_spec
    chunks = []
    rank = parallel_state.get_pipeline_model_parallel_rank()
    # Names and dtypes are the same on all ranks of a stage, but for the experts that they hold.
    mine = cut(facts, LearnerRank(layout, layout.place(rank, 0)))
    for chunk, layers in enumerate(layout.chunk_layers(facts.layers, rank)):
        with output_layer_without_apex():
            model = GPT(
                config,
                spec(config, len(layers)),
                vocab_size=padded_vocab(facts.vocab, layout.tensor),
                max_sequence_length=facts.max_positions,
                pre_process=rank == 0 and chunk == 0,
                post_process=rank == layout.pipeline - 1 and chunk == layout.virtual - 1,
                share_embeddings_and_output_weights=facts.tied,
                position_embedding_type="rope",
                rotary_base=int(facts.rope_theta),
                vp_stage=chunk if layout.virtual > 1 else None,
            )
        # Megatron takes an integer base and hard-codes the scaled variant; the frequencies themselves are the truth.
        model.rotary_pos_emb.inv_freq = rope_frequencies(facts).to(backend.local())
        here = [piece for piece in mine if piece.chunk == chunk]
        refuse_buffers(model, {piece.parameter for piece in here if piece.hf.buffer})
        chunks.append((model.bfloat16() if config.bf16 else model).to(backend.local()))
        _keep_dtypes(chunks[-1], here)
    return chunks


def _keep_dtypes(model: torch.nn.Module, pieces: Iterable[Piece]) -> None:
    """Gives what is kept in a dtype of its own that dtype: `bfloat16()` has cast everything."""
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    for piece in pieces:
        if piece.hf.dtype is not None:
            state[piece.parameter].data = state[piece.parameter].data.to(getattr(torch, piece.hf.dtype))


def refuse_buffers(model: torch.nn.Module, known: Container[str]) -> None:
    """Raises RequestError for state that is no parameter, such as a router's bias, and that the family's table does not
    name: neither load nor publish, export or receipt would see it, and the engine would go on without it."""
    for name, buffer in persistent_buffers(model).items():
        if name not in known:
            raise RequestError(
                f"the model has the buffer {name} {tuple(buffer.shape)}, which no map of tensors names: it would be "
                "lost on its way to the engine; models with it are not supported"
            )


def persistent_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns the state of a model that is no parameter, by name."""
    return {
        f"{place}.{name}": buffer
        for place, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def rope_frequencies(facts: ModelFacts) -> torch.Tensor:
    """Inverse frequencies [head_dim / 2] float32, scaled as the HF config says (Llama 3.1, arXiv 2407.21783; YaRN)."""
    exponent = torch.arange(0, facts.head_dim, 2, dtype=torch.float32) / facts.head_dim
    periods = facts.rope_theta**exponent
    plain = 1.0 / periods
    scaling = facts.rope_scaling
    if scaling is None:
        return plain
    if isinstance(scaling, Yarn):
        share = 1 - _yarn_blend(facts, scaling)
        return 1.0 / (scaling.factor * periods) * (1 - share) + plain * share
    wavelength = 2 * math.pi / plain
    turns = scaling.original_max_positions / wavelength  # within the original context
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0, 1)  # 0: few turns, wholly scaled; 1: many turns, as it was
    return (1 - blend) * plain / scaling.factor + blend * plain


def _yarn_blend(facts: ModelFacts, yarn: Yarn) -> torch.Tensor:
    """How far each frequency [head_dim / 2] is scaled, 0 to 1 (transformers' modeling_rope_utils.py; YaRN's gamma)."""

    def dimension(turns: float) -> float:
        """The dimension whose frequency turns so often within the original context."""
        share = math.log(yarn.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(facts.rope_theta))
        return facts.head_dim * share

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, facts.head_dim - 1)
    if low == high:
        high += 0.001
    return ((torch.arange(facts.head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)


def softmax_scale(facts: ModelFacts) -> float:
    """By what attention multiplies products of queries and keys.

    YaRN lets cosines and sines grow by its attention factor, that is, queries and keys each. Megatron-Core 0.16.1 has
    a YaRN of its own, which knows no attention factor but that of the formula, nor another base than a whole number.
    """
    grown = facts.rope_scaling.attention_factor if isinstance(facts.rope_scaling, Yarn) else 1.0
    return grown**2 / math.sqrt(facts.head_dim)


def _stages(facts: ModelFacts, layout: Layout) -> list[list[str]]:
    """Megatron's own form of a pipeline layout: what each chunk holds, in the order of the model."""
    by_rank = [layout.chunk_layers(facts.layers, rank) for rank in range(layout.pipeline)]
    chunks = [["decoder"] * len(by_rank[rank][v]) for v in range(layout.virtual) for rank in range(layout.pipeline)]
    chunks[0].insert(0, "embedding")
    chunks[-1].append("loss")
    return chunks


def _local_spec(config: TransformerConfig, layers: int) -> TransformerBlockSubmodules:
    """Megatron's local layer spec with our norm and attention in place of the two that cannot do packed sequences."""
    layer: ModuleSpec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    if config.num_moe_experts is not None:
        # Before experts the norm stands alone in both schemes, and only here would a checkpoint name it otherwise.
        del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=RMSNorm)


def _te_spec(config: TransformerConfig, layers: int) -> TransformerBlockSubmodules:
    """Megatron's own layer spec for Transformer Engine, attention over packed sequences included."""
    from megatron.core.extensions.transformer_engine import TENorm  # there only with Transformer Engine

    layer: ModuleSpec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=TENorm)
