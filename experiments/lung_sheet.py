"""Pictures of lung masks: a row of coronal and axial slices per scan, to be looked at."""

import numpy as np

from ct.scan import Scan
from results.overview import caption, outlined_plane, tile

CORONAL = (0.35, 0.5, 0.65)
"""Coronal planes that are shown, as shares of the way from front to back."""

AXIAL = (0.1, 0.3, 0.5, 0.7)
"""Axial slices that are shown, as shares of the way from feet to head."""


def scan_row(scan: Scan, mask: np.ndarray, text: str) -> np.ndarray:
    """Draws one scan with the outlines of a mask.

    Args:
        scan: The scan.
        mask: (z, y, x) uint8, 1 right lung and 2 left.
        text: Caption of the row.

    Returns:
        (y, x, 3) uint8 in BGR.
    """
    depth, height, _ = scan.hu.shape
    mm_z, mm_y, mm_x = scan.spacing_mm
    pictures = []
    for share in CORONAL:
        plane = np.s_[::-1, int(share * height)]
        hu, lung = np.asarray(scan.hu)[plane], mask[plane]
        picture = outlined_plane(hu, lung, np.zeros_like(lung), (mm_z, mm_x))
        pictures.append(tile(picture, f"y {int(share * height)}"))
    for share in AXIAL:
        z = int(share * depth)
        picture = outlined_plane(
            np.asarray(scan.hu[z]), mask[z], np.zeros_like(mask[z]), (mm_y, mm_x)
        )
        pictures.append(tile(picture, f"z {z}"))
    line = np.hstack(pictures)
    return np.vstack([caption(text, line.shape[1]), line])
