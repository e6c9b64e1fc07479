"""Finds what is odd about a series without making its geometry or HU wrong."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from cohorts.dicom_checks import named, uneven_gaps, unusual
from cohorts.dicom_slices import Slice, positions_along_normal_mm

RESCALED_HU = ("HU_MOD",)
"""RescaleTypes of values that approximate HU, as of spectral images."""


def find_oddities(ordered: Sequence[Slice]) -> list[str]:
    """Returns a warning per oddity; names files without folders and no header text.

    Args:
        ordered: Sorted slices of a series that `check_series` accepts.
    """
    return [
        *_mixed_uids(ordered),
        *_missing(ordered),
        *_values(ordered),
        *_places(ordered),
    ]


def _mixed_uids(slices: Sequence[Slice]) -> Iterator[str]:
    for name, attribute in (
        ("StudyInstanceUID", "study_uid"),
        ("FrameOfReferenceUID", "frame_of_reference"),
    ):
        other = unusual(slices, attribute)
        if other:
            yield (
                f"{named(other, slices)} have another {name}; they are kept, as all "
                "positions form one even stack"
            )
    other = unusual(slices, "kernel")
    if other:
        yield f"{named(other, slices)} have another ConvolutionKernel; they are kept"


def _missing(slices: Sequence[Slice]) -> Iterator[str]:
    for name, attribute in (
        ("Modality", "modality"),
        ("SeriesInstanceUID", "series_uid"),
        ("SOPInstanceUID", "sop_uid"),
    ):
        without = [item for item in slices if not getattr(item, attribute)]
        if without:
            yield f"{named(without, slices)} have no {name}"


def _values(slices: Sequence[Slice]) -> Iterator[str]:
    for name, attribute in (
        ("RescaleIntercept", "intercept"),
        ("RescaleSlope", "slope"),
    ):
        if unusual(slices, attribute):
            yield (
                f"{name} differs between images ({_range(slices, attribute)}); each is "
                "converted with its own"
            )
    secondary = [item for item in slices if item.secondary]
    if secondary:
        yield f"{named(secondary, slices)} are secondary captures; read as CT"
    modified = [item for item in slices if item.rescale_type in RESCALED_HU]
    if modified:
        yield f"RescaleType {modified[0].rescale_type} in {named(modified, slices)}; read as HU"


def _range(slices: Sequence[Slice], attribute: str) -> str:
    values: list[Any] = [getattr(item, attribute) for item in slices]
    return f"{min(values):g} to {max(values):g}"


def _places(ordered: Sequence[Slice]) -> Iterator[str]:
    gaps = uneven_gaps(ordered)
    if not gaps.rounded:
        return
    steps_mm = np.diff(positions_along_normal_mm(ordered))
    yield (
        f"the positions are rounded: slices are {steps_mm.min():.3f} to "
        f"{steps_mm.max():.3f} mm apart; read as evenly spaced by {steps_mm.mean():.4f} mm"
    )
