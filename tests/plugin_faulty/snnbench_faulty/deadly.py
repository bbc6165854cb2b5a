"""A plugin that kills the process that imports it."""

import os

from snnbench.methods.base import Method

os.abort()


class Deadly(Method):
    """Never gets so far."""
