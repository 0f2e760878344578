"""Runs through a real Slurm: two nodes on this host, the demo's model. `make test-slurm`; needs root and the daemons.

Jobs of several tests are queued at once: the nodes have 16 pretended CPUs each, and waiting is most of the time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import psutil
import pytest

from a3po_megatron.cli import main
from a3po_megatron.config import load_config
from a3po_megatron.errors import RequestError
from a3po_megatron.evaluate.result import read
from a3po_megatron.files.run_folder import RunFolder
from a3po_megatron.launch import slurm as launched
from a3po_megatron.telemetry.beats import read_beats
from tests.harness import interrupted_runs as tools
from tests.harness.ranks import ROOT
from tests.harness.tiny_models import resolved

sys.path.insert(0, str(ROOT / "slurm" / "test_cluster"))
import cluster

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(shutil.which(name) for name in ("slurmctld", "slurmd", "munged")),
        reason="needs root, slurm-wlm and munge",
    ),
]
LOOPBACK = "slurm.environment={GLOO_SOCKET_IFNAME: lo, VLLM_HOST_IP: 127.0.0.1}"
TWO_NODES = ("slurm.nodes=2", "slurm.gpus_per_node=0", "slurm.tasks_per_node=1", "slurm.cpus_per_task=1", LOOPBACK)
ONE_NODE = ("slurm.nodes=1", "slurm.gpus_per_node=0", "slurm.tasks_per_node=2", "slurm.cpus_per_task=1")
# Of a shell within torchrun, within an allocation that asked for memory by CPU, on a node with other interfaces.
SHELL = {
    **{"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "nowhere", "MASTER_PORT": "1"},
    **{"TORCHELASTIC_RUN_ID": "x", "SLURM_MEM_PER_CPU": "1", "SLURM_NTASKS_PER_NODE": "7", "SLURM_CPUS_PER_GPU": "3"},
    **{"SLURM_TIMELIMIT": "1", "SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SLURM_WORKING_DIR": "/nowhere"},
    **{"CUDA_VISIBLE_DEVICES": "7", "GLOO_SOCKET_IFNAME": "ib0"},
}


@pytest.fixture(scope="module", autouse=True)
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    hosts = Path("/etc/hosts").read_bytes()
    with cluster.cluster(tmp_path_factory.mktemp("slurm")) as configuration:
        yield configuration
    assert Path("/etc/hosts").read_bytes() == hosts


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run, without Slurm; like a job's it draws from no random stream."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("A3PO_TEST_DRAWS", "0")
        return tools.uninterrupted("tp2", tmp_path_factory)


def submit(folder: Path, *options: str, words: tuple[str, ...] = (), ended: int = 0) -> str:
    """`a3po submit`; returns the job's number, or what it said where it is to fail."""
    settings = [word for option in (*tools.SMALL, "slurm.time='30'", *options) for word in ("--set", option)]
    command = ["a3po", "submit", str(ROOT / "configs/arithmetic.yaml"), "--run-dir", str(folder), *settings, *words]
    code, out, err = 0, io.StringIO(), io.StringIO()
    # In this process: a program of its own takes seconds of imports each time.
    with mock.patch.object(sys, "argv", command), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as left:
            code = int(left.code or 0)
    assert code == ended, err.getvalue()
    said = out.getvalue()
    return err.getvalue() if ended else (re.findall(r"submitted job (\d+)", said) or [said])[0]


def queue() -> dict[str, str]:
    """Job → state, of all that are not done.

    It is asked hundreds of times, on a machine whose cores are taken: once squeue ended without a word.
    """
    for tries_left in (2, 1, 0):
        try:
            lines = cluster.run("squeue", "-h", "-o", "%i %T").splitlines()
            return dict(line.split() for line in lines)
        except SystemExit as error:
            if not tries_left:
                raise
            print(error, flush=True)
            time.sleep(1)
    raise AssertionError("not reached")


def wait_done(*jobs: str, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while waiting := [job for job in queue() if job.partition("_")[0] in jobs]:
        assert time.monotonic() < deadline, (waiting, cluster.run("squeue"))
        time.sleep(0.3)


def wait_for(folder: Path, step: int, seconds: float = 120) -> None:
    """Until rank 0 has begun a step: the row of the one before is written. Signs of life come up to 5 s late here, and
    a step may take one."""
    deadline, rows = time.monotonic() + seconds, RunFolder(folder).metrics
    while not rows.exists() or rows.read_bytes().count(b"\n") < step:
        assert time.monotonic() < deadline, said(folder)
        time.sleep(0.02)


def step_of_rank_0(folder: Path) -> int:
    """The step that rank 0 says it is in; -1 before the first."""
    beat = read_beats(folder / "logs").get(0)
    return -1 if beat is None or " of step " not in beat[0].place else int(beat[0].place.rpartition(" ")[2])


def wait_for_start(folder: Path, number: int, step: int) -> None:
    """Until the so-many-eth start of a run is at a step."""
    deadline = time.monotonic() + 120
    while attempts(folder) < number:
        assert time.monotonic() < deadline, said(folder)
        time.sleep(0.05)
    began = time.time()  # what was written before is of the start before
    while (beat := read_beats(folder / "logs").get(0)) is None or beat[1].stat().st_mtime < began:
        assert time.monotonic() < deadline, said(folder)
        time.sleep(0.05)
    while step_of_rank_0(folder) < step:
        assert time.monotonic() < deadline, said(folder)
        time.sleep(0.02)


def said(folder: Path) -> str:
    """What the jobs of a run said."""
    return "".join(path.read_text() for path in sorted((folder / "logs").glob("slurm-*.out")))


def attempts(folder: Path) -> int:
    return len(list((folder / "logs").glob("attempt-*")))


def test_ranks_land_as_planned_over_nodes_and_devices_and_the_run_ends_as_without_slurm_whatever_shell_submits(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, four = tmp_path / "run", tmp_path / "four"
    for name, value in SHELL.items():
        monkeypatch.setenv(name, value)
    jobs = [submit(folder, *TWO_NODES, words=("--export", str(tmp_path / "hf")))]
    placed = ("slurm.nodes=2", "slurm.gpus_per_node=2", "slurm.cpus_per_task=1", "trainer.steps=1")
    # The cluster's GPUs are none to train on.
    placed = (
        *placed,
        "cluster.device=cpu",
        "parallel.data=2",
        LOOPBACK.replace("{", "{CUDA_DEVICE_ORDER: PCI_BUS_ID, "),
    )
    # Of a site whose jobs get nothing of the shell; and by hand, where nothing is taken out when it is submitted.
    monkeypatch.setenv("SLURM_EXPORT_ENV", "NONE")
    assert "made, not submitted" in submit(four, *placed, words=("--write",))
    jobs.append(cluster.run("sbatch", "--parsable", str(four / "job.sbatch")).strip())
    for name in (*SHELL, "SLURM_EXPORT_ENV"):
        monkeypatch.delenv(name)
    deadline, logs = time.monotonic() + 120, [four / f"logs/attempt-1/rank-{n}.log" for n in range(4)]
    while not all(log.exists() and "\n" in log.read_text() for log in logs):
        assert time.monotonic() < deadline, said(four)
        time.sleep(0.1)
    cluster.run("scancel", jobs[1])  # where its ranks are is all that is asked of it
    wait_done(*queue())  # also the job that exports
    tools.assert_same_run(folder, whole)
    assert (tmp_path / "hf" / "model.safetensors").exists()  # the job that waited for the run
    for rank, (log, node, local) in enumerate(zip(logs, ("rl0", "rl0", "rl1", "rl1"), (0, 1, 0, 1), strict=True)):
        line = log.read_text().partition("\n")[0]
        assert line == f"rank {rank} of 4, local rank {local}, node {node}, devices 0,1", said(four)


@pytest.mark.soak
def test_a_run_is_evaluated_by_a_job_that_waits_for_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    submit(folder, *ONE_NODE, "trainer.steps=2", words=("--eval", "builtin:arithmetic"))
    wait_done(*queue())
    result = read(folder / "evaluations" / "step-000002" / "arithmetic.json")
    assert (result.model.kind, result.model.step, len(result.problems)) == ("run", 2, 500), said(folder)


def test_a_chain_goes_on_with_its_next_job_and_ends_bit_for_bit_as_undisturbed(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    job = submit(folder, *ONE_NODE, "slurm.resume=chain")
    wait_for(folder, 1)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    deadline = time.monotonic() + 200
    while queue() and time.monotonic() < deadline:
        time.sleep(0.3)
    assert not queue(), cluster.run("squeue")  # the chain's next link was taken back too
    assert "interrupted by SIGUSR1" in said(folder), said(folder)
    assert "goes on from step-" in said(folder), said(folder)
    assert attempts(folder) == 2
    tools.assert_same_run(folder, whole)
    assert len(list((folder / "logs").glob("slurm-*.out"))) == 2


@pytest.mark.soak  # signals of a start, without Slurm: tests/test_start_signals.py, tests/test_job.py
def test_a_job_that_is_told_to_leave_in_its_first_moments_comes_back(whole: Path, tmp_path: Path) -> None:
    """While the batch script sets up, which Slurm says once; and while srun and the ranks begin, again and again.

    There vLLM, whose cache is new, inspects the model's class in a process of its own: srun signals that as well.
    """
    script, ranks, idle, here = (tmp_path / name for name in ("script", "ranks", "idle", "set-up"))
    heard = f"touch {here}; for i in $(seq 600); do [ -z ${{A3PO_SIGNALLED:-}} ] || break; sleep 0.1; done"
    setup = f"slurm.setup=['[ ${{SLURM_RESTART_COUNT:-}} ] || {{ {heard}; }}']"
    first, second = submit(script, *ONE_NODE, setup), submit(ranks, *ONE_NODE)
    # One whose every start is told to leave at once: the second of them ends the chain.
    submit(idle, *ONE_NODE, "slurm.resume=chain", "slurm.setup=['kill -USR1 $$']")
    deadline = time.monotonic() + 120
    while not here.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    cluster.run("scancel", "--batch", "--signal=USR1", first)
    helped = 0  # signals that came while a helper of the ranks was there
    while helped < 20 and attempts(ranks) < 2:  # a second start that is told to leave ends the run
        assert time.monotonic() < deadline, "the ranks never had a helper"
        found = {p: " ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["name", "cmdline", "environ"])}
        sruns = [p for p, words in found.items() if p.info["name"] == "srun" and str(ranks) in words]
        inside = [p for p, words in found.items() if "models.registry" in words]
        for process in sruns:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGUSR1)
        # Of the other run's ranks, too, until it is over: those of this one say so in their environment.
        helped += bool(sruns) and any(
            str(ranks) in (p.info["environ"] or {}).get("VLLM_CACHE_ROOT", "") for p in inside
        )
        time.sleep(0.02)
    assert helped, "the ranks left before they had a helper"
    wait_done(first, second)
    assert "interrupted by SIGUSR1 before it started" in said(script), said(script)
    assert attempts(script) == 1
    assert "interrupted" in said(ranks), said(ranks)
    assert attempts(ranks) == 2
    for folder in (script, ranks):
        tools.assert_same_run(folder, whole)
    assert len(list((idle / "logs").glob("slurm-*.out"))) == 2
    assert "got no further in 2 starts in a row" in said(idle), said(idle)
    assert not queue()


def test_a_run_that_is_signalled_then_preempted_then_stands_still_is_requeued_and_ends_bit_for_bit_as_undisturbed(
    whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    job = submit(folder, *TWO_NODES, "slurm.partition=batch", "telemetry.stall_seconds=8")
    wait_for(folder, 1)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    wait_for_start(folder, 2, step=2)
    assert "interrupted by SIGUSR1" in said(folder), said(folder)

    options = ("--parsable", "-p", "urgent", "-N2", "--exclusive", "-t", "1", "-o", "/dev/null")
    urgent = cluster.run("sbatch", *options, "--wrap", "sleep 2").strip()
    wait_done(urgent)
    wait_for_start(folder, 3, step=4)  # it has been through every phase: the limits are the short ones

    stopped = next(p for p in ranks_of(folder) if p.environ()["SLURM_PROCID"] == "1")
    stopped.send_signal(signal.SIGSTOP)
    deadline, stacks = time.monotonic() + 120, folder / "logs/rank-1.stacks"
    while not stacks.read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    stopped.send_signal(signal.SIGSTOP)  # woken for its stacks, it would get on, and these few steps to their end
    wait_done(job, seconds=300)
    assert "rank 1 (phase " in said(folder), said(folder)
    assert "no heartbeat) stood still" in said(folder)
    for rank in range(2):  # also of the stopped one
        assert "Thread 0x" in (folder / f"logs/rank-{rank}.stacks").read_text(), rank
    assert attempts(folder) == 4, said(folder)
    assert said(folder).count("goes on from step-") == 3, said(folder)
    tools.assert_same_run(folder, whole)
    assert len(list((folder / "logs").glob("slurm-*.out"))) == 1


def ranks_of(folder: Path) -> list[psutil.Process]:
    return [process for process in tools.ranks_of(folder) if process.name().startswith("python")]  # not srun


@pytest.mark.soak
def test_a_run_whose_node_goes_down_comes_back(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    job = submit(folder, *TWO_NODES)
    wait_for(folder, 3)
    cluster.run("scontrol", "update", "nodename=rl1", "state=down", "reason=test")
    time.sleep(2)
    subprocess.run(["scontrol", "update", "nodename=rl1", "state=resume"], check=False)  # it may be back already
    wait_done(job)
    tools.assert_same_run(folder, whole)
    assert attempts(folder) == 2, said(folder)


def test_a_rank_that_dies_is_replaced_by_a_spare_node_within_the_allocation(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    job = submit(folder, *ONE_NODE, "slurm.spares=1")
    wait_for(folder, 3)
    ranks = ranks_of(folder)
    assert len(ranks) == 2
    ranks[0].send_signal(signal.SIGKILL)
    wait_done(job)
    assert "once more without rl" in said(folder), said(folder)
    assert attempts(folder) == 2
    tools.assert_same_run(folder, whole)


def test_a_sweep_is_an_array_of_runs(tmp_path: Path) -> None:
    top = tmp_path / "sweep"
    wait_done(submit(top, *ONE_NODE, "trainer.steps=1", words=("--sweep", "trainer.seed=0,1")))
    assert json.loads((top / "sweep.json").read_text()) == {"000": ["trainer.seed=0"], "001": ["trainer.seed=1"]}
    rows = [(top / name / "metrics.jsonl").read_text().splitlines() for name in ("000", "001")]
    assert [len(lines) for lines in rows] == [1, 1]
    assert json.loads(rows[0][0])["learner/loss"] != json.loads(rows[1][0])["learner/loss"]


@pytest.mark.soak
def test_an_array_of_jobs_is_one_run(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    wait_done(submit(folder, *ONE_NODE, "slurm.resume=array", "slurm.attempts=3"))
    tools.assert_same_run(folder, whole)
    assert attempts(folder) == 1  # the jobs after the first found nothing to do
    assert len(list((folder / "logs").glob("slurm-*.out"))) == 3


@pytest.mark.soak
def test_graders_on_ray_workers_of_all_nodes_give_the_run_that_local_ones_give(whole: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    folder = tmp_path / "run"
    wait_done(submit(folder, *TWO_NODES, "grader_pool.name=ray"))
    assert "report:" in said(folder), said(folder)
    tools.assert_same_run(folder, whole)
    assert {path.name for path in (folder / "logs").glob("ray-*")} == {"ray-rl0.log", "ray-rl1.log"}
    left = [p for p in psutil.process_iter() if "raylet" in p.name() or "gcs_server" in p.name()]
    assert not [p for p in left if p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.skipif("A3PO_NEMO_PYTHON" not in os.environ, reason="A3PO_NEMO_PYTHON names no interpreter with nemo-run")
def test_nemo_run_submits_the_same_ranks_and_they_end_with_the_same_run(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = (*tools.SMALL, *TWO_NODES, "slurm.time='30'", "slurm.account=root")
    settings = [word for option in options for word in ("--set", option)]
    command = [os.environ["A3PO_NEMO_PYTHON"], "launchers/nemo_run.py", "configs/arithmetic.yaml"]
    command += ["--run-dir", str(folder), "--a3po-python", sys.executable, *settings]
    around = os.environ | {"NEMORUN_HOME": str(tmp_path / "nemo")}
    seen = subprocess.run([*command, "--dry-run"], cwd=ROOT, env=around, capture_output=True, text=True, timeout=120)
    assert seen.returncode == 0, seen.stderr
    for words in ("#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=1", "SRUN_CPUS_PER_TASK=1"):
        assert words in seen.stdout
    assert "torchrun" not in seen.stdout
    assert not queue()
    done = subprocess.run([*command, "--detach"], cwd=ROOT, env=around, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    wait_done(*queue())
    tools.assert_same_run(folder, whole)


def test_what_the_cluster_cannot_give_is_named_before_submission(tmp_path: Path) -> None:
    for option, words in (
        ("slurm.partition=gpus", "slurm.partition = gpus: this cluster has batch, urgent"),
        ("slurm.gpus_per_node=9", "partition batch has 0 such nodes"),
        ("slurm.spares=1", "slurm.nodes + slurm.spares = 3"),
    ):
        assert words in submit(tmp_path / "run", *TWO_NODES, "cluster.device=cpu", option, ended=2)
    assert not (tmp_path / "run").exists()


def test_the_script_for_two_nodes_of_eight_h200_is_the_golden_one_and_slurm_takes_it(tmp_path: Path) -> None:
    golden = Path(__file__).parent / "golden-2x8.sbatch"
    options = [
        *(
            "slurm.nodes=2",
            "slurm.cpus_per_task=2",
            "slurm.partition=batch",
            "slurm.time='1:00:00'",
            "slurm.memory=16000",
        ),
        *("slurm.setup=[module load cuda]", "slurm.environment={HF_HOME: /scratch/hf}", "parallel.data=8"),
        *("checkpoint.every_steps=10", "model.dtype=bfloat16"),
    ]
    words = [word for option in options for word in ("--set", option)]
    command = [sys.executable, "-m", "a3po_megatron", "submit", "configs/arithmetic.yaml", "--run-dir", "/runs/example"]
    # Eight ranks with GPUs do not fit into so little of a node's memory, which this Slurm's nodes have.
    words = [*words, "--force"]
    done = subprocess.run([*command, *words, "--dry-run"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not Path("/runs/example").exists()
    assert done.stdout.replace(sys.executable, "/venv/bin/python") == golden.read_text()
    subprocess.run(["bash", "-n", str(golden)], check=True)
    tested = subprocess.run(["sbatch", "--test-only", str(golden)], capture_output=True, text=True)
    assert tested.returncode == 0, tested.stderr


def planned(folder: Path, *options: str) -> launched.Plan:
    given = ("slurm.nodes=1", "slurm.tasks_per_node=2", "slurm.cpus_per_task=1", "slurm.gpus_per_node=0", *options)
    return launched.plan([resolved(load_config(ROOT / "configs/arithmetic.yaml", given))], folder, sweep=False)


NAMES = ["my run", 'a"b', "it's", "a#b", "lr%j", "100%", "$HOME`id`", "日本 äö", "a;b&c:d"]


def test_what_a_job_says_lands_in_a_run_folder_of_any_name_and_its_program_gets_that_name(tmp_path: Path) -> None:
    jobs = {}
    for name in NAMES:
        plan = planned(tmp_path / name, "slurm.time=10", 'slurm.environment={SAYS: "it\'s\\n%j $HOME"}')
        shown = re.sub(r"(?m)^exec \S+ -m \S+ (.*)$", r'printf "%s\\n" "$SAYS" \1', plan.script)
        launched.write(dataclasses.replace(plan, script=shown), [[]])
        jobs[name] = launched.sbatch(str(tmp_path / name / launched.SCRIPT))
    wait_done(*jobs.values(), seconds=60)
    for name, job in jobs.items():
        assert (tmp_path / name / f"logs/slurm-{job}.out").read_text() == f"it's\n%j $HOME\n{tmp_path / name}\n", name


@pytest.mark.parametrize(
    "options",
    [
        [f"slurm.memory={memory}" for memory in ("0", "4096", "1G", "1GB", "512m", "64K")],
        [f"slurm.time={time}" for time in ("30", "90:00", "4:00:00", "0-12", "0-1:30", "0-01:02:03", "1:90:99")],
        [f"slurm.gpus_per_node={gpus}" for gpus in ("8", "h200:8", "gpu:h200:2")],
        [f"slurm.partition={names}" for names in ("batch", "urgent,batch")],
        ["slurm.extra=['--exclusive --nice=5', '--hint=nomultithread', '--comment=\"a # b\"']", "slurm.extra=-x rl1"],
        ["slurm.resume=array,slurm.attempts=1000"],
    ],
    ids=lambda options: options[0].partition("=")[0],
)
def test_values_that_are_taken_are_taken_by_sbatch_too(tmp_path: Path, options: list[str]) -> None:
    for option in options:
        words = option.split(",slurm.attempts")
        overrides = [words[0], *(f"slurm.attempts{word}" for word in words[1:])]
        assert launched.check_cluster(planned(tmp_path / "run", *overrides), tmp_path / "hf") == [], option


@pytest.mark.parametrize(
    ("option", "as_directive"),
    [
        ("slurm.memory=200 GB", "--mem=200 GB"),
        ("slurm.memory=1P", "--mem=1P"),
        ("slurm.time=4h", "--time=4h"),
        ("slurm.partition=batch,gpus", "--partition=batch,gpus"),
        ("slurm.gpus_per_node=a100:1", "--gpus-per-node=a100:1"),
        ("slurm.extra=--node=1", "--node=1"),
        ("slurm.extra=--no=1", "--no=1"),
        ("slurm.extra=--nonsense=1", "--nonsense=1"),
        ("slurm.extra=--reservation=none", "--reservation=none"),
        ("slurm.resume=array", "--array=1-1001%1"),
    ],
)
def test_values_that_sbatch_refuses_are_refused_before_anything_is_made(
    tmp_path: Path, option: str, as_directive: str
) -> None:
    script = f"#!/bin/bash\n#SBATCH {as_directive}\ntrue\n"
    tested = subprocess.run(["sbatch", "--test-only"], input=script, capture_output=True, text=True)
    assert tested.returncode, as_directive
    with pytest.raises(RequestError):
        launched.check_cluster(planned(tmp_path / "run", option, "slurm.attempts=1001"), None)
    assert not (tmp_path / "run").exists()


def test_a_job_for_nodes_that_are_drained_for_now_may_wait_and_is_submitted(tmp_path: Path) -> None:
    cluster.run("scontrol", "update", "nodename=rl0,rl1", "state=drain", "reason=test")
    try:
        (remark,) = launched.check_cluster(planned(tmp_path / "run", "slurm.partition=batch"), None)
        assert "2 nodes are down or drained now" in remark
    finally:
        cluster.run("scontrol", "update", "nodename=rl0,rl1", "state=resume")
