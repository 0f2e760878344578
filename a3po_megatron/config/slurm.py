"""Settings of `a3po submit`: the allocation that a run asks Slurm for, and how it comes back after its end."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from .sbatch_options import checked_extra
from .section import NonNegative, Positive, Section
from .slurm_forms import (
    checked_environment,
    checked_gpus,
    checked_memory,
    checked_text,
    checked_time,
    checked_word,
    checked_words,
    gpu_counts,
)


def _lines(value: object) -> object:
    """One line is taken as a list of one."""
    return (value,) if isinstance(value, str) else value


Text = Annotated[str, AfterValidator(checked_text)]
Lines = Annotated[tuple[Text, ...], BeforeValidator(_lines)]
Word = Annotated[str, AfterValidator(checked_word)]
Environment = Annotated[dict[str, str], AfterValidator(checked_environment)]


class SlurmOptions(Section):
    partition: Annotated[str, AfterValidator(checked_words)] | None = None  # or several, with commas: any of them
    account: Word | None = None
    qos: Word | None = None
    nodes: Positive = 1
    # 0: a run on CPUs. With a type where the cluster demands one: h200:8.
    gpus_per_node: Annotated[int | str, BeforeValidator(checked_gpus)] = 8
    tasks_per_node: Positive | None = None  # ranks; None: one for every GPU
    cpus_per_task: Positive = 8
    # Per node (in MB, or with a unit), as Slurm writes it; None: all of the node's where it asks for GPUs, else the
    # partition's default.
    memory: Annotated[str, BeforeValidator(checked_memory)] | None = None
    time: Annotated[str, AfterValidator(checked_time)] = "04:00:00"
    lead_seconds: Positive | None = (
        None  # the signal comes so long before the end; None: as the run measured, first 300
    )
    resume: Literal["requeue", "chain", "array"] = "requeue"  # chain, array: where the partition forbids requeueing
    attempts: Positive = 20  # starts of one run: of a chain and an array, jobs
    spares: NonNegative = 0  # further nodes of the allocation, for when one fails
    container: Text | None = None  # image for the ranks (pyxis); None: the interpreter that submits
    mounts: Lines = ()  # of the container, besides the run folder
    python: Text | None = None  # the ranks' interpreter; None: the one that submits, in a container `python`
    cache: Text | None = None  # what vLLM, Triton and Inductor compile is kept there; None: in the run folder
    setup: Lines = ()  # shell lines before all else, such as `module load cuda`
    environment: Environment = Field(default_factory=dict)
    extra: Annotated[Lines, AfterValidator(checked_extra)] = ()  # further #SBATCH options, such as --exclusive

    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node()

    def ranks_per_node(self) -> int:
        return self.tasks_per_node or max(1, self.gpus())

    def gpus(self) -> int:
        """Of a node, of whatever type."""
        return sum(gpu_counts(str(self.gpus_per_node)).values())
