"""The layout map against Megatron's layout in plain torch operations; names and shapes against real models."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from a3po_megatron.errors import RequestError
from a3po_megatron.model.cut import Piece, hf_tensors, pieces
from a3po_megatron.model.facts import Experts, ModelFacts
from a3po_megatron.model.layout import Layout, check_layout, padded_vocab
from a3po_megatron.model.read import NEUTRAL, facts_of, read_facts
from a3po_megatron.model.rope import RopeScaling
from tests.harness.tiny_models import tensor_pieces

VOCABULARY = {"embedding.word_embeddings.weight", "output_layer.weight"}
REAL = ("Qwen3-8B", "Qwen3-8B-Base", "Qwen2.5-Math-7B", "DeepSeek-R1-Distill-Qwen-7B")
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "num_hidden_layers": 3,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 67,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "eos_token_id": 1,
}

MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}


@st.composite
def models(draw: st.DrawFn) -> tuple[ModelFacts, int]:
    """A model and a tensor-parallel size that divides it; the heads of a group, sizes and vocabulary are odd ones."""
    tensor = draw(st.sampled_from([1, 2, 3, 4, 8]))
    kv_heads = tensor * draw(st.integers(1, 3))
    qwen3 = draw(st.booleans())
    facts = ModelFacts(
        architecture="Qwen3ForCausalLM" if qwen3 else "Qwen2ForCausalLM",
        layers=draw(st.integers(1, 3)),
        hidden=draw(st.integers(1, 9)),
        ffn=tensor * draw(st.integers(1, 5)),
        heads=kv_heads * draw(st.integers(1, 4)),
        kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 4)),
        vocab=draw(st.integers(1, 40)),
        tied=draw(st.booleans()),
        qk_norm=qwen3,
        qkv_bias=not qwen3,
        norm_eps=1e-6,
        rope_theta=1e4,
        max_positions=64,
        eos=(1,),
    )
    return facts, tensor


def numbered(facts: ModelFacts) -> dict[str, torch.Tensor]:
    """Every HF tensor with elements that are different from those of all others."""
    whole, start = {}, 1
    for name, shape in hf_tensors(facts).items():
        count = torch.Size(shape).numel()
        whole[name] = torch.arange(start, start + count).view(shape)
        start += count
    return whole


def megatron_parameters(
    facts: ModelFacts, tensor: int, rank: int, hf: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What Megatron keeps on one rank, said literally: whole tensors are chunked, then laid out; padding is 0."""

    def vocabulary(weight: torch.Tensor) -> torch.Tensor:
        rows = -(-facts.vocab // tensor) * tensor
        padding = torch.zeros(rows - facts.vocab, facts.hidden, dtype=weight.dtype)
        return torch.cat([weight, padding]).chunk(tensor)[rank]

    def qkv(prefix: str, kind: str) -> torch.Tensor:
        q, k, v = (hf[f"{prefix}self_attn.{name}_proj.{kind}"] for name in "qkv")
        groups = []
        for queries, key, value in zip(*(t.chunk(facts.kv_heads) for t in (q, k, v)), strict=True):
            groups.append(torch.cat([queries, key, value]))
        return torch.cat(groups[rank * facts.kv_heads // tensor : (rank + 1) * facts.kv_heads // tensor])

    found = {"embedding.word_embeddings.weight": vocabulary(hf["model.embed_tokens.weight"])}
    for layer in range(facts.layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        found[f"{ours}input_layernorm.weight"] = hf[f"{theirs}input_layernorm.weight"]
        found[f"{ours}self_attention.linear_qkv.weight"] = qkv(theirs, "weight")
        if facts.qkv_bias:
            found[f"{ours}self_attention.linear_qkv.bias"] = qkv(theirs, "bias")
        if facts.qk_norm:
            found[f"{ours}self_attention.q_layernorm.weight"] = hf[f"{theirs}self_attn.q_norm.weight"]
            found[f"{ours}self_attention.k_layernorm.weight"] = hf[f"{theirs}self_attn.k_norm.weight"]
        found[f"{ours}self_attention.linear_proj.weight"] = hf[f"{theirs}self_attn.o_proj.weight"].chunk(tensor, 1)[
            rank
        ]
        found[f"{ours}pre_mlp_layernorm.weight"] = hf[f"{theirs}post_attention_layernorm.weight"]
        gate, up = (hf[f"{theirs}mlp.{name}_proj.weight"].chunk(tensor)[rank] for name in ("gate", "up"))
        found[f"{ours}mlp.linear_fc1.weight"] = torch.cat([gate, up])
        found[f"{ours}mlp.linear_fc2.weight"] = hf[f"{theirs}mlp.down_proj.weight"].chunk(tensor, 1)[rank]
    found["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
    if not facts.tied:
        found["output_layer.weight"] = vocabulary(hf["lm_head.weight"])
    return found


def window(piece: Piece, start: int) -> tuple[slice, ...]:
    return tuple(
        slice(start, start + piece.length) if dim == piece.dim else slice(None) for dim in range(len(piece.shape))
    )


@settings(deadline=None, max_examples=60)
@given(models())
def test_the_map_fills_every_parameter_as_megatron_lays_it_out(model: tuple[ModelFacts, int]) -> None:
    facts, tensor = model
    hf = numbered(facts)
    for rank in range(tensor):
        wanted = megatron_parameters(facts, tensor, rank, hf)
        found = {name: torch.zeros_like(value) for name, value in wanted.items()}
        for piece in tensor_pieces(facts, tensor, rank):
            found[piece.parameter][window(piece, piece.offset)] = hf[piece.tensor][window(piece, piece.start)]
        for name, value in wanted.items():
            assert torch.equal(found[name], value), f"{name} on rank {rank} of {tensor}"


@settings(deadline=None, max_examples=60)
@given(models())
def test_every_hf_element_is_owned_exactly_once_over_the_ranks(model: tuple[ModelFacts, int]) -> None:
    facts, tensor = model
    owned = {name: np.zeros(shape, dtype=np.int64) for name, shape in hf_tensors(facts).items()}
    for rank in range(tensor):
        for piece in tensor_pieces(facts, tensor, rank):
            assert piece.shape == owned[piece.tensor].shape
            part = owned[piece.tensor][window(piece, piece.start)]
            assert part.size == piece.numel > 0
            part += piece.owner
    for name, count in owned.items():
        assert (count == 1).all(), name


@settings(deadline=None, max_examples=60)
@given(models())
def test_every_parameter_element_lies_in_one_piece_but_for_the_padding_of_the_vocabulary(
    model: tuple[ModelFacts, int],
) -> None:
    facts, tensor = model
    hf = numbered(facts)
    for rank in range(tensor):
        wanted = megatron_parameters(facts, tensor, rank, hf)
        covered = {name: np.zeros(tuple(value.shape), dtype=np.int64) for name, value in wanted.items()}
        for piece in tensor_pieces(facts, tensor, rank):
            covered[piece.parameter][window(piece, piece.offset)] += 1
        for name, count in covered.items():
            assert ((count == 1) == (wanted[name].numpy() > 0)).all(), name
            assert (count <= 1).all(), name
            assert name in VOCABULARY or (count == 1).all(), name


@settings(deadline=None, max_examples=60)
@given(models())
def test_pieces_follow_the_order_of_the_layers_and_the_vocabulary_is_padded_no_more_than_it_must(
    model: tuple[ModelFacts, int],
) -> None:
    facts, tensor = model
    order = list(hf_tensors(facts))
    for rank in range(tensor):
        layers = [
            piece.tensor.split(".")[2] for piece in tensor_pieces(facts, tensor, rank) if ".layers." in piece.tensor
        ]
        assert layers == sorted(layers)
        assert {piece.tensor for piece in tensor_pieces(facts, tensor, rank)} <= set(order)
    assert padded_vocab(facts.vocab, tensor) % tensor == 0
    assert facts.vocab <= padded_vocab(facts.vocab, tensor) < facts.vocab + tensor


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 2}, "num_attention_heads = 6"),
        ({"num_attention_heads": 8, "num_key_value_heads": 2}, "num_key_value_heads = 2"),
        ({"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 82}, "intermediate_size = 82"),
    ],
)
def test_a_size_that_the_tensor_parallel_size_does_not_divide_is_named(changes: dict[str, int], name: str) -> None:
    facts = facts_of(CONFIG | changes, "config.json")
    for attempt in (lambda: check_layout(facts, Layout(tensor=4)), lambda: tensor_pieces(facts, 4, 0)):
        with pytest.raises(RequestError) as caught:
            attempt()
        assert "parallel.tensor = 4" in str(caught.value)
        assert name in str(caught.value)


# --- names and shapes against transformers and published checkpoints ----------------------------------------------


def hf_configs() -> Iterator[Any]:
    sizes = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "vocab_size": 31,
        "max_position_embeddings": 64,
    }
    for tied in (False, True):
        yield pytest.param(
            Qwen3ForCausalLM, Qwen3Config(**sizes, head_dim=16, tie_word_embeddings=tied), id=f"qwen3-tied-{tied}"
        )
        yield pytest.param(Qwen2ForCausalLM, Qwen2Config(**sizes, tie_word_embeddings=tied), id=f"qwen2-tied-{tied}")


@pytest.mark.parametrize(("model", "config"), hf_configs())
def test_names_shapes_and_facts_are_those_of_the_model_in_transformers(tmp_path: Path, model: Any, config: Any) -> None:
    config.architectures = [model.__name__]
    config.save_pretrained(tmp_path)
    facts = read_facts(tmp_path)
    with torch.device("meta"):
        built = model(config)
    wanted = {name: tuple(parameter.shape) for name, parameter in built.named_parameters()}  # shared ones once
    assert hf_tensors(facts) == wanted
    assert facts.rope_theta == config.rope_parameters["rope_theta"]
    assert (facts.tied, facts.max_positions) == (config.tie_word_embeddings, 64)


@pytest.mark.skipif(
    "A3PO_TEST_DATA" not in os.environ, reason="A3PO_TEST_DATA does not name a folder with model configs"
)
@pytest.mark.parametrize("model", REAL)
def test_names_and_shapes_are_those_of_the_published_checkpoint(model: str) -> None:
    folder = Path(os.environ["A3PO_TEST_DATA"]) / "model_configs"
    published = json.loads((folder / "tensor_layouts.json").read_text())[model]
    config = json.loads((folder / f"{model}.config.json").read_text())
    wanted = {}
    for entry in published["tensors"]:
        for layer in range(entry["count"]):
            wanted[entry["name"].replace("{L}", str(layer))] = tuple(entry["shape"])
    found = hf_tensors(facts_of(config, model))
    assert found == wanted
    assert len(found) == published["tensor_count"]
    assert sum(torch.Size(shape).numel() for shape in found.values()) == published["params"]


@pytest.mark.skipif(
    "A3PO_TEST_DATA" not in os.environ, reason="A3PO_TEST_DATA does not name a folder with model configs"
)
def test_every_published_config_is_read() -> None:
    folder = Path(os.environ["A3PO_TEST_DATA"]) / "model_configs"
    read = {}
    for path in sorted(folder.glob("*.config.json")):
        name = path.name.removesuffix(".config.json")
        read[name] = facts_of(json.loads(path.read_text()), name)
    assert {*REAL, "Meta-Llama-3.1-70B", "Qwen3-235B-A22B"} <= set(read)
    # From the models' cards: layers, query and KV heads, and the base of the rope.
    facts = {name: (f.layers, f.heads, f.kv_heads, f.head_dim, f.rope_theta) for name, f in read.items()}
    assert facts["Qwen3-8B"] == (36, 32, 8, 128, 1e6)
    assert facts["Qwen3-32B"] == (64, 64, 8, 128, 1e6)
    assert facts["Qwen2.5-Math-7B"] == (28, 28, 4, 128, 1e4)
    assert facts["Meta-Llama-3.1-70B"] == (80, 64, 8, 128, 5e5)
    assert read["Meta-Llama-3.1-8B"].rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)
    assert read["Meta-Llama-3-8B"].rope_scaling is None
    assert read["Qwen3-30B-A3B"].experts == Experts(128, 8, 768, True)
    assert read["Qwen3-235B-A22B"].experts == Experts(128, 8, 1536, True)


# --- facts and refusals ------------------------------------------------------------------------------------------


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in CONFIG.items() if name not in names}


def test_both_forms_of_the_rope_parameters_read_equal() -> None:
    older = CONFIG | {"rope_scaling": None}
    newer = without("rope_theta") | {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
    both = older | newer
    assert facts_of(older, "a") == facts_of(newer, "b") == facts_of(both, "c") == facts_of(CONFIG, "d")
    assert facts_of(without("rope_theta") | {"rope_parameters": {"rope_theta": 5e5}}, "e").rope_theta == 5e5


# Fields that change what a model computes, each at a value at which it does.
CHANGING: dict[str, Any] = {
    "hidden_act": "gelu",
    **dict.fromkeys(["attention_bias", "mlp_bias", "bias", "qkv_bias", "qk_norm"], True),
    **dict.fromkeys(["use_sliding_window", "use_mrope", "attn_temperature_tuning"], True),
    "is_causal": False,
    **dict.fromkeys(["pretraining_tp", "decoder_sparse_step", "n_shared_experts"], 2),
    **dict.fromkeys(["partial_rotary_factor", "attention_dropout", "logit_scale", "logits_scaling"], 0.5),
    **dict.fromkeys(["embedding_multiplier", "residual_multiplier", "attention_multiplier"], 3.0),
    **dict.fromkeys(["attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"], 30.0),
    **dict.fromkeys(["original_max_position_embeddings", "shared_expert_intermediate_size"], 64),
    "dual_chunk_attention_config": {"chunk_size": 8},
    "per_layer_config": {"1": {"rms_norm_eps": 0.5}},
    **{name: {"quant_method": "fp8"} for name in ("quantization_config", "compression_config")},
    **{name: [0] for name in ("mlp_only_layers", "no_rope_layers")},
}
SIZES = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "max_position_embeddings"),
)
LLAMA3: dict[str, Any] = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 64,
}
LLAMA = CONFIG | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        *((CONFIG | {name: value}, f"{name} = ") for name, value in CHANGING.items()),
        *((CONFIG | {name: number}, f"{name} = ") for name, number in (("qk_norm", 0), ("is_causal", 1))),
        *((CONFIG | {n: value}, f"{n} = ") for n in SIZES for value in ("4", 4.0, True, [4], 0, -4)),
        *((CONFIG | MOE | {n: v}, n) for n in MOE if n != "architectures" for v in ("4", 4.0, [4], 0, -4)),
        *((CONFIG | MOE | {name: True}, name) for name in ("num_experts", "num_experts_per_tok")),
        *(
            (CONFIG | {name: value}, f"{name} = ")
            for name in ("rms_norm_eps", "rope_theta")
            for value in ("1", True, [1], 0, -1.0, float("nan"), float("inf"))
        ),
        *((CONFIG | MOE | {n: "false"}, f"{n} = ") for n in ("tie_word_embeddings", "norm_topk_prob")),
        *((CONFIG | {"tie_word_embeddings": value}, "tie_word_embeddings = ") for value in (1, 0, "no")),
        *((CONFIG | {"eos_token_id": value}, "eos_token_id = ") for value in ("<eos>", 1.5, True, -1, [[1]], ["a", 1])),
        *((CONFIG | {"model_type": kind}, f"model_type = {kind!r}") for kind in ("llama", "granite", 5)),
        *((CONFIG | {"architectures": given}, "architecture") for given in (5, [["a"]], [], "Qwen3ForCausalLM")),
        (CONFIG | {"architectures": ["MistralForCausalLM", "Qwen3ForCausalLM"]}, "MistralForCausalLM"),
        *((CONFIG | {"layer_types": value}, "layer_types = ") for value in (5, "full_attention", ["linear_attention"])),
        (CONFIG | MOE | {"num_experts_per_tok": 9}, "num_experts_per_tok = 9 is more than num_experts = 8"),
        (CONFIG | MOE | {"num_local_experts": 4}, "num_experts is contradictory"),
        (LLAMA | {"rope_scaling": LLAMA3 | {"type": "yarn"}}, "two types: llama3, yarn"),
        *((LLAMA | {"rope_scaling": LLAMA3 | {"low_freq_factor": low}}, "high_freq_factor") for low in (4.0, 5.0)),
        *(
            (LLAMA | {"rope_parameters": LLAMA3 | {"rope_theta": 1e4, name: value}}, f"rope_parameters.{name} = ")
            for name in LLAMA3
            if name != "rope_type"
            for value in ("4", True, [4], 0, None)
        ),
        (LLAMA | {"rope_parameters": LLAMA3 | {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor"),
        (LLAMA | {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters.full_attention"),
        (CONFIG | {"use_sliding_window": True, "sliding_window": 64}, "use_sliding_window"),
        (CONFIG | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types"),
        (CONFIG | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        (CONFIG | {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "llama3"}}, "rope_parameters"),
        (CONFIG | {"rope_parameters": {"rope_theta": 20000.0, "rope_type": "default"}}, "contradictory"),
        (CONFIG | {"attention_bias": True}, "attention_bias"),
        (CONFIG | {"hidden_act": "gelu"}, "hidden_act"),
        (CONFIG | {"use_mrope": True}, "use_mrope"),
        (CONFIG | {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        (CONFIG | {"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
        (CONFIG | {"architectures": ["LlamaForCausalLM"], "mlp_bias": True}, "mlp_bias"),
        (
            CONFIG | {"architectures": ["LlamaForCausalLM"], "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "low_freq_factor",
        ),
        (CONFIG | {"architectures": ["Qwen3MoeForCausalLM"]}, "num_experts is missing"),
        (CONFIG | MOE | {"mlp_only_layers": [0]}, "mlp_only_layers"),
        (CONFIG | MOE | {"decoder_sparse_step": 2}, "decoder_sparse_step"),
        (CONFIG | {"architectures": None}, "not given"),
        (without("architectures"), "not given"),
        (without("hidden_size"), "hidden_size"),
        (without("num_hidden_layers"), "num_hidden_layers"),
        (without("vocab_size"), "vocab_size"),
        (CONFIG | {"intermediate_size": None}, "intermediate_size"),
    ],
)
def test_a_config_that_cannot_be_represented_is_refused_by_name(config: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestError) as caught:
        facts_of(config, "some/config.json")
    assert str(caught.value).startswith("some/config.json: ")
    assert named in str(caught.value)


def test_every_field_that_changes_what_a_model_computes_is_among_the_cases() -> None:
    assert CHANGING.keys() == NEUTRAL.keys()
    assert facts_of(LLAMA | {"rope_scaling": LLAMA3}, "sound").rope_scaling == RopeScaling(8.0, 1.0, 4.0, 64)
    assert facts_of(CONFIG | MOE | {"num_experts_per_tok": 8}, "sound").experts == Experts(8, 8, 24, True)


def test_settings_that_change_nothing_are_not_refused() -> None:
    harmless = {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28, "attention_bias": False}
    assert facts_of(CONFIG | harmless | {"layer_types": ["full_attention"] * 3}, "a") == facts_of(CONFIG, "b")


def test_several_end_tokens_one_or_none_are_read() -> None:
    assert facts_of(CONFIG | {"eos_token_id": [5, 9]}, "a").eos == (5, 9)
    assert facts_of(CONFIG | {"eos_token_id": 0}, "b").eos == (0,)
    assert facts_of(without("eos_token_id"), "c").eos == ()


def test_the_end_tokens_of_the_generation_config_end_responses_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert read_facts(tmp_path).eos == (1,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 1]}')
    assert read_facts(tmp_path).eos == (1, 7)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert read_facts(tmp_path).eos == (1, 9)
    (tmp_path / "generation_config.json").write_text("{}")
    assert read_facts(tmp_path).eos == (1,)


def test_a_folder_without_a_readable_config_is_named(tmp_path: Path) -> None:
    for folder, text, named in (
        (tmp_path / "none", None, "model.path"),
        (tmp_path, None, "config.json"),
        (tmp_path, "{", "not valid JSON"),
    ):
        if text is not None:
            (tmp_path / "config.json").write_text(text)
        with pytest.raises(RequestError) as caught:
            read_facts(folder)
        assert str(folder) in str(caught.value)
        assert named in str(caught.value)


# --- layouts of many ranks ---------------------------------------------------------------------------------------


@st.composite
def layouts(draw: st.DrawFn) -> tuple[ModelFacts, Layout]:
    """A dense or mixture-of-experts model and a layout of up to 1,024 ranks that fits it, in either naming scheme."""
    tensor = draw(st.sampled_from([1, 2, 4, 8]))
    pipeline = draw(st.sampled_from([1, 2, 3, 8]))
    virtual = draw(st.sampled_from([1, 2])) if pipeline > 1 else 1
    chunks = pipeline * virtual
    counts = draw(st.lists(st.integers(1, 3), min_size=chunks, max_size=chunks))
    uneven = draw(st.booleans())
    expert, expert_tensor, changes = 1, None, {}
    if draw(st.booleans()):
        expert, expert_tensor = draw(st.sampled_from([(1, None), (2, None), (4, 1), (8, 1), (16, 2), (4, 4)]))
        width = 3 * (expert_tensor or tensor)
        changes = MOE | {"num_experts": 2 * expert, "moe_intermediate_size": width}
    config = CONFIG | changes
    config |= {
        "num_hidden_layers": sum(counts) if uneven else chunks + draw(st.integers(0, chunks)),
        "num_attention_heads": 2 * tensor,
        "num_key_value_heads": tensor,
        "head_dim": 2,
        "hidden_size": 6,
        "intermediate_size": 3 * tensor,
        "vocab_size": draw(st.integers(tensor + 1, 40)),
        "tie_word_embeddings": draw(st.booleans()),
    }
    scheme = draw(st.sampled_from(["local", "te"]))
    stages = tuple(counts) if uneven else None
    return facts_of(config, "config.json"), Layout(tensor, pipeline, virtual, expert, expert_tensor, stages, scheme)


@settings(deadline=None, max_examples=80)
@given(layouts())
def test_every_hf_element_is_owned_exactly_once_per_replica_for_any_layout(case: tuple[ModelFacts, Layout]) -> None:
    facts, layout = case
    assert len(layout.places()) <= 1024
    owned = {name: np.zeros(shape, dtype=np.int64) for name, shape in hf_tensors(facts).items()}
    for place in layout.places():
        covered: dict[tuple[int, str], list[tuple[int, int]]] = {}
        for piece in pieces(facts, layout, place):
            owned[piece.tensor][window(piece, piece.start)] += piece.owner
            covered.setdefault(piece.key, []).append((piece.offset, piece.offset + piece.length))
        for key, spans in covered.items():  # a parameter's pieces follow each other without gap or overlap
            spans.sort()
            assert spans[0][0] == 0, key
            assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(spans)), key
    for name, count in owned.items():
        assert (count == 1).all(), name


@pytest.mark.skipif(
    "A3PO_TEST_DATA" not in os.environ, reason="A3PO_TEST_DATA does not name a folder with model configs"
)
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("Qwen3-30B-A3B", Layout(4, 4, 3, expert=8, expert_tensor=1)),
        ("Qwen3-235B-A22B", Layout(4, 8, expert=32, expert_tensor=1, scheme="te")),
        ("Qwen3-235B-A22B", Layout(4, 8, expert=64, expert_tensor=2)),
        ("Meta-Llama-3.1-405B", Layout(8, 16)),
    ],
)
def test_real_shapes_are_owned_exactly_once(name: str, layout: Layout) -> None:
    config = json.loads((Path(os.environ["A3PO_TEST_DATA"]) / "model_configs" / f"{name}.config.json").read_text())
    facts = facts_of(config, name)
    shapes = hf_tensors(facts)
    spans: dict[str, list[tuple[int, int]]] = {tensor: [] for tensor in shapes}
    for place in layout.places():
        for piece in pieces(facts, layout, place):
            if piece.owner:
                spans[piece.tensor].append((piece.start, piece.start + piece.length))
                assert piece.shape == shapes[piece.tensor]
    for tensor, found in spans.items():
        found.sort()
        assert found[0][0] == 0, tensor
        assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(found)), tensor
        assert found[-1][1] in shapes[tensor], tensor
