"""Monte Carlo passes: their settings, their convergence and the resulting maps."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

import config
from inference.moments import RunningMoments, expected_dice_error

MIN_PASSES, MAX_PASSES, CHECK_EVERY = 8, 100, 4
"""Fewest passes, most passes and passes between convergence checks, with n="auto"."""

CONVERGED_DICE = 0.003
"""Expected Dice error, against the mask of infinitely many passes, below which the mask has
converged. The shipped lung weights need 40 passes; their mask then has a Dice of 0.998 with
that of 100 passes."""


@dataclass(frozen=True)
class Passes:
    """Settings of Monte Carlo passes."""

    n: int | Literal["auto"] = "auto"
    """Number of passes. auto adds passes until the lung mask has converged, up to 100; with a
    run for nodules it makes one. 0 and 1 make one pass with nothing hidden or dropped, whose
    standard deviation is 0. Runs that find nodules in the lungs make as many passes as they
    were tuned on."""
    draw: Literal["auto", "masks", "dropout", "both"] = "auto"
    """Random part of each pass: hidden cubes, dropout or both; auto uses masks if the run was
    trained with them, else dropout if it has any."""
    mask_fraction: float | None = None
    """Share of the cubes that masks hide; by default that of training, or its mean if it
    varied. A larger share makes the network infer lungs more from their surroundings and
    blurs borders."""
    seed: int = 0
    """Seed of masks and dropout; the same seed gives the same result."""

    def __post_init__(self) -> None:
        n, share = self.n, self.mask_fraction
        config.require(
            share is None or 0 < share < 1, "mask_fraction", share, "between 0 and 1"
        )
        config.require(n == "auto" or n >= 0, "n", n, "auto, or 0 or more")
        config.require(self.seed >= 0, "seed", self.seed, "0 or more")

    def drawn(self, model: config.Model) -> tuple[bool, bool]:
        """Returns whether this network draws masks, and whether it draws dropout.

        Raises:
            ValueError: If `draw` names something the run was not trained with, several
                passes are requested but nothing differs between them, or `mask_fraction`
                is set but nothing is masked.
        """
        masks, dropout = self._drawn(model)
        if self.mask_fraction is not None and not masks:
            raise ValueError(
                f"mask_fraction is {self.mask_fraction}, but no cubes are hidden in "
                f"n={self.n} passes with draw={self.draw} of this {model.name} (trained with "
                f"mask_fraction {model.mask_fraction}); leave it out, or use more passes"
            )
        return masks, dropout

    def _drawn(self, model: config.Model) -> tuple[bool, bool]:
        if self.n != "auto" and self.n <= 1:
            return False, False
        has_masks = model.name == "unet3d" and model.mask_fraction > 0
        has_dropout = model.dropout > 0
        if self.draw == "auto":
            if self.n != "auto" and not (has_masks or has_dropout):
                raise ValueError(
                    f"n is {self.n}, but the run was trained with neither masks nor dropout, "
                    "so all passes would be equal; use --n 1"
                )
            return has_masks, has_dropout and not has_masks
        masks = self.draw in ("masks", "both")
        dropout = self.draw in ("dropout", "both")
        if (masks and not has_masks) or (dropout and not has_dropout):
            raise ValueError(
                f"draw is {self.draw!r}, but the run's {model.name} has mask_fraction "
                f"{model.mask_fraction} and dropout {model.dropout}; use --draw auto"
            )
        return masks, dropout


@dataclass(frozen=True, eq=False)
class Maps:
    """Maps of the passes over a scan; each is computed on first use.

    Attributes:
        moments: Moments of the passes, in the part of the network's grid that the network saw.
        to_scan: Function that resamples (z, y, x) values from there to the scan's grid.
    """

    moments: RunningMoments
    to_scan: Callable[[np.ndarray], np.ndarray]

    @property
    def n(self) -> int:
        """The number of passes made."""
        return self.moments.n

    @functools.cached_property
    def mean(self) -> np.ndarray:
        """The mean probability on the scan's grid, (z, y, x) float32."""
        return self.to_scan(self.moments.mean)

    @functools.cached_property
    def std(self) -> np.ndarray:
        """The standard deviation on the scan's grid, (z, y, x) float32."""
        return self.to_scan(self.moments.std)

    @property
    def mutual_information(self) -> np.ndarray:
        """The mutual information in nats on the scan's grid, (z, y, x) float32."""
        return self.to_scan(self.moments.mutual_information)


def converge(
    one_pass: Callable[[int], np.ndarray],
    shape: tuple[int, ...],
    n: int | Literal["auto"],
    threshold: float,
) -> RunningMoments:
    """Makes passes and keeps only their moments.

    Args:
        one_pass: Function that returns the float32 probabilities of pass k.
        shape: Shape of a pass.
        n: Number of passes; "auto" stops when `expected_dice_error` is below
            `CONVERGED_DICE`.
        threshold: Threshold of the mask whose convergence is checked.
    """
    moments = RunningMoments(shape)
    for k in range(MAX_PASSES if n == "auto" else max(n, 1)):
        moments.add(one_pass(k))
        asked = n == "auto" and moments.n >= MIN_PASSES and moments.n % CHECK_EVERY == 0
        if asked and expected_dice_error(moments, threshold) < CONVERGED_DICE:
            break
    return moments
