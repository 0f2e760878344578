"""Inside a Slurm job: makes the run folder ready, starts one task a rank, and sees that the run comes back.

    python -m a3po_megatron.launch.job RUN_DIR          (slurm/train.sbatch.j2 becomes this process)

    exit of the ranks          what follows
    0                          the report, and the successor of a chain is taken back
    interrupted (85)           requeue | the successor goes on | the array's next job goes on; but the second start in a
                               row that brought the run no further fails the job, and nothing comes after it
    a node or a rank fails     once more in this allocation without that node, as long as there are spares
    a rank stood still         the same without the node of the rank that is blamed; else as interrupted
    anything else              the job fails

Every start leaves its ranks' logs in logs/attempt-N.
"""

from __future__ import annotations

import sys

from .signals import Signals, ignore

if __name__ == "__main__":
    SIGNALS = Signals()  # before the imports that take seconds

import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from ..config import Config, load_resolved
from ..config.slurm_forms import filename
from ..errors import A3POError, Finished, Interrupted, RunFailed
from ..ranks.handoff import Handoff
from ..telemetry.watchdog import NAMED, stalled
from .blame import Kind, deaths_in_job, error_of, first_bad_node
from .environment import of_run, settings
from .folder import prepare_folder
from .shell import of_a_job
from .slurm import SCRIPT, sbatch
from .starts import idle_starts, reached

POLL_SECONDS = 0.5
IDLE_STARTS = 2
# Until a rank can hear the signals, which are repeated, it must not die of them.
RANK = ("sh", "-c", "trap '' USR1 TERM INT; exec \"$@\"", "rank")
SAID_CHARACTERS = 1000  # of srun's, in a message


@dataclass(frozen=True)
class Ended:
    code: int
    words: dict[int, tuple[Kind, str]]  # rank → kind and message of what it failed of
    bad_node: str | None  # the first whose task failed
    said: str = ""  # by srun


def main(folder: Path, signals: Signals) -> None:
    config = load_resolved(folder / "config.yaml")
    job = os.environ["SLURM_JOB_ID"]
    successor, before = _submit_successor(folder, config, job), reached(folder)
    try:
        outcome = _run(folder, config, signals)
    except Finished as done:
        print(done, flush=True)
        outcome = None
    except A3POError as error:
        outcome = error
    if isinstance(outcome, Interrupted) and (idle := idle_starts(folder, before, _goes_on(config))) >= IDLE_STARTS:
        outcome = RunFailed(
            f"{outcome}. The run got no further in {idle} starts in a row, so it is not started again: give a start "
            "more time (slurm.time), see logs/ for what takes it, and submit again"
        )
        _take_back_array(config)
    if isinstance(outcome, Interrupted):
        print(f"{outcome}", flush=True)
        if config.slurm.resume == "requeue" and int(os.environ.get("SLURM_RESTART_COUNT", "0")) < config.slurm.attempts:
            subprocess.run(["scontrol", "requeue", job], check=True)
            time.sleep(600)  # Slurm ends this job now
        sys.exit(Interrupted.exit_code)
    if successor is not None:
        subprocess.run(["scancel", successor], check=False)
    if outcome is not None:
        print(f"error: {outcome}", file=sys.stderr, flush=True)
        sys.exit(outcome.exit_code)


def _goes_on(config: Config) -> bool:
    """Whether this job goes on with what an earlier one began, rather than being what somebody submitted."""
    numbers = [int(os.environ.get("SLURM_RESTART_COUNT", "0")), Handoff.of().attempt or 0]
    if config.slurm.resume == "array":
        numbers.append(int(os.environ.get("SLURM_ARRAY_TASK_ID", "1")) - 1)
    return any(numbers)


def _take_back_array(config: Config) -> None:
    if config.slurm.resume == "array" and (array := os.environ.get("SLURM_ARRAY_JOB_ID")):
        subprocess.run(["scancel", "--state=PENDING", array], check=False)


def _submit_successor(folder: Path, config: Config, job: str) -> str | None:
    """The next job of a chain, which waits for this one's end, whatever that is: a killed job could not submit it."""
    if config.slurm.resume != "chain":
        return None
    attempt = 1 + (Handoff.of().attempt or 0)
    if attempt >= config.slurm.attempts:
        return None
    script = folder / SCRIPT
    told = [f"{name}={value}" for name, value in Handoff(attempt=attempt).environment().items()]
    return sbatch(f"--dependency=afterany:{job}", f"--export={','.join(['ALL', *told])}", str(script))


def _run(folder: Path, config: Config, signals: Signals) -> A3POError | None:
    """Starts the ranks until they end well, or for good; None: the run is done."""
    nodes, bad = hosts(os.environ["SLURM_JOB_NODELIST"]), set[str]()
    while True:
        with prepare_folder(folder, config):
            use = [node for node in nodes if node not in bad][: config.slurm.nodes]
            signals.check(folder)
            ended = _srun(folder, config, use, signals)
        if ended.code == 0:
            from ..report.page import write_report

            print(f"run folder: {folder}\nreport:     {write_report([folder], None)}", flush=True)
            return None
        failure = _failure(folder, ended, signals.number is not None)
        blamed = _blamed(folder, ended, use, config.slurm.ranks_per_node())
        bad |= blamed
        if not blamed or len(nodes) - len(bad) < config.slurm.nodes:
            return failure
        print(f"{failure}; once more without {', '.join(sorted(blamed))}", flush=True)


def _srun(folder: Path, config: Config, nodes: list[str], signals: Signals) -> Ended:
    """One start of all ranks, one task each."""
    slurm = config.slurm
    attempt = folder / "logs" / f"attempt-{1 + sum(1 for _ in (folder / 'logs').glob('attempt-*'))}"
    attempt.mkdir()
    container = []
    if slurm.container:
        mounts = ",".join([f"{folder}:{folder}", *slurm.mounts])
        container = [f"--container-image={slurm.container}", f"--container-mounts={mounts}"]
    command = [
        "srun",
        f"--nodes={len(nodes)}",
        f"--nodelist={','.join(nodes)}",
        f"--ntasks={slurm.ranks()}",
        f"--ntasks-per-node={slurm.ranks_per_node()}",
        f"--cpus-per-task={slurm.cpus_per_task}",  # since 22.05 srun does not take it over from the job
        "--kill-on-bad-exit=1",
        "--export=ALL",  # a site may have told sbatch to export nothing, which srun would take over
        f"--output={filename(str(attempt))}/rank-%t.log",
        *container,
        *RANK,
        slurm.python or ("python" if slurm.container else sys.executable),
        *("-m", "a3po_megatron.train", str(folder)),
    ]
    around = {
        **settings(config.cluster.device, slurm.container is not None),
        **of_run(config),
        **of_a_job(os.environ, slurm.environment, len(nodes)),
        "MASTER_ADDR": nodes[0],
        "MASTER_PORT": str(config.cluster.port or 20000 + int(os.environ["SLURM_JOB_ID"]) % 20000),
        **Handoff(started=time.time(), words_dir=attempt).environment(),
    }
    if (end := _end_of_job()) is not None:
        around.setdefault("SLURM_JOB_END_TIME", end)
    with (attempt / "srun.err").open("w") as err:
        process = subprocess.Popen(
            command, env=around, stdin=subprocess.DEVNULL, stdout=err, stderr=err, preexec_fn=ignore
        )
        asked = False
        while process.poll() is None:
            signals.pass_on([process], always=signal.SIGUSR1)
            if not asked and stalled(folder / "logs") is not None:
                asked = True  # a rank that cannot act writes its stacks all the same, even if it is stopped
                process.send_signal(signal.SIGUSR2)
                time.sleep(POLL_SECONDS)  # what srun passes on is to be there first; it keeps CONT for itself
                subprocess.run(["scancel", "--signal=CONT", os.environ["SLURM_JOB_ID"]], check=False)
            time.sleep(POLL_SECONDS)
    text = (attempt / "srun.err").read_text()
    words = {}
    for path in attempt.glob("rank-*.words"):
        said = json.loads(path.read_text().partition("\n")[0])
        words[int(path.stem.removeprefix("rank-"))] = (said["kind"], said["message"])
    return Ended(process.returncode, words, first_bad_node(text), text)


def _failure(folder: Path, ended: Ended, told: bool) -> A3POError:
    """What the ranks failed of."""
    if (error := error_of(deaths_in_job(ended.words, ended.said), folder / "logs")) is not None:
        return error
    if ended.code == Interrupted.exit_code or (told and ended.bad_node is None):
        # No rank could write why, or srun was told to leave before it had started any.
        return Interrupted(f"{folder}: interrupted; the same command goes on")
    where = f" on {ended.bad_node}" if ended.bad_node else ""
    said = "; ".join(line for line in ended.said.splitlines() if line.strip())[-SAID_CHARACTERS:]
    return RunFailed(
        f"{folder}: a rank{where} failed and left no message; srun ended with {ended.code} and said: "
        f"{said or 'nothing'}; see logs/attempt-*"
    )


def _blamed(folder: Path, ended: Ended, nodes: list[str], ranks_per_node: int) -> set[str]:
    """The nodes that the next start should do without."""
    if (message := stalled(folder / "logs")) is not None:  # ranks on other nodes only waited
        return {nodes[int(rank) // ranks_per_node] for rank in NAMED.findall(message)}
    if ended.bad_node is None or any(kind != "crash" for kind, _ in ended.words.values()):
        return set()  # what a rank says of the run would be the same on any node
    return {ended.bad_node}


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
