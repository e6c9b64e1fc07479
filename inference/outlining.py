"""Outlines of found nodules, drawn by the seeded network slice by slice."""

from collections import Counter
from typing import Any

import cv2
import numpy as np

from ct import boxes
from nodules.components import components

PATCH_PX = 128
"""Side of the patches around candidates: twice what the seeded network sees at first."""

NEAR_PX = 2
"""An outline counts if it comes as near as this to what was found, and is at
least `LEAST_SHARE` as large."""

LEAST_SHARE = 0.25

SAME_SHARE = 0.5
"""Two nodules are one if so much of the smaller outline is in the other."""


def outlined(
    hu: np.ndarray, labels: np.ndarray, seeded: Any
) -> tuple[np.ndarray, list[int]]:
    """The nodules as a seeded network outlines them, in the slices they were found in.

    Around the middle of each nodule in each of its slices a patch is cut out. Of what the
    network outlines there counts what touches, or nearly, what was found; what it does
    not come near stays as it was found. Pixels of two outlines are those of the higher
    score, and where they are mostly the same, the two nodules are one.

    Args:
        hu: (z, y, x) HU.
        labels: (z, y, x) labels 1 to n, by falling score.
        seeded: A `PatchPredictor`, or what outlines like one.

    Returns:
        The new labels 1 to m, and which of them each of the n nodules became.
    """
    from scipy.ndimage import find_objects

    places = [
        (label, z)
        for label, (depth, *_) in enumerate(find_objects(labels), start=1)
        for z in range(depth.start, depth.stop)
        if (labels[z] == label).any()
    ]
    size = (PATCH_PX, PATCH_PX)
    starts = [patch_start(labels[z] == label) for label, z in places]
    patches = np.stack(
        [
            boxes.cut(hu[z], start, size, fill=int(hu[z].min()))
            for (_, z), start in zip(places, starts, strict=True)
        ]
    )
    masks = seeded.probability(patches) >= seeded.postprocess.threshold
    result = np.zeros_like(labels)
    sizes: Counter[int] = Counter()
    shared: dict[int, Counter[int]] = {}
    for (label, z), start, mask in zip(places, starts, masks, strict=True):
        outline = np.zeros(labels.shape[1:], bool)
        inside, covered = boxes.overlap(start, size, outline.shape)
        outline[inside] = mask[covered]
        outline = counted(outline, labels[z] == label)
        owners = result[z][outline]
        sizes[label] += len(owners)
        shared.setdefault(label, Counter()).update(owners[owners > 0].tolist())
        result[z][outline & (result[z] == 0)] = label
    return renumbered(result, sizes, shared)


def patch_start(mask: np.ndarray) -> tuple[int, ...]:
    """Where a patch begins whose middle is that of a (y, x) mask."""
    middle = np.argwhere(mask).mean(axis=0).tolist()
    return tuple(round(at) - PATCH_PX // 2 for at in middle)


def counted(outline: np.ndarray, own: np.ndarray) -> np.ndarray:
    """What counts of an outline: its parts near what was found; and the rest of that.

    Args:
        outline: (y, x) bool, of the seeded network.
        own: (y, x) bool, as it was found.
    """
    near = dilated(own)
    parts = components(outline[None], 26)[0]
    kept = np.isin(parts, np.setdiff1d(parts[near], 0))
    if np.count_nonzero(kept) < LEAST_SHARE * np.count_nonzero(own):
        return own
    own_parts = components(own[None], 26)[0]
    met = np.isin(own_parts, own_parts[dilated(kept)])
    return kept | (own & ~met)


def dilated(mask: np.ndarray) -> np.ndarray:
    """A (y, x) bool mask, `NEAR_PX` wider on all sides."""
    side = 2 * NEAR_PX + 1
    return cv2.dilate(mask.view(np.uint8), np.ones((side, side), np.uint8)) > 0


def renumbered(
    labels: np.ndarray, sizes: Counter[int], shared: dict[int, Counter[int]]
) -> tuple[np.ndarray, list[int]]:
    """Labels without those that are one with another; and what each became.

    Args:
        labels: (z, y, x) labels; some may have lost all voxels to others.
        sizes: Voxels of each label's outline.
        shared: Of each label, how many of these an earlier one had taken.
    """
    left = np.bincount(labels.ravel(), minlength=max(sizes) + 1)
    root: dict[int, int] = {}
    for label in sorted(sizes):
        root[label] = label
        for owner, count in shared[label].most_common(1):
            least = SAME_SHARE * min(sizes[label], sizes[owner])
            if count >= least or not left[label]:
                root[label] = root[owner]
    kept = sorted(set(root.values()))
    new = np.zeros(max(sizes) + 1, labels.dtype)
    for label, first in root.items():
        new[label] = kept.index(first) + 1
    return new[labels], new[sorted(root)].tolist()
