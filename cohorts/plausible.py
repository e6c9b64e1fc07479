"""Checks that a volume from any file type can be a CT in HU."""

import numpy as np

from ct.geometry import Grid
from ct.scan import AIR_HU, ScanError

AIR_RANGE_HU, MIN_AIR_SHARE = (AIR_HU + 1, -700), 0.001
"""Range of lung, bowel gas and skin surface, and its minimum share in every CT.

Excludes padding, which is exactly AIR_HU."""

SOFT_RANGE_HU, MIN_SOFT_SHARE = (-200, 200), 0.005
"""Range from fat to contrast-enhanced blood, and its minimum share in every CT.

If values are 1024 too low, only cortical bone is in this range."""

USUAL_INTERCEPT_HU = -1024
"""Usual rescale intercept; `check_hu` reports if it seems not to have been applied."""

MAX_FIELD_MM = (3000.0, 1000.0, 1000.0)
"""Largest (z, y, x) field: longer than a body and wider than the bore of a scanner.

A spacing in micrometres read as mm exceeds it, and resampling such a field to cubic voxels
would exhaust any memory."""


def check_field(grid: Grid, name: str) -> None:
    """Raises ScanError if a volume is larger than any scanner can produce.

    Args:
        grid: Canonical grid.
        name: Series or file for the error message.
    """
    sizes_mm = [n * mm for n, mm in zip(grid.shape, grid.spacing_mm, strict=True)]
    if any(size > most for size, most in zip(sizes_mm, MAX_FIELD_MM, strict=True)):
        found, expected = (
            " x ".join(f"{mm:.0f}" for mm in sizes)
            for sizes in (sizes_mm, MAX_FIELD_MM)
        )
        raise ScanError(
            f"{name}: the field is {found} mm (z, y, x); expected at most {expected}; "
            "check that its spacing is in mm"
        )


def check_hu(hu: np.ndarray, name: str) -> None:
    """Raises ScanError if the values of a volume cannot be HU of a body.

    A body must contain soft tissue and air other than padding.

    Args:
        hu: (z, y, x) int16.
        name: Series or file for the error message.
    """
    thin = hu[:, ::4, ::4] if hu[0].size > 256 * 256 else hu
    counts = np.bincount(thin.ravel().astype(np.int32) - np.iinfo(np.int16).min)
    counts = np.pad(counts, (0, (1 << 16) - len(counts)))
    if _looks_like_hu(counts, 0):
        return
    low, middle, high = np.percentile(thin, (1, 50, 99))
    message = (
        f"{name}: the values are not Hounsfield units (1st, 50th and 99th percentile "
        f"{low:.0f}, {middle:.0f}, {high:.0f}); expected air near -1000 and soft tissue "
        "near 0 to 100"
    )
    if _looks_like_hu(counts, -USUAL_INTERCEPT_HU):
        message += (
            f"; they would be after subtracting {-USUAL_INTERCEPT_HU}; check whether the "
            "rescale intercept is missing"
        )
    raise ScanError(message)


def _looks_like_hu(counts: np.ndarray, offset_hu: int) -> bool:
    def share(low: int, high: int) -> float:
        start = offset_hu - np.iinfo(np.int16).min
        return counts[max(low + start, 0) : max(high + start, 0)].sum() / counts.sum()

    return (
        share(*AIR_RANGE_HU) >= MIN_AIR_SHARE
        and share(*SOFT_RANGE_HU) >= MIN_SOFT_SHARE
    )
