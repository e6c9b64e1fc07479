"""Lung labels: the classical mask, labels from a probability map, and their checks."""
