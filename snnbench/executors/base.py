"""What every executor promises: a run folder is submitted, and a handle says what becomes of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from snnbench.store import RunFolder


class Handle(Protocol):
    """A run in progress, somewhere."""

    @property
    def alive(self) -> bool:
        """Whether something still works on it, or will."""

    @property
    def from_outside(self) -> bool:
        """Whether it ended through no fault of its own, and may be taken up again."""

    def messages(self, wait_s: float = 0.0) -> Iterator[dict[str, Any]]:
        """What the worker said meanwhile, or says within this time; none once it has ended."""

    def stop(self) -> None:
        """Ask it to save itself and to end."""

    def kill(self) -> None:
        """End it at once."""

    def death(self) -> str:
        """How it ended."""

    def close(self) -> None:
        """Release what belongs to it."""


class Executor(Protocol):
    """Starts runs."""

    remote: bool  # runs are claimed, watched and taken up again where they are executed

    def room(self, devices: int) -> bool:
        """Whether a run on so many devices can begin now."""

    def submit(self, folder: RunFolder, context: Mapping[str, Any], devices: int = 1) -> Handle:
        """Start the run of this folder; raises WorkerError where that cannot be."""

    def attached(self, folder: RunFolder) -> bool:
        """Whether an earlier command has submitted the run, and it is still in progress."""

    def batch(self) -> AbstractContextManager[None]:
        """What is submitted within may be started together at its end."""

    def wait(self, handles: Sequence[Handle], timeout_s: float) -> None:
        """Return when one of them has something to say, or after this time."""
