"""Faults that need more than one line: native crashes, lack of memory, a fault after the result."""

import ctypes
import os
from dataclasses import dataclass

import torch

from snnbench.methods.base import Method
from snnbench.store import RunFolder


class Segfaults(Method):
    """Reads where no memory is."""

    source = "nowhere"

    def loss(self, logits_TBK, target, progress):
        ctypes.string_at(0)


class Hungry(Method):
    """Asks for more memory than there is, unless its batch is small."""

    @dataclass(frozen=True)
    class Config:
        """`most` is the largest batch that it can do."""

        most: int = 8

    source = "nowhere"

    def loss(self, logits_TBK, target, progress):
        if logits_TBK.shape[1] > self.config.most:
            torch.empty(2**50, dtype=torch.uint8)
        return super().loss(logits_TBK, target, progress)


class Late(Method):
    """Everything is all right until the result is written; then the process dies."""

    source = "nowhere"

    def loss(self, logits_TBK, target, progress):
        RunFolder.finish = finish_and_abort
        return super().loss(logits_TBK, target, progress)


finish = RunFolder.finish


def finish_and_abort(self, result):
    finish(self, result)
    os.abort()
