"""Inside a Slurm job: a Ray cluster over its nodes for the graders, then the run itself, then the cluster's end.

    python launchers/ray_cluster.py RUN_DIR        (what the batch script becomes where grader_pool.name is ray)

Ray carries graders only: ranks are srun tasks as ever. The cluster has a token of its own, which the job's tasks
inherit: a port of a compute node is open to whoever else is on the network. Nothing but what was started here is ended;
`ray stop` would end whatever else of Ray runs on the node.
"""

from __future__ import annotations

from a3po_megatron.launch.signals import Signals

if __name__ == "__main__":
    SIGNALS = Signals()  # before the imports that take seconds, and Ray's start

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from a3po_megatron.launch import job

START_SECONDS = 120
RAY = str(Path(sys.executable).with_name("ray"))


@contextlib.contextmanager
def cluster(nodes: list[str], logs: Path) -> Iterator[str]:
    """Ray on every node; the address of its head."""
    address = f"{nodes[0]}:{20000 + (int(os.environ['SLURM_JOB_ID']) + 7919) % 20000}"
    port = address.rpartition(":")[2]
    started: list[subprocess.Popen[bytes]] = []
    try:
        for number, node in enumerate(nodes):
            place = ["srun", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={node}", "--cpus-per-task=1"]
            role = (
                ["--head", f"--port={port}", "--include-dashboard=false"] if number == 0 else [f"--address={address}"]
            )
            here = f"--node-ip-address={socket.gethostbyname(node)}"
            words = [*place, RAY, "start", "--block", "--disable-usage-stats", here, *role]
            with (logs / f"ray-{node}.log").open("ab") as log:
                started.append(subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
            if number == 0:
                _wait(address, 1, started, logs)
        _wait(address, len(nodes), started, logs)
        yield address
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait()


def _wait(address: str, nodes: int, started: list[subprocess.Popen[bytes]], logs: Path) -> None:
    """Until so many nodes are there."""
    here = socket.gethostbyname(address.partition(":")[0])
    connect = f"ray.init('{address}', _node_ip_address='{here}', log_to_driver=False)"
    count = f"import ray; {connect}; print(sum(n['Alive'] for n in ray.nodes()))"
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if any(process.poll() is not None for process in started):
            break
        done = subprocess.run([sys.executable, "-c", count], capture_output=True, text=True)
        if done.returncode == 0 and int(done.stdout.split()[-1]) >= nodes:
            return
        time.sleep(1)
    sys.exit(f"error: Ray did not come up on {nodes} node(s): see {logs}/ray-*.log")


def main(folder: Path, signals: Signals) -> None:
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with cluster(job.hosts(os.environ["SLURM_JOB_NODELIST"]), folder / "logs") as address:
        os.environ["RAY_ADDRESS"] = address
        job.main(folder, signals)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), SIGNALS)
