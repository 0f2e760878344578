"""The errors of the package and the exit code each one ends a command with.

An error message is one paragraph for a person: what is wrong, where (file, line, option, tensor, rank), what to do.
"""

from __future__ import annotations


class A3POError(Exception):
    """Base of every error that ends a command with a message and without a traceback."""

    exit_code = 1


class RequestError(A3POError):
    """The request was wrong: configuration, data, layout, a missing file. Nothing was started. Exit code 2."""

    exit_code = 2


class Finished(RequestError):
    """A run that has done all its steps already."""


class RunFailed(A3POError):
    """A run that had started could not go on. Exit code 1."""

    exit_code = 1


class Interrupted(A3POError):
    """A run that was told to stop, or that got stuck: the same command continues it. Exit code 85."""

    exit_code = 85


class PublishError(RunFailed):
    """Learner and engine do not hold the same weights after a publish. The message names the tensor."""
