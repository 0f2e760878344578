"""Old log-probs and entropies of a step's batch: computed once, and durable before its update.

A run that was interrupted between score and update finds them in the journal; what it finds is what it would compute.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..batch import Batch
from ..errors import RunFailed
from ..ranks.groups import Ranks
from .journal import Journal
from .rejected import Rejected


class Scores:
    def __init__(self, ranks: Ranks, journal: Journal, rejected: Rejected) -> None:
        self._ranks, self._journal, self._rejected = ranks, journal, rejected

    def __call__(self, step: int, batch: Batch, score: Callable[[Batch], Batch]) -> Batch:
        """Returns the batch with old log-probs and entropies: from the journal where all ranks have them, else from
        `score`, and then in the journal. Collective.

        Raises RunFailed for values that are not finite, with the batch saved: the learner's weights are broken.
        """
        known = self._journal.scores(step, batch.rollouts)
        scored_before = bool(self._ranks.agree("scored before", known is not None, all))
        if scored_before:
            assert known is not None
            values, rerouted = known
            batch.old_logprobs, batch.entropy = torch.from_numpy(values)
            batch.rerouted = None if rerouted is None else torch.tensor(rerouted, dtype=torch.int64)
        batch = score(batch)
        assert batch.old_logprobs is not None and batch.entropy is not None, "score gives both"
        sound = bool(torch.isfinite(batch.old_logprobs).all()) and bool(torch.isfinite(batch.entropy).all())
        if self._ranks.agree("scores", not sound, any):
            for number in range(batch.mini_batches):
                self._rejected.save(step, number, batch)
            raise RunFailed(
                f"step {step}: the learner's log-probs are not finite: its weights cannot be trusted; "
                f"{self._rejected.folder} holds the batch"
            )
        if self._ranks.batch_group.rank() == 0 and not scored_before:
            self._journal.add_scores(step, batch)
        return batch
