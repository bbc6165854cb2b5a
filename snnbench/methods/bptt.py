"""Back-propagation through time with surrogate gradients: the baseline of every table.

    L = CE(1/T sum_t O(t), y)

The gradient flows back through all timesteps and layers.  Memory grows linearly with T.
Source: Wu et al., Spatio-temporal backpropagation, Front. Neurosci. 2018.
"""

from snnbench.methods.base import Method


class BPTT(Method):
    """Back-propagation through time, the baseline: every default of `Method`."""

    source = "Wu et al. 2018 (STBP), Front. Neurosci. 12:331"
