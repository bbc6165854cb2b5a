"""Datasets and their augmentation."""
