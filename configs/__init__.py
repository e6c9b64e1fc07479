"""Named experiments, by the name that is typed on the command line."""

from config import Experiment
from configs import ablations, smoke, thesis

CONFIGS: dict[str, tuple[str, Experiment]] = {
    **thesis.CONFIGS,
    **smoke.CONFIGS,
    **ablations.CONFIGS,
}
"""Name to (one line of help, experiment)."""
