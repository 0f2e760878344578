"""config.json → the facts that the rest of the package needs, and a refusal by name of everything it cannot represent.

This and rope.py are the only readers of `config.json`. What a config leaves out has the value that transformers' own
class gives it (5.19), which vLLM shares; a null where transformers takes none is refused, as it would be later.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..files.hf_folder import check_pointer, explain
from .facts import Experts, Family, ModelFacts
from .families.registry import FAMILIES
from .quantised import FIELDS, Fp8, read_fp8
from .rope import Yarn, is_positive, read_rope


def read_facts(folder: Path | str) -> ModelFacts:
    """The facts of the HF checkpoint in `folder`.

    Raises RequestError for a missing or unreadable config.json, an unknown architecture, quantised weights, and every
    field that changes the mathematics in a way that is not implemented.
    """
    facts, fp8 = read_source(folder)
    if fp8 is not None:
        raise RequestError(
            f"{Path(folder) / 'config.json'}: quantization_config: the weights are quantised (fp8), which cannot be "
            f"trained: import, export it first (a3po convert import {folder} CKPT; a3po convert export CKPT NEW)"
        )
    return facts


def read_source(folder: Path | str) -> tuple[ModelFacts, Fp8 | None]:
    """The same of a checkpoint whose weights may be in FP8."""
    if not Path(folder).is_dir():
        raise RequestError(f"model.path: {folder} is not a folder with an HF checkpoint")
    path, generation = Path(folder) / "config.json", Path(folder) / "generation_config.json"
    config = _read_json(path)
    fp8 = read_fp8(config, str(path))
    facts = facts_of({name: value for name, value in config.items() if name not in FIELDS}, str(path))
    # Chat models name further tokens that end a turn there.
    more = _eos(_read_json(generation), str(generation)) if generation.exists() else ()
    return dataclasses.replace(facts, eos=tuple(sorted({*facts.eos, *more}))), fp8


def _read_json(path: Path) -> dict[str, Any]:
    try:
        check_pointer(path)
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise explain(path) from error
    except OSError as error:
        raise RequestError(
            f"{path}: cannot read it: {error.strerror}; model.path must hold an HF checkpoint"
        ) from error
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise RequestError(f"{path}: expected an object of settings")
    return config


def _eos(config: dict[str, Any], where: str) -> tuple[int, ...]:
    value = config.get("eos_token_id")
    tokens = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(token) is not int or token < 0 for token in tokens):
        raise RequestError(f"{where}: eos_token_id = {value!r} is no token id, nor a list of them")
    return tuple(tokens)


# Fields that would change what the model computes, and the values at which they do not. The first ones are read by
# transformers 5.19 or vllm 0.32 for these architectures; the rest belong to others, where they would be misplaced.
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu",), "only silu"),
    "attention_bias": ((False,), "biased projections"),
    "mlp_bias": ((False,), "biased projections"),
    "bias": ((False,), "biased projections"),
    "qkv_bias": ((False,), "biased projections"),
    "qk_norm": ((False,), "normed queries and keys"),
    "is_causal": ((True,), "attention to later tokens"),
    "use_sliding_window": ((False,), "attention over a window"),
    "use_mrope": ((False,), "multimodal rope"),
    "pretraining_tp": ((1,), "only 1"),
    "partial_rotary_factor": ((1, 1.0), "rope on a part of each head"),
    "original_max_position_embeddings": ((), "it belongs into the rope's own settings"),
    "attention_dropout": ((0, 0.0), "dropout"),
    "dual_chunk_attention_config": ((), "attention in chunks"),
    "per_layer_config": (({},), "layers that differ"),
    "quantization_config": (({},), "quantised weights cannot be trained"),
    "compression_config": (({},), "quantised weights cannot be trained"),
    "decoder_sparse_step": ((1,), "every layer must be a mixture of experts"),
    "mlp_only_layers": (([],), "every layer must be a mixture of experts"),
    "shared_expert_intermediate_size": ((0,), "shared experts"),
    "n_shared_experts": ((0,), "shared experts"),
    "logit_scale": ((1, 1.0), "scaled logits"),
    "logits_scaling": ((1, 1.0), "scaled logits"),
    "embedding_multiplier": ((1, 1.0), "scaled embeddings"),
    "residual_multiplier": ((1, 1.0), "scaled residuals"),
    "attention_multiplier": ((), "scaled attention"),
    "query_pre_attn_scalar": ((), "scaled attention"),
    "attn_logit_softcapping": ((), "capped attention"),
    "final_logit_softcapping": ((), "capped logits"),
    "attn_temperature_tuning": ((False,), "scaled attention"),
    "no_rope_layers": (([],), "layers without rope"),
}


class _Fields:
    """A config's fields, each with the type that it must have; `where` names the file in errors."""

    def __init__(self, config: dict[str, Any], where: str) -> None:
        self.config, self.where = config, where

    def refuse(self, name: str, what: str) -> RequestError:
        return RequestError(f"{self.where}: {name} = {self.config.get(name)!r} {what}")

    def need(self, name: str) -> Any:
        if self.config.get(name) is None:
            raise RequestError(f"{self.where}: the field {name} is missing")
        return self.config[name]

    def size(self, name: str) -> int:
        value = self.need(name)
        if type(value) is not int or value < 1:
            raise self.refuse(name, "is no size")
        return value

    def positive(self, name: str) -> float:
        if not is_positive(self.need(name)):
            raise self.refuse(name, "is no positive number")
        return float(self.config[name])

    def flag(self, name: str) -> bool:
        value = self.config.get(name)
        if value is not None and type(value) is not bool:
            raise self.refuse(name, "is neither true nor false")
        return bool(value)


def facts_of(config: dict[str, Any], where: str) -> ModelFacts:
    """The facts of a parsed config.json; `where` names it in errors."""
    fields = _Fields(config, where)
    family = _family(config, where)
    for name, (neutral, meaning) in NEUTRAL.items():
        value = config.get(name)
        if value is not None and not any(type(value) is type(other) and value == other for other in neutral):
            raise fields.refuse(name, f"is not supported ({meaning})")
    for name in family.not_null:
        if name in config and config[name] is None:
            raise fields.refuse(name, "is no value: transformers and vLLM fail on it; leave it out for their default")
    fields.config = {**family.defaults, **config}
    layers, max_positions = fields.size("num_hidden_layers"), fields.size("max_position_embeddings")
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, list) or any(layer != "full_attention" for layer in layer_types):
        raise fields.refuse("layer_types", "is not supported (only full_attention)")
    if layer_types and len(layer_types) != layers:
        raise RequestError(f"{where}: layer_types has {len(layer_types)} entries, num_hidden_layers is {layers}")
    heads, hidden = fields.size("num_attention_heads"), fields.size("hidden_size")
    # Without grouped attention: as transformers' classes do.
    kv_heads = heads if fields.config.get("num_key_value_heads") is None else fields.size("num_key_value_heads")
    if heads % kv_heads:
        default = "" if "num_key_value_heads" in config else " (transformers' default: config.json names none)"
        raise RequestError(
            f"{where}: num_key_value_heads = {kv_heads}{default} does not divide num_attention_heads = {heads}"
        )
    rope = read_rope(config, where, max_positions)
    if isinstance(rope.scaling, Yarn):
        max_positions = min(max_positions, rope.scaling.context)
    return ModelFacts(
        architecture=family.architecture,
        layers=layers,
        hidden=hidden,
        ffn=fields.size("intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_head_dim(fields, family, heads, hidden),
        vocab=fields.size("vocab_size"),
        tied=fields.flag("tie_word_embeddings"),
        qk_norm=family.qk_norm,
        qkv_bias=family.qkv_bias,
        norm_eps=fields.positive("rms_norm_eps"),
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        max_positions=max_positions,
        experts=_experts(fields) if family.experts else None,
        eos=_eos(config, where),
    )


def _head_dim(fields: _Fields, family: Family, heads: int, hidden: int) -> int:
    """Its own, or the share of the hidden size; Qwen3 alone has a default."""
    value, share = fields.config.get("head_dim"), f"hidden_size / num_attention_heads = {hidden} / {heads}"
    # transformers' Llama wants it whatever head_dim says.
    if hidden % heads and (value is None or family.head_dim != "free"):
        raise RequestError(f"{fields.where}: {share} is no whole number")
    head_dim = hidden // heads if value is None else fields.size("head_dim")
    if family.head_dim == "share" and head_dim != hidden // heads:
        raise fields.refuse("head_dim", f"is not supported: vLLM's Qwen2 takes {share}")
    if head_dim % 2:
        raise RequestError(f"{fields.where}: head_dim = {head_dim} is odd: rope turns pairs of dimensions")
    return head_dim


def _family(config: dict[str, Any], where: str) -> Family:
    """The family of an architecture; transformers goes by `model_type`, vLLM by `architectures`: they must agree."""
    names = config.get("architectures")
    supported = ", ".join(FAMILIES)
    if not isinstance(names, list) or len(names) != 1 or names[0] not in list(FAMILIES):
        raise RequestError(f"{where}: architecture {names or 'not given'} is not supported; supported: {supported}")
    family = FAMILIES[names[0]]
    if config.get("model_type", family.model_type) != family.model_type:
        raise RequestError(f"{where}: model_type = {config['model_type']!r} contradicts architecture {names[0]}")
    return family


def _experts(fields: _Fields) -> Experts:
    """transformers 5 writes num_local_experts, the checkpoints of the hub have num_experts."""
    names = [name for name in ("num_experts", "num_local_experts") if fields.config.get(name) is not None]
    if not names:
        raise RequestError(f"{fields.where}: num_experts is missing")
    counts = sorted({fields.size(name) for name in names})
    if len(counts) > 1:
        raise RequestError(f"{fields.where}: num_experts is contradictory: {counts}")
    per_token = fields.size("num_experts_per_tok")
    if per_token > counts[0]:
        raise RequestError(f"{fields.where}: num_experts_per_tok = {per_token} is more than num_experts = {counts[0]}")
    return Experts(counts[0], per_token, fields.size("moe_intermediate_size"), fields.flag("norm_topk_prob"))
