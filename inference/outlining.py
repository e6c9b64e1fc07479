"""Outlines of detected nodules, drawn slice by slice by the seeded network."""

from collections import Counter
from typing import Any

import cv2
import numpy as np

from ct import boxes
from nodules.components import components

PATCH_PX = 128
"""Side of the patches around candidates: twice the field of the network's first look."""

NEAR_PX = 2
"""Largest distance between an outline and the found mask for the outline to be used."""

LEAST_SHARE = 0.25
"""Least size of a usable outline, as a share of the found mask."""

SAME_SHARE = 0.5
"""Share of the smaller outline that must lie inside the other for two nodules to become one."""


def outline_nodules(
    hu: np.ndarray, labels: np.ndarray, seeded: Any
) -> tuple[np.ndarray, list[int]]:
    """Outlines nodules with a seeded network, in the slices they were found in.

    A patch is cut out around the centre of each nodule in each of its slices. Parts of the
    network's outline that touch or nearly touch the found mask are used; parts of the found
    mask that the outline does not come near are kept. Pixels in two outlines go to the
    nodule of higher score; two nodules with mostly the same outline become one.

    Args:
        hu: (z, y, x) HU.
        labels: (z, y, x) labels 1 to n, by falling score.
        seeded: `PatchPredictor`, or an object with its `probability` and `postprocess`.

    Returns:
        The new labels 1 to m, and for each of the n nodules its new label.
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
        outline = merge_with_outline(outline, labels[z] == label)
        owners = result[z][outline]
        sizes[label] += len(owners)
        shared.setdefault(label, Counter()).update(owners[owners > 0].tolist())
        result[z][outline & (result[z] == 0)] = label
    return merge_same_outlines(result, sizes, shared)


def patch_start(mask: np.ndarray) -> tuple[int, ...]:
    """Returns the (y, x) start of the patch centred on a (y, x) mask."""
    middle = np.argwhere(mask).mean(axis=0).tolist()
    return tuple(round(at) - PATCH_PX // 2 for at in middle)


def merge_with_outline(outline: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Merges an outline with the found mask of its nodule.

    Keeps the outline's components near the found mask, and adds the found components that
    they do not come near. An outline that is too small leaves the found mask as it is.

    Args:
        outline: (y, x) bool mask drawn by the seeded network.
        own: (y, x) bool mask as it was found.
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
    """Dilates a (y, x) bool mask by `NEAR_PX` on all sides."""
    side = 2 * NEAR_PX + 1
    return cv2.dilate(mask.view(np.uint8), np.ones((side, side), np.uint8)) > 0


def merge_same_outlines(
    labels: np.ndarray, sizes: Counter[int], shared: dict[int, Counter[int]]
) -> tuple[np.ndarray, list[int]]:
    """Merges labels with mostly the same outline and renumbers the rest from 1.

    Args:
        labels: (z, y, x) labels; some may have lost all voxels to others.
        sizes: Voxels in the outline of each label.
        shared: Voxels of each label's outline that belong to an earlier label, by that
            label.

    Returns:
        The new (z, y, x) labels, and the new label of each old one.
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
