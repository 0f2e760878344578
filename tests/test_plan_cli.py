"""`a3po plan` from outside: its numbers against ones counted by hand, its order, and what it says to nonsense."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from a3po_megatron import cli
from a3po_megatron.errors import RunFailed
from a3po_megatron.launch import check, hardware, local
from a3po_megatron.model.precision import Hardware
from a3po_megatron.ranks.backend import backend_of
from tests.harness.ranks import ROOT

PHASES = ["start", "rollout", "score", "first update", "update", "publish", "checkpoint"]
LEARNER = {"weights", "gradients", "optimizer"}
HOLDERS = LEARNER | {"activations", "loss", "engine weights", "KV cache", "engine work", "graphs, sampler", "buffers"}
HOLDERS |= {"overhead"}
FITS, TIGHT, OVER = "fits", "tight", "does not fit"
GPUS = ["a100-40gb", "h100", "h200", "b300"]  # ever more memory
MINIMAL = "model: {path: /models/Qwen3-8B-Base}\ndata: {path: /data/x.parquet}\nslurm: {nodes: 1}\n"

# Qwen3-8B, as its config.json and its checkpoint's index have it.
P, VOCAB, HIDDEN, LAYERS, KV_HEADS, HEAD = 8_190_735_360, 151_936, 4096, 36, 8, 128
# Qwen3-30B-A3B: 48 layers of 128 experts, three matrices of 2048 by 768 each; and in all.
EXPERTS, MOE = 48 * 128 * 3 * 2048 * 768, 30_532_122_624

# All sizes given, so that a plan differs in what was changed alone.
GIVEN = {
    "rollout.kv_cache_bytes": 20 << 30,
    "rollout.max_sequences": 64,
    "learner.micro_batch_tokens": 4096,
    "learner.recompute": "none",
    "learner.offload": "none",
}


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str

    @property
    def plan(self) -> dict[str, Any]:
        return json.loads(self.out)

    def part(self, name: str, phase: str = "update") -> int:
        return self.plan["phases"][phase]["parts"].get(name, 0)

    def totals(self) -> dict[str, int]:
        return {name: phase["total"] for name, phase in self.plan["phases"].items()}


@functools.cache
def _a3po(words: tuple[str, ...]) -> Ended:
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch.object(sys, "argv", list(words)):
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
    return Ended(code, out.buffer.getvalue().decode(), err.getvalue())


def a3po(*words: object) -> Ended:
    return _a3po(("a3po", *map(str, words)))


def overrides(options: dict[str, object]) -> list[str]:
    return [word for option, value in options.items() for word in ("--set", f"{option}={value}")]


@pytest.fixture(scope="module")
def minimal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "minimal.yaml"
    path.write_text(MINIMAL)
    return path


Plan = Callable[..., Ended]


@pytest.fixture
def plan(minimal: Path) -> Plan:
    """The plan of Qwen3-8B on one node of 8 H200, with what is said here."""

    def call(options: dict[str, object] | None = None, **flags: object) -> Ended:
        words = [word for name, value in flags.items() for word in (f"--{name}", value)]
        return a3po("plan", minimal, *words, *overrides(options or {}), "--json")

    return call


def model(name: str) -> dict[str, object]:
    return {"model.path": f"/models/{name}"}


def layout(tensor: int, pipeline: int = 1, context: int = 1, **more: int) -> dict[str, object]:
    shape = {"tensor": tensor, "pipeline": pipeline, "context": context, "sequence": str(tensor > 1).lower()} | more
    return {f"parallel.{name}": value for name, value in shape.items()}


# --- what is said --------------------------------------------------------------------------------------------------


def test_a_plan_has_all_phases_and_the_sum_of_their_parts(plan: Plan) -> None:
    for ended in (plan(), plan(gpu="h100"), plan(model("Qwen3-30B-A3B") | {"parallel.expert": 8}, gpu="b200")):
        said = ended.plan
        assert list(said["phases"]) == PHASES
        for name, phase in said["phases"].items():
            assert set(phase["parts"]) <= HOLDERS
            assert sum(phase["parts"].values()) == phase["total"], name
        assert set().union(*(phase["parts"] for phase in said["phases"].values())) == HOLDERS
        assert sum(said["host"]["parts"].values()) == said["host"]["total"]
        assert (said["ranks"], said["device"]) == (8, "cuda")


def test_the_table_says_what_the_json_says_and_explains_every_row_when_asked(minimal: Path, plan: Plan) -> None:
    table = a3po("plan", minimal)
    explained = a3po("plan", minimal, "--explain")
    assert (table.code, explained.code) == (0, 0)
    more = explained.out.removeprefix(table.out)
    assert more != explained.out
    said = plan().plan
    for name in HOLDERS:
        assert re.search(rf"^ +{name}  +\w+.*: ", more, re.MULTILINE), name
        (row,) = re.findall(rf"^{name}  +(.*)$", table.out, re.MULTILINE)
        held = [phase["parts"].get(name) for phase in said["phases"].values()]
        assert row.split() == ["-" if each is None else f"{each / 2**30:.2f}" for each in held], name
    for option, size in said["sizes"].items():
        assert f"{option}: {size['value']}" in table.out
        assert size["why"] in table.out


NO_TORCH = """
import io, json, sys
from a3po_megatron import cli
for words in json.loads(sys.argv[1]):
    sys.argv = ["a3po", *words]
    try:
        cli.main()
    except SystemExit as end:
        assert (end.code or 0) in (0, 2), end.code
print(json.dumps([name for name in ("torch", "transformers", "vllm", "megatron") if name in sys.modules]))
"""


def test_no_plan_imports_torch(minimal: Path) -> None:
    auto = ["--set", "parallel.layout=auto"]
    words = [["plan", str(minimal), *more] for more in ([], ["--json"], ["--explain"], auto, ["--gpus", "1"])]
    words += [["plan", "configs/demo.yaml"], ["plan", "configs/scale/qwen3-30b-a3b-1x8.yaml", "--gpu", "h100"]]
    command = [sys.executable, "-c", NO_TORCH, json.dumps(words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


SHIPPED = [path for path in sorted((ROOT / "configs").glob("*/*.yaml")) if path.name != "settings.yaml"]
SHIPPED += [ROOT / "configs/demo.yaml", ROOT / "configs/arithmetic.yaml"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_recipe_fits(path: Path) -> None:
    ended = a3po("plan", path, "--json")
    assert ended.code == 0, ended.err
    assert ended.plan["verdict"] == FITS


# --- bytes, counted by hand ----------------------------------------------------------------------------------------


def about(number: float) -> object:
    return pytest.approx(number, rel=1e-4)  # padding of buffers


@pytest.mark.parametrize("ranks", [1, 2, 8, 64])
def test_what_the_learner_of_a_dense_model_holds(plan: Plan, ranks: int) -> None:
    ended = plan(gpus=ranks)
    for phase in ("score", "first update", "update"):
        assert ended.part("weights", phase) == about(2 * P)
        assert ended.part("gradients", phase) == about(4 * P)
        assert ended.part("optimizer", phase) == about(12 * P / ranks)
    half = plan({"optimizer.moment_dtype": "bfloat16"}, gpus=ranks)
    assert half.part("optimizer") == about(8 * P / ranks)


@pytest.mark.parametrize("shape", [(2, 1), (8, 1), (1, 4), (2, 4)])
def test_tensor_and_pipeline_ranks_share_what_the_learner_holds(plan: Plan, shape: tuple[int, int]) -> None:
    tensor, pipeline = shape
    ended = plan(layout(tensor, pipeline))
    ends = VOCAB * HIDDEN * (pipeline > 1)  # the first and the last stage have the embeddings or the head
    fullest = ((P - 2 * ends) / pipeline + ends) / tensor
    assert ended.part("weights") == pytest.approx(2 * fullest, rel=1e-3)  # norms are whole everywhere
    assert ended.part("gradients") == about(2 * ended.part("weights"))
    assert ended.part("optimizer") == about(6 * ended.part("weights") * tensor * pipeline / 8)


@pytest.mark.parametrize(("ranks", "expert"), [(8, 8), (8, 2), (16, 8), (64, 8)])
def test_experts_are_dealt_over_expert_ranks_and_their_state_over_the_rest(plan: Plan, ranks: int, expert: int) -> None:
    ended = plan(model("Qwen3-30B-A3B") | {"parallel.expert": expert, "rollout.tensor": 2}, gpus=ranks)
    dense, dealt = MOE - EXPERTS, EXPERTS / expert
    assert ended.part("weights") == about(2 * (dense + dealt))
    assert ended.part("gradients") == about(4 * (dense + dealt))
    assert ended.part("optimizer") == about(12 * (dense / ranks + dealt / (ranks / expert)))


@pytest.mark.parametrize("tensor", [1, 2, 8, 16])
def test_a_token_of_the_cache_takes_its_keys_and_values_on_every_rank(plan: Plan, tensor: int) -> None:
    token = 2 * LAYERS * max(1, KV_HEADS // tensor) * HEAD * 2  # 16 ranks: each head is there twice
    ended = plan({"rollout.tensor": tensor}, gpus=16)
    value, why = ended.plan["sizes"]["rollout.kv_cache_bytes"].values()
    tokens, each = map(int, re.findall(r"(\d+) tokens of (\d+) bytes", why)[0])
    assert each == token
    assert 0 <= value - tokens * token < 16 * token  # a block of 16 tokens
    assert tokens >= 2048
    assert ended.part("KV cache", "rollout") == value
    twice = 2 * LAYERS * HIDDEN * HEAD * (max(1, KV_HEADS / tensor) - KV_HEADS / tensor)  # what computes them, too
    assert ended.part("engine weights", "rollout") == pytest.approx(2 * (P / tensor + twice), rel=1e-3)
    least = 2048 * token
    assert plan({"rollout.tensor": tensor, "rollout.kv_cache_bytes": least}, gpus=16).code == 0
    refused = plan({"rollout.tensor": tensor, "rollout.kv_cache_bytes": least - 1}, gpus=16)
    assert refused.code == 2
    assert f"{least} bytes" in refused.err


def test_an_engine_in_fp8_has_a_byte_for_every_weight_of_its_linear_layers(plan: Plan) -> None:
    quantised = plan({"rollout.quantization": "fp8_per_block"}).part("engine weights", "rollout")
    ends = 2 * VOCAB * HIDDEN
    assert quantised == pytest.approx(P - ends + 2 * ends, rel=2e-3)  # a scale per block of 128 × 128, norms in bf16


def test_offload_says_what_of_the_learner_is_beside_the_engine_and_what_is_on_the_host(plan: Plan) -> None:
    there = {}
    for offload in ("none", "optimizer", "all"):
        ended = plan(GIVEN | {"learner.offload": offload})
        parts = ended.plan["host"]["parts"]
        there[offload] = [LEARNER & ended.plan["phases"][phase]["parts"].keys() for phase in ("rollout", "publish")]
        assert parts["optimizer"] == about(12 * P * (offload != "none"))  # 8 ranks of a node, an eighth each
        assert (parts["weights"] >= 8 * 2 * P * 0.99) == (offload == "all")
    assert there == {"none": [LEARNER, LEARNER], "optimizer": [{"weights"}] * 2, "all": [set(), {"weights"}]}


def test_an_optimizer_on_the_host_is_there_and_not_on_the_device(plan: Plan) -> None:
    ended, here = plan(GIVEN | {"optimizer.on_host": "true"}), plan(GIVEN)
    assert all(ended.part("optimizer", phase) == 0 for phase in PHASES)
    assert ended.plan["host"]["parts"]["optimizer"] >= 12 * P * 0.999
    assert ended.part("weights") == here.part("weights")


# --- order ---------------------------------------------------------------------------------------------------------


def test_more_data_parallel_ranks_never_need_more_of_a_gpu_or_a_node(plan: Plan) -> None:
    found = [plan(GIVEN, gpus=ranks) for ranks in (8, 16, 32, 64, 256)]
    for fewer, more in itertools.pairwise(found):
        assert all(more.totals()[phase] <= fewer.totals()[phase] for phase in PHASES)
        assert more.plan["host"]["total"] <= fewer.plan["host"]["total"]


DEALT = model("Qwen3-30B-A3B") | {"parallel.expert": 8}
CUT = {"whole": {}, "tensor": layout(2), "pipeline": layout(1, 2), "context": layout(1, 1, 2)}
CUT |= {"experts": DEALT, "llama": model("Llama-3.1-8B") | layout(2)}


@pytest.mark.parametrize("kind", CUT)
def test_recomputation_smaller_micro_batches_and_shorter_responses_never_need_more(plan: Plan, kind: str) -> None:
    fixed = GIVEN | CUT[kind]
    recomputed = [plan(fixed | {"learner.recompute": each}, gpu="b300") for each in ("full", "selective", "none")]
    activations = [each.part("activations") for each in recomputed]
    assert activations == sorted(activations)
    assert activations[0] < activations[-1]
    for option in ("learner.micro_batch_tokens", "rollout.max_tokens"):
        found = [plan(fixed | {option: value}, gpu="b300").totals() for value in (1024, 2048, 6000, 16384)]
        for phase in PHASES:
            totals = [each[phase] for each in found]
            assert totals == sorted(totals), (option, phase)
        assert found[0]["update"] < found[-1]["update"], option


def test_a_micro_batch_holds_the_longest_sample_whatever_it_is_told(plan: Plan) -> None:
    longest = {"rollout.max_prompt_tokens": 1000, "rollout.max_tokens": 5144}
    one, whole, two = (plan(GIVEN | longest | {"learner.micro_batch_tokens": n}) for n in (1, 6144, 12288))
    assert one.plan["phases"] == whole.plan["phases"]
    assert one.part("activations") < two.part("activations")


def test_context_ranks_share_the_activations_of_a_sequence(plan: Plan) -> None:
    one, two, eight = (plan(GIVEN | layout(1, 1, ranks)).part("activations") for ranks in (1, 2, 8))
    assert one / 2 <= two * 1.001 <= 0.8 * one
    assert one / 8 <= eight * 1.001 <= 0.5 * one


def test_stages_of_a_pipeline_keep_the_micro_batches_that_are_in_flight(plan: Plan) -> None:
    alone, four = plan(GIVEN).part("activations"), plan(GIVEN | layout(1, 4)).part("activations")
    assert 0.8 * alone <= four  # a quarter of the layers, of four micro-batches
    chunks = plan(GIVEN | layout(1, 4, virtual=3)).part("activations")
    assert four < chunks  # 15 chunks of 3 layers in place of 4 of 9


CACHE = {"rollout.kv_cache_bytes": 60 << 30}


@pytest.mark.parametrize("options", [{}, DEALT | CACHE], ids=["8B", "30B-A3B"])
def test_what_fits_a_gpu_fits_every_larger_one(plan: Plan, options: dict[str, object]) -> None:
    found = [plan(options, gpu=gpu).plan for gpu in GPUS]
    capacities = [each["capacity"] for each in found]
    assert capacities == sorted(set(capacities))
    places = [(OVER, TIGHT, FITS).index(each["verdict"]) for each in found]
    assert places == sorted(places)
    assert (places[0], places[-1]) == (0, 2)


def test_the_verdict_follows_from_the_bytes_and_the_code_from_the_verdict(plan: Plan) -> None:
    capacity, rest = plan(GIVEN).plan["capacity"], plan(GIVEN).totals()["publish"] - (20 << 30)
    for share, verdict in ((0.90, FITS), (0.93, TIGHT), (0.999, TIGHT), (1.001, OVER)):
        ended = plan(GIVEN | {"rollout.kv_cache_bytes": int(share * capacity - rest)})
        assert ended.totals()["publish"] == pytest.approx(share * capacity, rel=1e-3)
        said = ended.plan
        assert said["verdict"] == said["phases"]["publish"]["verdict"] == verdict
        assert ended.code == (2 if verdict == OVER else 0)
    small = plan(GIVEN | {"slurm.memory": "60G"})
    assert (small.plan["host"]["verdict"], small.plan["verdict"], small.code) == (OVER, OVER, 2)
    assert plan(GIVEN).plan["verdict"] == FITS


# --- sizes that follow ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", ["h100", "h200", "b200"])
def test_sizes_that_follow_fit_and_given_back_they_are_the_same_plan(plan: Plan, gpu: str) -> None:
    said = plan(gpu=gpu).plan
    assert said["verdict"] == FITS
    assert said["sizes"].keys() == GIVEN.keys()
    values = {option: size["value"] for option, size in said["sizes"].items()}
    assert all(size["why"] for size in said["sizes"].values())
    again = plan(values, gpu=gpu).plan
    assert again["phases"] == said["phases"]
    assert again["sizes"] == {}


OWN: dict[str, list[object]] = {
    "rollout.kv_cache_bytes": [10**9, 3 << 30, 70 << 30],
    "rollout.max_sequences": [1, 2, 300, 4096],
}
OWN |= {"learner.micro_batch_tokens": [1, 5000], "learner.recompute": ["selective", "full"]}
OWN |= {"learner.offload": ["optimizer", "all"]}


@pytest.mark.parametrize(("option", "value"), [(option, value) for option, values in OWN.items() for value in values])
def test_a_size_that_is_given_stays_and_the_others_make_it_fit(plan: Plan, option: str, value: object) -> None:
    ended = plan({option: value})
    assert ended.code == 0, ended.err
    assert ended.plan["sizes"].keys() == GIVEN.keys() - {option}
    if option == "rollout.kv_cache_bytes":
        assert ended.part("KV cache", "rollout") == value


SMALLEST: list[tuple[str, str, int, dict[str, object]]] = [
    ("Qwen3-14B", "h100", 1, {}),
    ("Qwen3-32B", "h200", 1, {}),
    ("Llama-3.1-70B", "h200", 8, {}),
]
SMALLEST += [("Qwen3-8B", "a100-40gb", 1, {}), ("Qwen3-14B", "h200", 1, {"rollout.max_tokens": 31744})]


@pytest.mark.parametrize(("name", "gpu", "nodes", "more"), SMALLEST)
def test_auto_takes_the_smallest_layout_that_fits(
    plan: Plan, name: str, gpu: str, nodes: int, more: dict[str, object]
) -> None:
    asked = model(name) | {"slurm.nodes": nodes} | more
    auto = plan(asked | {"parallel.layout": "auto"}, gpu=gpu)
    assert auto.code == 0, auto.err
    assert auto.plan["verdict"] == FITS
    taken = [auto.plan["layout"][each] for each in ("tensor", "pipeline", "context")]
    product = taken[0] * taken[1] * taken[2]
    engine = {"rollout.tensor": 8}  # auto raises it where an engine needs it
    assert plan(asked | layout(*taken) | engine, gpu=gpu).plan["verdict"] == FITS
    assert auto.plan["layout"]["data"] == 8 * nodes // product
    powers = [(t, p, c) for t in (1, 2, 4, 8) for p in (1, 2, 4) for c in (1, 2, 4)]
    for shape in [shape for shape in powers if shape[0] * shape[1] * shape[2] == product // 2]:
        assert plan(asked | layout(*shape) | engine, gpu=gpu).plan["verdict"] != FITS, shape


@pytest.mark.parametrize(("name", "gpu", "nodes"), [("Qwen3-14B", "h100", 1), ("Llama-3.1-70B", "h200", 8)])
def test_what_auto_filled_in_is_the_same_plan_when_it_is_given(plan: Plan, name: str, gpu: str, nodes: int) -> None:
    asked = model(name) | {"slurm.nodes": nodes}
    auto = plan(asked | {"parallel.layout": "auto"}, gpu=gpu).plan
    shape = {f"parallel.{key}": json.dumps(value) for key, value in auto["layout"].items() if key != "layout"}
    given = plan(asked | shape | {option: size["value"] for option, size in auto["sizes"].items()}, gpu=gpu)
    assert given.code == 0, given.err
    assert given.plan["phases"] == auto["phases"]


# --- what does not fit ---------------------------------------------------------------------------------------------

SCALE = ROOT / "configs/scale"
ONE, H100 = "slurm.gpus_per_node=1", ["--gpu", "h100"]
TOO_MUCH: dict[str, tuple[str | None, list[str]]] = {
    "one GPU": (None, ["--set", ONE]),
    "one GPU by --gpus": (None, ["--gpus", "1"]),
    "micro-batch": (None, ["--set", "learner.micro_batch_tokens=1000000"]),
    "sequences": (None, ["--set", "rollout.max_sequences=100000000"]),
    "40 GB": (None, ["--gpu", "a100-40gb"]),
    "host": (None, ["--set", "slurm.memory=100G"]),
    "experts": ("qwen3-30b-a3b-1x8.yaml", H100),
    "32B": ("qwen3-32b-1x8.yaml", H100),
    "70B": ("llama-3.1-70b-2x8.yaml", H100),
    "two options": ("llama-3.1-405b-16x8.yaml", H100),  # rollout.tensor=16 and optimizer.on_host=true
}


@pytest.mark.parametrize("case", TOO_MUCH)
def test_what_does_not_fit_names_phases_bytes_and_up_to_three_changes_with_which_it_does(
    minimal: Path, case: str
) -> None:
    recipe, words = TOO_MUCH[case]
    start = ["plan", SCALE / recipe if recipe else minimal, *words]
    ended = a3po(*start, "--json")
    said = ended.plan
    assert (ended.code, said["verdict"]) == (2, OVER)
    message = ended.err[ended.err.index("error: ") :]
    assert "Traceback" not in message
    for name, phase in said["phases"].items():
        assert (phase["verdict"] == OVER) == (phase["total"] > said["capacity"]) == (f"{name} needs" in message)
        if phase["verdict"] == OVER:
            assert f"{phase['total'] - said['capacity']} bytes" in message
    if said["host"]["verdict"] == OVER:
        assert f"{said['host']['total'] - said['host']['capacity']} bytes" in message
    assert 1 <= len(said["changes"]) <= 3
    for change in said["changes"]:
        flags = [word for each in change["set"] for word in ("--set", each)]
        assert " ".join(flags) in message
        changed = a3po(*start, *flags, "--json")
        assert changed.code == 0, (change, changed.err)
        assert changed.plan["verdict"] == change["verdict"]


def test_auto_that_finds_nothing_says_phase_bytes_and_a_change_with_which_it_does(plan: Plan, minimal: Path) -> None:
    asked = model("Llama-3.1-70B") | {"parallel.layout": "auto", "slurm.nodes": 1}
    assert plan(asked | {"optimizer.on_host": "true"}, gpu="h100").code == 0
    ended = a3po("plan", minimal, "--gpu", "h100", *overrides(asked))
    assert ended.code == 2
    assert any(phase in ended.err for phase in PHASES), ended.err
    assert re.search(r"\d+ bytes", ended.err), ended.err
    assert "--set optimizer.on_host=true" in ended.err


def test_submit_refuses_what_does_not_fit_unless_it_is_forced(minimal: Path) -> None:
    here = {"model.path": ROOT / "configs/models/Qwen3-8B", "data.path": "builtin:arithmetic"}
    start = ["submit", minimal, "--dry-run", *overrides(here)]
    assert a3po(*start).code == 0
    refused = a3po(*start, "--set", ONE)
    assert (refused.code, refused.out) == (2, "")
    assert "does not fit" in refused.err
    assert "--set optimizer.on_host=true" in refused.err
    forced = a3po(*start, "--set", ONE, "--force")
    assert (forced.code, forced.out.startswith("#!")) == (0, True)


STARTED = "the ranks would start now"
AUTO = """
model: {{path: {model}}}
data: {{path: "builtin:arithmetic", template: raw}}
rollout: {{max_prompt_tokens: 32, max_tokens: 96}}
parallel: {{layout: auto}}
"""


def test_train_refuses_on_a_gpu_unless_it_is_forced_and_on_a_cpu_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "run_local", mock.Mock(side_effect=RunFailed(STARTED)))
    huge = ["train", ROOT / "configs/arithmetic.yaml", "--set", "rollout.kv_cache_bytes=1000000000000000"]
    on_cpu = a3po(*huge, "--run-dir", tmp_path / "cpu")
    assert (on_cpu.code, STARTED in on_cpu.err) == (1, True)
    found = Hardware((9, 0), (13, 0), (2, 11, 0), 2, 80 << 30)  # stands in for a machine with two GPUs
    monkeypatch.setattr(hardware, "find_hardware", lambda: found)
    monkeypatch.setattr(check, "find_hardware", lambda: found)
    monkeypatch.setattr(check, "select_backend", lambda _: backend_of("cuda"))
    refused = a3po(*huge, "--run-dir", tmp_path / "gpu")
    assert (refused.code, STARTED in refused.err, (tmp_path / "gpu").exists()) == (2, False, False)
    assert "does not fit" in refused.err
    forced = a3po(*huge, "--run-dir", tmp_path / "gpu", "--force")
    assert (forced.code, STARTED in forced.err) == (1, True)
    # A layout that is to be found takes all GPUs of the machine.
    config = tmp_path / "auto.yaml"
    config.write_text(AUTO.format(model=ROOT / "configs/models/tiny-arithmetic"))
    for number, more in enumerate(([], ["--set", "rollout.tensor=2"])):
        found_here = a3po("train", config, "--run-dir", tmp_path / f"auto-{number}", *more)
        assert (found_here.code, STARTED in found_here.err) == (1, True), found_here.err
        assert "starting 2 ranks" in found_here.out


# --- nonsense ------------------------------------------------------------------------------------------------------

QWEN = json.loads((ROOT / "configs/models/Qwen3-8B/config.json").read_text())
NONSENSE: list[tuple[list[str], list[str]]] = [
    (["--gpus", "0"], ["--gpus 0"]),
    (["--gpus", "-8"], ["--gpus -8"]),
    (["--gpus", "12"], ["12", "8"]),
    (["--gpu", "h2000"], ["h2000", "h200"]),
    (["--gpu", ""], ["h200"]),
    (["--set", "slurm.gpus_per_node=v100:8"], ["v100"]),  # 32 GB: to plan it as an H200 would be wrong
    (["--gpus", "7", "--set", "parallel.tensor=4"], ["7", "4", "parallel.tensor"]),
    (["--set", "parallel.layout=auto", "--set", "parallel.tensor=4"], ["parallel.tensor", "parallel.layout"]),
    (["--set", "parallel.pipeline=5"], ["8", "5", "pipeline"]),
    (["--set", "parallel.expert=8"], ["parallel.expert = 8", "no experts"]),
    (["--set", "rollout.tensor=3"], ["rollout.tensor = 3"]),
    (["--set", "rollout.max_tokens=1000000"], ["rollout.max_tokens", "max_position_embeddings"]),
    (["--set", "slurm.nodes=0"], ["slurm.nodes"]),
    (["--set", "slurm.tasks_per_node=16"], ["slurm.tasks_per_node", "16", "8"]),  # two ranks of one GPU
    (["--set", "rollout.kv_cache_bytes=1"], ["rollout.kv_cache_bytes = 1", "2048"]),
    (["--set", "model.path=/models/Qwen9-8B"], ["model.path", "/models/Qwen9-8B"]),
    (["--build", "8"], ["--build 8", "7"]),
    (["--build", "-1"], ["--build -1"]),
    (["--build", "some"], ["--build some"]),
    (["--world", "8"], ["--build"]),
]


def assert_refused(ended: Ended, *named: str) -> None:
    assert (ended.code, ended.out) == (2, ""), ended
    assert ended.err.startswith("error: "), ended
    assert (ended.err.count("error:"), ended.err.count("Traceback")) == (1, 0), ended
    for words in named:
        assert words in ended.err, ended


@pytest.mark.parametrize(("words", "named"), NONSENSE, ids=lambda value: " ".join(value))
def test_nonsense_is_one_message_that_names_it(minimal: Path, words: list[str], named: list[str]) -> None:
    assert_refused(a3po("plan", minimal, *words), *named)
    assert_refused(a3po("plan", minimal, *words, "--json"), *named)


BROKEN = ["", "{", "null", "[]", "{}", '{"architectures": ["BertModel"]}', "[" * 100_000]
BROKEN += [json.dumps(QWEN | {field: value}) for field in ("num_hidden_layers", "vocab_size") for value in (0, -1, "9")]
BROKEN += [json.dumps(QWEN | each) for each in ({"num_key_value_heads": 3}, {"hidden_size": 4096.5}, {"head_dim": -1})]


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_a_folder_that_holds_no_model_is_named_even_where_its_name_is_known(
    tmp_path: Path, minimal: Path, text: str
) -> None:
    folder = tmp_path / "Qwen3-8B"
    folder.mkdir()
    wanted = ["plan", minimal, "--set", f"model.path={folder}"]
    assert_refused(a3po(*wanted), str(folder / "config.json"))
    (folder / "config.json").write_text(text)
    assert_refused(a3po(*wanted, "--gpus", 8), str(folder / "config.json"))


# --- the real thing ------------------------------------------------------------------------------------------------

TINY = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 128, "head_dim": 32}
TINY |= {"num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 1000}
TINY |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "intermediate_size": 256}
TINY |= {"max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "norm_topk_prob": True}
TINY |= {"rope_theta": 1e6, "hidden_act": "silu", "mlp_only_layers": [], "decoder_sparse_step": 1}


def test_a_rank_that_is_built_holds_what_was_planned_to_the_byte(tmp_path: Path, minimal: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    base = ["plan", str(minimal), "--json", "--set", f"model.path={tmp_path}"]
    cut = overrides(layout(2, 2, expert=2, expert_tensor=1))
    words = [[*base, *cut, "--build", rank] for rank in ("first", "middle", "last", "3")]
    words += [[*base, *cut, "--build", "last", "--world", "64"], [*base, "--gpus", "1", "--build", "first"]]
    command = [sys.executable, "-c", NO_TORCH.replace("cli.main()", 'cli.main(); print("\\0")'), json.dumps(words)]
    command[2] = command[2].replace("except SystemExit as end:", 'except SystemExit as end:\n        print("\\0")')
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=120)
    *texts, heavy = done.stdout.split("\0")
    built = [json.loads(text)["build"] for text in texts]
    assert "torch" in heavy
    for each in built:
        for what in ("weights", "gradients", "optimizer"):
            assert each[what]["planned"] == each[what]["built"] > 0, (each["rank"], what)
        assert len(set(each["publish"]["digests"])) == 1  # all replicas are sent the same
    assert [each["rank"] for each in built] == [0, 4, 7, 3, 63, 0]
    assert built[5]["weights"]["built"] < sum(each["weights"]["built"] for each in built[:4])
