"""Thresholds for postprocessing, tuned on a grid over the validation scans."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

import config
from ct import boxes
from ct.geometry import Grid
from metrics.overlap import Counts, only_slices
from nodules.components import connected, within_lung

THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
EROSIONS_PX = (0, 3, 5)
MIN_VOLUMES_MM3 = (0.0, 14.0, 33.0, 65.0, 113.0)
MIN_SCORES = (0.0, 0.8, 0.85, 0.9, 0.93, 0.95)
"""Tuning grid; the volumes are those of spheres with diameters of 0, 3, 4, 5 and 6 mm."""

FALSE_COMPONENT_PENALTY = 0.02
"""Penalty for each false component, subtracted from the Dice of its scan."""


def tuning_counts(
    prob: np.ndarray,
    reference: np.ndarray,
    grid: Grid,
    settings: config.Postprocess,
    *,
    within: np.ndarray | None = None,
    slices: Sequence[int] | None = None,
) -> np.ndarray:
    """Counts voxels and false components of a scan for each setting of the grid.

    See `postprocess.count_for_tuning` for the result. Components are found once for all volumes
    and scores. `settings` gives the values that are not tuned: connectivity, `min_voxels` and
    `fill_holes`. Components and their volumes are those of the whole scan, but only voxels and
    components in `slices` are counted.
    """
    grid_axes = (THRESHOLDS, EROSIONS_PX, MIN_VOLUMES_MM3, MIN_SCORES)
    counts = np.zeros((*map(len, grid_axes), 4), np.int64)
    reference = only_slices(reference, slices)
    total_ref = int(np.count_nonzero(reference))
    counts[..., 2] = total_ref
    box = boxes.bounding_box(prob >= np.float32(THRESHOLDS[0]))
    if box is None:
        return counts
    prob, reference = prob[box], reference[box]
    counted = np.ones(len(prob), bool)
    if slices is not None:
        counted = np.isin(np.arange(len(prob)) + box[0].start, list(slices))
    for t, threshold in enumerate(THRESHOLDS):
        for e, erosion_px in enumerate(EROSIONS_PX):
            tried = replace(settings, erosion_px=erosion_px)
            parts = connected(prob >= np.float32(threshold), tried)
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
                kept &= (voxels >= settings.min_voxels) & (scores >= MIN_SCORES[s])
                tp, size = shared[kept].sum(), sizes[kept].sum()
                false = np.count_nonzero(shared[kept] == 0)
                counts[t, e, v, s] = tp, size - tp, total_ref - tp, false
    return counts


def best_of_grid(
    counts: np.ndarray, base: config.Postprocess
) -> tuple[config.Postprocess, dict[str, Any]]:
    """Chooses the simplest setting that is within one standard error of the best.

    The score of a scan is its Dice, or 0 without a nodule, minus `FALSE_COMPONENT_PENALTY` for
    every false component. A setting is as good as the best if its mean score is lower by at
    most one standard error of the per-scan differences. Of these settings, the one closest in
    grid steps to threshold 0.5, no erosion, a least volume of 14 mm3 and no least score is
    chosen: few scans cannot distinguish the settings more finely.

    Args:
        counts: (scans, thresholds, erosions, volumes, scores, 4) from `tuning_counts`, stacked.
        base: Settings that are kept where they are not tuned.

    Returns:
        The settings, and the scores they reach: mean Dice of the scans with nodules, false
        components per scan and the number of scans with nodules.

    Reference: Breiman et al. 1984 (the rule of one standard error).
    """
    dice = Counts(counts[..., 0], counts[..., 1], counts[..., 2]).dice
    with_nodule = (counts[..., 0] + counts[..., 2]).max(axis=(1, 2, 3, 4)) > 0
    scores = np.nan_to_num(dice)
    scores[~with_nodule] = 0.0
    scores -= FALSE_COMPONENT_PENALTY * counts[..., 3]
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
