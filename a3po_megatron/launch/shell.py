"""What of the launcher's shell reaches ranks, and what is taken out of it.

A shell that starts or submits a run may be inside another launcher's task (torchrun, mpirun, srun, salloc), on a login
node with other network interfaces, or told by its site to export nothing. Of all that nothing may decide who a rank is,
where ranks meet, or what srun gives them; everything else (PATH, HF_HOME, NCCL_DEBUG …) is the user's and is passed on.

What a launcher of ours puts in stands in ranks/handoff.py.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping

from ..errors import RequestError
from ..ranks.handoff import VARIABLES

# Who a process is in another launcher's eyes, and where its ranks meet.
OTHER_LAUNCHERS = re.compile(
    r"RANK|(LOCAL|GROUP|NODE|ROLE)_RANK|((LOCAL|GROUP|ROLE)_)?WORLD_SIZE|ROLE_NAME|MASTER_(ADDR|PORT)|NNODES|NPROC_PER_NODE"
    r"|(TORCHELASTIC|OMPI|ORTE|PMI|PMI2|PMIX|PRTE|HYDRA|HYDI|MPI|MV2|ALPS|PALS|JSM)_.*|MPIRUN_.*|NCCL_COMM_ID"
)
# Network interfaces by name, and addresses: of a machine, not of a run.
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "VLLM_HOST_IP")
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "VLLM_HOST_IP": "127.0.0.1"}  # for ranks that are all on one machine
# Of Slurm's: which job this is, and how its tasks are to lie on a node (slurm.extra: --hint, --distribution …). Not how
# many there are, what they get and how long they may run: those stand on srun's command line, or are the job's.
OF_THE_JOB = re.compile(
    r"SLURM_(CONF|JWT|JOB_.*|JOBID|ARRAY_.*|RESTART_COUNT|CLUSTER_NAME|SUBMIT_.*"
    r"|HINT|DISTRIBUTION|DIST_PLANESIZE|GPU_BIND|GPU_FREQ|NETWORK|THREADS_PER_CORE|MPI_TYPE)"
)
OF_THE_CLUSTER = ("SLURM_CONF", "SLURM_JWT")
# sbatch takes these over its script's lines; the rest of SBATCH_* says what a configuration leaves to the site.
OVER_THE_SCRIPT = re.compile(
    r"SBATCH_(JOB_NAME|TIMELIMIT|SIGNAL|OUTPUT|ERROR|OPEN_MODE|REQUEUE|NO_REQUEUE|ARRAY_INX|GPUS.*|MEM_PER_.*|CPUS_PER_GPU"
    r"|EXCLUSIVE|OVERCOMMIT|THREADS_PER_CORE)"
)


def of_one_machine(environ: Mapping[str, str]) -> dict[str, str]:
    """For ranks that are all on this machine: they talk over loopback, whatever the cluster's interfaces are called."""
    return _over_loopback(_kept(environ))


def of_a_job(environ: Mapping[str, str], chosen: Mapping[str, str], nodes: int) -> dict[str, str]:
    """For srun and its tasks. `chosen` (slurm.environment) is put back: it was meant for the ranks. Which GPUs a task
    sees is Slurm's to say."""
    variables = _kept(environ)
    variables = {
        name: value for name, value in variables.items() if name not in ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
    }
    return (_over_loopback(variables) if nodes == 1 else variables) | dict(chosen)


def of_a_submission(environ: Mapping[str, str]) -> dict[str, str]:
    """For sbatch on a login node, whose environment the job gets: what it would take for options, or hand on."""
    variables = {name: value for name, value in _kept(environ).items() if not OVER_THE_SCRIPT.fullmatch(name)}
    return {name: value for name, value in variables.items() if not name.startswith("SLURM") or name in OF_THE_CLUSTER}


def _over_loopback(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in INTERFACES} | LOOPBACK


def _kept(environ: Mapping[str, str]) -> dict[str, str]:
    def stays(name: str) -> bool:
        if name in VARIABLES.values() or OTHER_LAUNCHERS.fullmatch(name) or name.startswith("SRUN_"):
            return False
        return not name.startswith("SLURM") or OF_THE_JOB.fullmatch(name) is not None

    return {name: value for name, value in environ.items() if stays(name)}


def check_interfaces(environ: Mapping[str, str] = os.environ) -> None:
    """Raises RequestError for an interface that is chosen by name and that this machine does not have: Gloo would fail
    in C++, without a word of the variable."""
    here = [name for _, name in socket.if_nameindex()]
    for name in filter(None, environ.get("GLOO_SOCKET_IFNAME", "").split(",")):
        if name not in here:
            raise RequestError(
                f"GLOO_SOCKET_IFNAME = {name}, but {socket.gethostname()} has {', '.join(here)}: unset it where the "
                "run was submitted, or set it in slurm.environment to one that every node has"
            )
