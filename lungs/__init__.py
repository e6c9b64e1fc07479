"""Lung labels: the classical mask, labels from a probability map, and checks of both."""
