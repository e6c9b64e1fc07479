"""Inference with a seeded network, which outlines the nodule at the centre of a patch.

The centre of a patch is the seed point, such as a click or a candidate. The network first sees
the centre at the resolution of the patch. If the nodule reaches the border of that view, a
second look covers twice the side at half the resolution. If the nodule found in all slices
together lies off the centre, the slices are looked at once more, centred on the nodule.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

import config
from ct import boxes
from ct.inputs import to_input
from nodules.components import components, keep_likeliest
from training import runs

BORDER_PX = 2
"""Distance from the border of the view within which a nodule may extend beyond it."""

FURTHER = 2
"""Downsampling factor of the wider second look, along each axis."""

OFF_MIDDLE_PX = 6
"""Distance between the centres of nodule and patches from which a second look is made."""

SURER = 0.05
"""Least gain in expected Dice for which the second look replaces the first."""

LEAST_CHANCE = 0.02
"""Probabilities below this count as 0; they are so many that their sum would matter."""

TURNS = 8
"""Orientations of a patch: four quarter turns of it and of its mirror image."""


class PatchPredictor:
    """A seeded network, built and loaded once for any number of patches.

    Args:
        run_dir: Run directory made by train.py.
        settings: Settings of the run, with `batches.crop` seed.
        batch_size: Images per network call; the last batch is padded to it, so that
            TensorFlow traces the network once.
        turns: Number of the `TURNS` that are averaged; 1 is the patch as it is.

    Attributes:
        postprocess: Settings that turn the probabilities of a nodule's slices into a mask.

    Raises:
        ValueError: If the run was not trained on patches, or `turns` is out of range.
    """

    def __init__(
        self,
        run_dir: Path,
        settings: config.Experiment,
        *,
        batch_size: int = 64,
        turns: int = 1,
    ) -> None:
        if settings.batches.crop != "seed":
            raise ValueError(
                f"{run_dir}: the run was trained with batches.crop="
                f"{settings.batches.crop}; expected seed, patches around a nodule"
            )
        config.require(1 <= turns <= TURNS, "turns", turns, f"1 to {TURNS}")
        self.batches = settings.batches
        self.batch_size = batch_size
        self.turns = turns
        self.postprocess = settings.postprocess
        self.network: Any = runs.load_network(
            run_dir, settings, settings.batches.slice_px
        )

    def probability(self, patches: np.ndarray) -> np.ndarray:
        """Computes the probability of the nodule at the centre of each patch.

        Args:
            patches: (n, y, x) numbers, an increasing linear function of HU that may differ
                from patch to patch.

        Returns:
            (n, y, x) float32; 0 outside what the network saw.

        Raises:
            ValueError: If `patches` has another shape or type, or is not finite.
        """
        patches = checked_patches(patches)
        shape, size = patches.shape[1:], self.batches.slice_px
        near = self.look(
            [crop_to_centre(pad_to_size(patch, size), size) for patch in patches]
        )
        prob = (
            np.stack([place_at_centre(image, shape) for image in near])
            if len(near)
            else near
        )
        beyond = any(full > part for full, part in zip(shape, size, strict=True))
        if not beyond or not len(patches):
            return prob.reshape(patches.shape)
        wide = tuple(FURTHER * length for length in size)
        again = np.flatnonzero(reaches_border(near, self.postprocess.threshold))
        far = [downsample(crop_to_centre(patches[i], wide)) for i in again]
        for i, image in zip(again, self.look(far), strict=True):
            prob[i] = place_at_centre(cv2.resize(image, wide[::-1]), shape)
        return prob

    def nodule_probability(self, slices: np.ndarray) -> np.ndarray:
        """Computes the probability of one nodule in patches of its slices.

        The first look takes the centre of each slice for the nodule. If the nodule found in
        all slices together lies off that centre, a second look is centred on it. The second
        look is returned if its expected Dice is higher by `SURER`.

        Args:
            slices: (n, y, x) numbers, patches of the nodule's slices in order, all cut out
                at the same place; slices may be missing.

        Returns:
            (n, y, x) float32; 0 outside what the network saw.

        Raises:
            ValueError: See `probability`.
        """
        slices = checked_patches(slices)
        first = self.probability(slices)
        threshold = self.postprocess.threshold
        middle_yx = middle_of_nodule(first, threshold) if len(first) else None
        if middle_yx is None:
            return first
        off = middle_yx - (np.array(first.shape[1:]) - 1) / 2
        if np.hypot(*off) < OFF_MIDDLE_PX:
            return first
        y, x = np.rint(off).astype(int).tolist()
        size = (first.shape[1], first.shape[2])
        moved = [
            boxes.cut(image, (y, x), size, fill=float(image.min())) for image in slices
        ]
        second = np.zeros_like(first)
        for image, found in zip(second, self.probability(np.stack(moved)), strict=True):
            boxes.add(image, found, (y, x))
        surer = expected_dice(second) >= expected_dice(first) + SURER
        return second if surer else first

    def look(self, images: list[np.ndarray]) -> np.ndarray:
        """Returns the (n, y, x) float32 probability of images of the network's size."""
        inputs = [to_input(image, None, self.batches) for image in images]
        found = np.zeros((len(images), *self.batches.slice_px), np.float32)
        turned = (turn(image, t) for image in inputs for t in range(self.turns))
        for number, prob in enumerate(self.predicted(turned)):
            index, t = divmod(number, self.turns)
            found[index] += undo_turn(prob, t)
        found /= self.turns
        return found

    def predicted(self, inputs: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """Yields the network's probability of each input, computed in batches."""
        batch = np.empty((self.batch_size, *self.batches.slice_px, 1), np.float32)
        count = 0
        for image in inputs:
            batch[count, ..., 0] = image
            count += 1
            if count == self.batch_size:
                yield from self.predicted_batch(batch)
                count = 0
        yield from self.predicted_batch(batch)[:count] if count else ()

    def predicted_batch(self, batch: np.ndarray) -> np.ndarray:
        return np.asarray(runs.mask_of(self.network.predict_on_batch(batch)))[..., 1]


def checked_patches(patches: np.ndarray) -> np.ndarray:
    """Returns the patches as float32.

    Raises:
        ValueError: If they are not an (n, y, x) array of finite numbers.
    """
    patches = np.asarray(patches)
    if patches.ndim != 3 or patches.dtype.kind not in "iufb" or 0 in patches.shape[1:]:
        raise ValueError(
            f"patches have shape {patches.shape} and type {patches.dtype}; expected "
            "(n, y, x) numbers"
        )
    patches = patches.astype(np.float32)
    if not np.isfinite(patches).all():
        wrong = np.flatnonzero(~np.isfinite(patches).all(axis=(1, 2)))
        raise ValueError(
            f"{len(wrong)} of {len(patches)} patches, the first {wrong[0]}, hold NaN or "
            "infinity; expected finite numbers"
        )
    return patches


def crop_to_centre(patch: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Crops a patch to its centre; pads a smaller patch with its least value."""
    start = boxes.crop_at_centre(patch.shape, size).start
    return boxes.cut(patch, start, size, fill=float(patch.min()))


def pad_to_size(patch: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Pads a patch to at least `size` by repeating its border pixels."""
    start = boxes.crop_at_centre(patch.shape, size).start
    lacking = [
        (max(-first, 0), max(first + seen - length, 0))
        for first, seen, length in zip(start, size, patch.shape, strict=True)
    ]
    return np.pad(patch, lacking, mode="edge")


def place_at_centre(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Places an image at the centre of an array of another shape, 0 elsewhere."""
    whole = np.zeros(shape, image.dtype)
    boxes.add(whole, image, boxes.crop_at_centre(shape, image.shape).start)
    return whole


def downsample(image: np.ndarray) -> np.ndarray:
    """Downsamples an image to the mean of every `FURTHER` x `FURTHER` pixels."""
    size = tuple(length // FURTHER for length in image.shape)
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)


def reaches_border(prob: np.ndarray, threshold: float) -> np.ndarray:
    """Returns (n,) bool, True where a pixel near the border reaches `threshold`."""
    inner = np.zeros(prob.shape[1:], bool)
    inner[BORDER_PX:-BORDER_PX, BORDER_PX:-BORDER_PX] = True
    return prob[:, ~inner].max(axis=1, initial=0) >= threshold


def middle_of_nodule(prob: np.ndarray, threshold: float) -> np.ndarray | None:
    """Returns the (y, x) centre of the nodule over all its slices; None if there is none."""
    parts = components(prob >= np.float32(threshold), 26)
    nodule = np.argwhere(keep_likeliest(parts, prob))
    return nodule[:, 1:].mean(axis=0) if len(nodule) else None


def expected_dice(prob: np.ndarray) -> float:
    """Computes the highest Dice that a map expects of its own mask at any threshold.

    If pixel i is nodule with probability p_i, the mask {p >= t} and the nodule are expected
    to share the sum of p_i in the mask, so their Dice is close to 2 sum(p_i in the mask) /
    (pixels in the mask + sum(p_i)).

    Args:
        prob: Probabilities, any shape; values below `LEAST_CHANCE` count as 0.

    Returns:
        0 to 1; 0 if no probability reaches `LEAST_CHANCE`.

    Reference: Lipton et al. 2014, section 4 (F1, which is Dice).
    """
    chances = np.sort(prob[prob >= np.float32(LEAST_CHANCE)])[::-1]
    if not chances.size:
        return 0.0
    shared = np.cumsum(chances, dtype=np.float64)
    return float((2 * shared / (np.arange(1, len(chances) + 1) + shared[-1])).max())


def turn(image: np.ndarray, number: int) -> np.ndarray:
    """Turns a square image to one of the `TURNS`; number 0 leaves it as it is."""
    return np.rot90(image[:, ::-1] if number >= 4 else image, number % 4)


def undo_turn(image: np.ndarray, number: int) -> np.ndarray:
    """Undoes `turn`."""
    image = np.rot90(image, -number % 4)
    return image[:, ::-1] if number >= 4 else image
