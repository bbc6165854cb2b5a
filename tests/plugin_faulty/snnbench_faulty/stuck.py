"""A plugin whose import never ends."""

import time

from snnbench.methods.base import Method

time.sleep(3600)


class Stuck(Method):
    """Never gets so far."""
