"""Contact sheets: pictures of the samples in batches."""

import copy
from dataclasses import replace

import cv2
import numpy as np

import config
from dataset.generator2d import SliceGenerator
from dataset.generator3d import VolumeGenerator
from dataset.slice_table import SliceTable

SCALE = 2
"""Magnification of a slice in the contact sheet; outlines are one picture pixel wide."""

OUTLINE_BGR = (60, 230, 60)
CAPTION_PX = 22


def contact_sheet(
    generator: SliceGenerator, *, slices: int = 24, columns: int = 6
) -> np.ndarray:
    """Draws the first slices of the generator's epoch with outlines and captions.

    Slices are shown as the network sees them, except for the normalisation after the
    window. The outline is drawn just outside the reference.

    Args:
        generator: Generator of the batches to show.
        slices: Number of slices; fewer if the epoch has fewer.
        columns: Slices per line.

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
    """Returns batch settings for display: windowed, and normalised only if "relative"."""
    if batches.normalisation == "relative":
        return batches
    return replace(batches, normalisation="window")


def grey(image: np.ndarray) -> np.ndarray:
    """Returns an input in 0..1: unchanged if it lies there, else scaled from its own range."""
    least, most = float(image.min()), float(image.max())
    if least >= 0 and most <= 1:
        return image
    return (image - least) / ((most - least) or 1)


def volume_sheet(
    generator: VolumeGenerator, *, crops: int = 8, columns: int = 2
) -> np.ndarray:
    """Draws a `contact_sheet` of the middle axial, coronal and sagittal slice of each crop.

    Args:
        generator: Generator of the batches to show.
        crops: Number of crops; fewer if the epoch has fewer.
        columns: Crops per line.
    """
    shown = copy.copy(generator)
    shown.batches = visible(generator.batches)
    tiles = []
    for index in range(len(shown)):
        x, y = shown[index]
        scans = shown.rows_of_batch(index)
        for scan, image, reference in zip(scans, x[..., 0], y[..., 1], strict=True):
            patient = str(shown.table.scans["patient_id"][scan])
            texts = (f"scan {scan} axial", patient, "sagittal")  # one text per tile
            planes = middle_planes(image), middle_planes(reference)
            tiles.append(
                np.hstack([tile(*each) for each in zip(*planes, texts, strict=True)])
            )
        if len(tiles) >= crops:
            break
    return in_lines(tiles[:crops], columns)


def middle_planes(volume: np.ndarray) -> list[np.ndarray]:
    """Returns the middle axial, coronal and sagittal slice, head up, zero-padded to squares.

    Args:
        volume: (z, y, x).

    Returns:
        Three square images; their side is the longest one of the volume.
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
    """Arranges equally sized pictures, `columns` per line; pads the last line with black."""
    tiles = tiles + [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    lines = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    return np.vstack([np.hstack(line) for line in lines])


def tile(image: np.ndarray, mask: np.ndarray, text: str) -> np.ndarray:
    """Draws one slice of a contact sheet as (y, x, 3) uint8.

    Args:
        image: (y, x) float32 from 0 to 1.
        mask: (y, x) uint8 of 0 and 1 to outline.
        text: Caption under the slice.
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
    """Returns row, patient and z of a slice, so that it can be found again."""
    entry = table.rows[row]
    return f"row {row}  {table.patient_ids[row]}  z {entry['z']}"


def sheet(generator: SliceGenerator | VolumeGenerator, samples: int) -> np.ndarray:
    """Draws `volume_sheet` or `contact_sheet`, whichever fits the generator."""
    if isinstance(generator, VolumeGenerator):
        return volume_sheet(generator, crops=samples)
    return contact_sheet(generator, slices=samples)
