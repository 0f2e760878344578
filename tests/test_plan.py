"""What a run needs in each phase: formulas against what Megatron's layers keep and its schedules have in flight, the
public record of measurements, and what the engine of a run really has."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from a3po_megatron.config import load_config, load_resolved
from a3po_megatron.errors import RequestError
from a3po_megatron.launch.plan import check_memory, on_gpus, plan, with_known_model
from a3po_megatron.model.read import read_facts
from a3po_megatron.preflight import layouts
from a3po_megatron.preflight.activations import in_flight
from a3po_megatron.preflight.gpus import gpu_of
from a3po_megatron.preflight.memory import Phase, memory_of
from a3po_megatron.preflight.plan import Plan
from a3po_megatron.preflight.sizes import Sized
from a3po_megatron.preflight.traffic import Collective, collectives
from a3po_megatron.preflight.verdict import BAND, Verdict, verdict_of
from a3po_megatron.ranks.backend import backend_of
from a3po_megatron.run.folder import save_resolved
from tests.distributed import cases_static as cases
from tests.harness.ranks import ROOT, run_ranks
from tests.harness.tiny_models import make_checkpoint

GIB = 1 << 30
RECIPES = sorted((ROOT / "configs/scale").glob("*-*x8*.yaml"))
PAPER = [path for path in sorted((ROOT / "configs/paper").glob("*.yaml")) if path.name != "settings.yaml"]


def planned(path: Path, *changes: str, gpus: int | None = None, gpu: str | None = None) -> Plan:
    config, _ = with_known_model(on_gpus(load_config(path, list(changes), must_exist=False), gpus, gpu))
    return plan(config)


def minimal(folder: Path, model: str = "Qwen3-8B-Base", nodes: int = 1, more: str = "") -> Path:
    path = folder / "run.yaml"
    path.write_text(
        f"model: {{path: /models/{model}}}\ndata: {{path: /data/x.parquet}}\nslurm: {{nodes: {nodes}}}\n{more}"
    )
    return path


@pytest.mark.parametrize("world", [1, 2])
def test_what_a_layer_keeps_is_what_is_planned(world: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Within 12 %: softmax statistics, the norms' own and a router's small tensors are not all counted one by one."""
    folder = tmp_path_factory.mktemp("kept")
    for kind in ("qwen3", "qwen3_moe"):
        for depth in (2, 4):
            make_checkpoint(folder / f"{kind}_{depth}", kind, num_hidden_layers=depth)
    for found in run_ranks(world, cases.kept, folder=folder)["kept"]:
        for layout, (measured, formula) in found.items():
            assert measured == pytest.approx(formula, rel=0.12), layout


@pytest.mark.parametrize(("pipeline", "virtual"), [(1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (4, 3), (4, 8)])
def test_as_many_micro_batches_await_their_backward_as_megatrons_schedule_lets_run_ahead(
    pipeline: int, virtual: int
) -> None:
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

    for count in (pipeline, 2 * pipeline, 5 * pipeline):
        for stage in range(pipeline):
            # Stands for Megatron's communicator, of which two numbers are read.
            ranks = SimpleNamespace(size=lambda: pipeline, rank=lambda stage=stage: stage)
            interleaved = virtual if virtual > 1 else None
            asked = SimpleNamespace(pp_group=ranks, virtual_pipeline_model_parallel_size=interleaved)
            total, _, ahead, _ = get_pp_rank_microbatches(count, virtual, pipeline, p2p_communicator=asked)
            table = get_schedule_table(count, virtual, pipeline)[: min(ahead + 1, total)]
            assert in_flight(pipeline, virtual, stage, count) == [
                sum(chunk == number for _, chunk in table) for number in range(virtual)
            ]


def test_the_three_answers_part_where_they_say() -> None:
    assert verdict_of(92, 100) == Verdict.FITS
    assert verdict_of(92.001, 100) == verdict_of(100, 100) == Verdict.TIGHT
    assert verdict_of(100.001, 100) == Verdict.NO
    assert BAND <= 0.08


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_fits_with_what_its_header_says_and_stands_in_the_table(recipe: Path) -> None:
    found = planned(recipe)
    assert found.verdict == Verdict.FITS
    most = max(Phase, key=found.memory.total)
    text = recipe.read_text()
    said = re.search(r"Planned: (\d+) GiB of 139.8 at the most \((.*)\),\n# ([\d,]+) GiB of a node", text)
    assert said is not None
    host = sum(found.memory.host.values())
    assert said.groups() == (f"{found.memory.total(most) / GIB:.0f}", str(most), f"{host / GIB:.0f}")
    (row,) = [line for line in (ROOT / "configs/README.md").read_text().splitlines() if f"[{recipe.stem}](" in line]
    assert f"| {found.memory.total(most) / GIB:.0f} GiB | {host / GIB:.0f} GiB |" in row
    assert len(RECIPES) == 24


@pytest.mark.parametrize("config", PAPER, ids=lambda path: path.stem)
def test_the_papers_runs_fit_sixteen_h200(config: Path) -> None:
    assert planned(config).verdict == Verdict.FITS


def test_a_config_of_model_data_and_nodes_gets_every_size_with_its_reason_in_the_run_folder(tmp_path: Path) -> None:
    found = planned(minimal(tmp_path))
    assert found.verdict == Verdict.FITS
    sizes = {"learner.recompute", "learner.micro_batch_tokens", "learner.offload"}
    sizes |= {"rollout.kv_cache_bytes", "rollout.max_sequences"}
    assert found.settings.reasons.keys() == sizes
    assert found.settings.rollout.kv_cache_bytes > 40 * GIB  # not 256 MiB
    save_resolved(found.settings, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    for option, reason in found.settings.reasons.items():
        assert f"# planned: {option}: {reason}\n" in text
    again = load_resolved(tmp_path / "config.yaml")
    assert again == found.settings and again.reasons == found.settings.reasons


def test_what_a_run_asks_itself_may_be_longer_than_what_it_trains_on_and_the_engine_is_planned_for_that(
    tmp_path: Path,
) -> None:
    path = minimal(tmp_path)
    asks = ["evaluation.every_steps=1", "evaluation.benchmarks=[aime24]", "evaluation.data=/data"]
    plain, asking = planned(path), planned(path, *asks)
    prompt, trained = plain.settings.rollout.max_prompt_tokens, plain.settings.rollout.max_tokens
    work = [each.memory.phases[Phase.ROLLOUT]["engine work"] for each in (plain, asking)]
    assert prompt + trained < 8192, "vLLM's steps take that many tokens at least"
    assert work[1] / work[0] == pytest.approx((prompt + 32768) / 8192, rel=1e-6)  # AIME's responses, by its protocol
    starved = planned(path, *asks, "evaluation.max_tokens=30000", gpus=1, gpu="24G")
    assert starved.settings.rollout.kv_cache_bytes >= (prompt + 30000) * 147456  # of 36 layers, 8 heads of 128, bf16


@pytest.mark.parametrize(("model", "nodes"), [("Qwen3-8B-Base", 1), ("Qwen3-32B", 2), ("Qwen3-235B-A22B", 16)])
def test_auto_takes_the_first_layout_in_its_order_that_fits(model: str, nodes: int, tmp_path: Path) -> None:
    found = planned(minimal(tmp_path, model, nodes, "parallel: {layout: auto}\n"))
    assert found.verdict == Verdict.FITS
    chosen = found.settings.parallel
    smaller = chosen.tensor * chosen.pipeline * chosen.context // 2
    for tensor in (1, 2, 4, 8):
        if not smaller or smaller % tensor:
            continue
        given = f"parallel.tensor={tensor}", f"parallel.pipeline={smaller // tensor}", f"parallel.sequence={tensor > 1}"
        expert = (f"parallel.expert={chosen.expert}", "parallel.expert_tensor=1") if chosen.expert > 1 else ()
        engine = f"rollout.tensor={found.settings.rollout.tensor}"
        try:
            other = planned(minimal(tmp_path, model, nodes), *given, *expert, engine.replace("True", "true"))
        except RequestError:
            continue
        assert other.verdict != Verdict.FITS, given


@pytest.mark.parametrize(
    ("model", "nodes", "gpu"), [("Qwen3-8B-Base", 2, "24G"), ("Qwen3-30B-A3B", 2, "120G"), ("Llama-3.1-8B", 2, "20G")]
)
def test_bounds_that_spare_the_search_for_a_layout_time_change_nothing_of_what_it_finds(
    model: str, nodes: int, gpu: str, tmp_path: Path
) -> None:
    """Against every candidate and every engine planned in full."""
    path = minimal(tmp_path, model, nodes)
    config, _ = with_known_model(on_gpus(load_config(path, ["parallel.layout=auto"], must_exist=False), 8 * nodes, gpu))
    facts, backend, device = read_facts(config.model.path), backend_of("cuda"), gpu_of(gpu)
    room = (1 - BAND) * device.memory
    expected: tuple[dict[str, Any], int] | None = None
    for parallel in layouts._candidates(config, facts, 8 * nodes):
        caches: dict[int, int] = {}
        for tensor in (1, 2, 4, 8):
            asked = layouts._with(config, parallel, tensor)
            if not layouts._is_possible(asked, facts, 8 * nodes):
                continue
            settings = Sized(asked, facts, backend, 8 * nodes, device).settings
            memory = memory_of(facts, settings)
            if max(map(memory.total, Phase)) <= room and sum(memory.host.values()) <= 2000 * GIB:
                caches[tensor] = settings.rollout.kv_cache_bytes
        if caches:
            large = [tensor for tensor, cache in caches.items() if cache >= device.memory // 8]
            expected = parallel, large[0] if large else max(caches, key=lambda tensor: caches[tensor])
            break
    assert expected is not None, "a case in which none fits says nothing"
    found, _ = layouts.with_layout(config, facts, backend, 8 * nodes, device)
    assert (found.parallel.model_dump(include=set(expected[0])), found.rollout.tensor) == expected


def test_where_no_layout_leaves_the_band_free_the_smallest_that_is_tight_is_taken(tmp_path: Path) -> None:
    """Of a 70B on 512 small GPUs the bound for an update admits layouts that do not fit in other phases."""
    path = minimal(tmp_path, "Llama-3.1-70B", 64, "parallel: {layout: auto}\n")
    found = planned(path, gpu="28G")
    assert found.verdict == Verdict.TIGHT
    assert found.settings.reasons["parallel.tensor"] == "of the smallest layout that is tight"
    none = planned(path, gpu="27G")
    assert none.verdict == Verdict.NO and "none fits" in none.settings.reasons["parallel.tensor"]


def test_with_fp8_a_larger_micro_batch_is_tried_where_the_smallest_leaves_too_little(tmp_path: Path) -> None:
    """Every micro-batch in flight has its own quantised weights: two longer ones may need less than eight."""
    layout = "parallel: {tensor: 2, pipeline: 4, sequence: true}\n"
    layout += "learner: {precision: fp8-blockwise, recompute: selective}\n"
    batch = ["trainer.prompts_per_step=8", "trainer.mini_batches=8", "trainer.rollouts_per_prompt=8"]
    found = planned(minimal(tmp_path, "Qwen3-32B", 1, layout), *batch, gpu="122G")
    room, tokens = (1 - BAND) * 122 * GIB, found.settings.learner.micro_batch_tokens
    longest = found.settings.rollout.max_prompt_tokens + found.settings.rollout.max_tokens
    every = [
        planned(tmp_path / "run.yaml", *batch, f"learner.micro_batch_tokens={longest * times}", gpu="122G")
        for times in (4, 2, 1)
    ]
    fitting = [each for each in every if max(map(each.memory.total, (Phase.SCORE, Phase.UPDATE))) <= room]
    assert fitting and fitting[0].settings.learner.micro_batch_tokens == tokens > longest
    assert every[-1] not in fitting, "the smallest fits: nothing was tested"


def test_a_run_that_does_not_fit_is_refused_with_changes_that_make_it_fit(tmp_path: Path) -> None:
    path = minimal(tmp_path, "Llama-3.1-70B", 2, "parallel: {tensor: 4, sequence: true}\nrollout: {tensor: 8}\n")
    config, _ = with_known_model(load_config(path, must_exist=False))
    found = plan(config)
    assert found.verdict == Verdict.NO and 1 <= len(found.changes) <= 3
    with pytest.raises(RequestError) as refused:
        check_memory(config, found.settings)
    message = str(refused.value)
    over = found.memory.total(Phase.UPDATE) - found.capacity
    assert "update needs" in message and f"{over} bytes too much" in message and "--force" in message
    for change in found.changes:
        assert all(f"--set {each}" in message for each in change.overrides)
        assert planned(path, *change.overrides).verdict != Verdict.NO, change


def test_predicted_blocks_of_the_cache_are_vllms(tmp_path_factory: pytest.TempPathFactory) -> None:
    from tests.distributed import cases_engine_steps

    folder = tmp_path_factory.mktemp("blocks")
    make_checkpoint(folder / "m", "qwen3")
    (found,) = run_ranks(1, cases_engine_steps.blocks, folder=folder, own=True)["blocks"]
    assert found["predicted"] == found["real"] > 0


def test_one_rank_of_a_thousand_built_for_real_holds_what_is_planned(tmp_path: Path) -> None:
    layout = "{tensor: 2, sequence: true, pipeline: 4, expert: 16, expert_tensor: 1}"
    path = minimal(tmp_path, "Qwen3-30B-A3B", 128, f"parallel: {layout}\nrollout: {{tensor: 4, expert: 4}}\n")
    command = [sys.executable, "-m", "a3po_megatron", "plan", str(path), "--build", "middle", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    built = json.loads(done.stdout)["build"]
    assert built["world"] == 1024 and built["rank"] == 512
    for name in ("weights", "gradients", "optimizer"):
        assert built[name]["planned"] == built[name]["built"] > 0
    assert built["publish"]["replicas"] == 16 and len(built["publish"]["digests"]) == 1
    assert [row["ranks"] for row in built["growth"]] == [64, 256, 1024]
    assert {each["what"] for each in built["collectives"]} >= {"experts, forward", "stages", "gradients"}


def test_gradients_travel_among_those_that_hold_the_same_and_recomputation_sends_experts_tokens_once_more(
    tmp_path: Path,
) -> None:
    """Counted by hand: 16 ranks, 8 experts' shares, 128 experts of 48 layers with 128 × 3 × 2048 × 768 elements."""
    path = minimal(tmp_path, "Qwen3-30B-A3B", 2, "parallel: {expert: 8, expert_tensor: 1}\n")
    sent: dict[str, dict[str, list[Collective]]] = {}
    for kind in ("none", "selective"):
        found = planned(path, f"learner.recompute={kind}", "learner.micro_batch_tokens=9216")
        sent[kind] = {}
        for each in collectives(found.facts, found.settings, 0):
            sent[kind].setdefault(each.what, []).append(each)
    experts = 48 * 16 * 3 * 2048 * 768  # elements of 16 of them
    by_ranks = {each.ranks: each.bytes for each in sent["none"]["gradients"]}
    assert by_ranks.keys() == {2, 16} and 4 * experts <= by_ranks[2] <= 4 * (experts + 64 * 2 * 16 * 48)
    assert by_ranks[16] + by_ranks[2] == found.memory.phases[Phase.UPDATE]["gradients"]
    (before,), (after,) = (sent[kind]["experts, forward"] for kind in sent)
    (backward,) = sent["none"]["experts, backward"]
    assert after.times - before.times == backward.times > 0  # a micro-batch's backward runs its experts' forward again


def test_the_record_of_measurements_is_met() -> None:
    data = os.environ.get("A3PO_TEST_DATA")
    if not data:
        pytest.skip("skipped: A3PO_TEST_DATA is not set")
    from tools.plan_accuracy import bars, compare, out_of_memory

    rows: list[dict[str, Any]] = json.loads((Path(data) / "memory_truth.json").read_text())
    results, negatives = compare(rows), out_of_memory(rows)
    found = bars(results, negatives)
    assert found["rows"] == found["planned"] == 112
    assert found["static"]["median"] <= 0.05 and found["static"]["median_gib"] <= 0.3
    assert found["peak_large"]["rows"] == 16 and found["peak_large"]["median"] <= 0.12
    assert found["peak_small"]["median_gib"] <= 0.5
    assert found["on_1.25_fits"][0] >= 0.9 * 16 and found["on_0.8_refused"][0] >= 0.8 * 16
    assert found["out_of_memory_not_called_fits"][0] >= 3


def test_what_a_row_of_the_record_lacks_is_said_and_not_guessed() -> None:
    from tools.accuracy.rows import Unplannable, job_of

    with pytest.raises(Unplannable, match="unknown model: some-model"):
        job_of({"id": "x", "family": "other", "model": "some-model", "tp": 1, "pp": 1, "gpus": 1})
    with pytest.raises(Unplannable, match="no seq"):
        job_of({"id": "x", "family": "other", "model": "Qwen3-8B", "tp": 1, "pp": 1, "gpus": 1, "seq": None})


def test_the_other_planners_parameters_are_the_families(tmp_path: Path) -> None:
    """Shapes of models in other people's notes have as many parameters as the same models by our tables."""
    from a3po_megatron.model.cut import Stored, held
    from tools.accuracy.foreign import total_parameters
    from tools.accuracy.models import shape_of_name

    for folder in sorted((ROOT / "configs/models").iterdir()):
        name = folder.name.replace("Llama-3.1", "Llama-3")
        shape = shape_of_name(name)
        if shape is None or folder.name.startswith("tiny"):
            continue
        facts = read_facts(folder)
        ours = sum(each.elements for each in held(facts, Stored()))
        small = facts.layers * 4 * (facts.hidden + facts.heads * facts.head_dim)  # biases and norms of heads
        assert total_parameters(shape) == pytest.approx(ours, abs=small), folder.name
