"""LUSPO: GSPO's term times the length of the response, so that long ones do not count less a token.

    J = |y| min(s A, clip(s, 1 - low, 1 + high) A),   mean over rollouts;   s as in gspo.py

Source: arXiv 2602.05261; the clip range of its section 5.1. |y| counts the tokens that are trained on. The correction
is GSPO's.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...config import LuspoOptions
from ..token_loss import TokenBatch
from .gspo import sequence_surrogate
from .terms import SequenceTerms, Terms, begun, token_counts


@dataclass(frozen=True)
class Luspo(SequenceTerms[LuspoOptions]):
    def terms(self, batch: TokenBatch) -> Terms:
        counts = token_counts(batch)
        terms = sequence_surrogate(batch, counts, self.correction, self.options)
        return terms._replace(values=terms.values * begun(batch, counts))
