"""FROC and CPM by the rules of LUNA16: candidates as points with a score.

A candidate nearer to a nodule's centre than its radius hits it. The hit with the highest score
counts; further hits of the same nodule are ignored, and so are candidates within the radius of
an irrelevant finding. All others are false positives. One candidate may hit two nodules whose
spheres overlap.

Reference: Setio et al. 2017 (LUNA16), section 3; doi:10.1016/j.media.2017.06.015.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from metrics.intervals import Interval

RATES: tuple[float, ...] = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)
"""False positives per scan at which sensitivities are averaged to the CPM."""


@dataclass(frozen=True, eq=False)
class Marks:
    """Candidates of all scans, sorted out by `mark`.

    Attributes:
        scans: (scans,) ids of all scans, those without nodule or candidate too.
        nodule_scan: (nodules,) index in `scans`.
        nodule_score: (nodules,) highest score of its hits; -inf for a miss.
        false_scan: (false positives,) index in `scans`.
        false_score: (false positives,) scores.
    """

    scans: tuple[str, ...]
    nodule_scan: np.ndarray
    nodule_score: np.ndarray
    false_scan: np.ndarray
    false_score: np.ndarray


@dataclass(frozen=True, eq=False)
class Froc:
    """The curve, and sensitivities at `RATES` with their interval.

    Attributes:
        fp_per_scan: (points,) rising, first 0.
        sensitivity: (points,) rising.
        at_rates: One for each of `RATES`.
        cpm: Their mean.
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
        scans: Ids of the scans that count.
        candidates: Scan id to (n, 4) x, y, z in mm and score, any one coordinate system.
        nodules: Scan id to (n, 4) x, y, z and diameter in mm.
        irrelevant: The same of findings that are neither right nor wrong.

    Raises:
        ValueError: If a number is not finite, a diameter not positive, a candidate stands
            twice, or an id is not among `scans` or stands there twice.
    """
    irrelevant = irrelevant or {}
    place = {scan_id: index for index, scan_id in enumerate(scans)}
    if len(place) < len(scans):
        raise ValueError(f"{len(scans) - len(place)} scan ids stand twice")
    check(candidates, place, "candidates")
    check(nodules, place, "nodules", of_diameters=True)
    check(irrelevant, place, "irrelevant findings", of_diameters=True)
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
    """(points, spheres) bool: nearer to the centre than the radius; (n, 4) each."""
    apart = points[:, None, :3] - spheres[None, :, :3]
    return (apart**2).sum(axis=-1) < (spheres[:, 3] / 2) ** 2


def check(
    findings: Mapping[str, np.ndarray],
    scans: Mapping[str, int],
    what: str,
    *,
    of_diameters: bool = False,
) -> None:
    """Raises ValueError if findings cannot be used; see `mark`."""
    unknown = sorted(set(findings) - set(scans))
    if unknown:
        raise ValueError(
            f"{what} of {len(unknown)} scans that are not evaluated, the first {unknown[0]}; "
            "leave them out, or list their scans"
        )
    for scan_id, values in findings.items():
        values = np.asarray(values, np.float64)
        if values.ndim != 2 or values.shape[1] != 4:
            raise ValueError(
                f"{what} of {scan_id} have shape {values.shape}, not (n, 4)"
            )
        if not np.isfinite(values).all():
            raise ValueError(f"{what} of {scan_id} hold NaN or infinity")
        if of_diameters and (values[:, 3] <= 0).any():
            raise ValueError(f"{what} of {scan_id} have a diameter of 0 mm or less")
        if not of_diameters and len(np.unique(values, axis=0)) < len(values):
            raise ValueError(f"{what} of {scan_id} hold one candidate twice")


def froc(
    marks: Marks,
    patients: Sequence[str] | None = None,
    *,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Froc:
    """The FROC curve, with bootstrap intervals.

    Sensitivities between points of the curve are interpolated linearly, beyond its end they
    stay as they are: what LUNA16's script does.

    Args:
        marks: From `mark`.
        patients: (scans,) patient of each scan, who is drawn with all scans; None draws
            scans, as LUNA16 does.
        draws: Bootstrap draws; draws without a nodule are left out. If fewer than two
            patients have a nodule, the bounds of all intervals are NaN.
        seed: Of the draws.
        level: Coverage of the intervals.

    Raises:
        ValueError: If there is no nodule.
    """
    if not len(marks.nodule_score):
        raise ValueError("no nodule in any scan; there is no sensitivity")
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
    """Hits and false positives by falling score, so that a draw is two running sums.

    Attributes:
        scan: (events,) index of the scan.
        is_hit: (events,) bool.
        last: (points,) last event of each score.
        nodule_scan: (nodules,) scan of every nodule, misses too.
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
        """False positives per scan and sensitivity, with scans counted so many times."""
        weight = times[self.scan]
        hits = np.cumsum(np.where(self.is_hit, weight, 0))[self.last]
        false = np.cumsum(weight)[self.last] - hits
        nodules = times[self.nodule_scan].sum()
        return (
            np.concatenate(([0.0], false / times.sum())),
            np.concatenate(([0.0], hits / nodules)),
        )
