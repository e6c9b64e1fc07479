"""Running mean and standard deviation over passes, and the Dice error expected of them."""

import numpy as np

PROBABILITY_ERROR = 1e-7
"""Distance that probabilities keep from 0 and 1 before their logarithm is taken."""


class RunningMoments:
    """Mean, standard deviation and mean entropy of passes that are not stored.

    Uses Welford's recurrence: memory does not grow with the number of passes, and the
    result does not depend on how passes are grouped. After a single pass only its
    probabilities are held.

    Args:
        shape: Shape of one pass.

    Attributes:
        n: Number of passes so far.
        mean: Mean probability, float32.

    Reference: Welford 1962; Knuth, TAOCP 2, 4.2.2.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.n = 0
        self.mean = np.zeros(shape, np.float32)
        self._squares = self._entropy = np.zeros(1, np.float32)

    def add(self, prob: np.ndarray) -> None:
        """Adds one pass of float32 probabilities."""
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
        """The standard deviation over passes, float32 (divided by n, as W1 does)."""
        if self.n < 2:
            return np.zeros_like(self.mean)
        return np.sqrt(self._squares / self.n)

    @property
    def mutual_information(self) -> np.ndarray:
        """The mutual information, float32 in nats: entropy of the mean less mean entropy.

        It is high where the passes disagree.

        Reference: Gal et al. 2017 (BALD), equation 2.
        """
        if self.n < 2:
            return np.zeros_like(self.mean)
        spread = entropy(self.mean) - self._entropy / self.n
        return np.maximum(spread, 0)


def entropy(prob: np.ndarray) -> np.ndarray:
    """Computes the entropy of a binary probability in nats, 0 to log 2, as float32."""
    p = np.clip(prob, PROBABILITY_ERROR, 1 - PROBABILITY_ERROR)
    return -(p * np.log(p) + (1 - p) * np.log1p(-p))


def expected_dice_error(moments: RunningMoments, threshold: float) -> float:
    """Estimates 1 - Dice between the mask and that of infinitely many passes.

    A voxel's mean has the standard error std / sqrt(n), so it lies on the wrong side of
    the threshold with probability Phi(-|mean - threshold| sqrt(n) / std). The sum of
    these over all voxels is the expected number of wrong voxels; the Dice error is that
    number divided by the voxels of both masks.

    Returns:
        0 to 1. It is 1 before the second pass. An empty mask gives the expected number of
        wrong voxels, at most 1.
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
