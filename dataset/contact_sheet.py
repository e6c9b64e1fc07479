"""Contact sheets of batches."""

import copy
from dataclasses import replace

import cv2
import numpy as np

import config
from dataset.generator2d import SliceGenerator
from dataset.generator3d import VolumeGenerator
from dataset.slice_table import SliceTable

SCALE = 2
"""Magnification of the contact sheet; an outline is one magnified pixel wide."""

OUTLINE_BGR = (60, 230, 60)
CAPTION_PX = 22


def contact_sheet(
    generator: SliceGenerator, *, slices: int = 24, columns: int = 6
) -> np.ndarray:
    """A picture of the first slices of the generator's epoch, outlined and captioned.

    Slices are shown as the network gets them, but for the normalisation that follows the
    window; the outline is drawn just outside the reference.

    Args:
        generator: Whose batches are shown.
        slices: Number of slices; fewer if the epoch has fewer.
        columns: Slices in a line.

    Returns:
        (y, x, 3) uint8 picture in OpenCV's channel order (blue, green, red).
    """
    shown = copy.copy(generator)
    shown.batches = visible(generator.batches)
    tiles = []
    for index in range(len(shown)):
        x, y = shown[index]
        mask = ((y["mask"] if isinstance(y, dict) else y)[..., 1] >= 0.5).view(np.uint8)
        rows = shown.rows_of_batch(index)
        for row, image, reference in zip(rows, x[..., 0], mask, strict=True):
            text = caption(shown.table, int(row))
            tiles.append(tile(grey(image), reference, text))
        if len(tiles) >= slices:
            break
    return in_lines(tiles[:slices], columns)


def visible(batches: config.Batches) -> config.Batches:
    """The settings of batches that a person looks at, through `grey`."""
    if batches.normalisation == "relative":
        return batches
    return replace(batches, normalisation="window")


def grey(image: np.ndarray) -> np.ndarray:
    """An input as 0 to 1: as it is if it lies there, else its own range."""
    least, most = float(image.min()), float(image.max())
    if least >= 0 and most <= 1:
        return image
    return (image - least) / ((most - least) or 1)


def volume_sheet(
    generator: VolumeGenerator, *, crops: int = 8, columns: int = 2
) -> np.ndarray:
    """As `contact_sheet`: of each crop the middle axial, coronal and sagittal slice.

    Args:
        generator: Whose batches are shown.
        crops: Number of crops; fewer if the epoch has fewer.
        columns: Crops in a line.
    """
    shown = copy.copy(generator)
    shown.batches = visible(generator.batches)
    tiles = []
    for index in range(len(shown)):
        x, y = shown[index]
        scans = shown.rows_of_batch(index)
        for scan, image, reference in zip(scans, x[..., 0], y[..., 1], strict=True):
            patient = str(shown.table.scans["patient_id"][scan])
            texts = (f"scan {scan} axial", patient, "sagittal")  # each in its own tile
            planes = middle_planes(image), middle_planes(reference)
            tiles.append(
                np.hstack([tile(*each) for each in zip(*planes, texts, strict=True)])
            )
        if len(tiles) >= crops:
            break
    return in_lines(tiles[:crops], columns)


def middle_planes(volume: np.ndarray) -> list[np.ndarray]:
    """The middle axial, coronal and sagittal slice, head up, each in a square of zeros.

    Args:
        volume: (z, y, x).

    Returns:
        Three square images with the longest side of the volume.
    """
    side = max(volume.shape)
    squares = []
    for axis, length in enumerate(volume.shape):
        plane = np.take(volume, length // 2, axis)
        if axis:
            plane = plane[::-1]
        square = np.zeros((side, side), volume.dtype)
        square[: plane.shape[0], : plane.shape[1]] = plane
        squares.append(square)
    return squares


def in_lines(tiles: list[np.ndarray], columns: int) -> np.ndarray:
    """Pictures of one size, `columns` in a line; black where the last line has fewer."""
    tiles = tiles + [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    lines = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    return np.vstack([np.hstack(line) for line in lines])


def tile(image: np.ndarray, mask: np.ndarray, text: str) -> np.ndarray:
    """One slice of a contact sheet: (y, x, 3) uint8.

    Args:
        image: (y, x) float32 from 0 to 1.
        mask: (y, x) uint8 of 0 and 1, outlined.
        text: Written under the slice.
    """
    size_xy = (image.shape[1] * SCALE, image.shape[0] * SCALE)
    grey = cv2.resize((image * 255).astype(np.uint8), size_xy)
    picture = cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR)
    large = cv2.resize(mask, size_xy, interpolation=cv2.INTER_NEAREST)
    picture[cv2.dilate(large, np.ones((3, 3), np.uint8)) != large] = OUTLINE_BGR
    strip = np.zeros((CAPTION_PX, size_xy[0], 3), np.uint8)
    place = (4, CAPTION_PX - 7)
    cv2.putText(strip, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.45, (255, 255, 255))
    return np.vstack((picture, strip))


def caption(table: SliceTable, row: int) -> str:
    """Row, patient and slice: what one needs to find it again."""
    entry = table.rows[row]
    return f"row {row}  {table.patient_ids[row]}  z {entry['z']}"


def sheet(generator: SliceGenerator | VolumeGenerator, samples: int) -> np.ndarray:
    """`volume_sheet` or `contact_sheet`."""
    if isinstance(generator, VolumeGenerator):
        return volume_sheet(generator, crops=samples)
    return contact_sheet(generator, slices=samples)
