"""`a3po submit`: one run, or a sweep of runs, as Slurm jobs. What happens in a job is launch/job.py's.

requeue   one job, which asks Slurm to queue it again when it was interrupted (exit 85)
chain     every job submits its successor when it starts, to begin when it ends, and takes it back when all is done
array     slurm.attempts jobs, one after the other; those that find nothing left to do end at once
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import Config, Settings
from ..config.sbatch_options import options_of
from ..config.slurm_forms import directive, filename, limit_seconds
from ..errors import RequestError
from ..files.lock import hold
from ..files.run_folder import SCRIPT, RunFolder
from ..ranks.backend import backend_of
from ..ranks.topology import topology_of
from ..run.folder import newest_whole, save_resolved
from ..run.manifest import read_manifest
from .check import settle
from .folder import check_same, started_with
from .site import check_site, sbatch, try_out

if TYPE_CHECKING:
    from jinja2 import Template

TEMPLATE = Path(__file__).resolve().parents[2] / "slurm" / "train.sbatch.j2"
RAY_CLUSTER = TEMPLATE.parents[1] / "launchers" / "ray_cluster.py"
FIRST_LEAD_SECONDS = 300
START_UP_SECONDS = 60  # of a run that has measured none: imports, weights, the engine
# Of slurm.extra, what every job of a run is to have: where it may run, and for whom.
ALL_JOBS = ("clusters", "constraint", "reservation", "wckey")
# Of a multi-node run; each with its reason, which stands in the script too.
NETWORK = (
    ("NCCL_ASYNC_ERROR_HANDLING", "1", "a peer that is gone is an error, not a hang"),
    ("TORCH_NCCL_AVOID_RECORD_STREAMS", "1", "less memory held by collectives in flight"),
    ("NCCL_IB_TIMEOUT", "22", "a busy fabric may take 17 s to answer before a link counts as lost"),
    ("NCCL_IB_RETRY_CNT", "13", "as often as goes; the default gives up at a short flap"),
)


@dataclass(frozen=True)
class Plan:
    """What would be submitted: one script for one run, or for a sweep of runs in the folders below `top`."""

    top: Path
    folders: list[Path]
    runs: list[Settings]
    script: str


def settled(config: Config) -> Settings:
    """What a job of this configuration does. Raises RequestError where the options do not fit each other."""
    ranks, parallel = config.slurm.ranks(), config.parallel
    if parallel.data is None and ranks % parallel.ranks_of(1) == 0:
        world = ranks
    else:
        world = topology_of(parallel, config.rollout.tensor).world
    if world != ranks:
        raise RequestError(
            f"slurm.nodes × ranks per node = {ranks}, but the layout has {world} ranks "
            "(parallel.tensor × context × pipeline × data)"
        )
    device = config.cluster.device or ("cuda" if config.slurm.gpus_per_node else "cpu")
    if device == "cuda" and config.slurm.ranks_per_node() > config.slurm.gpus():
        raise RequestError(
            f"slurm.tasks_per_node = {config.slurm.tasks_per_node}, but a node has {config.slurm.gpus()} GPUs "
            "(slurm.gpus_per_node): every rank has one to itself"
        )
    return settle(config, backend_of(device), ranks)


def plan(runs: list[Settings], top: Path, sweep: bool) -> Plan:
    """Raises RequestError where the runs cannot be jobs like this."""
    slurm = runs[0].slurm
    if any(run.slurm != slurm for run in runs):
        raise RequestError("--sweep over the slurm section is not possible: all runs of a sweep are one array job")
    if sweep and slurm.resume == "array":
        raise RequestError("slurm.resume array and --sweep, which is an array itself, exclude each other: use requeue")
    _check_folder(top, bool(slurm.container))
    _check_time(runs[0], top)
    folders = [top / f"{number:03d}" for number in range(len(runs))] if sweep else [top]
    return Plan(top, folders, runs, render(runs[0], top, len(runs) if sweep else 0))


@functools.cache
def _template() -> Template:
    import jinja2

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters |= {"quote": shlex.quote, "directive": directive}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def render(settings: Settings, folder: Path, sweep: int = 0) -> str:
    """The batch script of a run in `folder`, or of a sweep of so many in its subfolders."""
    slurm = settings.slurm
    array = f"0-{sweep - 1}" if sweep else f"1-{slurm.attempts}%1" if slurm.resume == "array" else ""
    number = "%A_%a" if array else "%j"
    # The optimizer's twins lie in pinned host memory, twice while a save is written: a partition's default of a few GB
    # a core gets such a job killed. 0: all of the node's.
    memory = slurm.memory or ("0" if slurm.gpus_per_node else "")
    allocation = {"partition": slurm.partition, "account": slurm.account, "qos": slurm.qos, "mem": memory}
    cache = slurm.cache or str(folder / "cache")
    caches = [("VLLM_CACHE_ROOT", "vllm"), ("TRITON_CACHE_DIR", "triton"), ("TORCHINDUCTOR_CACHE_DIR", "inductor")]
    variables = [(name, f"{cache}/{part}", "") for name, part in caches]
    variables += list(NETWORK) if slurm.nodes > 1 and slurm.gpus_per_node else []
    variables += [(name, value, "") for name, value in slurm.environment.items()]
    index = '/"$(printf %03d "$SLURM_ARRAY_TASK_ID")"' if sweep else ""
    return _template().render(
        slurm=slurm,
        setup=whole_commands(slurm.setup),
        name=settings.name,
        folder=folder,
        target=shlex.quote(str(folder)) + index,
        lead=lead_seconds(settings, folder),
        output=f"{filename(str(folder))}/logs/slurm-{number}.out",
        array=array,
        allocation={name: value for name, value in allocation.items() if value},
        environment=variables,
        python=sys.executable,
        entry=shlex.quote(str(RAY_CLUSTER)) if settings.grader_pool.name == "ray" else "-m a3po_megatron.launch.job",
    )


def whole_commands(lines: tuple[str, ...]) -> list[str]:
    """The lines of slurm.setup, with those joined that are one command together (if …, then …, fi).

    Raises RequestError for what bash cannot read.
    """
    commands: list[str] = []
    begun: list[str] = []
    for line in lines:
        if not begun and (not line.strip() or (line.lstrip().startswith("#") and "\n" not in line)):
            continue  # nothing to run
        begun.append(line)
        text = "\n".join(begun)
        done = subprocess.run(["bash", "-n"], input=f"{{\n{text}\n}}", capture_output=True, text=True)
        if done.returncode == 0:
            commands.append(text)
            begun = []
    if begun:
        raise RequestError(f"slurm.setup: bash cannot read {begun[0]!r}: {' '.join(done.stderr.split())}")
    return commands


def lead_seconds(settings: Settings, folder: Path) -> int:
    """How long before the end of a job its signal comes: as given, else as the run in the folder measured."""
    if settings.slurm.lead_seconds:
        return settings.slurm.lead_seconds
    try:
        return max(30, int(RunFolder(folder).lead_seconds.read_text().split()[0]))
    except (OSError, ValueError, IndexError):  # it has not measured yet, or was killed while it wrote that down
        return FIRST_LEAD_SECONDS


def _check_folder(folder: Path, container: bool) -> None:
    """Raises RequestError for a run folder that cannot stand in a script, or where Slurm takes a path apart."""
    text = str(folder)
    if not text.isprintable():  # newlines, and bytes that are no text
        raise RequestError(f"--run-dir {text!r}: a run that Slurm starts needs a folder whose name can be printed")
    if "\\" in text:
        raise RequestError(f"--run-dir {text}: Slurm takes a backslash in the name of a job's output for its own sign")
    if container and (signs := [sign for sign in ":," if sign in text]):
        raise RequestError(f"--run-dir {text}: {signs[0]!r} separates the mounts of a container (slurm.container)")


def _check_time(settings: Settings, folder: Path) -> None:
    """Raises RequestError for a limit within which no step could be done: such a job would come back, again and again,
    only to be told to stop."""
    slurm, lead, start_up = settings.slurm, lead_seconds(settings, folder), start_up_seconds(folder)
    if (limit := limit_seconds(slurm.time)) > lead + start_up:
        return
    measured = RunFolder(folder).lead_seconds.exists()
    whose = "as given" if slurm.lead_seconds else "as measured" if measured else "unset"
    raise RequestError(
        f"slurm.time = {slurm.time} is {limit:.0f} s, but the signal to stop comes {lead} s before the end "
        f"(slurm.lead_seconds, {whose}) and a start takes about {start_up} s, so that no step could be done: raise "
        "slurm.time, or set a smaller slurm.lead_seconds"
    )


def start_up_seconds(folder: Path) -> int:
    """What a start of the run in the folder took until its first step, the last time; else START_UP_SECONDS."""
    try:
        last = RunFolder(folder).metrics.read_bytes().splitlines()[-1]
        return math.ceil(float(json.loads(last)["startup/seconds"]))
    except (OSError, ValueError, LookupError, TypeError, OverflowError):  # no step yet, or a line that was cut off
        return START_UP_SECONDS


def write(plan: Plan, overrides: list[list[str]]) -> None:
    """The run folders with their configurations, and the script. Raises RequestError, before anything is changed, for a
    folder with a live run, or with one that was configured otherwise: the job that continues it reads these files."""
    with contextlib.ExitStack() as locks:
        for folder, settings in zip(plan.folders, plan.runs, strict=True):
            if folder.exists():
                locks.enter_context(hold(folder))
            _check_alike(folder, settings)
        _write(plan, overrides)


def _check_alike(folder: Path, settings: Settings) -> None:
    """Raises RequestError for a configuration that is not the run's. Whether the files of a checkpoint are whole is
    left to the job: it resumes from one that is."""
    checkpoint, _ = newest_whole(RunFolder(folder).checkpoints, read_manifest)
    if checkpoint is not None:
        before = read_manifest(checkpoint)
        check_same(folder, settings, before.config, before.inputs)
    elif (started := started_with(folder)) is not None:
        check_same(folder, settings, started["config"], started["inputs"])


def _write(plan: Plan, overrides: list[list[str]]) -> None:
    for folder, settings in zip(plan.folders, plan.runs, strict=True):
        RunFolder(folder).logs.mkdir(parents=True, exist_ok=True)
        save_resolved(settings, RunFolder(folder).config)
    if len(plan.folders) > 1:
        names = {folder.name: words for folder, words in zip(plan.folders, overrides, strict=True)}
        RunFolder(plan.top).sweep.write_text(json.dumps(names, indent=2) + "\n")
    RunFolder(plan.top).logs.mkdir(exist_ok=True)
    (plan.top / SCRIPT).write_text(plan.script, encoding="utf-8")


def check_cluster(plan: Plan, export: Path | None, benchmarks: str = "") -> list[str]:
    """Raises RequestError for what this cluster would not take; returns what there is to say of what may wait."""
    slurm = plan.runs[0].slurm
    index = slurm.attempts if slurm.resume == "array" else len(plan.folders) - 1
    remarks = check_site(slurm, plan.script, index)
    if export is not None:
        remarks += try_out(slurm.partition, *_export_job(plan, export))
    if benchmarks:
        remarks += try_out(slurm.partition, *_evaluation_job(plan, benchmarks))
    return remarks


def submit(plan: Plan, export: Path | None, benchmarks: str = "") -> list[str]:
    """Submits what was written, and what is to follow it; returns the numbers of the jobs."""
    numbers = [sbatch(str(plan.top / SCRIPT))]
    after = (f"--dependency=afterok:{numbers[0]}", "--kill-on-invalid-dep=yes")
    if export is not None:
        numbers.append(sbatch(*after, *_export_job(plan, export)))
    if benchmarks:
        numbers.append(sbatch(*after, *_evaluation_job(plan, benchmarks)))
    return numbers


def _export_job(plan: Plan, export: Path) -> list[str]:
    """The job that exports the weights."""
    words = [sys.executable, "-m", "a3po_megatron", "convert", "export", str(plan.top), str(export.resolve())]
    return [*_after_job(plan, "export"), "--wrap", shlex.join(words)]


def _evaluation_job(plan: Plan, benchmarks: str) -> list[str]:
    """The job that evaluates the newest weights, on one node as the run's are."""
    slurm = plan.runs[0].slurm
    options = ["--nodes=1", f"--cpus-per-task={slurm.cpus_per_task * slurm.ranks_per_node()}", f"--time={slurm.time}"]
    if slurm.gpus_per_node:
        options += [f"--gpus-per-node={slurm.gpus_per_node}", "--mem=0"]
    words = [sys.executable, "-m", "a3po_megatron", "eval", str(plan.top), "--benchmark", benchmarks]
    commands = [*whole_commands(slurm.setup), f"exec {shlex.join(words)}"]
    return [*_after_job(plan, "eval"), *options, "--wrap", "\n".join(commands)]


def _after_job(plan: Plan, name: str) -> list[str]:
    """What a job that follows a run is, for sbatch: where and on whose account as the run itself."""
    slurm, top = plan.runs[0].slurm, plan.top
    named = {"partition": slurm.partition, "account": slurm.account, "qos": slurm.qos}
    further = [option for line in slurm.extra for option in options_of(line) if option[0] in ALL_JOBS]
    options = [f"--{name}={value}" for name, value in [*named.items(), *further] if value]
    options += ["--ntasks=1", f"--output={filename(str(top))}/logs/{name}-%j.out"]
    return [*options, f"--job-name={plan.runs[0].name}-{name}"]


def swept(sweep: list[str]) -> list[list[str]]:
    """`key=a,b,c` … → every combination, as --set overrides. Raises RequestError for one that names nothing."""
    choices: list[list[str]] = []
    for text in sweep:
        key, equals, values = text.partition("=")
        if not equals or not all(values.split(",")):
            raise RequestError(f"--sweep {text}: expected section.key=value,value,…")
        choices.append([f"{key}={value}" for value in values.split(",")])
    return [list(combination) for combination in itertools.product(*choices)]
