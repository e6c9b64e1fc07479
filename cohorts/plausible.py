"""Checks that a volume can be a CT in HU, whatever file it comes from."""

import numpy as np

from ct.geometry import Grid
from ct.scan import AIR_HU, ScanError

AIR_RANGE_HU, MIN_AIR_SHARE = (AIR_HU + 1, -700), 0.001
"""Lung, bowel gas, skin surface: every CT has some, apart from padding at exactly AIR_HU."""

SOFT_RANGE_HU, MIN_SOFT_SHARE = (-200, 200), 0.005
"""Fat to enhanced blood. Seen through an offset of 1024, only cortical bone lies here."""

USUAL_INTERCEPT_HU = -1024
"""Where it is missing, all values are too high by as much; the message then says so."""

MAX_FIELD_MM = (3000.0, 1000.0, 1000.0)
"""Largest (z, y, x) field: longer than a body, wider than the bore of a scanner. Micrometres
taken for mm give more, and cubic voxels over all of it would fill any memory."""


def check_field(grid: Grid, name: str) -> None:
    """Raises ScanError if a volume is larger than any that a scanner makes.

    Args:
        grid: Canonical.
        name: The series or file, for the message.
    """
    sizes_mm = [n * mm for n, mm in zip(grid.shape, grid.spacing_mm, strict=True)]
    if any(size > most for size, most in zip(sizes_mm, MAX_FIELD_MM, strict=True)):
        found, expected = (
            " x ".join(f"{mm:.0f}" for mm in sizes)
            for sizes in (sizes_mm, MAX_FIELD_MM)
        )
        raise ScanError(
            f"{name}: the field is {found} mm (z, y, x); expected at most {expected}; is "
            "its spacing in mm?"
        )


def check_hu(hu: np.ndarray, name: str) -> None:
    """Raises ScanError if the values of a volume cannot be HU of a body.

    There must be air (apart from padding) and soft tissue.

    Args:
        hu: (z, y, x) int16.
        name: The series or file, for the message.
    """
    thin = hu[:, ::4, ::4] if hu[0].size > 256 * 256 else hu
    counts = np.bincount(thin.ravel().astype(np.int32) - np.iinfo(np.int16).min)
    counts = np.pad(counts, (0, (1 << 16) - len(counts)))
    if _looks_like_hu(counts, 0):
        return
    low, middle, high = np.percentile(thin, (1, 50, 99))
    message = (
        f"{name}: the values are no Hounsfield units (1st, 50th and 99th percentile "
        f"{low:.0f}, {middle:.0f}, {high:.0f}); expected air near -1000 and soft tissue "
        "near 0 to 100"
    )
    if _looks_like_hu(counts, -USUAL_INTERCEPT_HU):
        message += (
            f"; they would be if {-USUAL_INTERCEPT_HU} were subtracted: is the rescale "
            "intercept missing?"
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
