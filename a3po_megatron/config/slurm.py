"""Settings of `a3po submit`: the allocation that a run asks Slurm for, and how it comes back after its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator

from .sbatch_options import checked_extra
from .section import NonNegative, Positive, Section, option
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


def _memory(value: object) -> object:
    return value if value == "" else checked_memory(value)


def _or_empty(check: Callable[[str], str]) -> AfterValidator:
    """An empty text says that nothing is asked for."""
    return AfterValidator(lambda text: text and check(text))


Text = Annotated[str, AfterValidator(checked_text)]
Lines = Annotated[tuple[Text, ...], BeforeValidator(_lines)]
Word = Annotated[str, _or_empty(checked_word)]
Environment = Annotated[dict[str, str], AfterValidator(checked_environment)]


class SlurmOptions(Section):
    partition: Annotated[str, _or_empty(checked_words)] = option(
        "", "where the job runs, or several with commas between: any of them; empty: the cluster's default"
    )
    account: Word = option("", "whom the job is charged to; empty: the user's default")
    qos: Word = option("", "quality of service; empty: the account's default")
    nodes: Positive = option(1, "nodes that train")
    gpus_per_node: Annotated[int | str, BeforeValidator(checked_gpus)] = option(
        8, "GPUs of each node, with their type where the cluster demands one (h200:8); 0: a run on CPUs"
    )
    tasks_per_node: Positive | None = option(None, "ranks of each node; null: one for every GPU")
    cpus_per_task: Positive = option(8, "CPUs of each rank")
    memory: Annotated[str, BeforeValidator(_memory)] = option(
        "",
        "per node, in MB or with K, M, G or T directly after it; 0: all of it; empty: all of a node with GPUs, else "
        "the partition's default",
    )
    time: Annotated[str, AfterValidator(checked_time)] = option("04:00:00", "limit of one job, in any form of Slurm's")
    lead_seconds: NonNegative = option(0, "the signal comes so long before the end; 0: as the run measured, first 300")
    resume: Literal["requeue", "chain", "array"] = option(
        "requeue", "how a run comes back after its end; chain, array: where the partition forbids requeueing"
    )
    attempts: Positive = option(20, "starts of one run: of a chain and an array, jobs")
    spares: NonNegative = option(0, "further nodes of the allocation, for when one fails")
    container: Text = option(
        "", "image for the ranks (pyxis), a file or a registry's; empty: the interpreter that submits"
    )
    mounts: Lines = option((), "of the container, besides the run folder: SOURCE:TARGET[:FLAGS]")
    python: Text = option("", "the ranks' interpreter; empty: the one that submits, in a container `python`")
    cache: Text = option("", "folder for what vLLM, Triton and Inductor compile; empty: in the run folder")
    setup: Lines = option((), "shell lines before all else, such as `module load cuda`; one that fails ends the job")
    environment: Environment = option({}, "variables of the job, as they stand: nothing in them is expanded")
    extra: Annotated[Lines, AfterValidator(checked_extra)] = option(
        (), "further options of sbatch, such as --exclusive"
    )

    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node()

    def ranks_per_node(self) -> int:
        return self.tasks_per_node or max(1, self.gpus())

    def gpus(self) -> int:
        """Of a node, of whatever type."""
        return sum(gpu_counts(str(self.gpus_per_node)).values())


class SlurmSettings(SlurmOptions):
    tasks_per_node: Positive
