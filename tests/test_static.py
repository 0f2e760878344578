"""What the planner says that a rank holds all the time is what it holds, to the byte; and of every model, all of it."""

from __future__ import annotations

import dataclasses
import math
import os
import random
import shutil
from pathlib import Path

import pytest

from a3po_megatron.errors import RequestError
from a3po_megatron.model.cut import EngineRank, LearnerRank, Stored, cut, held, hf_tensors
from a3po_megatron.model.facts import ModelFacts
from a3po_megatron.model.layout import Layout, check_layout
from a3po_megatron.model.read import read_facts
from a3po_megatron.preflight.flops import training_flops
from tests.distributed import cases_static as cases
from tests.harness.ranks import ROOT, run_ranks
from tests.harness.tiny_models import make_checkpoint


@pytest.mark.parametrize("world", cases.LAYOUTS)
def test_weights_gradients_and_optimizer_of_real_ranks_are_as_planned_to_the_byte(
    world: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("static")
    for kind in ("qwen3", "qwen2", "qwen3_moe"):
        make_checkpoint(folder / kind, kind)
    make_checkpoint(folder / "qwen3_deep", "qwen3", num_hidden_layers=5)
    (folder / "demo").symlink_to(ROOT / "configs/models/tiny-guesser")
    for by_layout in run_ranks(world, cases.measured, folder=folder)["measured"]:
        assert len(by_layout) == len(cases.LAYOUTS[world]) * 6
        for layout, (holds, planned) in by_layout.items():
            assert holds == planned, layout


# In all, published with the checkpoints (the sum of the shapes in their safetensors indices); a tied head counts once.
TOTALS = {
    "DeepSeek-R1-Distill-Qwen-7B": 7_615_616_512,
    "Meta-Llama-3-8B": 8_030_261_248,
    "Meta-Llama-3.1-8B": 8_030_261_248,
    "Meta-Llama-3.1-70B": 70_553_706_496,
    "Meta-Llama-3.1-405B": 405_853_388_800,
    "Qwen2.5-Math-7B": 7_615_616_512,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-8B-Base": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
}


def published(tmp_path: Path, name: str) -> ModelFacts:
    """Facts of a model's real config.json, or a skip where the data are not at hand."""
    data = os.environ.get("A3PO_TEST_DATA")
    if not data:
        pytest.skip("skipped: A3PO_TEST_DATA is not set")
    folder = tmp_path / name
    folder.mkdir()
    shutil.copy(Path(data, "model_configs", f"{name}.config.json"), folder / "config.json")
    return read_facts(folder)


@pytest.mark.parametrize("name", TOTALS)
def test_every_known_model_has_as_many_parameters_as_its_checkpoint(name: str, tmp_path: Path) -> None:
    facts = published(tmp_path, name)
    assert sum(map(math.prod, hf_tensors(facts).values())) == TOTALS[name]
    # A Megatron checkpoint holds the whole model once, padding of the vocabulary aside: of one rank there is none.
    assert sum(each.elements for each in held(facts, Stored())) == TOTALS[name]


def layouts(facts: ModelFacts, draw: random.Random, count: int) -> list[Layout]:
    """Random layouts that the model divides by."""
    found: list[Layout] = []
    while len(found) < count:
        tensor, pipeline, virtual = draw.choice([1, 2, 4, 8]), draw.choice([1, 2, 3, 4]), draw.choice([1, 1, 2])
        expert = draw.choice([1, 2, 4, 8]) if facts.experts else 1
        expert_tensor = draw.choice([1, 2, tensor]) if facts.experts else None
        layout = Layout(tensor, pipeline, virtual, expert, expert_tensor)
        try:
            check_layout(facts, layout)
        except RequestError:
            continue
        found.append(layout)
    return found


def test_over_the_ranks_of_a_replica_every_parameter_is_counted_once_in_a_thousand_layouts(tmp_path: Path) -> None:
    models = [
        dataclasses.replace(published(tmp_path, name), layers=layers)
        for name, layers in (("Qwen3-30B-A3B", 4), ("Meta-Llama-3.1-8B", 6), ("Qwen2.5-Math-7B", 5), ("Qwen3-8B", 7))
    ]
    draw = random.Random(0)
    for number in range(1000):
        facts = models[number % len(models)]
        (layout,) = layouts(facts, draw, 1)
        whole = sum(each.elements for each in held(facts, Stored()))
        padding = (facts.vocab // -layout.tensor * -layout.tensor - facts.vocab) * facts.hidden * (2 - facts.tied)
        total = 0
        for place in layout.places():
            holder = LearnerRank(layout, place)
            total += sum(each.elements for each in held(facts, holder) if holder.share(each.param, 0).owner)
        assert total == whole + padding, layout


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama", "qwen3_moe"])
def test_what_is_counted_is_what_the_pieces_cover(kind: str, tmp_path: Path) -> None:
    facts = read_facts(make_checkpoint(tmp_path / kind, kind))
    holders = [
        LearnerRank(layout, place) for layout in layouts(facts, random.Random(1), 8) for place in layout.places()
    ]
    holders += [Stored(), EngineRank(1, 0, (0, facts.experts.count if facts.experts else 0))]
    for holder in holders:
        covered: dict[tuple[int, str], int] = {}
        for piece in cut(facts, holder):
            covered[piece.key] = covered.get(piece.key, 0) + piece.numel
        counted = held(facts, holder)
        ends = [each for each in counted if each.param.cut == "vocabulary"]
        names = {name for each in ends for name in (each.param.learner, each.param.engine)}
        of_ends = sum(numel for (_, name), numel in covered.items() if name in names)
        assert sum(each.elements for each in counted if each not in ends) == sum(covered.values()) - of_ends
        assert 0 <= sum(each.elements for each in ends) - of_ends <= len(ends) * 64 * facts.hidden


def test_a_token_of_qwen3_30b_a3b_takes_as_many_operations_as_its_published_speeds_say(tmp_path: Path) -> None:
    # 299.352 TFLOP/s at 13,011.378 tokens/s, sequences of 4,096: Megatron-Bridge's own two numbers.
    facts = published(tmp_path, "Qwen3-30B-A3B")
    assert training_flops(facts, [4096]) / 4096 == pytest.approx(23.007e9, rel=0.01)
    # In packs of several sequences attention is within each.
    assert training_flops(facts, [1024] * 4) < training_flops(facts, [4096])
