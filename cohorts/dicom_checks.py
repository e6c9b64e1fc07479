"""Checks that the images of a DICOM series form one regular CT volume."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from cohorts.dicom_slices import (
    COSINE_ATOL,
    SAME_PLACE_MM,
    Slice,
    positions_along_normal_mm,
    slice_normal,
    sorted_slices,
)
from ct.scan import ScanError

GAP_RTOL, GAP_ATOL_MM = 0.01, 0.01
"""Tolerance of a gap between slices around the median gap: 1 % plus 0.01 mm.

In 1014 of the 1018 LIDC-IDRI scans the deviation stays below 0.0001 mm; each of the other
four has a gap of at least 1.6 times the usual one.
"""

MAX_INTERPOLATED_GAP_MM = 10.0
"""Widest gap that is interpolated; a wider one could hide a nodule."""

ROUNDING_MM, ROUNDING_SHARE = 0.06, 0.2
"""Distance from even positions, in mm and in slice distances, that rounding explains.

Some files write positions with one decimal, so slices of 0.625 mm are 0.6 or 0.7 mm apart."""

ACROSS_COSINE = 0.7
"""Cosine of the angle between two slice normals below which one image is a scout or a
reformat of the other's series."""

FEW_SHARE = 0.1
"""Share of the images of a series, or one image, that may deviate."""

SIDEWAYS_MM = 0.1
"""Largest allowed distance of a slice from the straight line through all slices."""

TILT_DEG = 0.5
"""Lean above which a stack counts as sheared; the affine represents smaller leans exactly."""

SPACING_RTOL = 1e-3
"""Relative tolerance of the pixel spacing within a series."""

CORRUPT_RATIO, CORRUPT_HU = 3.0, 150.0
"""Limits on the mean difference between neighbouring slices in a quarter of the image.

A step above both limits (this many times the usual step, and this many HU) means that the
slices do not belong together. In six intact scans with 2.5 to 8 mm slices, few quarters
differed by 150 HU, and these only by 1.5 times the usual step; where the lower half of three
slices was blanked, the steps were at least 172 HU and 4.3 times the usual step."""

NAMED_SLICES = 4
"""Largest number of slices that a message names."""

DOUBLE_TAGS = {
    "ConvolutionKernel": "kernel",
    "SliceThickness": "thickness",
    "AcquisitionNumber": "acquisition",
    "ImageType": "image_type",
    "FrameOfReferenceUID": "frame_of_reference",
    "StudyInstanceUID": "study_uid",
}
"""Tags in which duplicates agree, mapped to fields of `Slice`."""


@dataclass(frozen=True)
class Defect:
    """A defect of a series; `repair` names the repair that fixes it, or is ""."""

    reason: str
    repair: str = ""

    def __str__(self) -> str:
        return self.reason + (
            f" (fix with --repair {self.repair})" if self.repair else ""
        )


def named(some: Sequence[Slice], every: Sequence[Slice]) -> str:
    """Returns how many of the images are meant, and the name of the first."""
    return f"{len(some)} of {len(every)} images (first {some[0].name})"


def few(slices: Sequence[Slice]) -> int:
    """Returns how many images of a series may deviate from the others."""
    return max(1, int(FEW_SHARE * len(slices)))


def unusual(slices: Sequence[Slice], attribute: str) -> list[Slice]:
    """Returns the images whose value differs from the most frequent one."""
    values = [getattr(item, attribute) for item in slices]
    usual = Counter(values).most_common(1)[0][0]
    return [item for item, value in zip(slices, values, strict=True) if value != usual]


def without_scouts(slices: Sequence[Slice]) -> tuple[list[Slice], list[str]]:
    """Leaves out localizers, and few images across all others; returns warnings, too."""
    kept = [item for item in slices if "LOCALIZER" not in item.image_type]
    if not kept:
        return list(slices), []
    normals = np.array([slice_normal(item) for item in kept])
    usual = Counter(map(tuple, np.round(normals, 1))).most_common(1)[0][0]
    along = np.abs(normals @ usual) > ACROSS_COSINE
    if (~along).sum() <= few(kept):
        kept = [item for item, stays in zip(kept, along, strict=True) if stays]
    stay = set(kept)
    out = [item for item in slices if item not in stay]
    reason = "scouts or reformats across the others; left out"
    return kept, [f"{named(out, slices)} are {reason}"] if out else []


def check_series(slices: Sequence[Slice]) -> list[Defect]:
    """Returns the defects of a series; [] if its images form one regular CT volume.

    Checks the kind of the images first, then their consistency, then their positions.
    Each check is meaningful only if the previous one passes, so it stops at the first that
    fails.
    """
    for check in (_check_kind, _check_sameness, _check_place):
        findings = list(check(slices))
        if findings:
            return findings
    return []


def _check_kind(slices: Sequence[Slice]) -> Iterator[Defect]:
    for name, attribute, accepted in (
        ("modality", "modality", ("CT", "")),
        ("PhotometricInterpretation", "photometric", ("MONOCHROME2",)),
        ("RescaleType", "rescale_type", ("", "HU", "US", "HU_MOD")),
    ):
        wrong = [s for s in slices if getattr(s, attribute) not in accepted]
        if wrong:
            yield Defect(
                f"{name} {getattr(wrong[0], attribute)!r} in {named(wrong, slices)}; "
                f"expected {' or '.join(filter(None, accepted))}"
            )
    scouts = [s for s in slices if "LOCALIZER" in s.image_type]
    if scouts:
        yield Defect(
            f"localizer (scout) images: {named(scouts, slices)}; expected axial images"
        )
    if len(slices) == 1:
        yield Defect(f"only one image ({slices[0].name}); expected two or more")


def _check_sameness(slices: Sequence[Slice]) -> Iterator[Defect]:
    first = slices[0]
    mixed = sorted({s.series_uid for s in slices})
    if len(mixed) > 1:
        yield Defect(
            f"mixed with other series: {', '.join(uid or 'no UID' for uid in mixed)}; "
            "expected one SeriesInstanceUID"
        )
    kernels = unusual(slices, "kernel")
    if len(kernels) > few(slices):
        usual = next(s for s in slices if s not in kernels)
        yield Defect(
            f"mixed ConvolutionKernel: {kernels[0].kernel!r} in {named(kernels, slices)}, "
            f"{usual.kernel!r} in {usual.name}; expected one reconstruction; separate the "
            "files"
        )
    strangers = [s for s in slices if s.patient_id != first.patient_id]
    if strangers:
        yield Defect(
            f"mixed PatientIDs: {named(strangers, slices)} differ from {first.name}; "
            "expected one patient"
        )
    for name, attribute, tolerance in (
        ("matrix size", "size_px", 0.0),
        ("pixel spacing in mm", "spacing_mm", SPACING_RTOL * first.spacing_mm[0]),
        ("orientation", "axes_lps", COSINE_ATOL),
    ):
        expected = getattr(first, attribute)
        other = [
            s
            for s in slices
            if not np.allclose(getattr(s, attribute), expected, rtol=0, atol=tolerance)
        ]
        if other:
            yield Defect(
                f"mixed {name}: {_text(getattr(other[0], attribute))} in "
                f"{named(other, slices)}, {_text(expected)} in {first.name}; expected "
                "one throughout"
            )


def _check_place(slices: Sequence[Slice]) -> Iterator[Defect]:
    ordered = sorted_slices(slices)
    along_mm = positions_along_normal_mm(ordered)
    gaps_mm = np.diff(along_mm)
    places = group_by_position(ordered)
    doubled = [place for place in places if len(place) > 1]
    if doubled:
        one, another = doubled[0][:2]
        unlike = explain_mismatch(doubled)
        place_mm = positions_along_normal_mm([one])[0]
        yield Defect(
            f"{len(ordered) - len(places)} duplicate slices, first {one.name} and "
            f"{another.name} at {place_mm:.2f} mm; expected one image per "
            f"position{unlike and '; ' + unlike}",
            "" if unlike else "duplicates",
        )
    apart_mm = gaps_mm[gaps_mm >= SAME_PLACE_MM]
    if not len(apart_mm):
        return
    yield from _check_gaps(ordered, along_mm)
    yield from _check_tilt(ordered, along_mm)


@dataclass(frozen=True)
class Gaps:
    """Distances between slices along their normal.

    Attributes:
        usual_mm: Median distance.
        uneven: (slices - 1,) bool, where a distance is not the usual one.
        rounded: True if some distances are uneven only because positions were rounded.
    """

    usual_mm: float
    uneven: np.ndarray
    rounded: bool


def uneven_gaps(ordered: Sequence[Slice]) -> Gaps:
    """Compares the distances between sorted slices; ignores slices at the same place."""
    along_mm = positions_along_normal_mm(ordered)
    gaps_mm = np.diff(along_mm)
    usual_mm = float(np.median(gaps_mm[gaps_mm >= SAME_PLACE_MM]))
    uneven = (gaps_mm >= SAME_PLACE_MM) & (
        np.abs(gaps_mm - usual_mm) > GAP_ATOL_MM + GAP_RTOL * usual_mm
    )
    even_mm = np.linspace(along_mm[0], along_mm[-1], len(along_mm))
    limit_mm = min(ROUNDING_MM, ROUNDING_SHARE * usual_mm)
    rounded = bool(uneven.any()) and bool(np.abs(along_mm - even_mm).max() <= limit_mm)
    return Gaps(usual_mm, uneven & (not rounded), rounded)


def _check_gaps(ordered: Sequence[Slice], along_mm: np.ndarray) -> Iterator[Defect]:
    found = uneven_gaps(ordered)
    uneven, usual_mm = found.uneven, found.usual_mm
    if not uneven.any():
        return
    gaps_mm = np.diff(along_mm)
    k = int(np.argmax(np.where(uneven, gaps_mm, 0)))
    missing = int(np.rint(gaps_mm[uneven] / usual_mm - 1).clip(0).sum())
    reason = (
        f"{int(uneven.sum())} uneven gaps, about {missing} slices missing; the widest is "
        f"{gaps_mm[k]:.3f} mm between {ordered[k].name} and {ordered[k + 1].name} at "
        f"{along_mm[k]:.2f} mm; expected {usual_mm:.3f} mm throughout"
    )
    moved = unusual(ordered, "frame_of_reference")
    if moved:
        yield Defect(
            f"{reason}; {named(moved, ordered)} have another FrameOfReferenceUID, so "
            "positions cannot be compared; separate the files"
        )
    elif gaps_mm[k] > MAX_INTERPOLATED_GAP_MM and missing:
        yield Defect(
            f"{reason}; gaps above {MAX_INTERPOLATED_GAP_MM:g} mm are not interpolated"
        )
    else:
        yield Defect(reason, "gaps")


def _check_tilt(ordered: Sequence[Slice], along_mm: np.ndarray) -> Iterator[Defect]:
    line_mm, lean = _line(ordered, along_mm)
    off_mm = np.linalg.norm(_sideways_mm(ordered, along_mm) - line_mm, axis=1)
    k = int(np.argmax(off_mm))
    if off_mm[k] > SIDEWAYS_MM:
        yield Defect(
            f"{ordered[k].name} lies {off_mm[k]:.2f} mm off the line through all slices; "
            f"expected at most {SIDEWAYS_MM} mm"
        )
        return
    lean_deg = float(np.degrees(np.arctan(np.linalg.norm(lean))))
    if lean_deg > TILT_DEG:
        yield Defect(
            f"the stack leans {lean_deg:.1f} deg from the slice normal (gantry tilt); "
            f"expected at most {TILT_DEG} deg",
            "tilt",
        )
        return
    stated = max(ordered, key=lambda s: abs(s.tilt_deg))
    normal_deg = float(np.degrees(np.arccos(min(abs(slice_normal(stated)[2]), 1))))
    if abs(stated.tilt_deg) > TILT_DEG and normal_deg < TILT_DEG:
        yield Defect(
            f"GantryDetectorTilt is {stated.tilt_deg:g} deg in {stated.name}, but the "
            "positions and orientation show none; expected them to agree; the repair "
            "trusts the positions",
            "tilt",
        )


def group_by_position(ordered: Sequence[Slice]) -> list[list[Slice]]:
    """Groups slices by position; sorts each group by InstanceNumber, path and frame."""
    along_mm = positions_along_normal_mm(ordered)
    places: list[list[Slice]] = []
    start_mm = -np.inf
    for item, at_mm in zip(ordered, along_mm, strict=True):
        if at_mm - start_mm >= SAME_PLACE_MM:
            places.append([])
            start_mm = at_mm
        places[-1].append(item)
    return [sorted(p, key=lambda s: (s.instance, s.path, s.frame)) for p in places]


def explain_mismatch(doubled: Sequence[Sequence[Slice]]) -> str:
    """Returns why images at the same positions are not duplicates; "" if they are.

    Args:
        doubled: Images of each position, sorted as by `group_by_position`. The first of each is
            kept, so the first ones must form one set, and likewise the second ones.
    """
    for place in doubled:
        for name, attribute in DOUBLE_TAGS.items():
            found = [getattr(item, attribute) for item in place]
            for item, value in zip(place, found, strict=True):
                if value != found[0]:
                    return (
                        f"{place[0].name} and {item.name} differ in {name} ({found[0]!r}, "
                        f"{value!r}), so they are two reconstructions; separate the files"
                    )
    # Of copies of one file, it does not matter which is kept.
    doubled = [p for p in doubled if len({item.sop_uid for item in p}) > 1]
    if _in_folders(doubled) or _in_order(doubled):
        return ""
    return (
        "neither InstanceNumber nor folder shows which images belong together; separate "
        "the two sets"
    )


def _in_folders(doubled: Sequence[Sequence[Slice]]) -> bool:
    """Returns True if images of each rank (first, second, ...) have their own folder."""
    folders = [tuple(item.path.parent for item in place) for place in doubled]
    most = max(folders, key=len, default=())
    return len(set(most)) == len(most) and all(f == most[: len(f)] for f in folders)


def _in_order(doubled: Sequence[Sequence[Slice]]) -> bool:
    """Returns True if InstanceNumber is monotonic over the images of each rank."""
    for place in doubled:
        if any(a.instance == b.instance for a, b in pairwise(place)):
            return False
    for rank in range(max(map(len, doubled), default=0)):
        numbers = [place[rank].instance for place in doubled if len(place) > rank]
        directions = {int(np.sign(step)) for step in np.diff(numbers)}
        if not (directions <= {1} or directions <= {-1}):
            return False
    return True


def drop_duplicates(ordered: Sequence[Slice]) -> list[Slice]:
    """Keeps the first image of each position if these form one set; else keeps all."""
    places = group_by_position(ordered)
    if explain_mismatch([place for place in places if len(place) > 1]):
        return list(ordered)
    return [place[0] for place in places]


def _sideways_mm(ordered: Sequence[Slice], along_mm: np.ndarray) -> np.ndarray:
    """Returns (slices, 3) in-plane LPS offsets of the slices from the first."""
    origins = (
        np.array([s.position_lps_mm for s in ordered]) - ordered[0].position_lps_mm
    )
    return origins - np.outer(along_mm - along_mm[0], slice_normal(ordered[0]))


def _line(
    ordered: Sequence[Slice], along_mm: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Fits a straight line to the sideways offsets; returns it and its lean per mm."""
    sideways_mm = _sideways_mm(ordered, along_mm)
    centred_mm = along_mm - along_mm.mean()
    lean = centred_mm @ sideways_mm / (centred_mm @ centred_mm)
    return sideways_mm.mean(axis=0) + np.outer(centred_mm, lean), lean


def _text(value: Any) -> str:
    return np.array2string(np.asarray(value), precision=4, separator=", ").replace(
        "\n", ""
    )


def check_pixels(volume: np.ndarray, ordered: Sequence[Slice]) -> list[str]:
    """Raises ScanError if slices are damaged although they could be decoded.

    Args:
        volume: (slice, row, column) HU.
        ordered: Sorted slices of the volume.

    Returns:
        A warning if few slices are blank, and only at the ends.
    """
    blank = volume.min(axis=(1, 2)) == volume.max(axis=(1, 2))
    shown = np.flatnonzero(~blank)
    if not len(shown) or blank.sum() > few(ordered):
        check_neighbours(volume, ordered)
        return []
    inside = slice(shown[0], shown[-1] + 1)
    check_neighbours(volume[inside], ordered[inside])
    ends = [item for item, is_blank in zip(ordered, blank, strict=True) if is_blank]
    return [f"{named(ends, ordered)} are blank, at an end; kept"] if ends else []


def check_neighbours(volume: np.ndarray, ordered: Sequence[Slice]) -> None:
    """Raises ScanError if slices are damaged although they could be decoded.

    Rejects blank slices, slices that equal the previous one, and neighbours that differ too
    much: a slice from another scan, or slices that were rescaled differently.

    Args:
        volume: (slice, row, column) HU.
        ordered: Sorted slices of the volume.
    """
    series = f"series {ordered[0].series_uid}"
    blank = [k for k, image in enumerate(volume) if image.min() == image.max()]
    if blank:
        raise ScanError(
            f"{series}: {_names(blank, ordered)} blank; the first is "
            f"{volume[blank[0], 0, 0]} HU throughout; expected an image of the body; "
            "restore the files"
        )
    copies = [
        k + 1 for k, (a, b) in enumerate(pairwise(volume)) if np.array_equal(a, b)
    ]
    if copies:
        raise ScanError(
            f"{series}: {_names(copies, ordered)} identical to the previous slice (first "
            f"{ordered[copies[0] - 1].name}); expected a different image at each position; "
            "restore the files"
        )
    if len(volume) < 4:
        return
    steps_hu = _steps_by_quarter_hu(volume)
    usual_hu = np.median(steps_hu, axis=0)
    gaps_mm = np.diff(positions_along_normal_mm(ordered))
    # Slices that are further apart may differ more.
    apart = np.maximum(gaps_mm / np.median(gaps_mm), 1)
    over = steps_hu > np.maximum(CORRUPT_HU, CORRUPT_RATIO * np.outer(apart, usual_hu))
    jumps = np.flatnonzero(over.any(axis=1))
    if len(jumps):
        named = ", and ".join(
            f"by {steps_hu[k].max():.0f} HU from {ordered[k].name} to {ordered[k + 1].name}"
            for k in jumps[:NAMED_SLICES]
        )
        raise ScanError(
            f"{series}: {len(jumps)} pairs of neighbouring slices differ too much in a "
            f"quarter of the image, on average {named}; expected about "
            f"{usual_hu.max():.0f} HU as elsewhere; the slices on one side are damaged, from "
            "another scan, or rescaled differently; restore the files"
        )


def _steps_by_quarter_hu(volume: np.ndarray) -> np.ndarray:
    """Returns (slices - 1, 4) mean differences of neighbours per image quarter."""
    thin = volume[:, ::4, ::4].astype(np.float32)
    steps_hu = np.abs(np.diff(thin, axis=0))
    row, column = (n // 2 for n in thin.shape[1:])
    return np.stack(
        [
            steps_hu[:, rows, columns].mean(axis=(1, 2))
            for rows in (slice(row), slice(row, None))
            for columns in (slice(column), slice(column, None))
        ],
        axis=1,
    )


def _names(indices: Sequence[int], ordered: Sequence[Slice]) -> str:
    """Returns the start of a message: the number of slices and the first few names."""
    named = ", ".join(ordered[k].name for k in indices[:NAMED_SLICES])
    more = ", ..." if len(indices) > NAMED_SLICES else ""
    return f"{len(indices)} of {len(ordered)} slices ({named}{more}) are"
