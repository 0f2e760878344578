"""A throw-away Slurm on this host: real daemons, two nodes, fake GPUs. For tests; as root, with Debian's packages.

    python slurm/test_cluster/cluster.py up DIR        prints `export SLURM_CONF=…`
    python slurm/test_cluster/cluster.py down DIR

    apt-get install --no-install-recommends slurm-wlm munge

Everything is in DIR, and only what was started is stopped, by its pid file. The one change to the host is a line in
/etc/hosts, so that the nodes' names can be resolved; it goes with the cluster. A GPU is a link to /dev/null: Slurm asks
for a character device, counts it, and sets CUDA_VISIBLE_DEVICES.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jinja2

NODES, GPUS, PORT = ("rl0", "rl1"), 8, 16817
HOSTS = Path("/etc/hosts")
LINE = f"127.0.0.1 {' '.join(NODES)} # throw-away Slurm cluster\n"
START_SECONDS = 60


def up(root: Path) -> Path:
    """Starts the daemons and waits until both nodes are idle; returns the configuration file."""
    for part in ("etc", "state", "log", "dev", *(f"spool/{node}" for node in NODES)):
        (root / part).mkdir(parents=True, exist_ok=True)
    for number in range(GPUS):
        (root / "dev" / f"nvidia{number}").symlink_to("/dev/null")
    facts = {"root": root, "host": socket.gethostname().split(".")[0], "port": PORT, "nodes": NODES, "gpus": GPUS}
    template = jinja2.Template((Path(__file__).parent / "slurm.conf.j2").read_text(), undefined=jinja2.StrictUndefined)
    configuration = root / "etc/slurm.conf"
    configuration.write_text(template.render(facts) + "\n")
    devices = f"File={root}/dev/nvidia[0-{GPUS - 1}]"
    (root / "etc/gres.conf").write_text("".join(f"NodeName={n} Name=gpu Type=h200 {devices}\n" for n in NODES))
    key = root / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(1024))
    if LINE not in HOSTS.read_text():
        with HOSTS.open("a") as hosts:
            hosts.write(LINE)
    files = {"key-file": key, "socket": root / "munge.sock", "pid-file": root / "munged.pid"}
    files |= {"log-file": root / "log/munged.log", "seed-file": root / "munged.seed"}
    run("munged", "--force", "--num-threads=2", *(f"--{name}={path}" for name, path in files.items()))
    os.environ["SLURM_CONF"] = str(configuration)
    run("slurmctld")
    for node in NODES:
        run("slurmd", "-N", node)
    deadline = time.monotonic() + START_SECONDS
    while run("sinfo", "-h", "-N", "-p", "batch", "-t", "idle", "-o", "%N").split() != list(NODES):
        if time.monotonic() > deadline:
            raise SystemExit(f"the nodes are not idle after {START_SECONDS} s: {root}/log")
        time.sleep(0.2)
    return configuration


def down(root: Path) -> None:
    """Stops what `up` started, as far as it came."""
    os.environ["SLURM_CONF"] = str(root / "etc/slurm.conf")
    subprocess.run(["scancel", "-u", "root"], capture_output=True, timeout=30)
    time.sleep(1)
    for pid in (*(root / f"slurmd.{node}.pid" for node in NODES), root / "slurmctld.pid", root / "munged.pid"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            number = int(pid.read_text())
            os.kill(number, signal.SIGTERM)
            for _ in range(100):
                os.kill(number, 0)
                time.sleep(0.1)
            os.kill(number, signal.SIGKILL)
    HOSTS.write_text(HOSTS.read_text().replace(LINE, ""))


@contextlib.contextmanager
def cluster(root: Path) -> Iterator[Path]:
    """A cluster for the length of a block."""
    try:
        yield up(root)
    finally:
        down(root)


def run(*words: str) -> str:
    """What a command printed; ends the program if it fails."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip() or "without a word"
        raise SystemExit(f"{words[0]} ended with {done.returncode}: {said}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("up", "down"))
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    if options.action == "down":
        down(options.folder.resolve())
        return
    try:
        print(f"export SLURM_CONF={up(options.folder.resolve())}")
    except BaseException:
        down(options.folder.resolve())
        raise


if __name__ == "__main__":
    sys.exit(main())
