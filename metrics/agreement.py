"""How well an outline of a nodule agrees with its readers, and they with each other.

A nodule's readers are those who drew anything on it, n of them. All Dice are over all its
slices together; a reader who is compared with the others is not one of them.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ct.scan import reader_votes, readers_in
from metrics import overlap


@dataclass(frozen=True)
class Agreement:
    """Dice of one nodule; NaN where it takes more readers than there are.

    Attributes:
        consensus: Prediction and consensus: what at least half of the readers drew.
        others: Prediction and the majority of all readers but one, at least (n - 1) / 2 of
            them; mean over who is left out.
        readers: Prediction and one reader, mean over readers.
        reader_consensus: One reader and the consensus, himself counted; mean over readers.
        reader_others: One reader and the majority of the others, mean over readers.
        reader_reader: One reader and another, mean over pairs.
    """

    consensus: float
    others: float
    readers: float
    reader_consensus: float
    reader_others: float
    reader_reader: float


def agreement(reader_bits: np.ndarray, mask_pred: np.ndarray) -> Agreement:
    """The agreement on one nodule.

    Args:
        reader_bits: (...) uint8, bit r where reader r drew this nodule.
        mask_pred: (...) bool, the same shape.
    """
    masks = masks_of(reader_bits)
    votes = reader_votes(reader_bits)
    consensus = votes >= half(len(masks))
    others = (
        [votes - mask >= half(len(masks) - 1) for mask in masks]
        if len(masks) > 1
        else []
    )
    return Agreement(
        consensus=overlap.dice(consensus, mask_pred),
        others=mean([overlap.dice(mask, mask_pred) for mask in others]),
        readers=mean([overlap.dice(mask, mask_pred) for mask in masks]),
        reader_consensus=mean([overlap.dice(consensus, mask) for mask in masks]),
        reader_others=mean(
            [
                overlap.dice(rest, mask)
                for rest, mask in zip(others, masks, strict=False)
            ]
        ),
        reader_reader=mean(
            [overlap.dice(one, two) for one, two in itertools.combinations(masks, 2)]
        ),
    )


def masks_of(reader_bits: np.ndarray) -> list[np.ndarray]:
    """The bool mask of every reader who drew anything."""
    return [(reader_bits >> r & 1).astype(bool) for r in readers_in(reader_bits)]


def half(readers: int) -> int:
    """Votes that make at least half of so many readers; one at least."""
    return max((readers + 1) // 2, 1)


def mean(values: Sequence[float]) -> float:
    """The mean of what is defined; NaN of nothing."""
    defined = [value for value in values if not np.isnan(value)]
    return sum(defined) / len(defined) if defined else float("nan")
