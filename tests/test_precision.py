"""What an FP8 learner may be asked for, and what it then asks of Megatron, of packs and of the machine."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from a3po_megatron.config import LearnerOptions, ModelOptions, ParallelOptions, RolloutOptions, load_config, resolve
from a3po_megatron.errors import RequestError
from a3po_megatron.launch import environment
from a3po_megatron.launch import hardware as launch_hardware
from a3po_megatron.launch.check import _check_device
from a3po_megatron.model.facts import ModelFacts
from a3po_megatron.model.precision import (
    FP32_SCALES,
    Hardware,
    check_hardware,
    check_precision,
    megatron_settings,
    token_grain,
)
from a3po_megatron.model.read import read_facts
from a3po_megatron.ranks.backend import backend_of, select_backend
from a3po_megatron.rollout.vllm_engine import engine_arguments
from a3po_megatron.schedule.packing import token_multiple
from tests.harness.tiny_models import make_checkpoint

EXAMPLE = Path(__file__).resolve().parents[1] / "configs/arithmetic.yaml"
BF16 = ModelOptions(path="x", dtype="bfloat16")
H200 = Hardware(capability=(9, 0), cuda=(13, 0), transformer_engine=(2, 11, 0))


def facts_of(tmp_path: Any, kind: str = "qwen3", **sizes: int) -> ModelFacts:
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
    return read_facts(make_checkpoint(tmp_path / kind, kind, **wide | sizes))


def test_without_fp8_megatron_is_asked_for_nothing() -> None:
    for precision in (None, "bf16"):
        assert megatron_settings(LearnerOptions(precision=precision), experts=True) == {}


def test_an_fp8_learner_keeps_bf16_parameters_attention_and_edges_and_no_quantised_copies() -> None:
    found = megatron_settings(LearnerOptions(precision="fp8-blockwise", bf16_layers=(1, 2)), experts=True)
    assert found == {
        "fp8": "e4m3",
        "fp8_recipe": "blockwise",
        "fp8_param": False,
        "fp8_dot_product_attention": False,
        "disable_parameter_transpose_cache": True,
        "first_last_layers_bf16": True,
        "num_layers_at_start_in_bf16": 1,
        "num_layers_at_end_in_bf16": 2,
        "moe_router_padding_for_quantization": True,
    }
    dense = megatron_settings(LearnerOptions(precision="fp8-tensorwise"), experts=False)
    assert dense["fp8_recipe"] == "tensorwise" and not dense["first_last_layers_bf16"]
    assert "moe_router_padding_for_quantization" not in dense  # Megatron refuses it without experts


def test_every_ranks_share_of_a_pack_is_whole_blocks_of_the_recipe() -> None:
    grains = {None: 1, "bf16": 1, "fp8-tensorwise": 16, "fp8-blockwise": 128}
    for (precision, grain), tensor, sequence in itertools.product(grains.items(), (1, 2, 4, 8), (False, True)):
        multiple = token_multiple(token_grain(precision), tensor, sequence)
        share = multiple // tensor if sequence else multiple  # of one rank, where the multiple is just filled
        assert share == grain


@pytest.mark.parametrize(
    ("learner", "dtype", "parallel", "sizes", "mini_batches", "words"),
    [
        ({"precision": "bf16"}, "float32", {}, {}, 1, "learner.precision: bf16 needs model.dtype: bfloat16"),
        ({"precision": "fp8-blockwise"}, "float32", {}, {}, 1, "needs model.dtype: bfloat16"),
        ({"precision": "fp8-tensorwise"}, "bfloat16", {}, {}, 2, "trainer.mini_batches = 2"),
        ({"precision": "fp8-blockwise"}, "bfloat16", {}, {"hidden_size": 264}, 1, "hidden_size on a rank to be a mult"),
        (
            *({"precision": "fp8-blockwise"}, "bfloat16", {"tensor": 2, "sequence": True}, {"hidden_size": 192}, 1),
            "multiple of 128, and it is 192",
        ),
        (
            *({"precision": "fp8-blockwise"}, "bfloat16", {"tensor": 4}, {"intermediate_size": 480}, 1),
            "intermediate_size on a rank to be a multiple of 16, and it is 480 / 4 = 120",
        ),
        ({"precision": "fp8-blockwise", "bf16_layers": (2, 0)}, "bfloat16", {"pipeline": 2}, {}, 1, "first stage"),
        ({"precision": "fp8-blockwise", "bf16_layers": (0, 3)}, "bfloat16", {}, {}, 1, "last stage holds 2 layers"),
    ],
)
def test_what_a_model_layout_or_recipe_cannot_have_is_refused_by_name(
    tmp_path: Any,
    learner: dict[str, Any],
    dtype: Any,
    parallel: dict[str, Any],
    sizes: dict[str, int],
    mini_batches: int,
    words: str,
) -> None:
    model, layout = ModelOptions(path="x", dtype=dtype), ParallelOptions(**parallel)
    with pytest.raises(RequestError) as caught:
        check_precision(LearnerOptions(**learner), model, layout, facts_of(tmp_path, **sizes), mini_batches)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("device", "options", "words"),
    [
        ("cuda", ["model.dtype=float32"], "model.dtype: float32 is none that a GPU's attention"),
        ("cpu", ["learner.precision=fp8-blockwise"], "learner.precision: fp8-blockwise needs a GPU"),
        ("cpu", ["rollout.quantization=fp8_per_block"], "rollout.quantization: fp8_per_block needs a GPU"),
        ("cpu", ["rollout.batch_invariant=true"], "rollout.batch_invariant has no effect on a CPU"),
        ("cuda", ["rollout.quantization=fp8_per_block", "correction.name=none"], "needs correction.name: tis"),
        ("cuda", ["rollout.quantization=fp8_per_block", "rollout.tensor=4"], "num_key_value_heads × head_dim on an"),
        ("cuda", ["rollout.quantization=fp8_per_block", "rollout.bf16_layers=[2,1]"], "the model has 2 layers"),
    ],
)
def test_what_a_device_cannot_do_is_refused_by_name(tmp_path: Any, device: str, options: list[str], words: str) -> None:
    facts = facts_of(tmp_path, head_dim=64)
    config = load_config(EXAMPLE, ["model.dtype=bfloat16", *options])
    settings = resolve(config, facts, backend_of(device), ranks=4)
    with pytest.raises(RequestError) as caught:
        _check_device(settings, facts, backend_of(device))
    assert words in str(caught.value)


# VESPO corrects for the sampler by itself.
@pytest.mark.parametrize("corrected", [[], ["objective.name=vespo", "correction.name=none"]])
def test_quantised_rollouts_and_fp8_learners_are_taken_on_a_gpu(tmp_path: Any, corrected: list[str]) -> None:
    facts = facts_of(tmp_path, head_dim=64)
    asked = [*corrected, "rollout.quantization=fp8_per_block", "rollout.tensor=2", "rollout.bf16_layers=[1,1]"]
    asked += ["learner.precision=fp8-blockwise", "rollout.batch_invariant=true"]
    config = resolve(load_config(EXAMPLE, ["model.dtype=bfloat16", *asked]), facts, backend_of("cuda"), ranks=2)
    _check_device(config, facts, backend_of("cuda"))
    arguments = engine_arguments(tmp_path, config.rollout, torch.bfloat16, backend_of("cuda"), 4)
    assert arguments["quantization"] == "fp8_per_block"
    assert arguments["quantization_config"]["ignore"] == ["*.mlp.gate", "model.layers.0.*", "model.layers.3.*"]
    assert arguments["async_scheduling"] and arguments["enable_sleep_mode"]
    assert environment.of_run(config) == {"VLLM_BATCH_INVARIANT": "1"}


@pytest.mark.parametrize(
    ("device", "tensor", "visible", "off"),
    [("cuda", 2, 1, True), ("cuda", 2, 8, False), ("cuda", 1, 1, False), ("cpu", 2, 1, False)],
)
def test_an_engine_over_ranks_that_see_one_device_each_does_without_vllms_own_all_reduce(
    device: str, tensor: int, visible: int, off: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM looks its neighbours up among the visible devices: KeyError '0->1'."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)  # there is none here
    options = RolloutOptions(tensor=tensor)
    arguments = engine_arguments(tmp_path, options, torch.bfloat16, backend_of(device), 4)
    assert arguments.get("disable_custom_all_reduce", False) is off


@pytest.mark.parametrize("mine", ["hf_overrides", "compilation_config", "kernel_config", "disable_custom_all_reduce"])
def test_what_decides_the_engines_kernels_is_not_given_beside_the_record(mine: str, tmp_path: Path) -> None:
    options = RolloutOptions(engine_args={mine: {}})
    with pytest.raises(RequestError, match=f"rollout.engine_args.{mine}"):
        engine_arguments(tmp_path, options, torch.bfloat16, backend_of("cuda"), 4)


def test_every_argument_that_the_record_for_cuda_gives_vllm_is_one_of_vllms() -> None:
    from vllm.engine.arg_utils import EngineArgs

    fields = {field.name for field in dataclasses.fields(EngineArgs)}
    assert backend_of("cuda").engine_args.keys() | {"quantization", "quantization_config"} <= fields


def test_what_fits_is_taken(tmp_path: Any) -> None:
    facts, experts = facts_of(tmp_path), facts_of(tmp_path, "qwen3_moe", moe_intermediate_size=64)
    for precision, parallel in itertools.product(
        (None, "bf16", "fp8-blockwise", "fp8-tensorwise"), ({}, {"tensor": 2, "sequence": True}, {"pipeline": 2})
    ):
        for each in (facts, experts):
            check_precision(LearnerOptions(precision=precision), BF16, ParallelOptions(**parallel), each, 1)
    check_precision(LearnerOptions(precision="fp8-blockwise"), BF16, ParallelOptions(), facts, 16)


@pytest.mark.parametrize(
    ("precision", "hardware", "words"),
    [
        ("fp8-blockwise", Hardware(None, None, None), "needs a GPU"),
        (None, Hardware((9, 0), None, (2, 11, 0)), "torch is built for the CPU"),
        (None, Hardware((9, 0), (13, 0), None), "no Transformer Engine"),
        (None, Hardware((9, 0), (13, 0), (2, 8, 0)), "transformer-engine 2.8.0"),
        (None, Hardware((9, 0), (13, 0), (2, 12)), "transformer-engine 2.12"),
        ("fp8-tensorwise", Hardware((8, 0), (13, 0), (2, 11, 0)), "this one is sm_80"),
        ("fp8-blockwise", Hardware((9, 0), (12, 8), (2, 11, 0)), "torch is built for CUDA 12.8"),
    ],
)
def test_what_the_machine_cannot_do_is_refused_by_name(
    precision: str | None, hardware: Hardware, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FP32_SCALES, "1")
    with pytest.raises(RequestError) as caught:
        check_hardware(precision, hardware)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("visible", "gpus", "capability"), [(None, 3, (8, 0)), ("1,2", 2, (9, 0)), ("0", 1, (8, 0)), ("GPU-5c", 3, (8, 0))]
)
def test_only_gpus_that_are_visible_count(
    visible: str | None, gpus: int, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = "0, A100, 580.1, 8.0, 81920\n1, H200, 580.1, 9.0, 143771\n2, H200, 580.1, 9.0, 143771\n"
    monkeypatch.setattr(environment, "sees_gpu", lambda: True)  # there is none here, and no nvidia-smi
    monkeypatch.setattr(launch_hardware, "output", lambda *_: answer)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = launch_hardware.find_hardware()
    assert (found.gpus, found.capability) == (gpus, capability)


def test_more_ranks_than_gpus_are_refused() -> None:
    with pytest.raises(RequestError, match="has 8 ranks .* this machine 4 GPUs"):
        check_hardware(None, Hardware((9, 0), (13, 0), (2, 11, 0), gpus=4), ranks=8)


def test_the_patches_for_a_cpu_refuse_to_install_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from a3po_megatron.compat import megatron_cpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # there is none here
    with pytest.raises(RuntimeError, match="must not be installed where CUDA is present"):
        megatron_cpu.install()


@pytest.mark.parametrize(("wanted", "found"), [("cuda", False), ("cpu", True)])
def test_ranks_do_not_train_on_another_device_than_they_were_started_for(
    wanted: str, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found)
    assert select_backend(None).device == ("cuda" if found else "cpu")
    with pytest.raises(RequestError, match=f"cluster.device is {wanted}, but torch finds"):
        select_backend(wanted)


def test_scales_that_are_powers_of_two_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FP32_SCALES, "0")
    with pytest.raises(RequestError, match="powers of 2"):
        check_hardware("fp8-blockwise", H200)
    check_hardware("fp8-tensorwise", H200)  # has one scale a tensor, always float32


def test_a_machine_without_a_gpu_and_one_with_all_it_takes_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FP32_SCALES, "1")
    check_hardware(None, Hardware(None, None, None))
    for precision in (None, "bf16", "fp8-blockwise", "fp8-tensorwise"):
        check_hardware(precision, H200)
