"""The learner on Megatron's Transformer Engine spec: updates, names and checkpoints as on the CPU's spec, and FP8 asked
for as it should be. Transformer Engine itself is a stand-in: tests/fake_te says what that can and cannot show."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import cases_te as cases
from tests.distributed.runner import run_ranks
from tests.tiny import make_checkpoint


@pytest.mark.parametrize("world", cases.UPDATES)
def test_one_update_equals_plain_pytorch_on_the_hf_model(world: int, tmp_path: Path) -> None:
    for kind in ("qwen3", "qwen2", "qwen3_moe"):
        make_checkpoint(tmp_path / kind, kind)
    bounds = {  # as on the CPU's spec: tests/test_learner.py
        **{"score": 1e-5, "loss": 1e-6, "gradient": 5e-6, "norm_sgd": 1e-5, "norm": 1e-5, "parameter": 5e-7},
        **{"second_loss": 1e-4, "missing": 0, "padding": 0},
    }
    for name, by_rank in run_ranks(world, *cases.UPDATES[world], folder=tmp_path, te=True).items():
        for rank, found in enumerate(by_rank):
            wrong = {key: found[key] for key, bound in bounds.items() if not found[key] <= bound}
            assert not wrong, f"{name}, rank {rank}: {wrong}"


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("te")
    for kind in ("qwen3", "qwen2", "llama31", "qwen3_moe"):
        make_checkpoint(folder / kind, kind)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 5, "moe_intermediate_size": 64}
    make_checkpoint(folder / "wide", "qwen3", **{k: v for k, v in sizes.items() if not k.startswith("moe")})
    make_checkpoint(folder / "wide_moe", "qwen3_moe", **sizes)
    return run_ranks(2, cases.named, cases.in_fp8, cases.saved, folder=folder, te=True)


def test_the_map_names_every_parameter_of_megatrons_transformer_engine_spec_and_no_other(
    two_ranks: dict[str, Any],
) -> None:
    assert two_ranks["named"] == [[], []]


def test_a_checkpoint_holds_transformer_engines_extra_states_and_goes_on_bit_for_bit(
    two_ranks: dict[str, Any],
) -> None:
    for equal in two_ranks["saved"]:
        assert equal == {"weights": True, "after a further step": True}


RECIPES = {"bf16": "bf16", "fp8-blockwise": "Float8BlockScaling", "fp8-tensorwise": "Float8CurrentScaling"}


def test_score_and_update_run_every_linear_layer_in_the_recipe_that_was_asked_for(two_ranks: dict[str, Any]) -> None:
    for by_precision in two_ranks["in_fp8"]:
        assert len(by_precision) == 5
        for name, found in by_precision.items():
            _, precision, *edges = name.split(" ", 2)
            start, end = (1, 2) if edges else (0, 0)
            for runs in (found["score"], found["update"]):
                recipes = Counter(recipe for _, recipe, _ in runs)
                passes = len(found["tokens"])
                assert len(runs) == 4 * found["layers"] * passes, name  # qkv, proj, fc1, fc2
                layers = found["layers"] - start - end
                assert recipes[RECIPES[precision]] == 4 * layers * passes, name
                if edges:
                    assert recipes["bf16"] == 4 * (start + end) * passes, name
            assert found["dtypes"] == ["torch.bfloat16"], name  # the parameters stay what they are


def test_no_forward_may_use_a_copy_of_the_weights_that_was_quantised_before(two_ranks: dict[str, Any]) -> None:
    # None: neither first micro-batch (which overwrites main_grad) nor a later one (which uses the cached copy).
    for by_precision in two_ranks["in_fp8"]:
        for name, found in by_precision.items():
            assert {first for _, _, first in found["score"] + found["update"]} == {None}, name


def test_packs_are_padded_to_what_the_recipe_takes_and_no_further(two_ranks: dict[str, Any]) -> None:
    # Two tensor ranks share the tokens of a pack between layers (sequence parallelism).
    for by_precision in two_ranks["in_fp8"]:
        tokens = {name: found["tokens"] for name, found in by_precision.items()}
        real = sum(tokens["wide bf16"])
        for name, multiple in (("wide bf16", 2), ("wide fp8-tensorwise", 32), ("wide fp8-blockwise", 256)):
            assert all(count % multiple == 0 for count in tokens[name]), name
            assert sum(tokens[name]) < real + multiple * len(tokens[name]), name
