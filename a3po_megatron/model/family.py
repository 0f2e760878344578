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

ARCHITECTURES = {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}


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
    if kind == "qwen3" and config.get("attention_bias"):
        refuse("attention_bias", "Qwen3 with biased attention projections")
    if config.get("use_mrope"):
        refuse("use_mrope", "multimodal rope")
    if config.get("quantization_config"):
        refuse("quantization_config", "quantised weights cannot be trained")
    heads, hidden, kv_heads = size("num_attention_heads"), size("hidden_size"), size("num_key_value_heads")
    if heads % kv_heads:
        raise RequestError(f"{where}: num_key_value_heads = {kv_heads} does not divide num_attention_heads = {heads}")
    # Qwen3's own default is 128, whatever the other sizes are: guessing would be wrong for one of the families.
    head_dim = size("head_dim") if kind == "qwen3" or config.get("head_dim") is not None else hidden // heads
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
        qk_norm=kind == "qwen3",
        qkv_bias=kind == "qwen2",
        norm_eps=need("rms_norm_eps"),
        rope_theta=_rope_theta(config, where),
        max_positions=size("max_position_embeddings"),
        eos=_eos(config),
    )


def _rope_theta(config: dict[str, Any], where: str) -> float:
    thetas = set()
    if config.get("rope_theta") is not None:
        thetas.add(config["rope_theta"])
    for name in ("rope_scaling", "rope_parameters"):
        values = config.get(name) or {}
        if not isinstance(values, dict):
            raise RequestError(f"{where}: {name} = {values!r} is not supported: expected an object")
        kind = values.get("rope_type", values.get("type", "default"))
        if kind != "default":
            raise RequestError(f"{where}: {name} of type {kind!r} is not supported; only unscaled rope is")
        if values.get("rope_theta") is not None:
            thetas.add(values["rope_theta"])
    if len(thetas) != 1:
        found = "missing" if not thetas else f"contradictory: {sorted(map(str, thetas))}"
        raise RequestError(f"{where}: rope_theta is {found}")
    theta = thetas.pop()
    if not isinstance(theta, int | float) or not theta > 0:
        raise RequestError(f"{where}: rope_theta = {theta!r} is no positive number")
    return float(theta)
