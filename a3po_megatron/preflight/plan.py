"""Whether a run fits its GPUs and its nodes, and where it does not, the cheapest changes with which it would.

Changes are tried, not guessed: each is planned like the run itself, one after another and, where none alone is enough,
in pairs, in the order of what they cost. None of them changes what is learned.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..config import AdamOptions, Config, ParallelOptions, Settings
from ..config.slurm_forms import bytes_of_memory
from ..errors import RequestError
from ..model.facts import ModelFacts
from .cache import STEP
from .gpus import Gpu
from .memory import Memory, Phase, memory_of
from .overhead import NODE, gib
from .sizes import RECOMPUTE
from .verdict import Verdict, verdict_of

CHANGES = 3  # that are named
PAIRS = 100  # that are tried where no change alone is enough


@dataclass(frozen=True)
class Change:
    """Options, as --set takes them, and what a plan says with them."""

    overrides: tuple[str, ...]
    verdict: Verdict


@dataclass(frozen=True)
class Plan:
    facts: ModelFacts
    settings: Settings
    memory: Memory
    capacity: int  # bytes of one device, or of this machine for one rank
    node: int  # bytes of a node's memory
    verdicts: dict[Phase, Verdict]
    host: Verdict
    changes: tuple[Change, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """The worst."""
        order = list(Verdict)
        return max((*self.verdicts.values(), self.host), key=order.index)

    def refusal(self, whose: str) -> str:
        """Says where it does not fit, by how much, and what would help."""
        lines = []
        large = [phase for phase, verdict in self.verdicts.items() if verdict == Verdict.NO]
        for phase in sorted(large, key=self.memory.total, reverse=True):
            needed = self.memory.total(phase)
            lacks = needed - self.capacity
            lines.append(f"{phase} needs {gib(needed)} of {gib(self.capacity)}: {lacks} bytes too much")
        if self.host == Verdict.NO:
            needed = sum(self.memory.host.values())
            lacks = needed - self.node
            lines.append(f"a node's memory: {gib(needed)} of {gib(self.node)}: {gib(lacks)} ({lacks} bytes) too much")
        text = f"{whose} does not fit: " + "; ".join(lines)
        if self.changes:
            options = [" ".join(f"--set {each}" for each in change.overrides) for change in self.changes]
            text += ". With any of these it would: " + "; ".join(options)
        else:
            text += ". No change that was tried would make it fit: take more nodes, or larger GPUs"
        return text


def plan_of(
    config: Config,
    settings: Settings,
    facts: ModelFacts,
    gpu: Gpu | None,
    settle: Callable[[Config], Settings],
    nodes_fixed: bool = False,
) -> Plan:
    """`gpu`: None where the ranks are on a CPU, of which nothing is asked. `settle`: what a changed configuration would
    do; raises RequestError where that cannot be. `nodes_fixed`: their number is not to be changed."""
    plan = _planned(settings, facts, gpu)
    if plan.verdict != Verdict.NO:
        return plan
    awake = (Phase.START, Phase.ROLLOUT, Phase.PUBLISH)
    over = max(plan.memory.total(phase) for phase in awake) - plan.capacity
    # A layout helps the learner; an engine has its own.
    anew = config.parallel == ParallelOptions() and plan.verdicts[Phase.UPDATE] == Verdict.NO
    single = list(_single(config, settings, facts, over, anew))
    single = [each for each in single if not (nodes_fixed and _asks_for_nodes(each))]
    found: list[Change] = []
    for tries in (single, itertools.islice(_pairs(single), PAIRS)):
        for overrides in tries:
            if len(found) == CHANGES or any(set(change.overrides) <= set(overrides) for change in found):
                continue
            try:
                changed = _planned(settle(_with(config, overrides)), facts, gpu)
            except RequestError:
                continue
            if changed.verdict != Verdict.NO:
                found.append(Change(overrides, changed.verdict))
        if found:
            break
    return dataclasses.replace(plan, changes=tuple(found))


def _planned(settings: Settings, facts: ModelFacts, gpu: Gpu | None) -> Plan:
    memory = memory_of(facts, settings, gpu is None or gpu.hopper)
    node = bytes_of_memory(settings.slurm.memory) or NODE
    if gpu is None:
        fits = dict.fromkeys(Phase, Verdict.FITS)
        return Plan(facts, settings, memory, 0, node, fits, Verdict.FITS)
    verdicts = {phase: verdict_of(memory.total(phase), gpu.memory) for phase in Phase}
    return Plan(facts, settings, memory, gpu.memory, node, verdicts, verdict_of(sum(memory.host.values()), node))


def _pairs(single: Sequence[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """Two changes of different options; none of which a layout is to be found anew."""
    for pair in itertools.combinations(single, 2):
        names = [text.partition("=")[0] for text in itertools.chain(*pair)]
        if len(set(names)) == len(names) and "parallel.layout" not in names:
            yield tuple(itertools.chain(*pair))


def _asks_for_nodes(overrides: tuple[str, ...]) -> bool:
    return any(text.startswith("slurm.nodes") for text in overrides)


def _single(config: Config, settings: Settings, facts: ModelFacts, over: int, anew: bool) -> Iterator[tuple[str, ...]]:
    """In the order of what they cost: nothing, a copy, computing again, talking, machines. `over`:
    bytes that the phase lacks in which the engine is awake. `anew`: a layout may be found in the place of none."""
    parallel, rollout, learner = settings.parallel, settings.rollout, settings.learner
    spared = (rollout.kv_cache_bytes - over) // STEP * STEP
    if config.rollout.kv_cache_bytes is not None and over > 0 and spared > 0:
        yield (f"rollout.kv_cache_bytes={spared}",)
    if config.rollout.max_sequences is not None and rollout.max_sequences > 16:
        yield (f"rollout.max_sequences={min(256, rollout.max_sequences // 2)}",)
    longest = rollout.longest
    if learner.micro_batch_tokens > longest:
        yield (f"learner.micro_batch_tokens={longest}",)
    if learner.offload != "optimizer" and config.learner.offload == "none":
        yield ("learner.offload=optimizer",)
    if learner.offload != "all" and config.learner.offload is not None:
        yield ("learner.offload=all",)
    if parallel.tensor > 1 and not parallel.sequence:
        yield ("parallel.sequence=true",)
    if config.learner.recompute is not None:
        for kind in RECOMPUTE[RECOMPUTE.index(learner.recompute) + 1 :]:
            yield (f"learner.recompute={kind}",)
    for times in (2, 4, 8):
        if rollout.tensor * times <= 16:
            yield (f"rollout.tensor={rollout.tensor * times}",)
    if config.parallel.layout == "auto":
        yield from _machines(settings, anew)
        return
    if facts.experts is not None:
        for times in (2, 4, 8):
            yield (f"parallel.expert={parallel.expert * times}", "parallel.expert_tensor=1")
    for times in (2, 4, 8):
        if parallel.tensor * times <= 8:
            yield (f"parallel.tensor={parallel.tensor * times}", "parallel.sequence=true")
    for times in (2, 4):
        yield (f"parallel.pipeline={parallel.pipeline * times}",)
    for times in (2, 4):
        yield (f"parallel.context={parallel.context * times}",)
    yield from _machines(settings, anew)


def _machines(settings: Settings, anew: bool) -> Iterator[tuple[str, ...]]:
    """Layouts that are found anew, the host's time, and more nodes."""
    if anew:
        yield ("parallel.layout=auto",)
    if isinstance(settings.optimizer, AdamOptions) and not settings.optimizer.on_host:
        yield ("optimizer.on_host=true",)
    for times in (2, 4, 8):
        nodes = f"slurm.nodes={settings.slurm.nodes * times}"
        yield (nodes,)
        if anew:
            yield nodes, "parallel.layout=auto"


def _with(config: Config, overrides: tuple[str, ...]) -> Config:
    tree = config.model_dump()
    for text in overrides:
        option, _, value = text.partition("=")
        section, _, name = option.partition(".")
        tree[section][name] = {"true": True, "false": False}.get(value, int(value) if value.isdecimal() else value)
    return Config.model_validate(tree)
