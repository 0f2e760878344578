"""Inside a Slurm job: makes the run folder ready, starts one task a rank, and sees that the run comes back.

    python -m a3po_megatron.launch.job RUN_DIR          (slurm/train.sbatch.j2 becomes this process)

    exit of the ranks          what follows
    0                          the report, and the successor of a chain is taken back
    interrupted (85)           requeue | the successor goes on | the array's next job goes on; but the second start in a
                               row that brought the run no further fails the job, and nothing comes after it
    a node or a rank fails     once more in this allocation without that node, as long as there are spares
    a rank stood still         the same without the node of the rank that is blamed; else as interrupted
    anything else              the job fails, and nothing comes after it

Every start leaves its ranks' logs in logs/attempt-N.
"""

from __future__ import annotations

import sys

from .signals import Signals, ignore

if __name__ == "__main__":
    SIGNALS = Signals()  # before the imports that take seconds

import os
import signal
import subprocess
import time
from pathlib import Path

from ..config import Settings, load_resolved
from ..config.slurm_forms import filename
from ..errors import A3POError, Finished, Interrupted, RunFailed
from ..files.run_folder import rank_of
from ..ranks.handoff import Handoff
from .blame import InJob, first_bad_node, words_of
from .folder import prepare_folder
from .shell import of_a_job
from .slurm import SCRIPT, sbatch
from .starts import idle_starts, reached
from .supervise import PROGRAM, Start, rank_environment, supervise

IDLE_STARTS = 2
# Until a rank can hear the signals, which are repeated, it must not die of them.
RANK = ("sh", "-c", "trap '' USR1 TERM INT; exec \"$@\"", "rank")


def main(folder: Path, signals: Signals) -> None:
    settings = load_resolved(folder / "config.yaml")
    job = os.environ["SLURM_JOB_ID"]
    successor, before = _submit_successor(folder, settings, job), reached(folder)
    try:
        outcome = _run(folder, settings, signals)
    except Finished as done:
        print(done, flush=True)
        outcome = None
    except A3POError as error:
        outcome = error
    if isinstance(outcome, Interrupted) and (idle := idle_starts(folder, before, _resumes(settings))) >= IDLE_STARTS:
        outcome = RunFailed(
            f"{outcome}. The run got no further in {idle} starts in a row, so it is not started again: give a start "
            "more time (slurm.time), see logs/ for what takes it, and submit again"
        )
    if isinstance(outcome, Interrupted):
        print(f"{outcome}", flush=True)
        if settings.slurm.resume == "requeue" and _restarts() < settings.slurm.attempts:
            subprocess.run(["scontrol", "requeue", job], check=True)
            time.sleep(600)  # Slurm ends this job now
        sys.exit(Interrupted.exit_code)
    if successor is not None:
        subprocess.run(["scancel", successor], check=False)
    if outcome is not None:
        _take_back_array(settings)
        print(f"error: {outcome}", file=sys.stderr, flush=True)
        sys.exit(outcome.exit_code)


def _restarts() -> int:
    """Returns how often Slurm has queued this job again."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _resumes(settings: Settings) -> bool:
    """Whether this job resumes what an earlier one began, rather than being what somebody submitted."""
    numbers = [_restarts(), Handoff.of().attempt or 0]
    if settings.slurm.resume == "array":
        numbers.append(int(os.environ.get("SLURM_ARRAY_TASK_ID", "1")) - 1)
    return any(numbers)


def _take_back_array(settings: Settings) -> None:
    if settings.slurm.resume == "array" and (array := os.environ.get("SLURM_ARRAY_JOB_ID")):
        subprocess.run(["scancel", "--state=PENDING", array], check=False)


def _submit_successor(folder: Path, settings: Settings, job: str) -> str | None:
    """The next job of a chain, which waits for this one's end, whatever that is: a killed job could not submit it."""
    if settings.slurm.resume != "chain":
        return None
    attempt = 1 + (Handoff.of().attempt or 0)
    if attempt >= settings.slurm.attempts:
        return None
    script = folder / SCRIPT
    told = [f"{name}={value}" for name, value in Handoff(attempt=attempt).environment().items()]
    return sbatch(f"--dependency=afterany:{job}", f"--export={','.join(['ALL', *told])}", str(script))


def _run(folder: Path, settings: Settings, signals: Signals) -> A3POError | None:
    """Starts the ranks until they end well, or for good; None: the run is done."""
    nodes, bad = hosts(os.environ["SLURM_JOB_NODELIST"]), set[str]()
    while True:
        tasks = _Tasks(folder, settings, [node for node in nodes if node not in bad][: settings.slurm.nodes])
        with prepare_folder(folder, settings):
            failure = supervise(tasks, folder, signals)
        if failure is None:
            from ..report.page import write_report

            print(f"run folder: {folder}\nreport:     {write_report([folder], None)}", flush=True)
            return None
        blamed = tasks.ended().bad_nodes(folder, tasks.nodes, settings.slurm.ranks_per_node())
        bad |= blamed
        if not blamed or len(nodes) - len(bad) < settings.slurm.nodes:
            return failure
        print(f"{failure}; once more without {', '.join(sorted(blamed))}", flush=True)


class _Tasks(Start):
    """One task a rank, of one srun."""

    poll_seconds, through_srun = 0.5, True

    def __init__(self, folder: Path, settings: Settings, nodes: list[str]) -> None:
        super().__init__()
        self._folder, self._settings, self.nodes = folder, settings, nodes
        self._logs = folder / "logs"  # of this start, once it has begun

    def begin(self) -> None:
        logs = self._folder / "logs"
        self._logs = logs / f"attempt-{1 + sum(1 for _ in logs.glob('attempt-*'))}"
        self._logs.mkdir()
        settings, slurm = self._settings, self._settings.slurm
        inherited = of_a_job(os.environ, slurm.environment, len(self.nodes))
        port = settings.cluster.port or 20000 + int(os.environ["SLURM_JOB_ID"]) % 20000
        handoff = Handoff(started=time.time(), words_dir=self._logs)
        meeting = (self.nodes[0], port)
        around = rank_environment(settings, inherited, meeting, handoff, bool(slurm.container))
        if (end := _end_of_job()) is not None:
            around.setdefault("SLURM_JOB_END_TIME", end)
        with (self._logs / "srun.err").open("w") as err:
            process = subprocess.Popen(
                self._command(), env=around, stdin=subprocess.DEVNULL, stdout=err, stderr=err, preexec_fn=ignore
            )
        self.processes.append(process)

    def _command(self) -> list[str]:
        folder, slurm = self._folder, self._settings.slurm
        container = []
        if slurm.container:
            mounts = ",".join([f"{folder}:{folder}", *slurm.mounts])
            container = [f"--container-image={slurm.container}", f"--container-mounts={mounts}"]
        return [
            "srun",
            f"--nodes={len(self.nodes)}",
            f"--nodelist={','.join(self.nodes)}",
            f"--ntasks={slurm.ranks()}",
            f"--ntasks-per-node={slurm.ranks_per_node()}",
            f"--cpus-per-task={slurm.cpus_per_task}",  # since 22.05 srun does not take it over from the job
            "--kill-on-bad-exit=1",
            "--export=ALL",  # a site may have told sbatch to export nothing, which srun would take over
            f"--output={filename(str(self._logs))}/rank-%t.log",
            *container,
            *RANK,
            slurm.python or ("python" if slurm.container else sys.executable),
            *PROGRAM,
            str(folder),
        ]

    def wake(self) -> None:
        self.processes[0].send_signal(signal.SIGUSR2)
        time.sleep(self.poll_seconds)  # what srun passes on is to be there first; it keeps CONT for itself
        subprocess.run(["scancel", "--signal=CONT", os.environ["SLURM_JOB_ID"]], check=False)

    def ended(self) -> InJob:
        said = (self._logs / "srun.err").read_text()
        words = {
            rank_of(path): words_of(path.read_text().partition("\n")[0]) for path in self._logs.glob("rank-*.words")
        }
        return InJob(self.processes[0].returncode, words, first_bad_node(said), said)


def hosts(nodes: str) -> list[str]:
    """rl[0-1] → rl0, rl1"""
    done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return done.stdout.split()


def _end_of_job() -> str | None:
    """When this job ends, as UNIX time: newer versions of Slurm say so in the environment."""
    job = os.environ["SLURM_JOB_ID"]
    done = subprocess.run(["squeue", "-h", "-j", job, "-o", "%e"], capture_output=True, text=True)
    try:
        return str(int(time.mktime(time.strptime(done.stdout.strip(), "%Y-%m-%dT%H:%M:%S"))))
    except ValueError:
        return None


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), SIGNALS)
