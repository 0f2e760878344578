"""Slurm's own forms of values, held against what Slurm's manual says of each."""

from __future__ import annotations

import math

import pytest

from a3po_megatron.config.slurm_forms import limit_seconds


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("30", 30 * 60),
        ("90:00", 90 * 60),
        ("90:30", 91 * 60),  # whole minutes, rounded up
        ("00:30", 60),
        ("4:00:00", 4 * 3600),
        ("0:5:1", 6 * 60),
        ("1:90:60", 3600 + 91 * 60),  # sbatch takes more than 59 of them
        ("2-0", 2 * 86400),
        ("1-12", 36 * 3600),
        ("1-2:3", 86400 + 2 * 3600 + 3 * 60),
        ("1-02:03:04", 86400 + 2 * 3600 + 4 * 60),
        ("0-0:10", 600),
        ("UNLIMITED", math.inf),
        ("infinite", math.inf),
        ("0", math.inf),  # sbatch(1): a limit of zero requests that none be imposed
        ("0:00", math.inf),
    ],
)
def test_a_time_limit_is_read_in_every_form_that_sbatch_takes(time: str, seconds: float) -> None:
    assert limit_seconds(time) == seconds


@pytest.mark.parametrize("time", ["", "4h", "1-2:3:4:5", "1:2:3:4", "::", "1:", "-1", "1.5", " 1", "1 ", "٣", "2-", "-"])
def test_what_is_no_time_limit_is_refused(time: str) -> None:
    with pytest.raises(ValueError, match="hours:minutes:seconds"):
        limit_seconds(time)
