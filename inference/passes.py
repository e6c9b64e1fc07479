"""Monte Carlo passes: how many, what differs in each, and the maps they leave."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

import config
from inference.moments import RunningMoments, expected_dice_error

MIN_PASSES, MAX_PASSES, CHECK_EVERY = 8, 100, 4
"""With n="auto": fewest and most passes, and how often it is asked if they are enough."""

CONVERGED_DICE = 0.003
"""The mask has converged when its expected Dice with that of endlessly many passes lacks no
more than this. With the lungs that ship 40 passes do; they lack 0.002 against 100."""


@dataclass(frozen=True)
class Passes:
    """How often a network looks at a scan, and what differs each time."""

    n: int | Literal["auto"] = "auto"
    """Passes; auto goes on until the mask of the lungs has converged, at most 100, and is one
    pass of a run for nodules. 0 and 1 are one look at the whole scan, nothing hidden, of
    which the standard deviation is 0. In lungs, nodules are looked for as often as their
    run was tuned for."""
    draw: Literal["auto", "masks", "dropout", "both"] = "auto"
    """What is drawn in each pass; auto is masks if the run was trained with them, else
    dropout if it has any."""
    mask_fraction: float | None = None
    """Share of the cubes that masks hide; by default what the run was trained with, on the
    mean if that varied. With more hidden, lungs are guessed more from their surroundings
    and borders blur."""
    seed: int = 0
    """Seed of masks and dropout: same seed, same result."""

    def __post_init__(self) -> None:
        n, share = self.n, self.mask_fraction
        config.require(
            share is None or 0 < share < 1, "mask_fraction", share, "between 0 and 1"
        )
        config.require(n == "auto" or n >= 0, "n", n, "auto, or 0 or more")
        config.require(self.seed >= 0, "seed", self.seed, "0 or more")

    def drawn(self, model: config.Model) -> tuple[bool, bool]:
        """Whether masks, and whether dropout, are drawn with this network.

        Raises:
            ValueError: If the run was trained without what `draw` asks for, has nothing to
                draw in the passes that `n` asks for, or nothing is masked and
                `mask_fraction` is set.
        """
        masks, dropout = self._drawn(model)
        if self.mask_fraction is not None and not masks:
            raise ValueError(
                f"mask_fraction is {self.mask_fraction}, but no cubes are hidden in "
                f"n={self.n} passes with draw={self.draw} of this {model.name} (trained with "
                f"mask_fraction {model.mask_fraction}); leave it out, or ask for more passes"
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
                    "so all passes would be the same; use --n 1"
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
    """What passes said of a scan; a map is made when it is first asked for.

    Attributes:
        moments: Of the passes, on the grid and in the part that the network saw.
        to_scan: Brings (z, y, x) values from there to the scan's grid.
    """

    moments: RunningMoments
    to_scan: Callable[[np.ndarray], np.ndarray]

    @property
    def n(self) -> int:
        """Passes made."""
        return self.moments.n

    @functools.cached_property
    def mean(self) -> np.ndarray:
        """(z, y, x) float32 mean probability on the scan's grid."""
        return self.to_scan(self.moments.mean)

    @functools.cached_property
    def std(self) -> np.ndarray:
        """(z, y, x) float32 standard deviation on the scan's grid."""
        return self.to_scan(self.moments.std)

    @property
    def mutual_information(self) -> np.ndarray:
        """(z, y, x) float32, in nats, on the scan's grid."""
        return self.to_scan(self.moments.mutual_information)


def converge(
    one_pass: Callable[[int], np.ndarray],
    shape: tuple[int, ...],
    n: int | Literal["auto"],
    threshold: float,
) -> RunningMoments:
    """Makes passes and keeps their moments alone.

    Args:
        one_pass: Gives pass k, float32 probabilities.
        shape: Of a pass.
        n: Passes; "auto" stops when `expected_dice_error` is below `CONVERGED_DICE`.
        threshold: Of the mask that shall converge.
    """
    moments = RunningMoments(shape)
    for k in range(MAX_PASSES if n == "auto" else max(n, 1)):
        moments.add(one_pass(k))
        asked = n == "auto" and moments.n >= MIN_PASSES and moments.n % CHECK_EVERY == 0
        if asked and expected_dice_error(moments, threshold) < CONVERGED_DICE:
            break
    return moments
