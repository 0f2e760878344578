"""Several ranks of one experiment, or one that may be killed: processes that run one function.

    together(report, "layouts:every", 2, folder)     function(report, folder) in 2 ranks; rank 0's lines become ours

They meet and die as the ranks of a run do (launch/local.py), and find what they need in the environment, set
before anything is imported. In a Slurm allocation srun starts the same program (nodes.py), and rank 0 prints its lines.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from a3po_megatron.launch.environment import die_with_parent
from a3po_megatron.launch.local import rendezvous
from a3po_megatron.launch.shell import LOOPBACK
from a3po_megatron.ranks.handoff import Handoff

from .report import Report, read_lines
from .runner import GRACE, ROOT, _load

MARK = "a3po-bringup "  # before a line of the report, among whatever libraries print
WORDS = 4000  # characters of a dead rank's log


def together(
    report: Report,
    function: str,
    world: int,
    folder: Path,
    seconds: float = 300,
    environment: Mapping[str, str] | None = None,
    one_device: bool = False,  # every rank sees its own device alone
    killed: bool = False,  # they are to end by SIGKILL, of their own doing
    megatron: bool = True,  # they import it, and want its patches before
) -> None:
    """Raises RuntimeError with the last words of a rank that did not end well."""
    name = function.rpartition(":")[2]
    meeting = rendezvous(0)
    meeting.set_inheritable(True)
    processes = []
    for rank in range(world):
        place = {"RANK": rank, "LOCAL_RANK": 0 if one_device else rank, "WORLD_SIZE": world}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": meeting.getsockname()[1]}
        place |= Handoff(store_fd=meeting.fileno()).environment()
        settings = {**os.environ, **LOOPBACK, **(environment or {}), **{k: str(v) for k, v in place.items()}}
        if one_device:
            settings["CUDA_VISIBLE_DEVICES"] = _device(rank)
        with (folder / f"{name}-{rank}.log").open("w") as log:
            command = [sys.executable, "-m", "tools.bringup.ranks", function, str(folder), str(seconds)]
            command += ["plain"] * (not megatron)
            processes.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=settings,
                    stdout=log,
                    stderr=log,
                    preexec_fn=die_with_parent,
                    pass_fds=[meeting.fileno()] if rank == 0 else [],
                )
            )
    meeting.close()
    wanted, end = -signal.SIGKILL if killed else 0, time.monotonic() + seconds
    try:
        while any(p.poll() is None for p in processes) and time.monotonic() < end:
            if any(p.poll() not in (None, wanted) for p in processes):
                break  # the others would wait for it
            time.sleep(0.1)
    finally:
        codes = [p.poll() for p in processes]
        for process in processes:
            process.kill()
            process.wait()
    for line in read_lines(folder / f"{name}-0.said"):
        report.take(line)
    for rank in range(1, world):
        for line in read_lines(folder / f"{name}-{rank}.said"):
            if "claim" in line and not line["holds"]:
                report.take(line | {"claim": f"rank {rank}: {line['claim']}"})
    # One that failed before one that only waited for it.
    order = sorted(range(world), key=lambda rank: codes[rank] is None)
    for rank in order:
        if codes[rank] != wanted:
            print((folder / f"{name}-{rank}.log").read_text(errors="replace")[-WORDS:], file=sys.stderr)
            raise RuntimeError(f"rank {rank} of {world} in {name} ended with {codes[rank]} within {seconds:g} s")


def _device(rank: int) -> str:
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return visible[rank] if visible else str(rank)


class _Printed(Report):
    """Rank 0's lines on its standard output, for who cannot read its files."""

    def _say(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if os.environ["RANK"] == "0":
            print(MARK + json.dumps(line, allow_nan=False), flush=True)


def _main(function: str, folder: str, seconds: float, megatron: bool) -> None:
    faulthandler.enable()
    if seconds > 2 * GRACE:
        faulthandler.dump_traceback_later(seconds - GRACE)
    code = 0
    try:
        from a3po_megatron.launch import environment

        environment.prepare()
        if megatron:
            from a3po_megatron import compat

            compat.prepare()
        report: Report = _Printed()
        if folder != "-":
            report = Report(Path(folder, f"{function.rpartition(':')[2]}-{os.environ['RANK']}.said"))
        _load(function)(report, Path(folder))  # type: ignore[call-arg]
    except BaseException:  # told, and the process ends here: what others wait for must fail now
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], float(sys.argv[3]), "plain" not in sys.argv[4:])
