"""Errors that a user can act on, each with the exit code of the command line.

A message is one sentence that names the thing, where it is, and the next step.
"""

__all__ = ["DataError", "OmniconvError", "RefusedError", "ResourceError", "UsageError"]


class OmniconvError(Exception):
    """Base of every error that omniconv raises on purpose; the command line prints it without a traceback."""

    exit_code = 1


class UsageError(OmniconvError):
    """A call or command that cannot be meant as written (exit code 2)."""

    exit_code = 2


class DataError(OmniconvError):
    """Data that cannot be read or does not fit the task (exit code 3)."""

    exit_code = 3


class ResourceError(OmniconvError):
    """Memory, disk, time, a missing package or a device that is not there (exit code 4)."""

    exit_code = 4


class RefusedError(OmniconvError):
    """Something that could be done and was not, because its result would be wrong or unsafe (exit code 5)."""

    exit_code = 5
