"""FROC curve and CPM by the rules of LUNA16, from candidate points with scores.

A candidate hits a nodule if its distance from the nodule's centre is below the nodule's radius.
The hit with the highest score counts; further hits of the same nodule are ignored, and so are
candidates within the radius of an irrelevant finding. All other candidates are false positives.
One candidate may hit two nodules whose spheres overlap.

Reference: Setio et al. 2017 (LUNA16), section 3; doi:10.1016/j.media.2017.06.015.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from metrics.intervals import Interval

RATES: tuple[float, ...] = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)
"""Rates of false positives per scan; the CPM is the mean sensitivity at these rates."""


@dataclass(frozen=True, eq=False)
class Marks:
    """Hits and false positives of all scans; see `mark`.

    Attributes:
        scans: (scans,) ids of all scans, including those without nodules or candidates.
        nodule_scan: (nodules,) index into `scans`.
        nodule_score: (nodules,) highest score among the nodule's hits; -inf for a miss.
        false_scan: (false positives,) index into `scans`.
        false_score: (false positives,) scores.
    """

    scans: tuple[str, ...]
    nodule_scan: np.ndarray
    nodule_score: np.ndarray
    false_scan: np.ndarray
    false_score: np.ndarray


@dataclass(frozen=True, eq=False)
class Froc:
    """FROC curve, and sensitivities at `RATES` with their intervals.

    Attributes:
        fp_per_scan: (points,) ascending from 0.
        sensitivity: (points,) ascending.
        at_rates: Sensitivity at each of `RATES`.
        cpm: Mean of these sensitivities.
    """

    fp_per_scan: np.ndarray
    sensitivity: np.ndarray
    at_rates: tuple[Interval, ...]
    cpm: Interval


def mark(
    scans: Sequence[str],
    candidates: Mapping[str, np.ndarray],
    nodules: Mapping[str, np.ndarray],
    irrelevant: Mapping[str, np.ndarray] | None = None,
) -> Marks:
    """Sorts the candidates of all scans into hits, false positives and ignored ones.

    Args:
        scans: Ids of the scans to evaluate.
        candidates: Scan id -> (n, 4) x, y, z in mm and score, in the coordinate system of
            the nodules.
        nodules: Scan id -> (n, 4) x, y, z and diameter in mm.
        irrelevant: Scan id -> findings that count as neither hits nor false positives, in
            the layout of `nodules`.

    Raises:
        ValueError: If a number is not finite, a diameter is not positive, a candidate is
            listed twice, or an id is missing from `scans` or listed there twice.
    """
    irrelevant = irrelevant or {}
    place = {scan_id: index for index, scan_id in enumerate(scans)}
    if len(place) < len(scans):
        raise ValueError(
            f"{len(scans) - len(place)} scan ids are listed twice; expected each once"
        )
    check_findings(candidates, place, "candidates")
    check_findings(nodules, place, "nodules", of_diameters=True)
    check_findings(irrelevant, place, "irrelevant findings", of_diameters=True)
    nodule_scan, nodule_score, false_scan, false_score = [], [], [], []
    nothing = np.zeros((0, 4))
    for scan_id, index in place.items():
        found = np.asarray(candidates.get(scan_id, nothing), np.float64)
        known = np.asarray(nodules.get(scan_id, nothing), np.float64)
        other = np.asarray(irrelevant.get(scan_id, nothing), np.float64)
        hits = within(found, known)
        best = np.where(hits, found[:, 3:], -np.inf).max(axis=0, initial=-np.inf)
        free = ~hits.any(axis=1)
        false = free & ~within(found, other).any(axis=1)
        nodule_scan.append(np.full(len(known), index))
        nodule_score.append(best)
        false_scan.append(np.full(int(false.sum()), index))
        false_score.append(found[false, 3])
    return Marks(
        tuple(place),
        *(
            np.concatenate([np.zeros(0), *parts]).astype(kind)
            for parts, kind in (
                (nodule_scan, np.int64),
                (nodule_score, np.float64),
                (false_scan, np.int64),
                (false_score, np.float64),
            )
        ),
    )


def within(points: np.ndarray, spheres: np.ndarray) -> np.ndarray:
    """Returns (points, spheres) bool: point inside sphere; both inputs are (n, 4)."""
    apart = points[:, None, :3] - spheres[None, :, :3]
    return (apart**2).sum(axis=-1) < (spheres[:, 3] / 2) ** 2


def check_findings(
    findings: Mapping[str, np.ndarray],
    scans: Mapping[str, int],
    what: str,
    *,
    of_diameters: bool = False,
) -> None:
    """Raises ValueError if the findings are invalid; see `mark`."""
    unknown = sorted(set(findings) - set(scans))
    if unknown:
        raise ValueError(
            f"{what} of {len(unknown)} scans that are not evaluated, first {unknown[0]}; "
            "leave them out or evaluate these scans too"
        )
    for scan_id, values in findings.items():
        values = np.asarray(values, np.float64)
        if values.ndim != 2 or values.shape[1] != 4:
            raise ValueError(
                f"{what} of {scan_id} have shape {values.shape}; expected (n, 4)"
            )
        if not np.isfinite(values).all():
            raise ValueError(f"{what} of {scan_id} hold NaN or infinity")
        if of_diameters and (values[:, 3] <= 0).any():
            raise ValueError(f"{what} of {scan_id} have a diameter of 0 mm or less")
        if not of_diameters and len(np.unique(values, axis=0)) < len(values):
            raise ValueError(f"{what} of {scan_id} list one candidate twice")


def froc(
    marks: Marks,
    patients: Sequence[str] | None = None,
    *,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Froc:
    """Computes the FROC curve with bootstrap intervals.

    Sensitivity is interpolated linearly between points of the curve and is constant beyond
    its end, as in LUNA16's script.

    Args:
        marks: Result of `mark`.
        patients: (scans,) patient of each scan; a patient is drawn with all their scans. None
            draws single scans, as LUNA16 does.
        draws: Number of bootstrap draws; draws without a nodule are left out. If fewer than
            two patients have a nodule, the bounds of all intervals are NaN.
        seed: Seed of the draws.
        level: Coverage of the intervals.

    Raises:
        ValueError: If no scan has a nodule.
    """
    if not len(marks.nodule_score):
        raise ValueError("no nodule in any scan, so sensitivity is undefined")
    owners = np.arange(len(marks.scans))
    if patients is not None:
        owners = np.unique(np.asarray(patients), return_inverse=True)[1]
    events = Events.of(marks)
    fp_per_scan, sensitivity = events.curve(np.ones(len(marks.scans), np.int64))
    value = np.interp(RATES, fp_per_scan, sensitivity)
    number = int(owners.max()) + 1
    rng = np.random.default_rng(seed)
    drawn = []
    if len(np.unique(owners[marks.nodule_scan])) < 2:
        draws = 0
    for _ in range(draws):
        times = rng.multinomial(number, np.full(number, 1 / number))[owners]
        if times[marks.nodule_scan].any():
            drawn.append(np.interp(RATES, *events.curve(times)))
    bounds = ((1 - level) / 2, (1 + level) / 2)
    low, high = np.quantile(drawn, bounds, axis=0) if drawn else np.full((2, 7), np.nan)
    means = np.mean(drawn, axis=1) if drawn else []
    cpm = np.quantile(means, bounds) if drawn else (np.nan, np.nan)
    return Froc(
        fp_per_scan,
        sensitivity,
        tuple(
            Interval(float(v), float(a), float(b))
            for v, a, b in zip(value, low, high, strict=True)
        ),
        Interval(float(value.mean()), float(cpm[0]), float(cpm[1])),
    )


@dataclass(frozen=True, eq=False)
class Events:
    """Hits and false positives by descending score, so that a draw needs only two running sums.

    Attributes:
        scan: (events,) index of the scan.
        is_hit: (events,) bool.
        last: (points,) index of the last event with each score.
        nodule_scan: (nodules,) index of each nodule's scan, misses included.
    """

    scan: np.ndarray
    is_hit: np.ndarray
    last: np.ndarray
    nodule_scan: np.ndarray

    @classmethod
    def of(cls, marks: Marks) -> "Events":
        hit = np.isfinite(marks.nodule_score)
        score = np.concatenate((marks.nodule_score[hit], marks.false_score))
        scan = np.concatenate((marks.nodule_scan[hit], marks.false_scan))
        is_hit = np.arange(len(score)) < hit.sum()
        order = np.argsort(-score, kind="stable")
        last = np.flatnonzero(np.append(np.diff(score[order]) != 0, len(score) > 0))
        return cls(scan[order], is_hit[order], last, marks.nodule_scan)

    def curve(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Computes false positives per scan and sensitivity; `times` weights the scans."""
        weight = times[self.scan]
        hits = np.cumsum(np.where(self.is_hit, weight, 0))[self.last]
        false = np.cumsum(weight)[self.last] - hits
        nodules = times[self.nodule_scan].sum()
        return (
            np.concatenate(([0.0], false / times.sum())),
            np.concatenate(([0.0], hits / nodules)),
        )
