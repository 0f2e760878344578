"""tools/gpu_bringup.py where there is no GPU: it says so; its runner lets no experiment take another along; and what of
the experiments a CPU can do, it does here. Those that need Transformer Engine are in tests/test_te.py."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from a3po_megatron.model.read import read_facts
from tests.distributed import cases_bringup as cases
from tests.harness.ranks import ROOT, run_ranks
from tests.harness.tiny_models import hf_logprobs, hf_model, make_checkpoint
from tools import gpu_bringup
from tools.bringup import arena, basics, budget, head, loop, machine, oracle
from tools.bringup.experiments import EXPERIMENTS, by_id, chosen
from tools.bringup.report import Report, summary
from tools.bringup.runner import STATUSES, Experiment, _load, clean, run, run_all

NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
KEYS = {
    *("title", "status", "reason", "seconds", "date", "headline", "numbers", "claims", "refusals", "left_out"),
    *("environment", "last_lines", "cut"),
}


@functools.cache
def looked() -> dict[str, Any]:
    """What this machine is without its GPU; to ask torch takes a process."""
    with mock.patch.dict(os.environ, NO_GPU):
        return machine.look()


def bringup(*words: str) -> tuple[int, str, str]:
    """Exit code, output and errors of the script, in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "argv", ["gpu_bringup.py", *words]))
        stack.enter_context(mock.patch.object(gpu_bringup.machine, "look", return_value=dict(looked())))
        for redirect in (contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)):
            stack.enter_context(redirect)
        try:
            code = gpu_bringup.main()
        except SystemExit as end:
            code = int(end.code or 0)
    return code, out.getvalue(), err.getvalue()


def made_up(name: str, **options: Any) -> Experiment:
    options = {"needs": (), "seconds": 60} | options
    return Experiment(name, name.replace("_", " "), f"tests.harness.bringup_experiments:{name}", **options)


def on_cpu(name: str, seconds: float = 200) -> dict[str, Any]:
    """The record of an experiment that needs Megatron."""
    return run(made_up(name, needs=("megatron",), seconds=seconds, environment=NO_GPU), {})


def test_without_a_gpu_everything_is_left_out_with_its_reason_and_nothing_is_written(tmp_path: Path) -> None:
    evidence = gpu_bringup.EVIDENCE
    before = evidence.read_bytes() if evidence.exists() else None
    command = [sys.executable, "tools/gpu_bringup.py"]
    ended = subprocess.run(command, cwd=ROOT, env=os.environ | NO_GPU, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    table = ended.stdout[ended.stdout.index("experiment  ") :]
    for experiment in EXPERIMENTS:
        row = next(line for line in table.splitlines() if line.startswith(f"{experiment.id} "))
        assert "left out" in row and (
            "torch finds no CUDA device" in row or (experiment.id == "11" and "Slurm allocation" in row)
        )
    assert f"{len(EXPERIMENTS)} left out" in table
    assert "not written" in table
    assert (evidence.read_bytes() if evidence.exists() else None) == before
    out = tmp_path / "new" / "gpu.json"
    assert bringup("--only", "2", "5a", "--out", str(out))[0] == 0
    found = json.loads(out.read_text())
    assert found["schema"] == gpu_bringup.SCHEMA and found["device"] is None
    assert found["versions"]["torch"] == torch.__version__
    assert list(found["experiments"]) == ["2a", "2b", "5a"]
    assert all(set(record) == KEYS for record in found["experiments"].values())


def test_a_partial_run_keeps_the_others_records_and_refuses_those_of_another_machine(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    assert bringup("--only", "1a", "--out", str(out))[0] == 0
    assert bringup("--only", "6", "--out", str(out))[0] == 0
    found = json.loads(out.read_text())
    assert list(found["experiments"]) == ["1a", "6"]
    out.write_text(json.dumps(found | {"device": "another"}))
    code, _, said = bringup("--only", "6", "--out", str(out))
    assert code == 2 and "another device" in said
    assert json.loads(out.read_text())["device"] == "another"


def test_wrong_requests_are_refused_and_the_list_names_every_experiment() -> None:
    assert bringup("--only", "12")[0] == 2
    assert bringup("--limit", "0")[0] == 2
    assert bringup("--budget", "0")[0] == 2
    code, _, said = bringup("--model", "no/such/folder")
    assert code == 2 and "no config.json there" in said
    code, listed, _ = bringup("--list")
    assert code == 0
    assert [line.split()[0] for line in listed.splitlines()[1:]] == [e.id for e in EXPERIMENTS]
    assert [e.id for e in chosen(["4", "1b"])] == ["1b", "4a", "4b"]


def test_every_experiment_has_its_function() -> None:
    assert run_ranks(1, cases.not_there)["not_there"] == [[]]
    assert _load("head:exact") is head.exact
    assert len({e.id for e in EXPERIMENTS}) == len(EXPERIMENTS)
    assert all(set(e.needs) <= {"cuda", "hopper", "two", "nodes", *machine.NEEDS} for e in EXPERIMENTS)


def test_the_kernels_and_the_arenas_experiments_need_torch_and_triton_alone() -> None:
    code = """
import sys

class Missing:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("pydantic", "yaml", "megatron", "transformers", "vllm", "safetensors", "blake3"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
from a3po_megatron.launch import environment
environment.prepare()
from tools.bringup import arena, basics, budget, head, machine, runner, sleep
from a3po_megatron.learner import rows_triton
assert machine.lacks(True, "", (9, 0)).keys() >= {"megatron", "package"}
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | NO_GPU, check=False, timeout=100)
    assert ended.returncode == 0


def test_where_there_is_a_gpu_the_evidence_is_written_and_a_failure_is_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = {
        "date": "2027-01-01",
        "code": "abc",
        "device": "a card",
        "details": {},
        "versions": {"torch": "2"},
        "lacks": {},
    }
    monkeypatch.setattr(gpu_bringup.machine, "look", lambda: dict(here))
    monkeypatch.setattr(gpu_bringup, "EVIDENCE", tmp_path / "evidence" / "gpu.json")
    for names, code in ((("succeeds", "refuses"), 0), (("succeeds", "raises"), 1)):
        experiments = tuple(made_up(name) for name in names)
        monkeypatch.setattr(gpu_bringup, "chosen", lambda _, found=experiments: found)
        monkeypatch.setattr(sys, "argv", ["gpu_bringup.py"])
        assert gpu_bringup.main() == code
        found = json.loads(gpu_bringup.EVIDENCE.read_text())
        assert found["device"] == "a card" and "lacks" not in found
        assert list(found["experiments"]) == list(names)
        assert "| 42" in capsys.readouterr().out


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    names = ("crashes", "raises", "fails", "takes_all_memory", "refuses", "leaves_silently")
    experiments = [
        made_up("hangs", seconds=12),
        *(made_up(name) for name in names),
        made_up("left", needs=("cuda",)),
        made_up("succeeds", environment={"A": "1"}),
    ]
    logs = tmp_path_factory.mktemp("logs")
    found = run_all(experiments, {"cuda": "there is none"}, logs=logs)
    assert {path.stem for path in logs.iterdir()} == set(found) - {"left"}
    return found


def test_an_experiment_that_crashes_hangs_or_takes_all_memory_takes_no_other_along(
    records: dict[str, dict[str, Any]],
) -> None:
    assert {name: record["status"] for name, record in records.items()} == {
        **{"hangs": "failed", "crashes": "failed", "raises": "failed", "fails": "failed", "takes_all_memory": "failed"},
        **{"refuses": "refused", "leaves_silently": "failed", "left": "left out", "succeeds": "shown"},
    }
    reasons = {name: record["reason"] for name, record in records.items()}
    assert reasons["hangs"] == "it did not end within 12 s"
    assert reasons["crashes"] == "killed by SIGSEGV"
    assert reasons["raises"].startswith("ValueError: something in ")
    assert reasons["fails"] == "not so: not a number"
    assert reasons["takes_all_memory"] == "MemoryError"
    assert reasons["refuses"] == "refused: this card has no such unit"
    assert reasons["leaves_silently"] == "the process ended before the experiment did"
    assert reasons["left"] == "there is none"


def test_a_record_says_what_was_found_before_the_end_and_the_last_lines_of_what_failed(
    records: dict[str, dict[str, Any]],
) -> None:
    for record in records.values():
        assert set(record) == KEYS and record["status"] in STATUSES
        assert (record["headline"] == record["reason"]) == (record["status"] != "shown")
        assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert records["crashes"]["numbers"] == {"before": 2}
    assert records["takes_all_memory"]["numbers"] == {"before": 3}
    assert any("in hangs" in line for line in records["hangs"]["last_lines"])  # every thread's stack
    assert str(ROOT) not in json.dumps(records)  # records are published: no machine's paths
    assert records["raises"]["last_lines"][-1] == "ValueError: something in tests/harness/bringup_experiments.py"
    good = records["succeeds"]
    assert good["numbers"] == {"answer": 42} and good["headline"] == "42" and good["last_lines"] == []
    assert [claim["holds"] for claim in good["claims"]] == [True, True]
    assert good["refusals"] == {"13 tokens": "13 % 8 != 0"} and good["left_out"] == {"Liger": "not installed"}
    assert good["environment"] == {"A": "1"}
    assert records["fails"]["numbers"] == {"found": "nan"}


def test_what_a_hanging_experiment_started_ends_with_it(records: dict[str, dict[str, Any]]) -> None:
    child = Path("/proc", str(records["hangs"]["numbers"]["child"]), "stat")
    deadline = time.monotonic() + 5
    while lives(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not lives(child)


def lives(stat: Path) -> bool:
    """Whether a process is there, and no zombie that nobody has waited for."""
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_limit_given_by_the_user_counts() -> None:
    start = time.perf_counter()
    assert run(made_up("hangs"), {}, limit=2)["reason"] == "it did not end within 2 s"
    assert time.perf_counter() - start < 20


def test_the_table_names_every_experiment_and_counts_statuses(records: dict[str, dict[str, Any]]) -> None:
    lines = gpu_bringup.table(records).splitlines()
    assert lines[-1] == "6 failed, 1 refused, 1 left out, 1 shown"
    assert "shown" in lines[-2] and lines[-2].endswith("| 42")


def test_what_is_lacking_is_named_with_its_reason() -> None:
    found = machine.lacks(True, "", (8, 0))
    assert "cuda" not in found and found["hopper"].startswith("the device is sm_80")
    assert found["two"] == "one GPU is visible, and it needs two" and "allocation" in found["nodes"]
    assert "two" not in machine.lacks(True, "", (9, 0), 2)
    found = machine.lacks(False, "none", (0, 0))
    assert found["cuda"] == found["hopper"] == "none"
    assert clean(f"  File {ROOT}/tools/x.py, line 1") == "  File tools/x.py, line 1"


@pytest.mark.parametrize("tied", [True, False])
def test_the_oracle_equals_transformers_in_float64(tied: bool, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "qwen3", "qwen3", tie_word_embeddings=tied)
    facts, weights, model = read_facts(folder), oracle.read_weights(folder), hf_model(folder)
    prompt, response = (5, 9, 2, 40), torch.tensor([7, 1, 66, 3, 3])
    mine = oracle.logprobs(weights, facts, prompt, response.tolist(), 0.7)
    theirs = hf_logprobs(model, prompt, response.numpy(), 0.7)
    # transformers takes its rotary angles in float32.
    assert float((mine - theirs).detach().abs().max()) < 1e-5
    mine.sum().backward()
    theirs.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(weights[name].grad, parameter.grad, rtol=1e-4, atol=1e-5)


def within(seconds: float, *experiments: Experiment, before: dict[str, Any] | None = None) -> tuple[Any, list[str]]:
    told: list[str] = []
    waiting = budget.unproven(experiments, before or {})
    done = budget.run_within(seconds, waiting, {"cuda": "there is none"}, lambda *_: None, told.append)
    return done, told


def test_a_budget_takes_the_shortest_unproven_experiment_first_and_says_what_each_decides() -> None:
    experiments = (
        made_up("fails", expected=3, decides="what fails"),
        made_up("succeeds", expected=2, decides="what holds"),
        made_up("left", expected=1, needs=("cuda",), decides="what is left"),
        made_up("refuses", expected=0.5),
        made_up("takes_all_memory", expected=500),
    )
    # One that failed before is as unproven as one that was never tried.
    before = {"refuses": {"status": "shown"}, "fails": {"status": "failed"}}
    done, told = within(60, *experiments, before=before)
    assert [(name, record["status"]) for name, record in done.items()] == [
        *(("left", "left out"), ("succeeds", "shown"), ("fails", "failed"))
    ]
    assert "what is left: there is none" in told[0] and told[1].endswith("what holds: 42")
    assert "what fails: not so: not a number" in told[2]
    assert "not begun" in told[3] and "500 s expected" in told[3] and len(told) == 4


def test_a_budget_ends_in_time_and_what_it_cut_off_has_not_failed() -> None:
    start = time.perf_counter()
    done, _ = within(3, made_up("hangs", expected=1), made_up("succeeds", expected=2))
    assert time.perf_counter() - start < 8
    assert done.keys() == {"hangs"}
    assert done["hangs"]["status"] == "left out" and done["hangs"]["reason"].startswith("the budget ended after 3 s")
    done, _ = within(60, made_up("hangs", expected=1, seconds=2))
    assert done["hangs"]["status"] == "failed"  # by its own limit


def test_a_budget_goes_on_from_its_file_and_refuses_another_devices(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = {"date": "2027-01-01", "code": "abc", "device": "a card", "details": {}, "versions": {"torch": "2"}}
    monkeypatch.setattr(gpu_bringup.machine, "look", lambda: dict(here) | {"lacks": {}})
    monkeypatch.setattr(gpu_bringup, "EVIDENCE", tmp_path / "gpu.json")
    experiments = (made_up("succeeds", expected=1), made_up("raises", expected=2))
    monkeypatch.setattr(gpu_bringup, "chosen", lambda _: experiments)
    monkeypatch.setattr(sys, "argv", ["gpu_bringup.py", "--budget", "60"])
    for shown, code in ((0, 1), (1, 1)):
        assert gpu_bringup.main() == code
        assert f"{shown} shown already, {2 - shown} to do within 60 s" in capsys.readouterr().out
        found = json.loads(gpu_bringup.EVIDENCE.read_text())["experiments"]
        assert {name: record["status"] for name, record in found.items()} == {"succeeds": "shown", "raises": "failed"}
    monkeypatch.setattr(gpu_bringup.machine, "look", lambda: here | {"device": "another", "lacks": {}})
    with pytest.raises(SystemExit):
        gpu_bringup.main()
    assert "of another device" in capsys.readouterr().err


def test_every_experiment_says_what_it_decides_and_expects_less_than_its_limit() -> None:
    assert all(e.decides and 0 < e.expected < e.seconds for e in EXPERIMENTS)


def test_arena_and_head_have_what_they_are_built_on() -> None:
    report = Report()
    basics.basics_on(report, torch.device("cpu"), size=1 << 20)
    assert wrong(report) == [] and len(summary(report.lines)["claims"]) == 5


def test_a_storage_that_comes_back_elsewhere_than_its_views_look_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(block: Any) -> None:
        block.storage.resize_(block.bytes)
        torch.empty(0, dtype=torch.uint8).set_(block.storage).zero_()  # whatever was there: nothing is copied
        block.is_here = True

    monkeypatch.setattr(basics.Block, "back", elsewhere)
    report = Report()
    basics.basics_on(report, torch.device("cpu"), size=1 << 20)
    assert any("the tensor is as it was" in claim for claim in wrong(report))


def test_a_rank_that_dies_ends_the_others_and_its_experiment() -> None:
    record = run(made_up("a_rank_dies"), {})
    assert record["reason"] == "RuntimeError: rank 1 of 2 in dies_alone ended with 1 within 60 s"
    assert record["seconds"] < 50  # the other rank would have waited for ten minutes
    assert [c["claim"] for c in record["claims"] if not c["holds"]] == ["rank 1: one comes so far"]


@pytest.mark.soak
def test_a_run_killed_after_a_save_beside_rollouts_goes_on_bit_for_bit_and_canaries_are_told() -> None:
    record = on_cpu("saving_on_cpu")
    assert record["status"] == "shown", (record["reason"], record["last_lines"])
    assert record["numbers"]["tensors"] > 100 and len(record["numbers"]["canary: mean of each"]) == 2


@pytest.mark.soak
@pytest.mark.parametrize("name", ["layouts_on_cpu", "heads_on_cpu", "holders_on_cpu", "engine_over_two_ranks_on_cpu"])
def test_experiments_of_several_processes_go_through_on_cpus(name: str) -> None:
    record = on_cpu(name)
    assert record["status"] == "shown", (record["reason"], record["last_lines"])


def small_head(report: Report) -> None:
    head.exact_on(report, torch.device("cpu"), (1000, 997), width=64)


def wrong(report: Report) -> list[str]:
    return [claim["claim"] for claim in summary(report.lines)["claims"] if not claim["holds"]]


def test_the_loss_is_exact_by_the_experiments_measure() -> None:
    report = Report()
    small_head(report)
    assert wrong(report) == []
    assert len(summary(report.lines)["claims"]) == 2 * 2 * 8


def test_a_head_that_counts_padding_or_loses_precision_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    right: Callable[..., Any] = head.fused_head
    monkeypatch.setattr(head, "fused_head", lambda *given, vocab_size, **more: right(*given, **more))
    report = Report()
    small_head(report)
    assert any("padding" in claim for claim in wrong(report)) and any("logprob" in claim for claim in wrong(report))

    def coarse(hidden: torch.Tensor, *given: Any, **more: Any) -> Any:
        return right((hidden * (1 + 2**-11)), *given, **more)  # what tf32 does to an operand

    monkeypatch.setattr(head, "fused_head", coarse)
    report = Report()
    small_head(report)
    assert any("d_weight" in claim for claim in wrong(report))


def test_times_of_kernels_and_head_are_taken_of_every_arm() -> None:
    report, cpu = Report(), torch.device("cpu")
    share = head.row_speed(report, cpu, 8, 100, ceiling=1e9)
    head.head_speed(report, cpu, 8, 16, 100)
    numbers = summary(report.lines)["numbers"]
    assert share > 0 and numbers["rows T 8 V 100 entropy"]["backward_ms"] > 0
    for arm in ("fused", "fused, entropy", "eager", "eager, entropy"):
        assert numbers[f"head T 8 H 16 V 100: {arm}"]["ms"] > 0
    assert "Liger" in summary(report.lines)["left_out"] or numbers["head T 8 H 16 V 100: liger"]["ms"] > 0


def test_an_optimizer_that_leaves_and_returns_takes_the_same_steps() -> None:
    report = Report()
    arena.blocks_on(report, torch.device("cpu"), [1000, 70_001, 3], cycles=3)
    assert wrong(report) == [] and len(summary(report.lines)["claims"]) == 2
    assert summary(report.lines)["numbers"]["bytes"] >= 3 * 4 * 71_004


def test_one_lost_bit_of_a_returning_optimizer_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    back = arena.Gathered.back

    def damaged(block: arena.Gathered) -> None:
        back(block)
        block.members[0].data[3] *= 1 + 2**-23

    monkeypatch.setattr(arena.Gathered, "back", damaged)
    report = Report()
    arena.blocks_on(report, torch.device("cpu"), [1000], cycles=2)
    assert wrong(report)


def test_a_whole_learner_that_leaves_takes_the_same_steps() -> None:
    ((record,),) = run_ranks(1, *(getattr(cases, name) for name in cases.LEARNER)).values()
    assert record["claims"] and all(claim["holds"] for claim in record["claims"]), record["claims"]
    # bf16 weights, float32 gradients, masters and moments: 18 bytes a parameter of 2.6 M.
    assert record["numbers"]["bytes of the learner that leave"] > 40e6


def test_the_engines_experiments_go_through_on_vllm_for_cpus() -> None:
    found = run_ranks(1, *(getattr(cases, name) for name in cases.ENGINE))
    (cycles,), (table,) = (found[name] for name in cases.ENGINE)
    for each in (cycles, table):
        assert each["claims"] and all(claim["holds"] for claim in each["claims"]), each["claims"]
    assert cycles["numbers"]["receipt: strength, tensors, bytes"][0] == "stream"  # all that a CPU's engine can prove
    assert 0 < table["numbers"]["learner bf16, engine bf16"]["abs_mean"] < 0.05


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="a CPU without AMX")
def test_a_bf16_engine_that_is_first_to_use_amx_does_not_die_of_an_illegal_instruction() -> None:
    record = on_cpu("engine_steps_before_anything_else_on_cpu")
    assert record["status"] == "shown", record["reason"]


@pytest.mark.soak
def test_generation_in_process_equals_a_vllm_of_its_own_on_a_cpu() -> None:
    record = on_cpu("standalone_on_cpu")
    assert record["status"] == "shown", record["reason"]
    responses, share, _ = record["numbers"]["responses, share equal, tokens compared"]
    assert responses == 32 and share >= 0.9  # of the same kernels; how requests share a batch may differ


def rows(steps: int, rise: float = 0.2, **changes: float) -> list[dict[str, Any]]:
    return [
        {
            **{"step": step, "learner/loss": 0.1, "policy/grad_norm": 1.0, "mismatch/logprob_abs_mean": 0.01},
            **{"reward/correct_rate": 0.4 + rise * step / (steps - 1), "policy/ratio_first_max": 0.05},
            **changes,
        }
        for step in range(steps)
    ]


@pytest.mark.parametrize(
    ("given", "claim"),
    [
        (rows(40), None),
        (rows(39), "40 steps"),
        (rows(40, rise=0.1), "rises"),
        (rows(40, **{"learner/loss": math.nan}), "learner/loss"),
        (rows(40, **{"mismatch/logprob_abs_mean": 0.3}), "mismatch"),
        (rows(40, **{"policy/ratio_first_max": 0.9}), "ratio"),
    ],
)
def test_the_demos_loop_is_judged_by_its_metrics(given: list[dict[str, Any]], claim: str | None) -> None:
    report = Report()
    loop.judge(report, given, 40)
    assert len(wrong(report)) == (claim is not None)
    if claim is not None:
        assert claim in wrong(report)[0]


def test_experiments_whose_settings_are_read_at_import_run_with_them() -> None:
    assert by_id("1c").environment == {"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "0"}
    assert "expandable_segments:True" in by_id("3b").environment["PYTORCH_CUDA_ALLOC_CONF"]
