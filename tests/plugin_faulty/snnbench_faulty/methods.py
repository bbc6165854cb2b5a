"""BPTT with a fault in the loss."""

import os
import sys
import time
from dataclasses import dataclass

from snnbench.methods.base import Method


class Raises(Method):
    """An ordinary bug."""

    source = "nowhere"

    def loss(self, logits_TBK, target, progress):
        raise ValueError("a fault of the guest")


class Aborts(Method):
    """Dies as native code does, without a word to Python."""

    source = "nowhere"

    def loss(self, logits_TBK, target, progress):
        os.abort()


class Exits(Method):
    """Leaves without saying so, in the middle of training."""

    @dataclass(frozen=True)
    class Config:
        """`code` is the exit code."""

        code: int = 3

    source = "nowhere"

    def loss(self, logits_TBK, target, progress):
        if progress > 0.5:
            os._exit(self.config.code)
        return super().loss(logits_TBK, target, progress)


class Hangs(Method):
    """Never comes back, and minds no signal that Python handles."""

    @dataclass(frozen=True)
    class Config:
        """`after` is the share of the training that goes well; below 0 not even the probe does."""

        after: float = 0.3

    source = "nowhere"

    def loss(self, logits_TBK, target, progress):
        while progress > self.config.after:
            time.sleep(3600)
        return super().loss(logits_TBK, target, progress)


class Chatty(Method):
    """Prints garbage wherever it can."""

    source = "nowhere"

    def loss(self, logits_TBK, target, progress):
        sys.stdout.write('{"event": "epoch"} garbage on stdout\n')
        sys.stdout.flush()
        sys.stderr.write("garbage on stderr\n")
        os.write(1, b"\xff\x00 raw garbage\n")
        return super().loss(logits_TBK, target, progress)
