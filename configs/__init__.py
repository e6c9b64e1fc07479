"""Named experiments, indexed by the name given on the command line."""

from config import Experiment
from configs import (
    ablations,
    candidates2d,
    lungs2d,
    lungs3d,
    nodules2d,
    nodules3d,
    smoke,
    thesis,
)

CONFIGS: dict[str, tuple[str, Experiment]] = {
    **thesis.CONFIGS,
    **smoke.CONFIGS,
    **ablations.CONFIGS,
    **lungs2d.CONFIGS,
    **lungs3d.CONFIGS,
    **nodules2d.CONFIGS,
    **candidates2d.CONFIGS,
    **nodules3d.CONFIGS,
}
"""Experiments by name, each with one line of help."""
