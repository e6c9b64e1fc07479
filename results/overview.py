"""Overview picture of a scan: lungs from the front and from below, and enlarged nodules."""

import math
from collections.abc import Sequence

import cv2
import numpy as np

from ct import boxes, files
from ct.provenance import DISCLAIMER
from ct.scan import LEFT, RIGHT, Scan
from nodules.found import FoundNodule

SIDE_PX = 360
"""Side of a tile of the picture."""
CAPTION_PX = 22
COLUMNS = 4
MOST_NODULES = 10
"""Largest number of nodules that are enlarged, those of highest score first."""
NEAR_MM = 70.0
"""Side of an enlarged view; larger for nodules that need more."""
LUNG_WINDOW_HU = (-1200.0, 400.0)

RIGHT_BGR, LEFT_BGR, NODULE_BGR = (230, 180, 60), (80, 200, 80), (60, 90, 255)
WHITE_BGR, WARNING_BGR = (255, 255, 255), (80, 80, 255)
NUMBER_PX = (18, 11)
"""Width and height of the space for the number of a nodule."""
MARGIN_MM = 15.0
"""Margin shown around the lungs."""


def draw(
    scan: Scan,
    lung: np.ndarray,
    labels: np.ndarray,
    nodules: Sequence[FoundNodule],
    *,
    warning: str = "",
) -> np.ndarray:
    """Draws the picture, (y, x, 3) uint8 in BGR.

    Args:
        scan: Scan with HU and spacing.
        lung: (z, y, x) uint8 lung labels, 1 right and 2 left; they may differ from
            `scan.lung`.
        labels: (z, y, x), 0 or the number of the nodule.
        nodules: One nodule for each label, by falling score.
        warning: Reason to distrust the lungs, shown in red; "" for none.
    """
    from scipy.ndimage import find_objects

    tiles = [from_the_front(scan, lung, labels), from_below(scan, lung, labels)]
    places = find_objects(labels)
    for nodule in nodules[:MOST_NODULES]:
        box = places[nodule.nodule_id - 1]
        tiles.append(enlarged(scan, lung, labels, nodule, box))
    columns = min(COLUMNS, len(tiles))
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    lines = [np.hstack(tiles[i : i + columns]) for i in range(0, len(tiles), columns)]
    shown = min(len(nodules), MOST_NODULES)
    text = f"{scan.scan_id}: {files.count_text(len(nodules), 'nodule')}"
    if shown < len(nodules):
        text += f", {shown} of them enlarged"
    width = lines[0].shape[1]
    strips = [caption(part, width) for part in (text, DISCLAIMER)]
    if warning:
        text = f"DO NOT TRUST THE LUNGS: {warning}"
        strips.append(caption(text, width, WARNING_BGR))
    return np.vstack([*strips, *lines])


def from_the_front(scan: Scan, lung: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Draws the coronal plane with most lung, and the nodules of all planes on it."""
    z, _, x = around_lungs(scan, lung)
    y = int((lung > 0).sum(axis=(0, 2)).argmax())
    planes = scan.hu[z, y, x], lung[z, y, x], foremost(labels[z, :, x], axis=1)
    spacing_mm = scan.spacing_mm[0], scan.spacing_mm[2]
    hu, lung, labels = (plane[::-1] for plane in planes)
    picture = outlined_plane(hu, lung, labels, spacing_mm)
    return tile(picture, "right lung blue, left green; red: outlines of all slices")


def from_below(scan: Scan, lung: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Draws the axial slice with most lung, and the nodules of all slices on it."""
    z = int((lung > 0).sum(axis=(1, 2)).argmax())
    _, y, x = around_lungs(scan, lung)
    planes = scan.hu[z, y, x], lung[z, y, x], foremost(labels[:, y, x], axis=0)
    picture = outlined_plane(*planes, scan.spacing_mm[1:])
    text = f"z {z} of 0 to {len(lung) - 1} from the feet; red: outlines of all slices"
    return tile(picture, text)


def foremost(labels: np.ndarray, axis: int) -> np.ndarray:
    """Projects labels along an axis to the lowest number, which has the highest score."""
    return (labels.astype(np.uint16) - np.uint16(1)).min(axis) + np.uint16(1)


def around_lungs(scan: Scan, lung: np.ndarray) -> boxes.Box:
    """Returns the box of the lungs with `MARGIN_MM`; the whole scan without lungs."""
    margin = [math.ceil(MARGIN_MM / step) for step in scan.spacing_mm]
    return boxes.bounding_box(lung, margin) or boxes.full_box(lung.shape)


def enlarged(
    scan: Scan,
    lung: np.ndarray,
    labels: np.ndarray,
    nodule: FoundNodule,
    box: boxes.Box,
) -> np.ndarray:
    """Draws a nodule and its surroundings in the slice that holds most of it.

    Args:
        scan: Scan with HU and spacing.
        lung: (z, y, x) lung labels.
        labels: (z, y, x) nodule labels.
        nodule: The nodule.
        box: Box of the nodule in the scan.
    """
    own = labels[box] == nodule.nodule_id
    z = box[0].start + int(own.sum(axis=(1, 2)).argmax())
    middle = boxes.centre(box[1:])
    side_mm = max(NEAR_MM, 1.5 * nodule.long_axis_mm)
    near = boxes.near(
        middle, [side_mm / 2] * 2, scan.spacing_mm[1:], boxes.full_box(labels.shape[1:])
    )
    planes = (scan.hu[z][near], lung[z][near], labels[z][near])
    picture = outlined_plane(*planes, scan.spacing_mm[1:])
    text = (
        f"{nodule.nodule_id}: {nodule.long_axis_mm:.0f} x {nodule.short_axis_mm:.0f} mm, "
        f"{nodule.volume_mm3:.0f} mm3, score {nodule.score:.2f}, largest at z {z}"
    )
    return tile(picture, text)


def outlined_plane(
    hu: np.ndarray,
    lung: np.ndarray,
    labels: np.ndarray,
    spacing_mm: Sequence[float],
) -> np.ndarray:
    """Draws a plane with outlines of lungs and nodules, and the numbers of the nodules.

    Returns:
        (y, x, 3) uint8 with square pixels, at most `SIDE_PX` to a side.
    """
    size_mm = [n * step for n, step in zip(hu.shape, spacing_mm, strict=True)]
    scale = SIDE_PX / max(size_mm)
    size_xy = tuple(max(round(length * scale), 1) for length in size_mm[::-1])
    low, high = LUNG_WINDOW_HU
    grey = np.clip((hu.astype(np.float32) - low) / (high - low), 0, 1) * 255
    grey = cv2.resize(grey.astype(np.uint8), size_xy)
    picture = cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR)
    found = (labels > 0, NODULE_BGR)
    for mask, colour in ((lung == RIGHT, RIGHT_BGR), (lung == LEFT, LEFT_BGR), found):
        large = cv2.resize(
            mask.astype(np.uint8), size_xy, interpolation=cv2.INTER_NEAREST
        )
        picture[cv2.dilate(large, np.ones((3, 3), np.uint8)) != large] = colour
    width, height = size_xy
    taken: list[tuple[float, float]] = []
    for number in np.unique(labels[labels > 0]).tolist():
        y, x = (np.argwhere(labels == number).max(axis=0) + 1) / labels.shape
        wanted = (
            min(x * width + 2, width - NUMBER_PX[0]),
            min(y * height + 8, height - 2),
        )
        taken.append(free_place(wanted, taken, height))
        write_text(picture, str(number), taken[-1], NODULE_BGR)
    return picture


def free_place(
    wanted: tuple[float, float], taken: Sequence[tuple[float, float]], height: int
) -> tuple[float, float]:
    """Returns a free place (x, y) for a number: as wanted, else above it, else below."""
    x, y = wanted
    near = [at_y for at_x, at_y in taken if abs(at_x - x) < NUMBER_PX[0]]
    above = np.arange(y, NUMBER_PX[1] - 1, -1)
    for at in (*above, *np.arange(y, height)):
        if all(abs(at - other) >= NUMBER_PX[1] for other in near):
            return x, float(at)
    return wanted


def tile(picture: np.ndarray, text: str) -> np.ndarray:
    """Centres a picture in a black square, with a line of text below."""
    square = np.zeros((SIDE_PX, SIDE_PX, 3), np.uint8)
    height, width = picture.shape[:2]
    y, x = (SIDE_PX - height) // 2, (SIDE_PX - width) // 2
    square[y : y + height, x : x + width] = picture
    return np.vstack([square, caption(text, SIDE_PX)])


def caption(
    text: str, width: int, colour: tuple[int, int, int] = WHITE_BGR
) -> np.ndarray:
    """Draws a line of text on black."""
    strip = np.zeros((CAPTION_PX, width, 3), np.uint8)
    write_text(strip, text, (6, CAPTION_PX - 7), colour)
    return strip


def write_text(
    picture: np.ndarray,
    text: str,
    place: tuple[float, float],
    colour: tuple[int, int, int],
) -> None:
    """Writes small text with its lower left corner at `place` (x, y)."""
    x, y = place
    at = max(round(x), 0), max(round(y), 0)
    cv2.putText(
        picture, text, at, cv2.FONT_HERSHEY_SIMPLEX, 0.4, colour, 1, cv2.LINE_AA
    )
