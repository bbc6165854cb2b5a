"""BPTT that takes its time, and whose runs are saved after every epoch: easy to interrupt."""

import time
from dataclasses import dataclass

from snnbench import train
from snnbench.methods.base import Method

train.EPOCH_CHECKPOINT_S = 0.0


class Steady(Method):
    """BPTT with a pause in every step."""

    @dataclass(frozen=True)
    class Config:
        """`delay_s` is the length of the pause."""

        delay_s: float = 0.05

    source = "nowhere"

    def backward(self, net, x_TB, target, progress):
        time.sleep(self.config.delay_s)
        return super().backward(net, x_TB, target, progress)
