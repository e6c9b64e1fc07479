"""Mean and spread of many passes of a network, and when there have been enough of them."""

import numpy as np

PROBABILITY_ERROR = 1e-7
"""Probabilities are kept this far from 0 and 1 where their logarithm is taken."""


class RunningMoments:
    """Mean, standard deviation and mean entropy of passes that are not kept.

    Welford's recurrence: memory does not grow with the number of passes, and what comes
    out does not depend on how passes are grouped. A single pass is all that is kept of it.

    Args:
        shape: Of one pass.

    Attributes:
        n: Passes so far.
        mean: float32 mean probability.

    Reference: Welford 1962; Knuth, TAOCP 2, 4.2.2.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.n = 0
        self.mean = np.zeros(shape, np.float32)
        self._squares = self._entropy = np.zeros(1, np.float32)

    def add(self, prob: np.ndarray) -> None:
        """Takes one pass: float32 probabilities."""
        self.n += 1
        if self.n == 1:
            self.mean[...] = prob
            return
        if self.n == 2:
            self._squares = np.zeros_like(self.mean)
            self._entropy = entropy(self.mean)
        step = prob - self.mean
        self.mean += step / np.float32(self.n)
        self._squares += step * (prob - self.mean)
        self._entropy += entropy(prob)

    @property
    def std(self) -> np.ndarray:
        """float32 standard deviation over passes (divided by n, as W1 does)."""
        if self.n < 2:
            return np.zeros_like(self.mean)
        return np.sqrt(self._squares / self.n)

    @property
    def mutual_information(self) -> np.ndarray:
        """float32 entropy of the mean less mean entropy, in nats: what passes disagree on.

        Reference: Gal et al. 2017 (BALD), equation 2.
        """
        if self.n < 2:
            return np.zeros_like(self.mean)
        spread = entropy(self.mean) - self._entropy / self.n
        return np.maximum(spread, 0)


def entropy(prob: np.ndarray) -> np.ndarray:
    """float32 entropy of a yes-or-no probability, in nats: 0 to log 2."""
    p = np.clip(prob, PROBABILITY_ERROR, 1 - PROBABILITY_ERROR)
    return -(p * np.log(p) + (1 - p) * np.log1p(-p))


def expected_dice_error(moments: RunningMoments, threshold: float) -> float:
    """How much Dice the mask is expected to lack against that of endlessly many passes.

    A voxel's mean has the standard error std / sqrt(n), so it lies on the wrong side of
    the threshold with probability Phi(-|mean - threshold| sqrt(n) / std). The sum of
    these over all voxels is the expected number of wrong voxels; Dice lacks that over
    the voxels of both masks.

    Returns:
        0 to 1; 1 before the second pass and where there is no mask to be wrong about but
        some voxel may still enter it.
    """
    from scipy.special import ndtr

    if moments.n < 2:
        return 1.0
    std = np.sqrt(moments._squares / (moments.n - 1))  # unbiased: n is small here
    open_to_doubt = std > 0
    distance = np.abs(moments.mean[open_to_doubt] - np.float32(threshold))
    wrong = ndtr(-distance * np.sqrt(moments.n) / std[open_to_doubt]).sum()
    voxels = 2 * np.count_nonzero(moments.mean > np.float32(threshold))
    return float(min(wrong / max(voxels, 1), 1.0))
