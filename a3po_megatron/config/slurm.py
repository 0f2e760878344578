"""Settings of `a3po submit`: the allocation that a run asks Slurm for, and how it comes back after its end."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from .section import NonNegative, Positive, Section
from .slurm_forms import checked_time


def _quoted(value: object) -> object:
    if isinstance(value, int):
        raise ValueError('put it in quotes, as "4:00:00": YAML takes it for a number of sixties, or for minutes')
    return value


def _lines(value: object) -> object:
    """One line is taken as a list of one."""
    return (value,) if isinstance(value, str) else value


Lines = Annotated[tuple[str, ...], BeforeValidator(_lines)]


class SlurmOptions(Section):
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    nodes: Positive = 1
    gpus_per_node: NonNegative = 8  # 0: a run on CPUs
    tasks_per_node: Positive | None = None  # ranks; None: one for every GPU
    cpus_per_task: Positive = 8
    # Per node (in MB, or with a unit), as Slurm writes it; None: all of the node's where it asks for GPUs, else the
    # partition's default.
    memory: int | str | None = None
    time: Annotated[str, AfterValidator(checked_time), BeforeValidator(_quoted)] = "04:00:00"
    lead_seconds: Positive | None = (
        None  # the signal comes so long before the end; None: as the run measured, first 300
    )
    resume: Literal["requeue", "chain", "array"] = "requeue"  # chain, array: where the partition forbids requeueing
    attempts: Positive = 20  # starts of one run: of a chain and an array, jobs
    spares: NonNegative = 0  # further nodes of the allocation, for when one fails
    container: str | None = None  # image for the ranks (pyxis); None: the interpreter that submits
    mounts: Lines = ()  # of the container, besides the run folder
    python: str | None = None  # the ranks' interpreter; None: the one that submits, in a container `python`
    cache: str | None = None  # what vLLM, Triton and Inductor compile is kept there; None: in the run folder
    setup: Lines = ()  # shell lines before all else, such as `module load cuda`
    environment: dict[str, str] = Field(default_factory=dict)
    extra: Lines = ()  # further #SBATCH options, such as --exclusive

    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node()

    def ranks_per_node(self) -> int:
        return self.tasks_per_node or max(1, self.gpus_per_node)
