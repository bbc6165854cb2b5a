"""Every error a user can cause, and the exit code it ends the command with."""

from enum import IntEnum


class ExitCode(IntEnum):
    """Documented in the README; a script may rely on them."""

    OK = 0
    RUNS_FAILED = 1
    USAGE = 2
    SUITE = 3
    DATA = 4
    RESULTS = 5
    WORKER = 6
    INTERNAL = 70
    INTERRUPTED = 130


class SnnbenchError(Exception):
    """A mistake or mishap that the user can mend; its message is one clear line each."""

    exit_code = ExitCode.INTERNAL


class UsageError(SnnbenchError):
    """The command line asks for something that does not exist."""

    exit_code = ExitCode.USAGE


class SuiteError(SnnbenchError):
    """A suite file, or a value set over it, is not valid."""

    exit_code = ExitCode.SUITE


class DataError(SnnbenchError):
    """A dataset is missing, damaged or not what it claims to be."""

    exit_code = ExitCode.DATA


class ResultsError(SnnbenchError):
    """The results folder cannot be read or written, or somebody else is writing it."""

    exit_code = ExitCode.RESULTS


class SchemaError(ResultsError):
    """A record was written by a version of snnbench that this one does not understand."""


class WorkerError(SnnbenchError):
    """A worker process could not be started or could not load what it needs."""

    exit_code = ExitCode.WORKER


class RunSkipped(Exception):
    """The combination makes no sense or cannot run here; the reason is an outcome of the run."""


class DivergedError(SnnbenchError):
    """Training produced a value that is not finite; an outcome of a run, not of a command."""
