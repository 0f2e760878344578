"""Experiment 11: the nodes of a Slurm allocation reach each other as the ranks of a run must.

    salloc --nodes=2 --gpus-per-node=8 python tools/gpu_bringup.py --only 11

The store of rank 0, gloo by the interface that the host's name leads to, and NCCL: all-reduce, sums and GB/s.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time

import torch
import torch.distributed as dist

from a3po_megatron.ranks.backend import CUDA, Backend

from .measure import seconds, settle
from .rank import join
from .ranks import MARK
from .report import Refused, Report
from .runner import ROOT

SIZES = (1 << 20, 1 << 26, 1 << 30)
# GB/s over the bus. One port of 100 Gb/s is 12.5 by arithmetic; below a part of one NCCL goes another way than that.
SLOW = 6.0
STORE_SECONDS = 0.05  # a round trip, of which every `agree` takes some: beyond that a step would wait for it
LIMIT = 300


def reach_on(report: Report, backend: Backend, sizes: tuple[int, ...] = SIZES) -> None:
    began = time.perf_counter()
    cluster = join(backend)
    report.number("seconds until all have met", time.perf_counter() - began)
    device, world, rank = backend.local(), cluster.world, cluster.rank
    hosts = cluster.agree("hosts", socket.gethostname(), list)
    report.number("ranks, nodes", [world, len(set(hosts))])
    interface, address = os.environ.get("GLOO_SOCKET_IFNAME"), _address()
    report.number("GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME", [interface, os.environ.get("NCCL_SOCKET_IFNAME")])
    if len(set(hosts)) > 1:  # gloo binds to what the host's name leads to, unless it is told
        outside = cluster.agree("address", not address.startswith("127.") or interface is not None, all)
        report.holds("every host's name leads to an address that others reach, or gloo has its interface", outside)
    began = time.perf_counter()
    for number in range(20):
        cluster.agree("store", number, max)
    report.claim("seconds of a decision through the store", (time.perf_counter() - began) / 20, STORE_SECONDS * 2)
    on_host = torch.full((1000,), float(rank))
    dist.all_reduce(on_host)
    report.holds("gloo's sums are right", bool((on_host == world * (world - 1) / 2).all()))
    found = {}
    for size in sizes:
        values = torch.full((size // 4,), float(rank), device=device)
        dist.all_reduce(values)
        settle(device)
        report.holds(f"all-reduce of {size >> 20} MiB: right", bool((values == world * (world - 1) / 2).all()))
        spent = seconds(lambda given=values: dist.all_reduce(given), device, 5, 2)  # type: ignore[misc]
        found[size] = 2 * (world - 1) / world * size / spent / 1e9
        report.number(f"all-reduce of {size >> 20} MiB: GB/s over the bus", found[size])
    if device.type == "cuda":
        report.claim_above("GB/s over the bus, largest all-reduce", found[max(sizes)], SLOW)
    report.headline(f"{len(set(hosts))} nodes, {world} ranks, {found[max(sizes)]:.1f} GB/s over the bus")


def _address() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:  # it leads nowhere
        return "127."


def measure(report: Report, _: object) -> None:
    reach_on(report, CUDA)


def reach(report: Report) -> None:
    """Starts a rank for every GPU of the allocation, and takes over what rank 0 says."""
    job, gpus = int(os.environ["SLURM_JOB_ID"]), os.environ.get("SLURM_GPUS_ON_NODE", "")
    if not gpus.isdecimal():
        raise Refused("SLURM_GPUS_ON_NODE is not set: ask for GPUs (salloc --nodes=2 --gpus-per-node=N)")
    run_on(report, "nodes:measure", job, int(gpus))


def run_on(report: Report, function: str, job: int, ranks_per_node: int) -> None:
    names = subprocess.run(["scontrol", "show", "hostnames"], capture_output=True, text=True, check=True, timeout=60)
    meeting = {"MASTER_ADDR": names.stdout.split()[0], "MASTER_PORT": str(20000 + job % 20000)}
    command = ["srun", f"--nodes={os.environ['SLURM_JOB_NUM_NODES']}", f"--ntasks-per-node={ranks_per_node}"]
    command += ["--kill-on-bad-exit=1", sys.executable, "-m", "tools.bringup.ranks", function, "-", str(LIMIT)]
    around = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    around |= meeting
    ended = subprocess.run(command, cwd=ROOT, env=around, stdout=subprocess.PIPE, text=True, timeout=LIMIT)
    for line in ended.stdout.splitlines():
        if line.startswith(MARK):
            report.take(json.loads(line.removeprefix(MARK)))
        else:
            print(line)
    if ended.returncode:
        raise RuntimeError(f"srun ended with {ended.returncode}")
