"""Whether bytes fit, with a margin for what no formula knows."""

from __future__ import annotations

from enum import StrEnum

# Of a device's memory: what the public record's measurements differ by from run to run is about as much.
BAND = 0.08


class Verdict(StrEnum):
    FITS = "fits"
    TIGHT = "tight"  # fits by less than the band
    NO = "does not fit"


def verdict_of(needed: float, capacity: float) -> Verdict:
    if needed > capacity:
        return Verdict.NO
    return Verdict.FITS if needed <= (1 - BAND) * capacity else Verdict.TIGHT
