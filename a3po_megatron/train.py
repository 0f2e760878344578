"""The loop: A3PO as one reads it in the paper. Every rank runs it, with its parts (parts.py).

`python -m a3po_megatron.train RUN_DIR` starts a rank, by way of rank.py: nothing heavy is imported here.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .telemetry.catalogue import Phase

if TYPE_CHECKING:
    from .parts import Parts


def train(parts: Parts) -> None:
    """Trains a run to its last step. Collective over all ranks."""
    intake, assemble, scores, shape = parts.intake, parts.assemble, parts.scores, parts.shape
    learner, objective, residency, publish = parts.learner, parts.objective, parts.residency, parts.publish
    recorder, checkpoints, stop = parts.recorder, parts.checkpoints, parts.stop
    evaluate, last = parts.evaluate, parts.settings.trainer.steps

    with stop.saving(checkpoints):  # when all ranks agreed that time is up
        with residency.publishing():
            publish()  # also after a resume: never sample from weights that were not proven
        for step in parts.profile.of(checkpoints.steps()):
            with residency.rollout():  # engine awake, learner asleep
                evaluated = evaluate(step)  # when due: benchmarks, with the weights that the step begins with
                groups = intake.next(step)  # sample, grade, keep groups with spread
            with residency.training():  # learner awake, engine asleep
                batch = assemble(groups)  # group-normalised advantage per rollout
                batch = scores(step, batch, learner.score)  # old log-probs, entropy: computed once, durable
                stop.if_due(Phase.UPDATE, Phase.PUBLISH)  # an update is never left half done
                batch = shape(batch, step)  # A3PO: token weights from old log-probs and polarity
                update = learner.update(batch, objective)  # one optimiser step a mini-batch; not finite: not applied
            with residency.publishing():  # parameters and engine weights, nothing else
                receipt = publish()  # reshard, load, compare
            recorder.step(step, groups, batch, update, receipt, evaluated)
            checkpoints.step(step)  # when due, or when all ranks agreed that time is up
        with residency.rollout():
            evaluate(last)  # the weights that it ends with


if __name__ == "__main__":
    from a3po_megatron.rank import start

    start(Path(sys.argv[1]), train)
