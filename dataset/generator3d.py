"""Makes augmented 3-D batches, and tiles for validation, from volumes of the table.

Needs the volumes that table.py stores with `table.volume_spacing_mm`; `input_px` of
`config.Batches` is then (z, y, x). `data_generator.py` displays them and passes them to
Keras.
"""

import math
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import config
from augment import augment2d, augment3d, gas, lesions, synthesis
from ct import boxes, inputs
from ct.boxes import Box, Crop
from ct.geometry import Grid, flip_xy
from ct.scan import PHANTOM, consensus
from dataset.batching import (
    CANDIDATE_PX,
    VOLUME_BATCH,
    VOLUME_ORDER,
    Generator,
    TileGenerator,
    count_batches,
    cut_sample,
    find_usable,
)
from dataset.slice_table import SliceTable

CACHE_BYTES = 2**33
"""Memory limit of a volume cache, enough for 290 chests at 1.5 mm or 85 at 1 mm. Training and
validation have a cache each. Decompressing a volume again takes 0.6 s at 1 mm."""

LEAST_VOXELS = 4
"""Minimum size of a nodule component that crops are placed around: hardly anything is left of
a smaller one after rotation."""

DENSE_HU = -500
"""Lower HU limit of dense voxels in the lungs: vessels, airway walls, the pleura, nodules."""

INNER_PX = 3
"""Least depth inside the lungs, in voxels, at which a dense voxel counts as inner. Inner ones
lie among vessels; they are drawn as often as those of the whole lungs, most of which lie at the
pleura."""

MOST_DENSE = 20_000
"""Upper limit of the dense voxels of each kind kept per volume, spread evenly over all."""

CANDIDATE_REACH = [length / 2 - 1 for length in CANDIDATE_PX]
"""Distance limit per axis, in voxels, of a simulated nodule from the centre of its crop."""

CANDIDATES_PER_SCAN = 4
"""Candidates drawn in succession from a scan, since reading it costs more than they do."""

TILE_MARGIN_PX = 4
"""Margin of the validation tiles around the bounding box of the lungs, in voxels."""


@dataclass(frozen=True, eq=False)
class Volume:
    """Resampled volume of a scan, from which samples are cut.

    Attributes:
        hu: (z, y, x) int16.
        marks: (z, y, x) uint8 with the bits `augment2d.TARGET_BIT` and `augment2d.LUNG_BIT`.
        lung_box: Bounding box of the lungs; None without lungs.
        nodule_boxes: Boxes of the components of a nodule target; see `nodule_boxes`.
        others: Flat indices of the voxels on which candidates that are not aimed at a nodule
            are centred: `dense_voxels`, which include those of nodules, and, for scans with
            marks from networks, `hard_negatives`. Empty unless `crop=candidate`.
    """

    hu: np.ndarray
    marks: np.ndarray
    lung_box: Box | None
    nodule_boxes: tuple[Box, ...]
    others: tuple[np.ndarray, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (self.hu, self.marks, *self.others))


class VolumeCache:
    """Thread-safe cache of decompressed volumes of a table; drops the least recently used.

    Args:
        table: The open table.
        batches: Target and consensus settings.
        candidates: (n, 3) LPS x, y, z in mm of marks from networks, by scan id; marks with
            no nodule at the centre of their crop are hard negatives.
        most_bytes: Memory limit in bytes.
    """

    def __init__(
        self,
        table: SliceTable,
        batches: config.Batches,
        *,
        candidates: Mapping[str, np.ndarray] | None = None,
        most_bytes: int = CACHE_BYTES,
    ) -> None:
        self.table = table
        self.batches = batches
        self.candidates = candidates or {}
        self.most_bytes = most_bytes
        self.kept: OrderedDict[int, Volume] = OrderedDict()
        self.kept_bytes = 0
        self.lock = threading.Lock()

    def read(self, scan_index: int) -> Volume:
        """Returns the volume of a scan; callers must not modify it."""
        with self.lock:
            if scan_index in self.kept:
                self.kept.move_to_end(scan_index)
                return self.kept[scan_index]
        # Read without the lock: two threads may read the same volume, but it is kept once.
        volume = read_table_volume(self.table, scan_index, self.batches)
        scan_id = str(self.table.scans["scan_id"][scan_index])
        if scan_id in self.candidates:
            grid = self.table.volume_grid(scan_index)
            places = voxels_at(self.candidates[scan_id], grid)
            negatives = hard_negatives(places, volume.marks)
            volume = replace(volume, others=(*volume.others, negatives))
        with self.lock:
            if scan_index not in self.kept:
                self.kept[scan_index] = volume
                self.kept_bytes += volume.nbytes
            while self.kept_bytes > self.most_bytes:
                self.kept_bytes -= self.kept.popitem(last=False)[1].nbytes
        return volume


class VolumeGenerator(Generator):
    """Generator of batches of crops from volumes; see `Generator`.

    Args:
        table: The open table, made with volumes.
        scans: Indices of scans of the table, e.g. from `split.scans_of_part`.
        batches: Crop, window, target and batch size.
        augmentation: Augmentation settings; None for plain crops.
        pathology: Lesions to simulate in augmented samples; None for none. They use a
            random stream of their own, so the augmentation is the same with and without
            them. Simulated nodules never take the shape of a nodule of a patient who is in the
            table but has none of these scans.
        candidates: See `VolumeCache`. In scans with hard negatives, these make up a third
            of the samples that are not centred on a nodule.
        seed: Seed of order, crops and augmentation.
        steps_per_epoch: Batches per epoch; 0 for as many as hold all scans once.
        shuffle: True draws a new order and new augmentation each epoch; False keeps the
            scans in the order given, with the same crops every epoch.
        with_slice_label: See `Generator`.

    Raises:
        ValueError: If no scan is usable, or the input would be masked by the target.
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
        candidates: Mapping[str, np.ndarray] | None = None,
        steps_per_epoch: int = 0,
        shuffle: bool = True,
        with_slice_label: bool = False,
    ) -> None:
        self.table = table
        self.scans = usable_scans(table, scans, batches)
        patients = table.scans["patient_id"][self.scans].tolist()
        self.phantoms = np.array([name.startswith(PHANTOM) for name in patients], bool)
        self.each = CANDIDATES_PER_SCAN if batches.crop == "candidate" else 1
        own = len(self.scans) * self.each
        self.samples = steps_per_epoch * batches.batch_size or own
        steps = count_batches(self.samples, batches)
        super().__init__(
            batches,
            steps,
            seeds=(VOLUME_BATCH, seed),
            shuffle=shuffle,
            with_slice_label=with_slice_label,
        )
        self.augmentation = augmentation
        self.held_out = table.other_patients(scans)
        self.pathology = lesions.checked_lesions(pathology, batches, self.held_out)
        self.seed = seed
        self.cache = VolumeCache(table, batches, candidates=candidates)

    def order_of_epoch(self, epoch: int) -> np.ndarray:
        """Returns the scans of an epoch, batch after batch; see `draw_scans`."""
        each, count = self.each, len(self.scans)
        visits = -(-self.samples // each)
        if not self.shuffle:
            spread = np.arange(visits)
            spread = spread % count if visits >= count else spread * count // visits
            return self.scans[spread].repeat(each)[: self.samples]
        visited = draw_scans(
            self.scans,
            self.phantoms,
            visits,
            self.batches.real_fraction,
            (VOLUME_ORDER, self.seed, epoch),
        )
        return visited.repeat(each)[: self.samples]

    def sample(
        self, row: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Makes a (z, y, x) float32 input and a (z, y, x) uint8 mask of 0 and 1 from a scan."""
        volume = self.cache.read(int(row))
        crop = self.crop(volume, rng)
        if self.augmentation is None:
            return cut_sample(volume.hu, volume.marks, crop.start, self.batches)
        size = self.batches.volume_px
        warp = augment3d.draw_volume_warp(self.augmentation, crop, size, rng)
        if self.augmentation.gas:
            volume = self.with_gas(volume, self.augmentation.gas, rng.spawn(1)[0])
        if self.pathology is not None:
            own = rng.spawn(1)[0]
            volume, warp = self.with_lesions(volume, warp, self.pathology, own)
        return self.changed(volume, warp, self.augmentation, rng)

    def with_gas(
        self, volume: Volume, share: float, rng: np.random.Generator
    ) -> Volume:
        """Returns the volume with simulated bowel gas in a `share` of the calls."""
        if rng.random() >= share:
            return volume
        spacing_mm = (self.table.settings.volume_spacing_mm,) * 3
        lung = volume.marks & augment2d.LUNG_BIT
        return replace(volume, hu=gas.paint_gas(volume.hu, lung, spacing_mm, rng))

    def with_lesions(
        self,
        volume: Volume,
        warp: augment3d.VolumeWarp,
        pathology: config.Lesions,
        rng: np.random.Generator,
    ) -> tuple[Volume, augment3d.VolumeWarp]:
        """Returns the volume with simulated lesions, and the warp adapted to it.

        If nodules are the target, they are simulated within the field of view of the warp
        and added to the reference; the returned volume is cut to that field of view.
        """
        spacing_mm = (self.table.settings.volume_spacing_mm,) * 3
        if self.batches.target == "lung":
            lung = ((volume.marks & augment2d.LUNG_BIT) > 0).view(np.uint8)
            hu = lesions.simulate_lesions(
                volume.hu, lung, spacing_mm, pathology, rng, held_out=self.held_out
            )
            return replace(volume, hu=hu), warp
        size, full = self.batches.volume_px, volume.hu.shape
        box = augment3d.sampled_box(warp, size, full)
        if box is None:
            return volume, warp
        beyond = math.ceil(lesions.NODULE_MM[1] / 2 / spacing_mm[0])
        room = boxes.grow_box(box, beyond, full)
        start = np.array([part.start for part in room])
        to_output = np.linalg.inv(warp.matrix[:, :3])

        def seen(place: tuple[float, ...]) -> bool:
            at = to_output @ (start + place - warp.matrix[:, 3])
            return bool(((at >= 0) & (at < size)).all())

        marks = volume.marks[room]
        lung = ((marks & augment2d.LUNG_BIT) > 0).view(np.uint8)
        places = None
        if self.batches.crop == "candidate":
            middle = warp.matrix @ (*boxes.centre(boxes.full_box(size)), 1) - start
            box = boxes.near(
                middle, CANDIDATE_REACH, (1, 1, 1), boxes.full_box(lung.shape)
            )
            # A real nodule in the centre stays as it is; else one may be placed in the lungs.
            taken = (marks[box] & augment2d.TARGET_BIT).any()
            places = np.argwhere(lung[box] & ~taken) + [part.start for part in box]
        hu, drawn = lesions.simulate_nodules(
            volume.hu[room],
            lung,
            spacing_mm,
            pathology,
            rng,
            held_out=self.held_out,
            seen=seen,
            places=places,
        )
        marks = marks | drawn * np.uint8(augment2d.TARGET_BIT)
        matrix = np.column_stack((warp.matrix[:, :3], warp.matrix[:, 3] - start))
        part = Volume(hu, marks, None, ())
        return part, replace(warp, matrix=matrix)

    def changed(
        self,
        volume: Volume,
        warp: augment3d.VolumeWarp,
        changes: config.Augment,
        rng: np.random.Generator,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Warps and augments a volume; returns the input and the target mask."""
        size = self.batches.volume_px
        scanner = augment3d.draw_scanner(changes, size, rng)
        marks = augment3d.warp_volume_labels(volume.marks, warp, size)
        lung = marks & augment2d.LUNG_BIT
        hu = augment3d.warp_volume(volume.hu, warp, size)
        if rng.random() < changes.synthesis:
            hu = synthesis.synthesize_patch(hu, lung, rng)
        hu = augment3d.simulate_scanner(hu, scanner, rng)
        marks = augment3d.cut_to_field(marks, scanner.field, 0)
        lung = marks & augment2d.LUNG_BIT
        image = inputs.to_input(hu, lung, self.batches, gamma=scanner.gamma)
        return image, marks & augment2d.TARGET_BIT

    def crop(self, volume: Volume, rng: np.random.Generator) -> Crop:
        """Draws the part of the volume that becomes the sample, by `batches.crop`."""
        size, full = self.batches.volume_px, volume.hu.shape
        near, which, *place = rng.random(8)
        found = volume.nodule_boxes
        if self.batches.crop == "centre":
            return boxes.crop_around(boxes.centre(boxes.full_box(full)), full, size)
        box = volume.lung_box or boxes.full_box(full)
        if self.batches.crop == "body" and near < 0.5:
            box = boxes.full_box(full)
        wanted = found and near < self.batches.nodule_fraction
        if self.batches.crop == "candidate":
            others = [kind for kind in volume.others if len(kind)]
            if wanted:
                point = boxes.centre(found[int(which * len(found))])
            elif others:
                kind = others[int(place[0] * len(others))]
                point = np.unravel_index(kind[int(which * len(kind))], full)
            else:
                point = boxes.point_in(box, place[3:])
            return boxes.crop_on(point, size)
        if wanted and self.batches.crop == "nodule":
            box = found[int(which * len(found))]
            half = [(part.stop - part.start) / 2 for part in box]
            return boxes.crop_near(boxes.centre(box), half, full, size, place[:3])
        return boxes.crop_around(boxes.point_in(box, place[3:]), full, size)


def draw_scans(
    scans: np.ndarray,
    phantoms: np.ndarray,
    count: int,
    real_fraction: float,
    seeds: tuple[int, ...],
) -> np.ndarray:
    """Draws the scans of an epoch in random order.

    Args:
        scans: (n,) indices; each is drawn equally often within its kind, or once more.
        phantoms: (n,) bool, True for phantoms.
        count: Number of scans to draw.
        real_fraction: Share of real scans (no phantoms), rounded to whole scans. If it is
            0, or if all scans are of one kind, the kind is ignored.
        seeds: Seeds of the order and of the choice of scans that are drawn once more.
    """

    def turns(kind: np.ndarray, most: int) -> np.ndarray:
        orders = [
            np.random.default_rng((*seeds, turn)).permutation(kind)
            for turn in range(-(-most // len(kind)))
        ]
        return np.concatenate([kind[:0], *orders])[:most]

    if not real_fraction or not 0 < phantoms.sum() < len(scans):
        return turns(scans, count)
    real = round(real_fraction * count)
    mixed = [turns(scans[~phantoms], real), turns(scans[phantoms], count - real)]
    return np.random.default_rng((*seeds, count)).permutation(np.concatenate(mixed))


def validation_of_volumes(
    table: SliceTable,
    scans: np.ndarray,
    batches: config.Batches,
    *,
    most: int = 0,
    **options: Any,
) -> Generator:
    """Builds the validation generator: all tiles of volumes, or candidates.

    It is the same in each epoch. See `tiles_of_volumes` for the arguments.
    """
    if batches.crop != "candidate":
        return tiles_of_volumes(table, scans, batches, most=most, **options)
    return VolumeGenerator(
        table,
        scans,
        batches,
        None,
        seed=0,
        steps_per_epoch=count_batches(most, batches),
        shuffle=False,
        **options,
    )


def tiles_of_volumes(
    table: SliceTable, scans: np.ndarray, batches: config.Batches, **options: Any
) -> TileGenerator:
    """Builds a generator of all tiles of some volumes, for validation.

    The tiles cover the bounding box of the lungs with a margin, or the whole volume if it
    has no lungs.

    Args:
        table: The open table, made with volumes.
        scans: Indices of scans of the table.
        batches: Window, target, tile size and batch size.
        options: Options of `TileGenerator`.
    """
    cache = VolumeCache(table, batches)

    def read(scan: int) -> tuple[np.ndarray, np.ndarray]:
        volume = cache.read(scan)
        return volume.hu, volume.marks

    tiles = []
    for scan in usable_scans(table, scans, batches).tolist():
        volume = cache.read(scan)
        full = volume.hu.shape
        box = boxes.grow_box(
            volume.lung_box or boxes.full_box(full), TILE_MARGIN_PX, full
        )
        tiles += [(scan, tile.start) for tile in boxes.tiles(box, batches.volume_px)]
    return TileGenerator(tiles, read, batches, **options)


def read_table_volume(
    table: SliceTable, scan_index: int, batches: config.Batches
) -> Volume:
    """Reads a scan's volume from the table, with its target, boxes and dense voxels."""
    hu, lung = (table.volume(scan_index, name) for name in ("hu", "lung"))
    lung_bits = (lung > 0) * np.uint8(augment2d.LUNG_BIT)
    if batches.target == "lung":
        return Volume(hu, lung_bits | (lung > 0), boxes.bounding_box(lung), ())
    mask = consensus(
        table.volume(scan_index, "reader_bits"),
        table.volume(scan_index, "nodule_labels"),
        table.readers_of_label(scan_index),
        level=batches.consensus_level,
        min_readers=batches.min_readers,
    )
    dense = dense_voxels(hu, lung) if batches.crop == "candidate" else ()
    return Volume(
        hu, lung_bits | mask, boxes.bounding_box(lung), nodule_boxes(mask), dense
    )


def voxels_at(places_lps_mm: np.ndarray, grid: Grid) -> np.ndarray:
    """Converts (n, 3) LPS x, y, z in mm to (n, 3) voxel indices (z, y, x).

    Raises:
        ValueError: If a point lies outside the volume.
    """
    index = np.rint(grid.ras_mm_to_index(flip_xy(places_lps_mm))).astype(int)
    outside = ((index < 0) | (index >= grid.shape)).any(axis=1)
    if outside.any():
        raise ValueError(
            f"{outside.sum()} of {len(index)} points lie outside the volume, the first "
            f"at {tuple(places_lps_mm[outside][0].tolist())} LPS mm"
        )
    return index


def hard_negatives(places: np.ndarray, marks: np.ndarray) -> np.ndarray:
    """Returns int32 flat indices of the voxels whose crops have no nodule at the centre.

    Args:
        places: (n, 3) indices (z, y, x) in the volume.
        marks: Target and lung bits; see `Volume`.
    """
    nodule = marks & augment2d.TARGET_BIT
    alone = [
        place
        for place in places.tolist()
        if not boxes.cut(
            nodule, boxes.crop_on(place, CANDIDATE_PX).start, CANDIDATE_PX, fill=0
        ).any()
    ]
    index = np.array(alone, np.intp).reshape(-1, 3)
    return np.ravel_multi_index(tuple(index.T), marks.shape).astype(np.int32)


def dense_voxels(hu: np.ndarray, lung: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finds int32 flat indices of all dense voxels in the lungs, and of the inner ones."""
    from scipy import ndimage

    box = boxes.bounding_box(lung) or boxes.full_box(lung.shape)
    inner = np.zeros(lung.shape, bool)
    inner[box] = ndimage.binary_erosion(lung[box] > 0, iterations=INNER_PX)
    kinds = []
    for within in (lung > 0, inner):
        found = np.flatnonzero((hu >= DENSE_HU) & within).astype(np.int32)
        kinds.append(found[:: len(found) // MOST_DENSE + 1])
    return kinds[0], kinds[1]


def nodule_boxes(mask: np.ndarray) -> tuple[Box, ...]:
    """Finds boxes of the (z, y, x) mask's components with `LEAST_VOXELS` or more voxels."""
    from scipy import ndimage

    labels, _ = ndimage.label(mask, np.ones((3, 3, 3)))
    return tuple(
        box
        for number, box in enumerate(ndimage.find_objects(labels), start=1)
        if np.count_nonzero(labels[box] == number) >= LEAST_VOXELS
    )


def usable_scans(
    table: SliceTable, scans: np.ndarray, batches: config.Batches
) -> np.ndarray:
    """Returns the scans with the masks that the settings need; see `batching.find_usable`.

    Raises:
        ValueError: If no scan is usable, or the table has no volumes.
    """
    if not table.settings.volume_spacing_mm:
        raise ValueError(
            f"{table.path} was made with table.volume_spacing_mm=0 and holds no volumes, "
            f"but batches.input_px is {batches.input_px}; run table.py again with "
            "--table.volume_spacing_mm"
        )
    scans = np.asarray(scans)
    return scans[find_usable(table, scans, batches, of="scans")]
