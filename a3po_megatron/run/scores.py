"""Old log-probs and entropies of a step's batch, and what else is wanted of its tokens: computed once, and written down
while its update is made.

A run that was interrupted between score and update finds them in the journal; what it finds is what it would compute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..batch import SCORES, Batch
from ..errors import RunFailed
from ..ranks.groups import Ranks
from .journal import Journal
from .rejected import Rejected


class Scores:
    def __init__(self, ranks: Ranks, journal: Journal, rejected: Rejected, kinds: Sequence[str] = SCORES[:2]) -> None:
        """`kinds`: what the learner says of a token, of SCORES and in its order."""
        self._kinds = tuple(kinds)
        self._ranks, self._journal, self._rejected = ranks, journal, rejected

    def __call__(self, step: int, batch: Batch, score: Callable[[Batch], Batch]) -> Batch:
        """Returns the batch with old log-probs and entropies: from the journal where all ranks have them, else from
        `score`, and then in the journal. Collective.

        Raises RunFailed for values that are not finite, with the batch saved: the learner's weights are broken.
        """
        known = self._journal.scores(step, batch.rollouts, len(self._kinds))
        scored_before = bool(self._ranks.agree("scored before", known is not None, all))
        if scored_before:
            assert known is not None
            values, rerouted = known
            for kind, row in zip(self._kinds, torch.from_numpy(values), strict=True):
                setattr(batch, kind, row)
            batch.rerouted = None if rerouted is None else torch.tensor(rerouted, dtype=torch.int64)
        batch = score(batch)
        assert tuple(batch.scores()) == self._kinds, f"score gives {', '.join(self._kinds)}"
        # What the less noisy policy never takes has a log-prob of -inf there.
        sound = all(
            bool(torch.isfinite(values).all()) for kind, values in batch.scores().items() if kind != "proxy_logprobs"
        )
        if self._ranks.agree("scores", not sound, any):
            for number in range(batch.mini_batches):
                self._rejected.save(step, number, batch)
            self._rejected.settle()
            raise RunFailed(
                f"step {step}: the learner's log-probs are not finite: its weights cannot be trusted; "
                f"{self._rejected.folder} holds the batch"
            )
        if self._ranks.batch_group.rank() == 0 and not scored_before:
            self._journal.add_scores(step, batch)
        return batch
