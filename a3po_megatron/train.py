"""The loop: A3PO as one reads it in the paper. Every rank runs this same program (`python -m a3po_megatron.train`)."""

from __future__ import annotations

from a3po_megatron.launch import environment

environment.prepare()  # must precede every import of torch, Megatron and vLLM

from a3po_megatron.run.stop import INTERRUPT  # noqa: E402

if __name__ == "__main__":
    INTERRUPT.install()  # a signal that comes while the rest is imported must not be lost

import sys  # noqa: E402
from pathlib import Path  # noqa: E402

from a3po_megatron import compat  # noqa: E402

compat.prepare()  # before Megatron and vLLM are imported

from a3po_megatron.algorithm.advantage import assemble  # noqa: E402
from a3po_megatron.algorithm.shaping import shape  # noqa: E402
from a3po_megatron.config import Config, load_resolved  # noqa: E402
from a3po_megatron.data.prompts import Prompts  # noqa: E402
from a3po_megatron.data.tokens import Tokens  # noqa: E402
from a3po_megatron.launch.folder import prepare_folder  # noqa: E402
from a3po_megatron.launch.hardware import find_hardware  # noqa: E402
from a3po_megatron.launch.shell import check_interfaces  # noqa: E402
from a3po_megatron.learner.learner import Learner  # noqa: E402
from a3po_megatron.model.build import DTYPES  # noqa: E402
from a3po_megatron.model.facts import read_facts  # noqa: E402
from a3po_megatron.model.precision import check_hardware  # noqa: E402
from a3po_megatron.ranks.groups import Cluster, connect  # noqa: E402
from a3po_megatron.residency import Residency  # noqa: E402
from a3po_megatron.reward.graders import math_graders  # noqa: E402
from a3po_megatron.rollout.intake import Collector, Graders  # noqa: E402
from a3po_megatron.rollout.vllm_engine import VllmEngine  # noqa: E402
from a3po_megatron.run.checkpoints import Run, leave_if_told, resumed_from  # noqa: E402
from a3po_megatron.run.journal import Journal  # noqa: E402
from a3po_megatron.run.manifest import identity  # noqa: E402
from a3po_megatron.telemetry.clock import CLOCK, phase  # noqa: E402
from a3po_megatron.telemetry.watchdog import Watchdog  # noqa: E402


def train(folder: Path, config: Config, cluster: Cluster, graders: Graders) -> None:
    """Trains the run in `folder` to its last step. Collective over all ranks."""
    facts = read_facts(config.model.path)
    tokens = Tokens.of(config.data, Path(config.model.path), facts.vocab, facts.eos)
    prompts = Prompts(config.data, tokens, config.trainer.seed, config.rollout.max_prompt_tokens)
    # The engine first: it wants an empty device, and building it disturbs process-wide state.
    dtype = DTYPES[config.model.known_dtype()]
    with phase("engine"):
        engine = VllmEngine(Path(config.model.path), facts, tokens.stops, config.rollout, dtype, cluster.backend)
    leave_if_told(folder, cluster, INTERRUPT)
    checkpoint = resumed_from(folder, cluster)
    with phase("model"):
        learner = Learner(cluster, facts, config, checkpoint)
    leave_if_told(folder, cluster, INTERRUPT)
    any_weights = config.checkpoint.replay == "all"
    journal = Journal(folder / "journal", cluster.rank, identity(config), any_weights)
    collect = Collector(cluster, tokens, config.trainer, config.rollout, config.reward, journal, INTERRUPT)
    residency = Residency(engine, learner.arena, cluster.backend, config.learner.offload)
    run = Run(folder, config, cluster, facts, tokens, prompts, collect, learner, checkpoint)

    with residency.publishing():
        run.publish(learner, engine)  # also after a resume: never sample from weights that were not proven
    with run.leaving(learner):  # when all ranks agreed that time is up
        for step in run.steps():
            with residency.rollout():  # engine awake, learner asleep
                groups = collect(engine, prompts, graders, step)  # sample, grade, keep groups with spread
            with residency.training():  # learner awake, engine asleep
                batch = assemble(groups, config.advantage, config.trainer.mini_batches)  # group-normalised advantages
                batch = learner.score(run.recall(step, batch))  # old log-probs, entropy: training engine
                run.keep(step, batch)  # from here on nothing of it is lost
                batch = shape(batch, step, config.shaping)  # A3PO: token weights from old log-probs and polarity
                stats = learner.update(batch)  # clipped objective, mini-batches, one optimiser step each
                run.keep_rejected(step, batch)  # what was not finite was not applied
            with residency.publishing():  # parameters and engine weights, nothing else
                receipt = run.publish(learner, engine)  # reshard, load, compare
            run.record(step, groups, batch, stats, receipt)
            run.checkpoint(step, learner)  # when due, and at the end
    run.close()


def main(folder: Path) -> None:
    CLOCK.attach(folder / "logs" / f"rank-{environment.rank()}.phase")
    config = load_resolved(folder / "config.yaml")
    rank, world = environment.rank(), environment.world()
    lock = prepare_folder(folder, config) if rank == 0 and not environment.launched() else None  # noqa: F841  held
    watchdog = Watchdog(folder, rank, world, config.telemetry, CLOCK, environment.last_words)
    if environment.launched():
        watchdog.start()
    CLOCK.seconds["imports"] = environment.since_start()
    check_hardware(config.learner.precision, find_hardware())  # a job's launcher may be on another node, or outside
    check_interfaces()
    with math_graders(config.reward) as graders:
        with phase("groups"):
            cluster = connect(config.parallel, config.cluster, config.rollout.tensor, config.trainer.seed)
        watchdog.start()  # at the latest; until all have met, the folder may hold what is left of an earlier start
        train(folder, config, cluster, graders)


if __name__ == "__main__":
    environment.report_failures(Path(sys.argv[1]), main)
