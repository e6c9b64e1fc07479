"""A fixed set of real nodule shapes for simulated nodules."""

import functools
import logging
from collections.abc import Set

import numpy as np

from nodules import shapes

log = logging.getLogger(__name__)

SHAPES = 64
"""Number of LIDC-IDRI outlines that give simulated nodules their shape."""

SHAPE_MM = (6.0, 30.0)
SHAPES_SEED = 20110
FEWEST_SHAPES = 32
"""Number of shapes outside held-out patients below which a warning is logged."""


def check_shapes(count: int, size_mm: tuple[float, float], held_out: Set[str]) -> None:
    """Warns if held-out patients leave few shapes for nodules.

    Raises:
        ValueError: If they leave none.
    """
    left = sum(patient_of_shape(i, size_mm) not in held_out for i in range(count))
    if not left:
        raise ValueError(
            f"all {count} LIDC-IDRI outlines that shape simulated nodules belong to "
            "patients in the table who are not trained on; expected at least one other; "
            "train on more of these patients (slice_idx.py) or use "
            "--lesions.probability 0"
        )
    if left < FEWEST_SHAPES:
        log.warning(
            "simulated nodules use %d of %d shapes: the others are outlines of "
            "patients who are in the table but not trained on",
            left,
            count,
        )


def drawn_shape(
    count: int,
    size_mm: tuple[float, float],
    held_out: Set[str],
    rng: np.random.Generator,
) -> shapes.Shape:
    """Draws one of `count` shapes, skipping to the next while the patient is held out.

    Raises:
        ValueError: If all patients are held out.
    """
    first = int(rng.integers(count))
    for number in (*range(first, count), *range(first)):
        if patient_of_shape(number, size_mm) not in held_out:
            return nodule_shape(number, size_mm)
    raise ValueError(f"all {count} nodule shapes come from patients who are held out")


@functools.cache
def nodule_shape(number: int, size_mm: tuple[float, float]) -> shapes.Shape:
    """Returns shape `number` in a range of diameters, the same in every process."""
    return shapes.draw_shape(*start_of_shape(number, size_mm))


@functools.cache
def patient_of_shape(number: int, size_mm: tuple[float, float]) -> str:
    """Returns the LIDC-IDRI patient whose nodule `nodule_shape` returns."""
    return shapes.draw_annotation(*start_of_shape(number, size_mm))[1]


def start_of_shape(
    number: int, size_mm: tuple[float, float]
) -> tuple[np.random.Generator, float]:
    """Returns the generator that draws shape `number`, and its diameter in mm."""
    rng = np.random.default_rng((SHAPES_SEED, number))
    return rng, float(np.exp(rng.uniform(*np.log(size_mm))))
