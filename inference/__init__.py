"""Inference on whole scans: Monte Carlo passes, candidates, nodules and outlines."""
