"""Verdicts: graders, the processes they run in, and rewards."""
