"""What config.json leaves out or leaves null: as transformers' own classes take it, or refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from a3po_megatron.errors import RequestError
from a3po_megatron.model.facts import ModelFacts
from a3po_megatron.model.families.registry import FAMILIES
from a3po_megatron.model.read import facts_of
from a3po_megatron.model.rope import Yarn, vllm_parameters

# Sizes at which transformers' defaults of 32 and of 4 KV heads, and of 128 a head, would be sound ones.
COMMON: dict[str, Any] = {
    **{"num_hidden_layers": 3, "hidden_size": 128, "intermediate_size": 80, "num_attention_heads": 32},
    **{"num_key_value_heads": 8, "vocab_size": 67, "max_position_embeddings": 256, "eos_token_id": 1},
    **{"tie_word_embeddings": True, "rms_norm_eps": 1e-5, "rope_theta": 5000.0, "hidden_act": "silu"},
    **{"attention_dropout": 0.0, "rope_scaling": None, "rope_parameters": None},
}
WINDOW = {"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 1}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
OWN: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 16, "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
    "qwen2": {**WINDOW, "layer_types": ["full_attention"] * 3},
    "qwen3": {**WINDOW, "layer_types": ["full_attention"] * 3, "head_dim": 16, "attention_bias": False},
    "qwen3_moe": {
        **{"head_dim": 16, "attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
        **EXPERTS,
        "use_sliding_window": False,
    },
}
# transformers 5.19 fails on these as well, but we have no use for them: null or absent, they change nothing.
UNREAD = {"max_window_layers", "sliding_window"}
# What must be taken, so that refusing everything is no way to pass.
TAKEN = {
    *((kind, name, "drop") for kind in OWN for name in ("rope_theta", "rms_norm_eps", "max_position_embeddings")),
    *((kind, name, "drop") for kind in OWN for name in ("tie_word_embeddings", "hidden_act", "num_key_value_heads")),
    *((kind, name, how) for kind in OWN for name in ("rope_scaling", "rope_parameters") for how in ("drop", "null")),
    *((kind, "num_key_value_heads", "null") for kind in ("llama", "qwen2", "qwen3")),
    *((kind, "head_dim", "drop") for kind in ("llama", "qwen3", "qwen3_moe")),
    *(("qwen3_moe", name, "drop") for name in ("norm_topk_prob", "mlp_only_layers", "decoder_sparse_step")),
    *((kind, "attention_bias", "drop") for kind in ("llama", "qwen3", "qwen3_moe")),
    ("llama", "head_dim", "null"),
    ("qwen3_moe", "mlp_only_layers", "null"),
    *((kind, "layer_types", how) for kind in ("qwen2", "qwen3") for how in ("drop", "null")),
}


def config_of(kind: str, drop: set[str] = frozenset(), null: set[str] = frozenset(), **more: Any) -> dict[str, Any]:  # type: ignore[assignment]
    (architecture,) = (name for name, family in FAMILIES.items() if family.model_type == kind)
    config = {"architectures": [architecture], "model_type": kind} | COMMON | OWN[kind] | more
    return {name: None if name in null else value for name, value in config.items() if name not in drop}


def oracle(config: dict[str, Any]) -> PretrainedConfig:
    """transformers' own class, which raises errors of many kinds."""
    return AutoConfig.for_model(**json.loads(json.dumps(config)))


def expected(config: PretrainedConfig) -> dict[str, Any]:
    rope = dict(config.rope_parameters)
    assert rope.pop("rope_theta") is not None, "transformers' model fails on it"
    head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    found = {
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "ffn": config.intermediate_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": int(head_dim),
        "vocab": config.vocab_size,
        "tied": config.tie_word_embeddings,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_parameters["rope_theta"],
        "max_positions": config.max_position_embeddings,
    }
    if config.model_type == "qwen3_moe":
        found["experts"] = (
            *(config.num_experts, config.num_experts_per_tok),
            *(config.moe_intermediate_size, config.norm_topk_prob),
        )
    return found


def ours(facts: ModelFacts, names: Any) -> dict[str, Any]:
    found = {name: getattr(facts, name) for name in names}
    if facts.experts is not None:
        e = facts.experts
        found["experts"] = (e.count, e.per_token, e.ffn, e.norm_topk)
    return found


def agrees(config: dict[str, Any], changed: set[str]) -> bool:
    """True: taken as transformers takes it; False: refused, by the name of what was changed."""
    try:
        facts = facts_of(config, "config.json")
    except RequestError as error:
        if not any(name in str(error) for name in changed):
            raise
        return False
    wanted = expected(oracle(config))
    assert ours(facts, [name for name in wanted if name != "experts"]) == wanted
    return True


MEMBERS = [(kind, name) for kind in OWN for name in {**COMMON, **OWN[kind]} if name not in UNREAD]


@pytest.mark.parametrize(("kind", "name"), MEMBERS)
def test_a_member_that_is_absent_or_null_means_what_transformers_takes_it_for_or_is_refused_by_name(
    kind: str, name: str
) -> None:
    assert agrees(config_of(kind), set())
    for how in ("drop", "null"):
        changed = {name}
        config = config_of(kind, drop=changed) if how == "drop" else config_of(kind, null=changed)
        assert agrees(config, changed) or (kind, name, how) not in TAKEN, how


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(sorted(OWN)), st.data())
def test_members_that_are_absent_or_null_together_mean_the_same(kind: str, data: st.DataObject) -> None:
    optional = sorted({name for k, name, _ in TAKEN if k == kind})
    drop = set(data.draw(st.lists(st.sampled_from(optional), unique=True)))
    null = {name for k, name, how in TAKEN if k == kind and how == "null"} - drop
    null = set(data.draw(st.lists(st.sampled_from(sorted(null)), unique=True))) if null else set()
    config = config_of(kind, drop, null)
    assert agrees(config, drop | null)


@pytest.mark.parametrize("kind", OWN)
def test_a_head_that_the_hidden_size_does_not_divide_into_or_that_vllm_reads_otherwise_is_refused(kind: str) -> None:
    odd = {"llama": "is no whole number", "qwen2": "is no whole number"}
    for changes, named in ({"hidden_size": 100}, odd.get(kind)), ({"head_dim": 6}, {"qwen2": "head_dim = 6"}.get(kind)):
        if named is None:
            assert facts_of(config_of(kind, **changes), "c").hidden == changes.get("hidden_size", 128)
            continue
        with pytest.raises(RequestError, match=named):
            facts_of(config_of(kind, **changes), "c")


@pytest.mark.skipif(
    "A3PO_TEST_DATA" not in os.environ, reason="A3PO_TEST_DATA does not name a folder with model configs"
)
def test_published_configs_say_the_same_to_transformers_and_to_us_whatever_default_is_left_out() -> None:
    folder, taken = Path(os.environ["A3PO_TEST_DATA"]) / "model_configs", 0
    for path in sorted(folder.glob("*.config.json")):
        config = json.loads(path.read_text())
        for name in [None, *config]:
            if name not in ("model_type", "architectures"):
                taken += agrees({key: value for key, value in config.items() if key != name}, {str(name)})
    assert taken >= 12 * 12  # files × members that may be left out


# --- rope ---------------------------------------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def same_rope(config: dict[str, Any]) -> ModelFacts:
    """Our frequencies and attention factor against those of transformers' own module, bit for bit."""
    from a3po_megatron import compat

    compat.prepare()  # before Megatron is imported
    from a3po_megatron.model.build import rope_frequencies, softmax_scale

    facts, rotary = facts_of(config, "config.json"), LlamaRotaryEmbedding(oracle(config))
    assert torch.equal(rope_frequencies(facts), rotary.inv_freq)
    assert softmax_scale(facts) == pytest.approx(rotary.attention_scaling**2 * facts.head_dim**-0.5, rel=1e-15)
    return facts


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize(
    "members",
    [
        {},
        {"factor": 2},
        {"factor": 1.0},
        {"attention_factor": 1.5},
        {"attention_factor": 0.5, "mscale": 1.0, "mscale_all_dim": 0.5},
        {"mscale": 1.0, "mscale_all_dim": 0.5},
        {"mscale": 0.7},
        {"mscale_all_dim": 0.7, "mscale": 0},
        {"beta_fast": 8, "beta_slow": 2.5},
        {"beta_fast": 4, "beta_slow": 4, "truncate": False},
        {"truncate": False},
        {"truncate": True, "beta_slow": 0.5},
        {"original_max_position_embeddings": 8},
        dict.fromkeys(("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")),
        {"partial_rotary_factor": 1.0},
    ],
    ids=str,
)
def test_yarn_turns_and_grows_as_transformers_has_it_in_either_form(kind: str, members: dict[str, Any]) -> None:
    old = dict(YARN | members)
    old["type"] = old.pop("rope_type")
    new = YARN | members | {"rope_theta": 5000.0}
    facts = same_rope(config_of(kind, rope_scaling=old))
    assert facts == same_rope(config_of(kind, drop={"rope_theta"}, rope_parameters=new))
    assert isinstance(facts.rope_scaling, Yarn)
    # What the engine is told holds no null, and means the same to transformers.
    told = vllm_parameters(facts.rope_theta, facts.rope_scaling)
    assert told is not None and None not in told.values()
    assert same_rope(config_of(kind, rope_parameters=told)) == facts


def test_yarn_without_an_original_context_has_the_models_own_and_reaches_no_further_than_vllm_prepares() -> None:
    config = config_of("qwen2", rope_scaling={"type": "yarn", "factor": 4.0})
    assert same_rope(config).max_positions == 256  # of 4 × 256
    assert same_rope(config_of("qwen2", rope_scaling=YARN | {"factor": 2.5})).max_positions == 160  # 2.5 × 64, of 256


@pytest.mark.parametrize("form", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "factor": None, "original_max_position_embeddings": None},
        {"rope_type": "default", "low_freq_factor": None, "mrope_section": None, "truncate": None},
        {"factor": None, "attention_factor": None},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "attention_factor": None,
        }
        | {"original_max_position_embeddings": 64, "beta_fast": None},
        YARN | {"low_freq_factor": None, "short_factor": None, "mscale": None},
    ],
    ids=str,
)
def test_members_of_the_rope_that_are_null_mean_nothing(form: str, rope: dict[str, Any]) -> None:
    told = {name: value for name, value in rope.items() if value is not None}
    theta = {"rope_theta": 5000.0} if form == "rope_parameters" else {}
    assert same_rope(config_of("llama", **{form: rope | theta})) == facts_of(
        config_of("llama", **{form: told | theta}), "c"
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_theta": None}, "rope_theta = None"),
        ({"rope_theta": None, "rope_scaling": YARN}, "rope_theta = None"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": None}}, "rope_parameters.rope_theta = None"),
        *(({"rope_scaling": YARN | {key: None}}, f"rope_scaling.{key} = None") for key in ("rope_type", "type")),
        *(({"rope_scaling": YARN | {name: None}}, f"rope_scaling.{name} = None") for name in YARN if name[0] != "r"),
        ({"rope_scaling": YARN | {"truncate": None}}, "rope_scaling.truncate = None"),
        ({"rope_scaling": YARN | {"partial_rotary_factor": None}}, "partial_rotary_factor = None"),
        ({"rope_scaling": YARN | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        *(({"rope_scaling": YARN | {"factor": value}}, "rope_scaling.factor = ") for value in (0.5, 0, "4", True)),
        *(
            ({"rope_scaling": YARN | {name: value}}, f"rope_scaling.{name} = ")
            for name in ("attention_factor", "beta_fast", "beta_slow")
            for value in (0, -1.0, "1", True, float("nan"))
        ),
        ({"rope_scaling": YARN | {"beta_fast": 1, "beta_slow": 2}}, "beta_fast = 1 must not be below beta_slow = 2"),
        ({"rope_scaling": YARN | {"mscale": -1.0}}, "rope_scaling.mscale = -1.0"),
        (
            {"rope_scaling": YARN | {"original_max_position_embeddings": 64.5}},
            "original_max_position_embeddings = 64.5",
        ),
        (
            {"rope_scaling": YARN | {"finetuned": True}},
            "rope_scaling.finetuned is not supported for rope of type 'yarn'",
        ),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor is missing"),
        *(({"rope_scaling": {"type": kind, "factor": 2.0}}, repr(kind)) for kind in ("linear", "dynamic", "longrope")),
        ({"rope_scaling": YARN, "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}}, "contradict"),
    ],
)
def test_a_rope_that_transformers_or_vllm_could_not_have_is_refused_by_name(
    changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(RequestError) as caught:
        facts_of(config_of("qwen3", **changes), "some/config.json")
    assert str(caught.value).startswith("some/config.json: ") and named in str(caught.value)


def test_the_base_is_that_of_the_form_which_transformers_reads() -> None:
    """With `rope_scaling`, it never looks at the base in `rope_parameters`."""
    both = {"rope_scaling": YARN, "rope_parameters": YARN | {"rope_theta": 7000.0}}
    without = config_of("llama", drop={"rope_theta"}, **both)
    assert oracle(without).rope_parameters["rope_theta"] == 10000.0
    with pytest.raises(RequestError, match="contradictory: 10000 with rope_scaling, 7000 with rope_parameters"):
        facts_of(without, "c")
    assert same_rope(config_of("llama", drop={"rope_theta"}, rope_scaling=YARN)).rope_theta == 10000.0
