"""What of the launcher's shell reaches ranks: nothing that decides who they are, where they meet, what they get."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from a3po_megatron.errors import RequestError
from a3po_megatron.launch import environment
from a3po_megatron.launch.shell import check_interfaces, of_a_job, of_a_submission, of_one_machine
from a3po_megatron.ranks.handoff import VARIABLES, WHEELS, Handoff
from tests.harness.ranks import ROOT

USERS = {
    "PATH": "/usr/bin",
    "HOME": "/home/u",
    "HF_HOME": "/models",
    "NCCL_DEBUG": "INFO",
    "NCCL_IB_HCA": "mlx5",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "OMP_NUM_THREADS": "4",
    "VLLM_CACHE_ROOT": "/cache",
    "WORLD": "mine",
}
# What torchrun, mpirun and a shell in an allocation or in a step (Slurm 22.05 to 24.11) leave in their children.
TORCHRUN = (
    *(
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "GROUP_WORLD_SIZE",
        "ROLE_RANK",
        "ROLE_NAME",
    ),
    *("ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE"),
    *("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "NODE_RANK", "NNODES", "NPROC_PER_NODE"),
)
MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_RANK", "PMI_SIZE", "PMIX_RANK", "PMIX_NAMESPACE", "PMI_FD")
SLURM_SIZES = (
    *("SLURM_MEM_PER_CPU", "SLURM_MEM_PER_GPU", "SLURM_MEM_PER_NODE", "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NNODES"),
    *("SLURM_NTASKS_PER_NODE", "SLURM_NTASKS_PER_GPU", "SLURM_NTASKS_PER_CORE", "SLURM_CPUS_PER_TASK", "SLURM_GPUS"),
    *("SLURM_CPUS_PER_GPU", "SLURM_GPUS_PER_NODE", "SLURM_GPUS_PER_TASK", "SLURM_TIMELIMIT", "SLURM_EXPORT_ENV"),
    *("SLURM_CPU_BIND", "SLURM_CPU_BIND_LIST", "SLURM_CPU_BIND_TYPE", "SLURM_GRES", "SLURM_STEP_GRES", "SLURM_WHOLE"),
    *("SLURM_EXACT", "SLURM_OVERLAP", "SLURM_EXCLUSIVE", "SLURM_WORKING_DIR", "SLURM_STDOUTMODE", "SLURM_STDERRMODE"),
    *("SLURM_LABELIO", "SLURM_IMMEDIATE", "SLURM_WAIT", "SLURM_KILL_BAD_EXIT", "SLURM_RESERVATION", "SLURM_PARTITION"),
    *(
        "SLURM_PROCID",
        "SLURM_LOCALID",
        "SLURM_NODEID",
        "SLURM_STEP_ID",
        "SLURM_STEPID",
        "SLURM_TASK_PID",
        "SLURM_GTIDS",
    ),
    *("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_LAUNCH_NODE_IPADDR", "SLURM_SRUN_COMM_PORT", "SLURMD_NODENAME"),
    *("SLURM_GTIDS", "SLURM_TASKS_PER_NODE", "SRUN_CPUS_PER_TASK", "SRUN_DEBUG"),
)
OURS = ("A3PO_STARTED", "A3PO_WORDS_FD", "A3PO_WORDS_DIR", "A3PO_STORE_FD", "A3PO_CONSOLE_FD", "A3PO_SIGNALLED")
LEAKS = dict.fromkeys((*TORCHRUN, *MPI, *SLURM_SIZES, *OURS, "NCCL_COMM_ID"), "7")
JOB = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "n[0-1]",
    "SLURM_CONF": "/etc/slurm.conf",
    "SLURM_RESTART_COUNT": "2",
    "SLURM_JOB_END_TIME": "99",
    "SLURM_HINT": "nomultithread",  # slurm.extra: --hint=nomultithread
}
INTERFACES = {
    "GLOO_SOCKET_IFNAME": "ib0",
    "NCCL_SOCKET_IFNAME": "ib0",
    "TP_SOCKET_IFNAME": "ib0",
    "VLLM_HOST_IP": "10.1",
}
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "VLLM_HOST_IP": "127.0.0.1"}


def test_ranks_of_one_machine_get_what_is_the_users_the_job_they_may_be_in_and_loopback() -> None:
    assert of_one_machine(USERS | LEAKS | JOB | INTERFACES) == USERS | JOB | LOOPBACK
    with_gpus = USERS | {"CUDA_VISIBLE_DEVICES": "2,3"}  # the user's choice
    assert of_one_machine(with_gpus | LEAKS) == with_gpus | LOOPBACK


def test_a_job_gives_srun_what_is_the_users_and_the_jobs_and_what_the_configuration_chose() -> None:
    around = USERS | LEAKS | JOB | {"CUDA_VISIBLE_DEVICES": "0"}  # Slurm gives every task its own
    assert of_a_job(around | INTERFACES, {}, 2) == USERS | JOB | INTERFACES  # of a cluster whose nodes are alike
    assert of_a_job(around | INTERFACES, {}, 1) == USERS | JOB | LOOPBACK
    chosen = {"GLOO_SOCKET_IFNAME": "eth0", "SLURM_CPU_BIND": "none", "CUDA_VISIBLE_DEVICES": "0,1"}
    assert of_a_job(around | INTERFACES, chosen, 1) == USERS | JOB | LOOPBACK | chosen


def test_sbatch_gets_nothing_that_it_would_take_over_the_script_or_that_describes_the_shell() -> None:
    site = {
        "SBATCH_ACCOUNT": "site",
        "SBATCH_EXPORT": "NONE",
        "SBATCH_PARTITION": "any",
        "SLURM_CONF": "/etc/slurm.conf",
    }
    over = dict.fromkeys(("SBATCH_TIMELIMIT", "SBATCH_JOB_NAME", "SBATCH_SIGNAL", "SBATCH_GPUS_PER_NODE"), "1")
    over |= dict.fromkeys(("SBATCH_REQUEUE", "SBATCH_MEM_PER_CPU", "SBATCH_OPEN_MODE", "SBATCH_ARRAY_INX"), "1")
    assert of_a_submission(USERS | LEAKS | JOB | site | over) == USERS | site


@pytest.mark.parametrize(
    ("before", "rank"),
    [
        ({}, "3"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "3"),  # of the shell from which srun was called
        ({"RANK": "5", "TORCHELASTIC_RUN_ID": "x"}, "5"),  # torchrun within a task
        ({"RANK": "1", "A3PO_WORDS_FD": "9"}, "1"),  # `a3po train` within a task
        ({"RANK": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, "1"),  # started by hand in an interactive task
    ],
)
def test_a_rank_under_srun_is_the_task_unless_a_launcher_within_the_task_says_otherwise(
    before: dict[str, str], rank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*TORCHRUN, *OURS):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"} | before).items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # so that what is adopted is taken back
        monkeypatch.setenv(name, os.environ.get(name, ""))
        if name not in before:
            monkeypatch.delenv(name)
    environment.adopt_slurm()
    assert os.environ["RANK"] == rank
    if rank == "3":
        assert (os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]) == ("4", "1")


def test_an_interface_that_a_machine_does_not_have_is_named_with_those_that_it_has() -> None:
    check_interfaces({})
    check_interfaces({"GLOO_SOCKET_IFNAME": "lo"})
    with pytest.raises(RequestError, match=r"GLOO_SOCKET_IFNAME = bond7, but \S+ has lo.*slurm\.environment"):
        check_interfaces({"GLOO_SOCKET_IFNAME": "lo,bond7"})


def test_a_launchers_variables_are_named_in_one_file_and_the_shells_are_its_names() -> None:
    holders = [path for path in (ROOT / "a3po_megatron").rglob("*.py") if "A3PO_" in path.read_text()]
    assert holders == [ROOT / "a3po_megatron/ranks/handoff.py"]
    scripts = [path for folder in ("slurm", "tools") for path in (ROOT / folder).rglob("*") if path.is_file()]
    scripts = [path for path in scripts if path.suffix in (".j2", ".sh", ".conf", "")]
    named = {name for path in scripts for name in re.findall(r"A3PO_[A-Z_]+", path.read_text())}
    assert named == {VARIABLES["signalled"], WHEELS}


def test_a_process_reads_what_its_launcher_wrote_and_nothing_where_there_is_none() -> None:
    told = Handoff(1753900000.25, 7, Path("/runs/a b/logs/attempt-1"), 8, 9, "SIGUSR1", 0, 11)
    assert None not in vars(told).values() and set(told.environment()) == set(VARIABLES.values())
    assert Handoff.of(USERS | told.environment()) == told
    assert Handoff.of(USERS) == Handoff() and Handoff().environment() == {}
