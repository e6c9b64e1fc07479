"""Agreement of a nodule's outline with its readers, and of the readers with each other.

The n readers of a nodule are those who drew anything on it. Every Dice covers all slices of
the nodule together. A reader who is compared with the others is not counted among them.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ct.scan import reader_votes, readers_in
from metrics import overlap


@dataclass(frozen=True)
class Agreement:
    """Dice scores of one nodule; NaN where the nodule has too few readers.

    Attributes:
        consensus: Prediction against the consensus: voxels that at least half of the
            readers drew.
        others: Prediction against the majority of all readers but one: voxels that at
            least (n - 1) / 2 of them drew; mean over the reader left out.
        readers: Prediction against one reader; mean over readers.
        reader_consensus: One reader against the consensus, which includes this reader;
            mean over readers.
        reader_others: One reader against the majority of the others; mean over readers.
        reader_reader: One reader against another; mean over pairs.
    """

    consensus: float
    others: float
    readers: float
    reader_consensus: float
    reader_others: float
    reader_reader: float


def agreement(reader_bits: np.ndarray, mask_pred: np.ndarray) -> Agreement:
    """Computes the agreement of prediction and readers on one nodule.

    Args:
        reader_bits: (...) uint8; bit r is set where reader r drew this nodule.
        mask_pred: (...) bool, same shape.
    """
    masks = reader_masks(reader_bits)
    votes = reader_votes(reader_bits)
    consensus = votes >= majority_votes(len(masks))
    others = (
        [votes - mask >= majority_votes(len(masks) - 1) for mask in masks]
        if len(masks) > 1
        else []
    )
    return Agreement(
        consensus=overlap.dice(consensus, mask_pred),
        others=mean_of_defined([overlap.dice(mask, mask_pred) for mask in others]),
        readers=mean_of_defined([overlap.dice(mask, mask_pred) for mask in masks]),
        reader_consensus=mean_of_defined(
            [overlap.dice(consensus, mask) for mask in masks]
        ),
        reader_others=mean_of_defined(
            [
                overlap.dice(rest, mask)
                for rest, mask in zip(others, masks, strict=False)
            ]
        ),
        reader_reader=mean_of_defined(
            [overlap.dice(one, two) for one, two in itertools.combinations(masks, 2)]
        ),
    )


def reader_masks(reader_bits: np.ndarray) -> list[np.ndarray]:
    """Returns one bool mask for each reader who drew anything."""
    return [(reader_bits >> r & 1).astype(bool) for r in readers_in(reader_bits)]


def majority_votes(readers: int) -> int:
    """Returns the number of votes that is at least half of the readers, and at least 1."""
    return max((readers + 1) // 2, 1)


def mean_of_defined(values: Sequence[float]) -> float:
    """Returns the mean of the values that are not NaN; NaN if there are none."""
    defined = [value for value in values if not np.isnan(value)]
    return sum(defined) / len(defined) if defined else float("nan")
