"""Scores of each reference nodule: overlap, readers' agreement and ratings, and strata."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ct import boxes
from ct.scan import Nodule, Scan, readers_in
from metrics import agreement, overlap
from metrics.surfaces import surface_distances
from nodules.measures import pleura_distance_mm

MAX_LABEL = 255
"""Largest label of a reference nodule, since labels are uint8."""

STRATA: dict[str, dict[str, tuple[float, float]]] = {
    "diameter_mm": {
        "0 to 6 mm": (0, 6),
        "6 to 10 mm": (6, 10),
        "10 to 20 mm": (10, 20),
        "over 20 mm": (20, np.inf),
    },
    "texture": {
        "ground glass": (1, 2),
        "part-solid": (2, 4),
        "solid": (4, np.inf),
    },
    "pleura_distance_mm": {
        "0 to 3 mm from the pleura": (0, 3),
        "3 to 10 mm from the pleura": (3, 10),
        "over 10 mm from the pleura": (10, np.inf),
    },
    "subtlety": {
        "subtlety 1 (hardest to see)": (1, 2),
        "subtlety 2": (2, 3),
        "subtlety 3": (3, 4),
        "subtlety 4": (4, 5),
        "subtlety 5 (obvious)": (5, np.inf),
    },
}
"""Column of nodules.csv -> name of each stratum and its bounds; the lower bound is included.
A median rating of 3.5 falls into the stratum of 3. The strata of texture are the kinds of
nodules that phantoms have."""


def strata(
    nodules: Sequence[dict[str, Any]],
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yields name and rows of all nodules, then of each stratum that is not empty.

    A nodule whose value in a column is NaN belongs to none of the column's strata.
    """
    yield "all", list(nodules)
    for column, bins in STRATA.items():
        for name, (low, high) in bins.items():
            some = [nodule for nodule in nodules if low <= nodule[column] < high]
            if some:
                yield name, some


def nodules_that_count(scan: Scan, min_readers: int) -> list[Nodule]:
    """Returns the nodules that at least `min_readers` readers outlined."""
    return [nodule for nodule in scan.nodules if nodule.readers >= max(min_readers, 1)]


def reference_labels(
    scan: Scan, consensus: np.ndarray, nodules: Iterable[Nodule]
) -> np.ndarray:
    """Returns the nodule labels on the readers' consensus; 0 elsewhere.

    If the readers of a nodule agree on no voxel, every voxel that any of them drew is
    labelled: all of them say that the nodule exists, FROC counts it, and a component can
    hit it.

    Args:
        scan: Scan with readers' marks.
        consensus: (z, y, x) bool.
        nodules: Nodules that count.

    Returns:
        (z, y, x) uint8. A nodule whose voxels all belong to other nodules has none.
    """
    from scipy.ndimage import find_objects

    drawn = np.asarray(scan.nodule_labels)
    labels = drawn * consensus
    agreed = find_objects(labels, max_label=MAX_LABEL)
    places = find_objects(drawn, max_label=MAX_LABEL)
    for nodule in nodules:
        box = places[nodule.label - 1]
        if agreed[nodule.label - 1] is None and box is not None:
            labels[box][drawn[box] == nodule.label] = nodule.label
    return labels


def nodule_rows(
    scan: Scan,
    nodules: Sequence[Nodule],
    labels_ref: np.ndarray,
    labels_pred: np.ndarray,
    match: overlap.NoduleMatch,
    *,
    tolerance_mm: float,
) -> list[dict[str, Any]]:
    """Returns one row per nodule; docs/formats.md describes the columns.

    A nodule without any voxel counts as missed; its other scores are NaN.

    Args:
        scan: Scan with readers' marks.
        nodules: Nodules that count.
        labels_ref: (z, y, x) labels from `reference_labels`.
        labels_pred: (z, y, x) integer labels of the predicted components.
        match: Match of these two label volumes.
        tolerance_mm: Largest distance at which surfaces agree.
    """
    from scipy.ndimage import find_objects

    drawn, reader_bits = np.asarray(scan.nodule_labels), np.asarray(scan.reader_bits)
    lung = None if scan.lung is None else (scan.lung > 0) | (labels_ref > 0)
    place = {int(label): index for index, label in enumerate(match.labels_ref)}
    boxes_drawn = find_objects(drawn, max_label=MAX_LABEL)
    boxes_ref = find_objects(labels_ref, max_label=MAX_LABEL)
    boxes_pred = find_objects(labels_pred)
    rows = []
    for nodule in nodules:
        row = facts_of(nodule)
        rows.append(row)
        near, own = boxes_drawn[nodule.label - 1], boxes_ref[nodule.label - 1]
        if near is None or own is None:
            continue
        if lung is not None:
            row["pleura_distance_mm"] = pleura_distance_mm(
                labels_ref[own] == nodule.label, own, lung, scan.grid
            )
        touching = match.labels_pred
        if scan.whole:
            met = np.unique(labels_pred[near][drawn[near] == nodule.label])
            touching = met[met > 0]
        box = enclosing_box([near, *(boxes_pred[label - 1] for label in touching)])
        index = place[nodule.label]
        component = int(match.component[index])
        surfaces = surface_distances(
            labels_ref[box] == nodule.label,
            (labels_pred[box] == component) & (component > 0),
            scan.spacing_mm,
        )
        bits = np.where(drawn[box] == nodule.label, reader_bits[box], 0)
        row |= {
            "hit": int(match.hit_by[index] > 0),
            "iou": float(match.iou[index]),
            "dice": float(match.dice[index]),
            "surface_dice": surfaces.dice(tolerance_mm),
            **agreement_columns(bits, np.isin(labels_pred[box], touching)),
        }
    return rows


def facts_of(nodule: Nodule) -> dict[str, Any]:
    """Returns the initial row of a nodule: its ratings, no hit, and undefined scores."""
    scores = ["iou", "dice", "surface_dice"]
    scores += [f"dice_{name}" for name in agreement.Agreement.__dataclass_fields__]
    return {
        "label": nodule.label,
        "readers": nodule.readers,
        "diameter_mm": nodule.diameter_mm,
        "texture": median_rating(nodule, "texture"),
        "subtlety": median_rating(nodule, "subtlety"),
        "pleura_distance_mm": np.nan,
        "hit": 0,
        **dict.fromkeys(scores, np.nan),
    }


def median_rating(nodule: Nodule, name: str) -> float:
    """Returns the median over the readers who rated the nodule; NaN if nobody did."""
    ratings = [
        annotation.characteristics[name]
        for annotation in nodule.annotations
        if name in annotation.characteristics
    ]
    return float(np.median(ratings)) if ratings else float("nan")


def agreement_columns(bits: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Computes the agreement of prediction and readers, and each reader's own Dice.

    Args:
        bits: (z, y, x) uint8 reader bits of the nodule, 0 elsewhere.
        predicted: (z, y, x) bool. In a whole scan, all components that touch a voxel any
            reader drew; in a patch, all components.
    """
    found = asdict(agreement.agreement(bits, predicted))
    columns = {f"dice_{name}": value for name, value in found.items()}
    for reader in readers_in(bits):
        drawn = (bits >> reader & 1).astype(bool)
        columns[reader_column(reader)] = overlap.dice(drawn, predicted)
    return columns


def reader_column(reader: int) -> str:
    """Returns the column name of a reader's own Dice; names count readers from 1."""
    return f"dice_reader{reader + 1}"


def columns_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the columns found in any row; the readers' columns come last, in order."""
    found = dict.fromkeys(name for row in rows for name in row)
    readers = [reader_column(reader) for reader in range(8)]
    return [name for name in found if name not in readers] + [
        name for name in readers if name in found
    ]


def enclosing_box(parts: Sequence[boxes.Box]) -> boxes.Box:
    """Returns the smallest box that contains all the given boxes."""
    return tuple(
        slice(min(part.start for part in axis), max(part.stop for part in axis))
        for axis in zip(*parts, strict=True)
    )
