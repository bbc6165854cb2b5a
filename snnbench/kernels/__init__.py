"""Interchangeable implementations of the neuron's scan over time."""
