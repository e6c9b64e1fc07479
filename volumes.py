"""Volumes of the table as augmented 3-D batches, and as tiles for validation.

The volumes are those that table.py stores with `table.volume_spacing_mm`; `input_px` of
`config.Batches` is then (z, y, x). `data_generator.py` draws them and hands them to Keras.
"""

import itertools
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace

import cv2
import numpy as np

import augment
import augment_volume
import config
import lesions
import synthesis
from augment_volume import Crop
from scan import AIR_HU, consensus
from slice_table import SliceTable

log = logging.getLogger(__name__)

ORDER, BATCH = 4, 5
"""First words of the seeds of the order of scans and of a batch; see data_generator.py."""

CACHE_BYTES = 2**30
"""Most memory for volumes that are kept after use: two hundred chests at 3 mm."""

TILE_MARGIN_PX = 4
"""How far the tiles of validation reach beyond the box around the lungs."""

Box = tuple[tuple[int, int], ...]
"""First voxel along z, y and x, and the one after the last."""


@dataclass(frozen=True, eq=False)
class Volume:
    """What samples are made of.

    Attributes:
        hu: (z, y, x) int16.
        marks: (z, y, x) uint8, `augment.TARGET_BIT` and `augment.LUNG_BIT`.
        lung_box: Around the lungs; None without lungs.
        nodule_boxes: Around each connected part of a nodule target.
    """

    hu: np.ndarray
    marks: np.ndarray
    lung_box: Box | None
    nodule_boxes: tuple[Box, ...]

    @property
    def nbytes(self) -> int:
        return self.hu.nbytes + self.marks.nbytes


class VolumeCache:
    """Volumes of a table, decompressed; those used last stay. Any thread may ask.

    Args:
        table: The open table.
        batches: Target and consensus.
        most_bytes: Memory of what is kept.
    """

    def __init__(
        self, table: SliceTable, batches: config.Batches, most_bytes: int = CACHE_BYTES
    ) -> None:
        self.table = table
        self.batches = batches
        self.most_bytes = most_bytes
        self.kept: OrderedDict[int, Volume] = OrderedDict()
        self.kept_bytes = 0
        self.lock = threading.Lock()

    def read(self, scan_index: int) -> Volume:
        """The volume of a scan; not to be written to."""
        with self.lock:
            if scan_index in self.kept:
                self.kept.move_to_end(scan_index)
                return self.kept[scan_index]
        # Outside of the lock: two threads may read the same volume, and it is kept once.
        volume = read_volume(self.table, scan_index, self.batches)
        with self.lock:
            if scan_index not in self.kept:
                self.kept[scan_index] = volume
                self.kept_bytes += volume.nbytes
            while self.kept_bytes > self.most_bytes:
                self.kept_bytes -= self.kept.popitem(last=False)[1].nbytes
        return volume


class VolumeGenerator:
    """Batches of crops of volumes by number: `len(generator)`, `generator[index]`.

    As of `data_generator.SliceGenerator`, a batch depends on (seed, epoch, index) alone,
    and any number of threads may ask for batches at once.

    Args:
        table: The open table, made with volumes.
        scans: Indices of scans of the table, e.g. of `slice_idx.scans_of_part`.
        batches: Crop, window, target and batch size.
        augmentation: Random changes; None gives plain crops.
        pathology: Lesions simulated in augmented samples; None for none. They have draws
            of their own, so the other changes are the same with and without.
        seed: Of order, crops and augmentation.
        steps_per_epoch: Batches per epoch; 0 for as many as hold all scans once.
        shuffle: True draws a new order and new changes each epoch; False gives the scans
            in the order given and the same crops every epoch.

    Attributes:
        epoch: The epoch that batches are made for; set it to resume.

    Raises:
        ValueError: If no scan can be used, or the settings give the answer away.
    """

    def __init__(
        self,
        table: SliceTable,
        scans: np.ndarray,
        batches: config.Batches,
        augmentation: config.Augment | None,
        *,
        seed: int,
        pathology: config.Lesions | None = None,
        steps_per_epoch: int = 0,
        shuffle: bool = True,
    ) -> None:
        cv2.setNumThreads(1)  # threads are those of the caller
        self.table = table
        self.scans = usable_scans(table, scans, batches)
        self.batches = batches
        self.augmentation = augmentation
        self.pathology = lesions.checked(pathology, batches)
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        self.steps = steps_per_epoch or -(-len(self.scans) // batches.batch_size)
        self.samples = len(self.scans)
        if steps_per_epoch:
            self.samples = steps_per_epoch * batches.batch_size
        self.cache = VolumeCache(table, batches)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """One batch: x (b, z, y, x, 1) float32, y (b, z, y, x, 2) uint8, background first.

        Raises:
            IndexError: If `index` is not from 0 to the number of batches.
        """
        epoch = self.epoch if self.shuffle else 0  # once: it may end meanwhile
        scans = self.scans_of_batch(index, epoch)
        rng = np.random.default_rng((BATCH, self.seed, epoch, index))
        samples = (self.sample(int(scan), rng) for scan in scans)
        return batch_of(samples, len(scans), self.batches)

    def on_epoch_end(self) -> None:
        """Goes on to the next epoch."""
        self.epoch += 1

    def scans_of_batch(self, index: int, epoch: int | None = None) -> np.ndarray:
        """(b,) scans of batch `index` of an epoch, by default the present one."""
        if epoch is None:
            epoch = self.epoch if self.shuffle else 0
        if not 0 <= index < self.steps:
            raise IndexError(f"batch {index}; expected 0 to {self.steps - 1}")
        size = self.batches.batch_size
        wanted = np.arange(index * size, min((index + 1) * size, self.samples))
        rounds, places = np.divmod(wanted, len(self.scans))
        if not self.shuffle:
            return self.scans[places]
        orders = {
            turn: np.random.default_rng(
                (ORDER, self.seed, epoch, int(turn))
            ).permutation(self.scans)
            for turn in np.unique(rounds)
        }
        return np.array([orders[r][p] for r, p in zip(rounds, places, strict=True)])

    def sample(
        self, scan_index: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """A crop as (z, y, x) float32 input and (z, y, x) uint8 mask of 0 and 1."""
        volume = self.cache.read(scan_index)
        crop = self.crop(volume, rng)
        if self.augmentation is None:
            return plain(volume, crop, self.batches)
        if self.pathology is not None:
            lung = ((volume.marks & augment.LUNG_BIT) > 0).view(np.uint8)
            spacing_mm = (self.table.settings.volume_spacing_mm,) * 3
            own = rng.spawn(1)[0]
            hu = lesions.simulate(volume.hu, lung, spacing_mm, self.pathology, own)
            volume = replace(volume, hu=hu)
        return self.changed(volume, crop, self.augmentation, rng)

    def changed(
        self,
        volume: Volume,
        crop: Crop,
        changes: config.Augment,
        rng: np.random.Generator,
    ) -> tuple[np.ndarray, np.ndarray]:
        """`sample` after its random changes."""
        size = self.batches.volume_px
        warp = augment_volume.draw_warp(changes, crop, size, rng)
        scanner = augment_volume.draw_scanner(changes, size, rng)
        marks = augment_volume.warp_labels(volume.marks, warp, size)
        lung = marks & augment.LUNG_BIT
        hu = augment_volume.warp_volume(volume.hu, warp, size)
        if rng.random() < changes.synthesis:
            hu = synthesis.synthetic(hu, lung, rng)
        hu = augment_volume.scanned(hu, scanner, rng)
        marks = augment_volume.within_field(marks, scanner.field, 0)
        lung = marks & augment.LUNG_BIT
        image = augment.to_input(hu, lung, self.batches, gamma=scanner.gamma)
        return image, marks & augment.TARGET_BIT

    def crop(self, volume: Volume, rng: np.random.Generator) -> Crop:
        """The part of the volume that becomes the sample, by `batches.crop`."""
        size, full = self.batches.volume_px, volume.hu.shape
        near, which, *place = rng.random(8)
        boxes = volume.nodule_boxes
        if self.batches.crop == "centre":
            return crop_around([(length - 1) / 2 for length in full], full, size)
        wanted = self.batches.crop == "nodule" and near < self.batches.nodule_fraction
        if wanted and boxes:
            box = boxes[int(which * len(boxes))]
            return crop_near(box, full, size, place[:3])
        box = volume.lung_box or tuple((0, length) for length in full)
        focus = [
            low + share * (high - 1 - low)
            for (low, high), share in zip(box, place[3:], strict=True)
        ]
        return crop_around(focus, full, size)


class VolumeTileGenerator:
    """Every tile of some volumes, in order: what inference will look at, for validation.

    Tiles cover the box around the lungs and a margin, or the volume where no lungs are
    known. Nothing is augmented.

    Args:
        table: The open table, made with volumes.
        scans: Indices of scans of the table.
        batches: Window, target, size of the tiles and of a batch.
        most: Most tiles, spread evenly over all; 0 for all.
    """

    def __init__(
        self,
        table: SliceTable,
        scans: np.ndarray,
        batches: config.Batches,
        *,
        most: int = 0,
    ) -> None:
        cv2.setNumThreads(1)
        self.batches = batches
        self.cache = VolumeCache(table, batches)
        tiles = [
            (int(scan), crop)
            for scan in usable_scans(table, scans, batches)
            for crop in tiles_of(self.cache.read(int(scan)), batches.volume_px)
        ]
        count = min(most or len(tiles), len(tiles))
        self.tiles = [tiles[i * len(tiles) // count] for i in range(count)]

    def __len__(self) -> int:
        return -(-len(self.tiles) // self.batches.batch_size)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """One batch, shaped as `VolumeGenerator`'s; the last may be smaller.

        Raises:
            IndexError: If `index` is not from 0 to the number of batches.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index}; expected 0 to {len(self) - 1}")
        size = self.batches.batch_size
        tiles = self.tiles[index * size : (index + 1) * size]
        samples = (
            plain(self.cache.read(scan), crop, self.batches) for scan, crop in tiles
        )
        return batch_of(samples, len(tiles), self.batches)

    def on_epoch_end(self) -> None:
        """Nothing: all epochs are the same."""


def read_volume(table: SliceTable, scan_index: int, batches: config.Batches) -> Volume:
    """A scan's volume from the table, with its target and where things are."""
    hu, lung = (table.volume(scan_index, name) for name in ("hu", "lung"))
    lung_bits = (lung > 0) * np.uint8(augment.LUNG_BIT)
    if batches.target == "lung":
        return Volume(hu, lung_bits | (lung > 0), box_of(lung), ())
    mask = consensus(
        table.volume(scan_index, "reader_bits"),
        table.volume(scan_index, "nodule_labels"),
        table.readers_of_label(scan_index),
        level=batches.consensus_level,
        min_readers=batches.min_readers,
    )
    return Volume(hu, lung_bits | mask, box_of(lung), nodule_boxes(mask))


def box_of(mask: np.ndarray) -> Box | None:
    """The box around what is above 0 in a (z, y, x) mask; None if nothing is."""
    box = []
    for axes in ((1, 2), (0, 2), (0, 1)):
        places = np.flatnonzero(mask.any(axis=axes))
        if not len(places):
            return None
        box.append((int(places[0]), int(places[-1]) + 1))
    return tuple(box)


def nodule_boxes(mask: np.ndarray) -> tuple[Box, ...]:
    """The box around each connected part of a (z, y, x) bool mask."""
    from scipy import ndimage

    labels, _ = ndimage.label(mask, np.ones((3, 3, 3)))
    return tuple(
        tuple((axis.start, axis.stop) for axis in box)
        for box in ndimage.find_objects(labels)
    )


def crop_around(focus_zyx, volume_px, output_px: tuple[int, int, int]) -> Crop:
    """The crop with a point in its middle, kept within the volume where it fits there."""
    middle = _middle(output_px)
    return Crop(_start(focus_zyx, middle, volume_px, output_px), middle)


def crop_near(box: Box, volume_px, output_px, share_zyx) -> Crop:
    """A crop that holds a box, or its middle if it is larger; turns are pinned to it.

    Args:
        box: Of a nodule.
        volume_px: (z, y, x) size of the volume.
        output_px: (z, y, x) size of the crop.
        share_zyx: Where the middle of the box lies in the crop, 0 to 1 of what is free.
    """
    focus = [(low + high - 1) / 2 for low, high in box]
    lies = []
    for (low, high), size, share in zip(box, output_px, share_zyx, strict=True):
        half = min((high - low) / 2, (size - 1) / 2)
        lies.append(half + share * (size - 1 - 2 * half))
    start = _start(focus, lies, volume_px, output_px)
    z, y, x = (point - first for point, first in zip(focus, start, strict=True))
    return Crop(start, (z, y, x))


def _middle(size_px: tuple[int, int, int]) -> tuple[float, float, float]:
    z, y, x = size_px
    return (z - 1) / 2, (y - 1) / 2, (x - 1) / 2


def _start(focus_zyx, lies_zyx, volume_px, output_px) -> tuple[int, int, int]:
    """Where the crop begins for `focus` to lie at `lies`, kept within the volume."""
    z, y, x = (
        min(max(round(focus - lies), 0), full - size)
        if full >= size
        else (full - size) // 2
        for focus, lies, full, size in zip(
            focus_zyx, lies_zyx, volume_px, output_px, strict=True
        )
    )
    return z, y, x


def tiles_of(volume: Volume, output_px: tuple[int, int, int]) -> list[Crop]:
    """Overlapping crops that cover the box around the lungs and a margin, from the feet up."""
    full = volume.hu.shape
    bounds = [(0, length) for length in full]
    if volume.lung_box is not None:
        bounds = [
            (max(low - TILE_MARGIN_PX, 0), min(high + TILE_MARGIN_PX, length))
            for (low, high), length in zip(volume.lung_box, full, strict=True)
        ]
    middle = _middle(output_px)
    starts = [
        [start for start, _ in augment.tiles_along(low, high, size)]
        for (low, high), size in zip(bounds, output_px, strict=True)
    ]
    return [Crop((z, y, x), middle) for z, y, x in itertools.product(*starts)]


def plain(
    volume: Volume, crop: Crop, batches: config.Batches
) -> tuple[np.ndarray, np.ndarray]:
    """A crop as (z, y, x) float32 input and (z, y, x) uint8 mask, unchanged."""
    size = batches.volume_px
    hu = augment_volume.cut(volume.hu, crop, size, fill=AIR_HU)
    marks = augment_volume.cut(volume.marks, crop, size, fill=0)
    image = augment.to_input(hu, marks & augment.LUNG_BIT, batches)
    return image, marks & augment.TARGET_BIT


def batch_of(
    samples: Iterable[tuple[np.ndarray, np.ndarray]],
    count: int,
    batches: config.Batches,
) -> tuple[np.ndarray, np.ndarray]:
    """`count` pairs of input and mask as x and y of a batch; see `VolumeGenerator`."""
    x = np.empty((count, *batches.volume_px, 1), np.float32)
    y = np.empty((count, *batches.volume_px, 2), np.uint8)
    for position, (image, mask) in enumerate(samples):
        x[position, ..., 0] = image
        y[position] = augment.one_hot(mask)
    return x, y


def usable_scans(
    table: SliceTable, scans: np.ndarray, batches: config.Batches
) -> np.ndarray:
    """The scans that have what the settings ask for; says how many it leaves out.

    Raises:
        ValueError: If none is left, the table has no volumes, or the input would be masked
            by the target.
    """
    if batches.target == "lung" and batches.lung_mask:
        raise ValueError(
            "batches.target=lung with batches.lung_mask shows the network the answer; "
            "add --batches.no-lung-mask"
        )
    if not table.settings.volume_spacing_mm:
        raise ValueError(
            f"{table.path} was made with table.volume_spacing_mm=0 and holds no volumes, "
            f"but batches.input_px is {batches.input_px}; run table.py again with "
            "--table.volume_spacing_mm"
        )
    scans = np.asarray(scans)
    needed, usable = [], np.ones(len(scans), bool)
    if batches.target == "nodule":
        needed.append("readers' outlines")
        usable &= table.scans["read"][scans] > 0
    if batches.target == "lung" or batches.lung_mask or batches.crop != "centre":
        needed.append("a lung mask")
        usable &= table.scans["has_lung"][scans] > 0
    if not usable.any():
        raise ValueError(
            f"{table.path}: none of the {len(scans)} scans can be used; expected scans "
            f"with {' and '.join(needed) or 'volumes'}; run preprocess.py and table.py "
            "with them"
        )
    if not usable.all():
        left_out = len(scans) - np.count_nonzero(usable)
        log.warning("%d scans left out: no %s", left_out, " and ".join(needed))
    return scans[usable]
