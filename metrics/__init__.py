"""Scores: overlap, surfaces, hits, FROC, agreement, calibration and intervals."""
