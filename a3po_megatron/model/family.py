"""HF config → the facts that the rest of the package needs, and a refusal by name of everything it cannot represent.

This is the only reader of `config.json`. It reads both forms of the rope parameters: transformers 4 (`rope_theta`,
`rope_scaling`) and transformers 5 (`rope_parameters`).
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RequestError

ARCHITECTURES = {
    "Qwen2ForCausalLM": "qwen2",  # Qwen2, Qwen2.5, R1-Distill-Qwen
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "LlamaForCausalLM": "llama",  # Llama 3 and 3.1, R1-Distill-Llama
}


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's rope: low frequencies divided by `factor`, high ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of every layer's MLP."""

    count: int
    per_token: int
    ffn: int  # hidden size of one expert
    norm_topk: bool  # the chosen experts' probabilities are made to sum to 1


@dataclass(frozen=True)
class Family:
    """The facts of one model. Sizes are those of the whole model."""

    architecture: str
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
    max_positions: int
    eos: tuple[int, ...]
    rope_scaling: RopeScaling | None = None
    experts: Experts | None = None


def read_family(folder: Path | str) -> Family:
    """The facts of the HF checkpoint in `folder`.

    Raises RequestError for a missing or unreadable config.json, an unknown architecture, and every field that changes
    the mathematics in a way that is not implemented.
    """
    if not Path(folder).is_dir():
        raise RequestError(f"model.path: {folder} is not a folder with an HF checkpoint")
    path, generation = Path(folder) / "config.json", Path(folder) / "generation_config.json"
    family = family_of(_read_json(path), str(path))
    # Chat models name further tokens that end a turn there.
    more = _eos(_read_json(generation)) if generation.exists() else ()
    return dataclasses.replace(family, eos=tuple(sorted({*family.eos, *more})))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise RequestError(
            f"{path}: cannot read it: {error.strerror}; model.path must hold an HF checkpoint"
        ) from error
    except ValueError as error:
        raise RequestError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise RequestError(f"{path}: expected an object of settings")
    return config


def _eos(config: dict[str, Any]) -> tuple[int, ...]:
    eos = config.get("eos_token_id")
    return tuple(eos) if isinstance(eos, list) else (() if eos is None else (eos,))


def family_of(config: dict[str, Any], where: str) -> Family:
    """The facts of a parsed config.json; `where` names it in errors."""

    def need(name: str) -> Any:
        if config.get(name) is None:
            raise RequestError(f"{where}: the field {name} is missing")
        return config[name]

    def size(name: str) -> int:
        value = need(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise RequestError(f"{where}: {name} = {value!r} is no size")
        return value

    architectures = config.get("architectures") or []
    known = [name for name in architectures if name in ARCHITECTURES]
    if not known:
        supported = ", ".join(ARCHITECTURES)
        raise RequestError(
            f"{where}: architecture {architectures or 'not given'} is not supported; supported: {supported}"
        )
    kind = ARCHITECTURES[known[0]]

    def refuse(name: str, meaning: str) -> None:
        raise RequestError(f"{where}: {name} = {config.get(name)!r} is not supported ({meaning})")

    if config.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", "only silu")
    if config.get("use_sliding_window"):
        refuse("use_sliding_window", "attention over a window")
    if any(kind_of != "full_attention" for kind_of in config.get("layer_types") or []):
        refuse("layer_types", "only full_attention")
    for name in ("attention_bias", "mlp_bias"):
        if config.get(name):
            refuse(name, "biased projections")
    if config.get("pretraining_tp", 1) != 1:
        refuse("pretraining_tp", "only 1")
    if config.get("use_mrope"):
        refuse("use_mrope", "multimodal rope")
    if config.get("quantization_config"):
        refuse("quantization_config", "quantised weights cannot be trained")
    if kind == "qwen3_moe":
        if config.get("decoder_sparse_step", 1) != 1:
            refuse("decoder_sparse_step", "every layer must be a mixture of experts")
        if config.get("mlp_only_layers"):
            refuse("mlp_only_layers", "every layer must be a mixture of experts")
    heads, hidden, kv_heads = size("num_attention_heads"), size("hidden_size"), size("num_key_value_heads")
    if heads % kv_heads:
        raise RequestError(f"{where}: num_key_value_heads = {kv_heads} does not divide num_attention_heads = {heads}")
    # Qwen3's own default is 128, whatever the other sizes are: guessing would be wrong for one of the families.
    head_dim = size("head_dim") if kind[:5] == "qwen3" or config.get("head_dim") is not None else hidden // heads
    return Family(
        architecture=known[0],
        layers=size("num_hidden_layers"),
        hidden=hidden,
        ffn=size("intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=size("vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        qk_norm=kind in ("qwen3", "qwen3_moe"),
        qkv_bias=kind == "qwen2",
        norm_eps=need("rms_norm_eps"),
        rope_theta=_rope_theta(config, where),
        rope_scaling=_rope_scaling(config, where),
        max_positions=size("max_position_embeddings"),
        experts=Experts(
            count=_experts(config, where),
            per_token=size("num_experts_per_tok"),
            ffn=size("moe_intermediate_size"),
            norm_topk=bool(config.get("norm_topk_prob", False)),
        )
        if kind == "qwen3_moe"
        else None,
        eos=_eos(config),
    )


def _experts(config: dict[str, Any], where: str) -> int:
    """transformers 5 writes num_local_experts, the checkpoints of the hub have num_experts."""
    counts = {config[name] for name in ("num_experts", "num_local_experts") if config.get(name) is not None}
    if len(counts) != 1:
        raise RequestError(f"{where}: num_experts is {'missing' if not counts else f'contradictory: {sorted(counts)}'}")
    return counts.pop()


def _rope_theta(config: dict[str, Any], where: str) -> float:
    thetas = {config["rope_theta"]} if config.get("rope_theta") is not None else set()
    thetas |= {
        values["rope_theta"] for _, values in _rope_fields(config, where) if values.get("rope_theta") is not None
    }
    if len(thetas) != 1:
        found = "missing" if not thetas else f"contradictory: {sorted(map(str, thetas))}"
        raise RequestError(f"{where}: rope_theta is {found}")
    theta = thetas.pop()
    if not isinstance(theta, int | float) or not theta > 0:
        raise RequestError(f"{where}: rope_theta = {theta!r} is no positive number")
    return float(theta)


def _rope_fields(config: dict[str, Any], where: str) -> list[tuple[str, dict[str, Any]]]:
    """The fields that transformers 4 and 5 keep rope settings in, as far as the config has them."""
    found = [(name, config[name]) for name in ("rope_scaling", "rope_parameters") if config.get(name)]
    for name, values in found:
        if not isinstance(values, dict):
            raise RequestError(f"{where}: {name} = {values!r} is not supported: expected an object")
    return found


def _rope_scaling(config: dict[str, Any], where: str) -> RopeScaling | None:
    """The scaling in either form; a second, different one, an unknown type and unknown fields are refused by name."""
    found: set[RopeScaling | None] = set()
    for name, given in _rope_fields(config, where):
        values = dict(given)
        kind = values.pop("rope_type", None) or values.get("type", "default")
        values.pop("type", None)
        values.pop("rope_theta", None)
        if kind == "default" and not values:
            found.add(None)
            continue
        if kind != "llama3":
            raise RequestError(f"{where}: {name} of type {kind!r} is not supported; only unscaled and llama3 rope are")
        fields = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        if set(values) != set(fields):
            raise RequestError(
                f"{where}: {name} must hold exactly {', '.join(fields)}: got {', '.join(sorted(values))}"
            )
        found.add(RopeScaling(*(values[field] for field in fields)))
    if len(found) > 1:
        raise RequestError(f"{where}: rope_scaling and rope_parameters contradict each other")
    return found.pop() if found else None
