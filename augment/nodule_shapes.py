"""A fixed choice of real nodule shapes for simulated nodules."""

import functools
import logging
from collections.abc import Set

import numpy as np

from nodules import shapes

log = logging.getLogger(__name__)

SHAPES = 64
"""Outlined nodules of LIDC-IDRI that the nodules are shaped after."""

SHAPE_MM = (6.0, 30.0)
SHAPES_SEED = 20110
FEWEST_SHAPES = 32
"""With fewer left by patients who are held out, a warning."""


def check_shapes(count: int, size_mm: tuple[float, float], held_out: Set[str]) -> None:
    """Says if few shapes are left for nodules by patients who are held out.

    Raises:
        ValueError: If none is.
    """
    left = sum(patient_of_shape(i, size_mm) not in held_out for i in range(count))
    if not left:
        raise ValueError(
            f"all {count} outlines of LIDC-IDRI that drawn nodules are shaped after are "
            "those of patients of the table who are not trained on; train on more of "
            "them (slice_idx.py), or use --lesions.probability 0"
        )
    if left < FEWEST_SHAPES:
        log.warning(
            "drawn nodules have %d of %d shapes: the others are outlines of patients of "
            "the table who are not trained on",
            left,
            count,
        )


def drawn_shape(
    count: int,
    size_mm: tuple[float, float],
    held_out: Set[str],
    rng: np.random.Generator,
) -> shapes.Shape:
    """One of `count` shapes; in place of one of a patient who is held out, the next.

    Raises:
        ValueError: If all are.
    """
    first = int(rng.integers(count))
    for number in (*range(first, count), *range(first)):
        if patient_of_shape(number, size_mm) not in held_out:
            return nodule_shape(number, size_mm)
    raise ValueError(f"all {count} shapes are those of patients who are held out")


@functools.cache
def nodule_shape(number: int, size_mm: tuple[float, float]) -> shapes.Shape:
    """A shape whose diameter lies in a range; it is the same in every process."""
    return shapes.draw_shape(*start_of_shape(number, size_mm))


@functools.cache
def patient_of_shape(number: int, size_mm: tuple[float, float]) -> str:
    """The patient of LIDC-IDRI who has the nodule of `nodule_shape`."""
    return shapes.draw_annotation(*start_of_shape(number, size_mm))[1]


def start_of_shape(
    number: int, size_mm: tuple[float, float]
) -> tuple[np.random.Generator, float]:
    """What a shape is drawn by, and its diameter in mm."""
    rng = np.random.default_rng((SHAPES_SEED, number))
    return rng, float(np.exp(rng.uniform(*np.log(size_mm))))
