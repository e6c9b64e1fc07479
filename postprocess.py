"""Step 7 of 9: turn probability maps into nodules, each measured in mm.

A run whose method is "tuned" gets threshold, erosion and smallest volume from the
validation scans; `best_of_grid` says how.

Example:
    python postprocess.py --predictions work/predictions/thesis --run work/runs/thesis
"""

import csv
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

import boxes
import config
import files
import provenance
import runs
import steps
from geometry import Grid, flip_xy
from metrics import Counts
from scan import (
    LEFT,
    RIGHT,
    Scan,
    ScanError,
    consensus,
    read_scan,
    readers_of_label,
    scan_path,
)
from volume_io import PROBABILITY_STEPS, check_same_grid, read_volume, write_volume

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Of predictions.json and postprocess.json."""

PREDICTIONS = "predictions.json"

Connectivity = Literal[6, 18, 26]

THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
EROSIONS_PX = (0, 3, 5)
MIN_VOLUMES_MM3 = (0.0, 14.0, 33.0, 65.0, 113.0)
MIN_SCORES = (0.0, 0.8, 0.85, 0.9, 0.93, 0.95)
"""The grid that is tuned; the volumes are spheres of 0, 3, 4, 5 and 6 mm."""

WITHIN_SHARE = 0.5
"""A component of which so much lies in the lung mask is in the lungs."""

FALSE_PRICE = 0.02
"""What a false component costs, in Dice of its scan."""

NODULE_COLUMNS = (
    "case_id",
    "series_uid",
    "nodule_id",
    "score",
    "max_prob",
    "x_lps_mm",
    "y_lps_mm",
    "z_lps_mm",
    "i_source",
    "j_source",
    "k_source",
    "z_slice",
    "long_axis_mm",
    "short_axis_mm",
    "diameter_mm",
    "volume_mm3",
    "mean_hu",
    "side",
)
"""Columns of nodules.csv; docs/layout.md says what each holds."""


@dataclass(frozen=True)
class FoundNodule:
    """One connected component of the mask.

    Attributes:
        nodule_id: Its value in the mask; 1 has the highest score.
        score: Mean probability of its voxels.
        max_prob: Largest probability.
        centre_zyx: Centre of mass in voxels of the canonical array.
        volume_mm3: Voxels times voxel volume.
        diameter_mm: Of the sphere of that volume.
        long_axis_mm: Largest extent within an axial slice.
        short_axis_mm: Extent across it, in the same slice.
        mean_hu: Mean HU; None if HU were not given.
        side: "right" or "left" by the lung most of it lies in; "" if in none.
    """

    nodule_id: int
    score: float
    max_prob: float
    centre_zyx: tuple[float, float, float]
    volume_mm3: float
    diameter_mm: float
    long_axis_mm: float
    short_axis_mm: float
    mean_hu: float | None
    side: str


@dataclass(frozen=True)
class Predictions:
    """What predictions.json says of a folder of predictions; infer.py writes it.

    Attributes:
        run: Name of the run.
        weights_sha256: Checksum of the weights.
        split_sha256: Checksum of the split the run was trained with.
        training_patients: Patients the weights have seen.
        scans: scan_id -> {"part": "train", "validation", "test" or "", "patient_id"}, and
            of a split by slice {"slices": {part: [z, ...]}}.
        provenance: What wrote the predictions.
    """

    run: str
    weights_sha256: str
    split_sha256: str
    training_patients: tuple[str, ...]
    scans: dict[str, dict[str, Any]]
    provenance: dict[str, Any] = field(default_factory=dict)

    def of_part(self, part: str) -> dict[str, tuple[int, ...] | None]:
        """Sorted ids of a part's scans, each with its slices (z) that are in the part.

        None stands for all slices; only a split by slice has others. The part "all" has
        every scan.
        """
        found: dict[str, tuple[int, ...] | None] = {}
        for scan_id, facts in sorted(self.scans.items()):
            slices = facts.get("slices")
            if part == "all" or (slices is None and facts["part"] == part):
                found[scan_id] = None
            elif slices is not None and part in slices:
                found[scan_id] = tuple(slices[part])
        return found

    def write(self, folder: Path) -> None:
        """Writes predictions.json into `folder`."""
        record = {"format_version": FORMAT_VERSION, **asdict(self)}
        files.write_json(Path(folder) / PREDICTIONS, record)


def read_predictions(folder: Path) -> Predictions:
    """Reads predictions.json.

    Raises:
        FileNotFoundError: If it is missing.
        ValueError: If it is of another version.
    """
    path = Path(folder) / PREDICTIONS
    if not path.exists():
        raise FileNotFoundError(f"no {path}; run infer.py first")
    record = json.loads(path.read_text())
    if record.pop("format_version", None) != FORMAT_VERSION:
        raise ValueError(
            f"{path}: not of format {FORMAT_VERSION}; run infer.py again with --overwrite"
        )
    for scan_id in record["scans"]:
        files.checked_id(scan_id, where=str(path))
    training_patients = tuple(record.pop("training_patients"))
    return Predictions(training_patients=training_patients, **record)


def find_nodules(
    prob: np.ndarray,
    grid: Grid,
    settings: config.Postprocess,
    *,
    lung: np.ndarray | None = None,
    hu: np.ndarray | None = None,
) -> tuple[np.ndarray, list[FoundNodule]]:
    """Thresholds, erodes, connects and measures.

    Args:
        prob: (z, y, x) float32 probability of nodule.
        grid: Where `prob` lies.
        settings: "tuned" works like "fixed": its values were tuned before.
        lung: (z, y, x) uint8 lung labels; needed with `settings.within_lung`.
        hu: (z, y, x) int16, for `mean_hu`.

    Returns:
        (z, y, x) labels, uint8 or the smallest unsigned type that holds them, and the
        nodules, by falling score.

    Raises:
        ValueError: If `settings.within_lung` and there is no `lung`.
    """
    if settings.within_lung and lung is None:
        raise ValueError(
            "no lung mask; expected one with within_lung (--postprocess.within_lung)"
        )
    within = lung > 0 if settings.within_lung and lung is not None else None
    mask = prob >= threshold_of(prob if within is None else prob[within], settings)
    box = boxes.around(mask)
    if box is None:
        return np.zeros(prob.shape, np.uint8), []
    parts = components(erode(mask[box], settings.erosion_px), settings.connectivity)
    if within is not None:
        parts[~within_lung(parts, within[box])[parts]] = 0
    kept, scores, peaks = _kept_components(parts, prob[box], grid, settings)
    order = np.argsort(-scores[kept], kind="stable")
    renumber = np.zeros(len(scores), np.min_scalar_type(max(len(kept), 255)))
    renumber[kept[order]] = np.arange(1, len(kept) + 1)
    labels = np.zeros(prob.shape, renumber.dtype)
    labels[box] = renumber[parts]
    chances = np.stack([scores, peaks], axis=1)[kept[order]]
    return labels, measure_nodules(labels, chances, grid, lung=lung, hu=hu)


def threshold_of(prob: np.ndarray, settings: config.Postprocess) -> np.float32:
    """The probability from which a voxel is nodule.

    float32, the type of the maps, so that 0.3 is not below 0.3.
    """
    if settings.method == "kmeans":
        return np.float32(kmeans_threshold(prob))
    return np.float32(settings.threshold)


def kmeans_threshold(prob: np.ndarray) -> float:
    """Midway between the two cluster centres of probabilities (K-means, k = 2).

    The best of all cuts of the histogram in steps of 1e-4: the optimum that iterations
    may miss. The thesis clusters each slice; a slice without nodule then gets clusters
    of noise, so here the scan is clustered.

    Args:
        prob: Probabilities, any shape.

    Returns:
        The threshold; infinity if all probabilities are alike.
    """
    steps_of = np.rint(prob.ravel() * np.float32(PROBABILITY_STEPS)).astype(np.int32)
    counts = np.bincount(steps_of)
    values = np.flatnonzero(counts)
    if len(values) < 2:
        return float("inf")
    number = counts[values].astype(np.float64)
    below = np.cumsum(number)[:-1]
    sum_below = np.cumsum(number * values)[:-1]
    above = number.sum() - below
    centre_low = sum_below / below
    centre_high = ((number * values).sum() - sum_below) / above
    # Least spread within the clusters is largest spread between them.
    best = np.argmax(below * above * (centre_high - centre_low) ** 2)
    return float(centre_low[best] + centre_high[best]) / 2 / PROBABILITY_STEPS


def erode(mask: np.ndarray, side_px: int) -> np.ndarray:
    """Erodes each axial slice of a bool mask by a square; what is outside is empty."""
    if side_px < 2:
        return mask
    square = np.ones((side_px, side_px), np.uint8)
    eroded = [
        cv2.erode(
            image.astype(np.uint8),
            square,
            borderType=cv2.BORDER_CONSTANT,
            borderValue=(0, 0, 0, 0),
        )
        for image in mask
    ]
    return np.stack(eroded).astype(bool)


def components(mask: np.ndarray, connectivity: Connectivity) -> np.ndarray:
    """(z, y, x) uint32 labels of the connected components of a bool mask."""
    import cc3d

    return cc3d.connected_components(
        mask, connectivity=connectivity, out_dtype=np.uint32
    )


def within_lung(parts: np.ndarray, lung: np.ndarray) -> np.ndarray:
    """(labels,) bool: of which components at least `WITHIN_SHARE` lies in the lungs.

    Args:
        parts: (z, y, x) labels of components; 0 is none and counts as outside.
        lung: (z, y, x) bool.
    """
    sizes = np.bincount(parts.ravel())
    inside = np.bincount(parts[lung], minlength=len(sizes))
    within = inside >= WITHIN_SHARE * sizes
    within[0] = False
    return within


def _kept_components(
    parts: np.ndarray, prob: np.ndarray, grid: Grid, settings: config.Postprocess
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels of the components that stay, and every label's mean and largest probability.

    K-means splits noise as well as nodules, so its components need one voxel that
    reaches the fixed threshold; for the other methods each voxel does.
    """
    inside = parts > 0
    owners, chances = parts[inside], prob[inside]
    sizes = np.bincount(owners, minlength=1)
    scores = np.bincount(owners, weights=chances, minlength=1) / np.maximum(sizes, 1)
    peaks = np.zeros(len(sizes), np.float32)
    np.maximum.at(peaks, owners, chances)
    stays = sizes * grid.voxel_mm3 >= settings.min_volume_mm3
    stays &= scores >= settings.min_score
    stays &= (peaks >= np.float32(settings.threshold)) & (sizes > 0)
    return np.flatnonzero(stays), scores, peaks


def measure_nodules(
    labels: np.ndarray,
    chances: np.ndarray,
    grid: Grid,
    *,
    lung: np.ndarray | None = None,
    hu: np.ndarray | None = None,
) -> list[FoundNodule]:
    """Measures every label.

    Args:
        labels: (z, y, x) labels 1 to n.
        chances: (n, 2) mean and largest probability of each.
        grid: Where `labels` lies.
        lung: (z, y, x) lung labels, for the side.
        hu: (z, y, x) HU, for the mean.
    """
    from scipy.ndimage import find_objects

    nodules = []
    boxes = find_objects(labels, max_label=len(chances))
    for nodule_id, box in enumerate(boxes, start=1):
        mask = labels[box] == nodule_id
        places = np.argwhere(mask) + [axis.start for axis in box]
        volume_mm3 = len(places) * grid.voxel_mm3
        long_axis_mm, short_axis_mm = axes_mm(mask, grid.spacing_mm[1:])
        score, max_prob = chances[nodule_id - 1].tolist()
        nodules.append(
            FoundNodule(
                nodule_id=nodule_id,
                score=score,
                max_prob=max_prob,
                centre_zyx=tuple(places.mean(axis=0).tolist()),
                volume_mm3=volume_mm3,
                diameter_mm=float(np.cbrt(6 * volume_mm3 / np.pi)),
                long_axis_mm=long_axis_mm,
                short_axis_mm=short_axis_mm,
                mean_hu=None if hu is None else float(hu[box][mask].mean()),
                side="" if lung is None else side_of(lung[box][mask]),
            )
        )
    return nodules


def side_of(lung: np.ndarray) -> str:
    """The side of most of a nodule's voxels, by their lung labels; "" if in no lung."""
    right, left = np.count_nonzero(lung == RIGHT), np.count_nonzero(lung == LEFT)
    if not right and not left:
        return ""
    return "right" if right >= left else "left"


def axes_mm(
    mask: np.ndarray, spacing_yx_mm: tuple[float, float]
) -> tuple[float, float]:
    """The largest extent within a slice, and the extent across it in that slice.

    Extents run between the middles of the outer pixel edges, so that a row of n pixels
    is n pixels long; pixel centres would make it n - 1, corners more.

    Args:
        mask: (z, y, x) bool of one nodule.
        spacing_yx_mm: (y, x).
    """
    halves = np.array([[-0.5, 0], [0.5, 0], [0, -0.5], [0, 0.5]])
    best = (0.0, 0.0)
    for image in mask:
        pixels = np.argwhere(image)
        if not len(pixels):
            continue
        points_mm = (pixels[:, None] + halves).reshape(-1, 2) * spacing_yx_mm
        hull_mm = cv2.convexHull(points_mm.astype(np.float32)).reshape(-1, 2)
        apart_mm = hull_mm[:, None] - hull_mm
        distances_mm = np.linalg.norm(apart_mm, axis=-1)
        long_mm = float(distances_mm.max())
        if long_mm > best[0]:
            first, second = np.unravel_index(distances_mm.argmax(), distances_mm.shape)
            along = apart_mm[first, second] / long_mm
            across_mm = hull_mm @ np.array([-along[1], along[0]])
            best = (long_mm, float(np.ptp(across_mm)))
    return best


def nodule_row(nodule: FoundNodule, scan: Scan) -> dict[str, Any]:
    """One row of nodules.csv."""
    centre_ras_mm = scan.grid.index_to_ras_mm(np.array(nodule.centre_zyx))
    x_mm, y_mm, z_mm = flip_xy(centre_ras_mm).tolist()
    i, j, k = scan.source_grid.ras_mm_to_index(centre_ras_mm).tolist()
    numbers = {
        "score": nodule.score,
        "max_prob": nodule.max_prob,
        "x_lps_mm": x_mm,
        "y_lps_mm": y_mm,
        "z_lps_mm": z_mm,
        "i_source": i,
        "j_source": j,
        "k_source": k,
        "long_axis_mm": nodule.long_axis_mm,
        "short_axis_mm": nodule.short_axis_mm,
        "diameter_mm": nodule.diameter_mm,
        "volume_mm3": nodule.volume_mm3,
        "mean_hu": nodule.mean_hu,
    }
    row = {name: "" if n is None else f"{n:.4f}" for name, n in numbers.items()}
    return {
        "case_id": scan.scan_id,
        "series_uid": scan.series_uid,
        "nodule_id": nodule.nodule_id,
        "z_slice": round(nodule.centre_zyx[0]),
        "side": nodule.side,
        **row,
    }


def write_rows(
    rows: Sequence[dict[str, Any]], columns: Sequence[str], path: Path
) -> None:
    """Writes a CSV with a header; it appears whole or not at all."""
    with files.written_whole(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


@dataclass(frozen=True)
class Job:
    """One scan to work on, wherever that happens."""

    scan_id: str
    folder: Path
    scans: Path
    settings: config.Postprocess
    consensus_level: float = 0.5
    min_readers: int = 1
    slices: tuple[int, ...] | None = None
    """The slices (z) that count; None for all."""


def read_prediction(job: Job, name: str) -> tuple[Scan, np.ndarray]:
    """The scan of a job, and its volume `name` on the same grid.

    Raises:
        ScanError: If one is missing or they do not lie on one grid.
    """
    path = scan_path(job.scans, job.scan_id)
    if not path.exists():
        raise ScanError(f"no scan file {path}; run preprocess.py first")
    scan = read_scan(path)
    volume, grid = read_volume(job.folder / job.scan_id / name)
    check_same_grid(grid, scan.grid, job.folder / job.scan_id / name)
    return scan, volume


def lung_of(scan: Scan) -> np.ndarray:
    """The lung labels of a scan.

    Raises:
        ScanError: If it has none.
    """
    if scan.lung is None:
        raise ScanError(
            f"scan {scan.scan_id} has no lung mask; run preprocess.py again with --overwrite"
        )
    return scan.lung


def write_nodules(job: Job) -> int:
    """Writes mask.nii.gz and nodules.csv of one scan.

    Returns:
        The number of nodules. nodules.csv is written last: it marks a scan as done.
    """
    scan, prob = read_prediction(job, "prob.nii.gz")
    labels, nodules = find_nodules(
        prob,
        scan.grid,
        job.settings,
        lung=lung_of(scan) if job.settings.within_lung else scan.lung,
        hu=scan.hu,
    )
    folder = job.folder / job.scan_id
    write_volume(folder / "mask.nii.gz", labels, scan.grid, scan.source_grid)
    rows = [nodule_row(nodule, scan) for nodule in nodules]
    write_rows(rows, NODULE_COLUMNS, folder / "nodules.csv")
    return len(nodules)


def reference_mask(
    scan: Scan, *, consensus_level: float, min_readers: int
) -> np.ndarray:
    """(z, y, x) bool consensus of the scan's readers.

    Raises:
        ScanError: If no reader looked at the scan.
    """
    if scan.reader_bits is None or scan.nodule_labels is None:
        raise ScanError(f"scan {scan.scan_id} has no readers' marks to compare with")
    return consensus(
        scan.reader_bits,
        scan.nodule_labels,
        readers_of_label(scan.nodules),
        level=consensus_level,
        min_readers=min_readers,
    )


def count_for_tuning(job: Job) -> np.ndarray:
    """What each setting of the grid gives on one scan.

    Returns:
        (thresholds, erosions, volumes, scores, 4) int64: voxels true positive, false positive
        and false negative, and components that touch no reference voxel.
    """
    scan, prob = read_prediction(job, "prob.nii.gz")
    reference = reference_mask(
        scan, consensus_level=job.consensus_level, min_readers=job.min_readers
    )
    return tuning_counts(
        prob,
        reference,
        scan.grid,
        job.settings.connectivity,
        within=lung_of(scan) > 0 if job.settings.within_lung else None,
        slices=job.slices,
    )


def only_slices(volume: np.ndarray, slices: Sequence[int] | None) -> np.ndarray:
    """A (z, y, x) volume that is 0 in all but some slices; None keeps all."""
    if slices is None:
        return volume
    kept = np.zeros_like(volume)
    kept[list(slices)] = volume[list(slices)]
    return kept


def tuning_counts(
    prob: np.ndarray,
    reference: np.ndarray,
    grid: Grid,
    connectivity: Connectivity,
    *,
    within: np.ndarray | None = None,
    slices: Sequence[int] | None = None,
) -> np.ndarray:
    """See `count_for_tuning`; each component is found once for all volumes and scores.

    Components and their volumes are those of the whole scan, but only voxels and
    components in `slices` are counted.
    """
    grid_axes = (THRESHOLDS, EROSIONS_PX, MIN_VOLUMES_MM3, MIN_SCORES)
    counts = np.zeros((*map(len, grid_axes), 4), np.int64)
    reference = only_slices(reference, slices)
    total_ref = int(np.count_nonzero(reference))
    counts[..., 2] = total_ref
    box = boxes.around(prob >= np.float32(THRESHOLDS[0]))
    if box is None:
        return counts
    prob, reference = prob[box], reference[box]
    counted = np.ones(len(prob), bool)
    if slices is not None:
        counted = np.isin(np.arange(len(prob)) + box[0].start, list(slices))
    for t, threshold in enumerate(THRESHOLDS):
        for e, erosion_px in enumerate(EROSIONS_PX):
            mask = erode(prob >= np.float32(threshold), erosion_px)
            parts = components(mask, connectivity)
            if within is not None:
                parts[~within_lung(parts, within[box])[parts]] = 0
                mask = parts > 0
            owners = parts[mask]
            voxels = np.bincount(owners, minlength=1)
            scores = np.bincount(owners, weights=prob[mask], minlength=1)
            scores = scores / np.maximum(voxels, 1)
            mask[~counted] = False
            sizes = np.bincount(parts[mask], minlength=len(voxels))
            shared = np.bincount(parts[mask & reference], minlength=len(sizes))
            for v, s in np.ndindex(len(MIN_VOLUMES_MM3), len(MIN_SCORES)):
                kept = (sizes > 0) & (voxels * grid.voxel_mm3 >= MIN_VOLUMES_MM3[v])
                kept &= scores >= MIN_SCORES[s]
                tp, size = shared[kept].sum(), sizes[kept].sum()
                false = np.count_nonzero(shared[kept] == 0)
                counts[t, e, v, s] = tp, size - tp, total_ref - tp, false
    return counts


def best_of_grid(
    counts: np.ndarray, base: config.Postprocess
) -> tuple[config.Postprocess, dict[str, Any]]:
    """The plainest setting that is not worse than the best by more than chance explains.

    A scan scores its Dice, 0 if it has no nodule, less `FALSE_PRICE` for every false
    component. A setting is as good as the best if its mean score lacks no more than one
    standard error of the scans' differences. Of those, the one fewest steps of the grid
    away from threshold 0.5, no erosion, a smallest volume of 14 mm3 and any score is taken:
    few scans cannot tell more apart.

    Args:
        counts: (scans, thresholds, erosions, volumes, scores, 4) of `count_for_tuning`.
        base: Gives what is not tuned.

    Returns:
        The settings, and what they reach: mean Dice of the scans with nodules, and false
        components per scan.

    Reference: Breiman et al. 1984 (the rule of one standard error).
    """
    dice = Counts(counts[..., 0], counts[..., 1], counts[..., 2]).dice
    with_nodule = (counts[..., 0] + counts[..., 2]).max(axis=(1, 2, 3, 4)) > 0
    scores = np.nan_to_num(dice)
    scores[~with_nodule] = 0.0
    scores -= FALSE_PRICE * counts[..., 3]
    best = np.unravel_index(scores.mean(axis=0).argmax(), scores.shape[1:])
    lack = scores[:, *best].reshape(-1, 1, 1, 1, 1) - scores
    error = lack.std(axis=0, ddof=1) if len(scores) > 1 else np.zeros(lack.shape[1:])
    good = lack.mean(axis=0) <= error / np.sqrt(len(scores)) + 1e-9

    def steps_away(place: tuple[int, ...]) -> tuple[int, ...]:
        t, e, v, s = place
        usual = THRESHOLDS.index(0.5), MIN_VOLUMES_MM3.index(14.0)
        return (abs(t - usual[0]) + e + abs(v - usual[1]) + s, *place)

    taken = min(
        (place for place in np.ndindex(good.shape) if good[place]), key=steps_away
    )
    settings = replace(
        base,
        method="tuned",
        threshold=THRESHOLDS[taken[0]],
        erosion_px=EROSIONS_PX[taken[1]],
        min_volume_mm3=MIN_VOLUMES_MM3[taken[2]],
        min_score=MIN_SCORES[taken[3]],
    )
    reached = {
        "mean_dice": float(dice[with_nodule, *taken].mean())
        if with_nodule.any()
        else None,
        "false_components_per_scan": float(counts[:, *taken, 3].mean()),
        "scans_with_nodule": int(with_nodule.sum()),
    }
    return settings, reached


@dataclass(frozen=True)
class Arguments:
    """What to work on."""

    predictions: Path
    """Folder that infer.py wrote."""
    run: Path
    """Run directory whose configuration holds; tuned values are kept there."""
    scans: Path = Path("work/scans")
    """Folder that preprocess.py wrote."""
    tune: bool = False
    """Tune on the validation scans whatever the run's method is, and tune again if it
    was done before."""
    workers: int = 2
    """Processes on this machine."""
    scheduler: str = ""
    """Address of a Dask scheduler to use instead."""
    overwrite: bool = False
    """Replace masks and nodules that are there."""


def postprocess_predictions(arguments: Arguments) -> steps.Report:
    """Tunes if needed, then writes masks and nodules of every predicted scan."""
    predictions = read_predictions(arguments.predictions)
    experiment = read_experiment(arguments.run)
    weights = arguments.run / "best.weights.h5"
    if weights.exists() and files.sha256(weights) != predictions.weights_sha256:
        raise ValueError(
            f"{arguments.predictions} was predicted by run {predictions.run} with other "
            f"weights than those of {arguments.run}; name the run that made it"
        )
    settings, origin = settings_of_run(arguments, predictions, experiment)
    record = {
        "format_version": FORMAT_VERSION,
        "weights_sha256": predictions.weights_sha256,
        "settings": config.to_json(settings),
        "origin": origin,
    }
    folder = arguments.predictions
    if arguments.overwrite:
        # All at once: a run that is stopped must not leave masks of the older settings
        # that look done.
        for scan_id in predictions.scans:
            files.remove(folder / scan_id / "nodules.csv")
    refuse_other_settings(record, folder)
    files.write_json(folder / RECORD, {**record, "provenance": provenance.record()})
    jobs = [
        Job(scan_id, folder, arguments.scans, settings)
        for scan_id in sorted(predictions.scans)
        if not (folder / scan_id / "nodules.csv").exists()
    ]
    found, failures = steps.map_scans(
        write_nodules,
        jobs,
        workers=arguments.workers,
        scheduler=arguments.scheduler,
        label="nodules",
    )
    done = len(predictions.scans) - len(jobs)
    line = (
        f"wrote {folder}: {sum(found)} nodules in {len(found)} scans "
        f"({done} were done before); {settings_text(settings)}, {origin}"
    )
    return steps.Report(line, failures)


RECORD = "postprocess.json"
"""Settings and their origin: in a run its tuned values, in predictions what was used."""


def read_experiment(run: Path) -> config.Experiment:
    """The configuration of a run that segments nodules.

    Raises:
        FileNotFoundError: If the run is absent or not complete.
        ValueError: If the run segments something else.
    """
    experiment = runs.read_settings(run)
    if experiment.batches.target != "nodule":
        raise ValueError(
            f"{run}: the run segments {experiment.batches.target}; nodules are found "
            "only in probabilities of nodule"
        )
    return experiment


def settings_of_run(
    arguments: Arguments, predictions: Predictions, experiment: config.Experiment
) -> tuple[config.Postprocess, str]:
    """The settings to use, and a phrase that says where they come from."""
    base = experiment.postprocess
    if base.method != "tuned" and not arguments.tune:
        return base, f"method {base.method} of the run"
    path = arguments.run / RECORD
    if path.exists() and not arguments.tune:
        record = json.loads(path.read_text())
        if record.get("tuned_on") == tuned_on(predictions, experiment):
            settings = config.from_json(config.Postprocess, record["settings"])
            return settings, record["origin"]
        log.warning(
            "%s was tuned on other weights, scans or settings; it does not count", path
        )
    return tune(arguments, predictions, experiment)


def tuned_on(predictions: Predictions, experiment: config.Experiment) -> dict[str, Any]:
    """What tuned values hold for: weights, validation scans and what is not tuned."""
    batches, base = experiment.batches, experiment.postprocess
    scans = predictions.of_part("validation")
    return {
        "weights_sha256": predictions.weights_sha256,
        "scans": {
            scan_id: slices and list(slices) for scan_id, slices in scans.items()
        },
        "consensus_level": batches.consensus_level,
        "min_readers": batches.min_readers,
        "within_lung": base.within_lung,
        "connectivity": base.connectivity,
    }


def tune(
    arguments: Arguments, predictions: Predictions, experiment: config.Experiment
) -> tuple[config.Postprocess, str]:
    """Tunes on the validation scans and keeps the result in the run directory."""
    base, batches = experiment.postprocess, experiment.batches
    jobs = [
        Job(
            scan_id,
            arguments.predictions,
            arguments.scans,
            base,
            batches.consensus_level,
            batches.min_readers,
            slices,
        )
        for scan_id, slices in predictions.of_part("validation").items()
    ]
    counts, failures = steps.map_scans(
        count_for_tuning,
        jobs,
        workers=arguments.workers,
        scheduler=arguments.scheduler,
        label="tuning",
    )
    for failure in failures:
        log.warning("not tuned on %s: %s", failure.scan_id, failure.reason)
    if not counts:
        log.warning(
            "no validation scan to tune on; the fixed threshold %g is used",
            base.threshold,
        )
        return replace(base, method="fixed"), "not tuned: no validation scans"
    settings, reached = best_of_grid(np.stack(counts), base)
    origin = (
        f"tuned on {len(counts)} validation scans, {reached['scans_with_nodule']} of them "
        "with a nodule"
    )
    if reached["mean_dice"] is not None:
        origin += f" (mean Dice {reached['mean_dice']:.3f})"
    record = {
        "format_version": FORMAT_VERSION,
        "tuned_on": tuned_on(predictions, experiment),
        "settings": config.to_json(settings),
        "origin": origin,
        "reached": reached,
        "provenance": provenance.record(),
    }
    files.write_json(arguments.run / RECORD, record)
    return settings, origin


def refuse_other_settings(record: dict[str, Any], folder: Path) -> None:
    """Stops before masks of two settings or two weights lie in one folder.

    Raises:
        ValueError: If masks are there that were made otherwise.
    """
    path = Path(folder) / RECORD
    if not path.exists() or not any(folder.glob("*/nodules.csv")):
        return
    before = json.loads(path.read_text())
    changed = [
        f"{name} was {before['settings'].get(name)}, is {value}"
        for name, value in record["settings"].items()
        if before["settings"].get(name) != value
    ]
    if before["weights_sha256"] != record["weights_sha256"]:
        changed.append("the weights are others")
    if changed:
        raise ValueError(
            f"{folder} holds masks made otherwise ({'; '.join(changed)}); "
            "add --overwrite to make them again"
        )


def settings_text(settings: config.Postprocess) -> str:
    """The settings in a phrase."""
    threshold = (
        "K-means threshold"
        if settings.method == "kmeans"
        else f"threshold {settings.threshold:g}"
    )
    return (
        f"{threshold}, erosion {settings.erosion_px} px, "
        f"at least {settings.min_volume_mm3:g} mm3 and mean probability "
        f"{settings.min_score:g}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    steps.run(postprocess_predictions, Arguments, argv=argv)


if __name__ == "__main__":
    main()
