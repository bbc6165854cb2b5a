"""Python runs this at its start where the folder is on its path: the clock jumps by days."""

import random
import time

RNG = random.Random()
steady = time.time


def jumping():
    return steady() + RNG.choice([-1, 1]) * 86400 * RNG.uniform(1, 1000)


time.time = jumping
time.time_ns = lambda: int(jumping() * 1e9)
