"""A benchmark of training methods for spiking neural networks."""

__version__ = "0.1.0"
