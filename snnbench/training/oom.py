"""Lack of memory: how it is told, and the smaller parts of a batch that it may lead to."""

from __future__ import annotations

import re
from dataclasses import replace

from snnbench.spec import RunSpec
from snnbench.store import RunFolder

ASKED = re.compile(r"(?:allocate|allocated:?) +([\d.]+ *(?:[KMGT]i?B|bytes))", re.IGNORECASE)
# What torch says on a CPU, and what the libraries of a GPU do where torch did not ask itself.
# cuDNN without memory for any of its algorithms finds no engine (pytorch/pytorch#108645).
WORDS = ("not enough memory", "can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED",
         "unable to find an engine to execute")  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ended: by the type of the error, or by its words; without loading torch."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)


def after_oom(spec: RunSpec, run: RunFolder) -> tuple[RunSpec, str]:
    """What to do, in the parts that the last lack of memory led to, and a word about it."""
    tried = [e for e in run.events()[0] if e.get("event") == "oom_retry"]
    if not tried:
        return spec, ""
    parts = tried[-1]["batch_split"]
    reason = f"batches taken in {parts} parts, since in {parts // 2}: {tried[-1]['reason']}"
    return replace(spec, train=replace(spec.train, batch_split=parts)), reason


def more_parts(spec: RunSpec | None) -> int | None:
    """Twice as many parts of a batch; None where it cannot be divided so, or is recorded whole."""
    if spec is None or spec.train.graph:
        return None
    parts = 2 * spec.train.batch_split
    return None if spec.train.batch_size % (parts * spec.train.devices) else parts


def size_asked_for(error: BaseException) -> str:
    """Why there was not enough memory, beginning with the size that was asked for."""
    text = " ".join(str(error).split())
    found = ASKED.search(text)
    asked = found[1] if found else "a size that was not said"
    return f"out of memory, asked for {asked}: {text[:240] or type(error).__name__}"
