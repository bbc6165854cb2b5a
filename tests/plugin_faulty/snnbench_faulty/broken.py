"""A plugin whose own requirement is not installed."""

import a_module_that_nobody_has  # noqa: F401

from snnbench.methods.base import Method


class Broken(Method):
    """Never gets so far."""
