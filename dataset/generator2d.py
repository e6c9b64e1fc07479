"""Makes batches from slices of the table."""

import functools
from dataclasses import replace
from typing import Any

import numpy as np

import config
from augment import augment2d, lesions
from ct import boxes, inputs
from ct import scan as scans
from dataset.batching import (
    SLICE_BATCH,
    SLICE_NOISE,
    SLICE_ORDER,
    Generator,
    TileGenerator,
    count_batches,
    cut_sample,
    find_usable,
    reads_lung,
)
from dataset.slice_table import SliceTable


class SliceGenerator(Generator):
    """Generator of batches of slices; see `Generator`.

    Args:
        table: The open table.
        rows: Table rows to use, e.g. those of one part of the split.
        batches: Crop, window, target, batch size and share of nodule slices.
        augmentation: Augmentation settings; None for plain crops.
        pathology: Lesions to simulate in augmented samples; None for none. They use a
            random stream of their own, so the augmentation is the same with and without
            them. Simulated nodules never take the shape of a nodule of a patient who is in the
            table but has none of these rows.
        seed: Seed of order, crops and augmentation.
        steps_per_epoch: Batches per epoch; 0 for as many as hold all rows once.
        shuffle: True draws a new order and new augmentation each epoch. False is for
            validation: all epochs are the same, and rows keep the order given.
        balanced: Draw `batches.nodule_fraction` of each batch, and at least one row, from
            the rows with target and the others from those without; the rarer kind is
            repeated. False, or a fraction of 0, takes rows as they are.
        with_slice_label: See `Generator`.

    Raises:
        ValueError: If no row is usable, or the input would be masked by the target.
    """

    def __init__(
        self,
        table: SliceTable,
        rows: np.ndarray,
        batches: config.Batches,
        augmentation: config.Augment | None,
        *,
        seed: int,
        pathology: config.Lesions | None = None,
        steps_per_epoch: int = 0,
        shuffle: bool = True,
        balanced: bool = True,
        with_slice_label: bool = False,
    ) -> None:
        self.table = table
        self.rows = usable_rows(table, rows, batches)
        super().__init__(
            batches,
            steps_per_epoch or count_batches(len(self.rows), batches),
            seeds=(SLICE_BATCH, seed),
            shuffle=shuffle,
            with_slice_label=with_slice_label,
        )
        self.augmentation = augmentation
        self.held_out = table.other_patients(table.rows["scan"][rows])
        self.pathology = lesions.checked_lesions(pathology, batches, self.held_out)
        self.seed = seed
        self.readers = None
        if batches.reference != "consensus":
            self.readers = Readers(table, batches.min_readers)
        self.groups = [(self.rows, batches.batch_size)]
        if balanced and batches.nodule_fraction > 0:
            self.groups = balanced_groups(table, self.rows, batches)
        self.rows_once = len(self.groups) == 1 and steps_per_epoch == 0
        self.noise_field = None
        if augmentation is not None and augmentation.noise_hu > 0:
            seeds = (SLICE_NOISE, seed)
            self.noise_field = augment2d.noise_field(batches.slice_px, seed=seeds)

    def order_of_epoch(self, epoch: int) -> np.ndarray:
        """Returns the table rows of an epoch, batch after batch."""
        rng = None
        if self.shuffle:
            rng = np.random.default_rng((SLICE_ORDER, self.seed, epoch))
        if self.rows_once:
            return draw_rows(self.rows, len(self.rows), rng)
        columns = [
            draw_rows(rows, self.steps * count, rng).reshape(self.steps, count)
            for rows, count in self.groups
        ]
        return np.concatenate(columns, axis=1).ravel()

    def sample(self, row: int, rng: np.random.Generator):
        """Makes a (y, x) float32 input and mask from a row; see `Generator.sample`."""
        batches = self.batches
        if self.readers is not None and self.augmentation is not None:
            return self.sample_of_readers(row, rng, self.readers, self.augmentation)
        hu, mask, lung = read_row(self.table, row, batches)
        crop = self.crop(mask, lung, rng)
        marks = pack_marks(mask, lung)
        if self.augmentation is not None:
            if self.pathology is not None and lung is not None:
                own = rng.spawn(1)[0]
                spacing_mm, settings = self.spacing_mm(row), self.pathology
                hu = lesions.simulate_lesions(
                    hu, lung, spacing_mm, settings, own, held_out=self.held_out
                )
            return self.changed(hu, marks, crop, self.augmentation, rng)
        return cut_sample(hu, marks, crop.start, batches)

    def sample_of_readers(
        self,
        row: int,
        rng: np.random.Generator,
        readers: "Readers",
        changes: config.Augment,
    ):
        """Makes a `sample` whose reference is the readers' votes or one reader per nodule.

        The votes are interpolated, so that borders keep their subpixel position under the
        warp.
        """
        hu, consensus, lung = read_row(self.table, row, self.batches)
        crop = self.crop(consensus, lung, rng)
        if self.batches.reference == "votes":
            drawn = readers.votes(row)
        else:
            drawn = readers.one(row, rng).astype(np.float32)
        marks = pack_marks(consensus, lung)
        image, _, warp = self.warped(hu, marks, crop, changes, rng)
        mask = augment2d.warp_image(drawn, warp, self.batches.slice_px, fill=0)
        if self.batches.reference == "reader":
            mask = (mask >= 0.5).astype(np.uint8)
        return image, mask

    def spacing_mm(self, row: int) -> list[float]:
        """Returns the (y, x) pixel spacing of a row's sample."""
        if self.batches.pixel_mm:
            return [self.batches.pixel_mm] * 2
        return stored_spacing_mm(self.table, row)

    def changed(self, hu, marks, crop, changes: config.Augment, rng):
        """Augments a slice; returns the input and the target mask."""
        image, marks, _ = self.warped(hu, marks, crop, changes, rng)
        return image, marks & augment2d.TARGET_BIT

    def warped(self, hu, marks, crop, changes: config.Augment, rng):
        """Augments a slice; returns the input, the marks and the warp applied to both.

        With `lung_mask` only the bounding box of the lungs is computed; the rest is 0.
        """
        batches, size = self.batches, self.batches.slice_px
        warp = augment2d.draw_warp(changes, crop, size, rng)
        gamma, noise_hu = augment2d.draw_intensity(changes, rng)
        marks = augment2d.warp_labels(marks, warp, size)
        lung = marks & augment2d.LUNG_BIT
        image = np.zeros(size, np.float32)
        box = boxes.bounding_box(lung) if batches.lung_mask else boxes.full_box(size)
        if box:
            fill = inputs.padding_value(hu, batches)
            hu = augment2d.warp_image(hu, warp.within(box), image[box].shape, fill=fill)
            if self.noise_field is not None:
                hu = augment2d.add_noise(hu, self.noise_field, noise_hu, rng)
            image[box] = inputs.windowed(hu, lung[box], batches, gamma=gamma)
        return inputs.normalised(image, batches), marks, warp

    def crop(self, mask, lung, rng: np.random.Generator) -> boxes.Crop:
        """Chooses the part of the slice that becomes the sample, by `batches.crop`."""
        size = self.batches.slice_px
        match self.batches.crop:
            case "centre" | "seed":
                return boxes.crop_at_centre(mask.shape, size)
            case "lung":
                return augment2d.crop_at_lungs(lung, size)
            case "nodule":
                shift_px = self.augmentation.shift_px if self.augmentation else 0
                return augment2d.crop_near_nodule(
                    mask, lung, size, rng, margin_px=shift_px
                )
            case other:
                raise ValueError(
                    f"batches.crop is {other}; expected centre, seed, lung or nodule"
                )


class Readers:
    """Outlines of the individual readers on the slices of a table.

    Args:
        table: The open table.
        min_readers: Minimum number of readers of a nodule; others count as background.
    """

    def __init__(self, table: SliceTable, min_readers: int = 1) -> None:
        self.table = table
        self.min_readers = min_readers
        self.counts = functools.lru_cache(maxsize=None)(table.readers_of_label)
        self.bits = functools.lru_cache(maxsize=None)(self.bits_of_scan)

    def votes(self, row: int) -> np.ndarray:
        """Computes the (y, x) float32 share of a nodule's readers who marked each pixel."""
        bits = self.table.read("reader_bits", row)
        labels = self.table.read("nodule_labels", row)
        counts = self.counts(int(self.table.rows["scan"][row]))
        readers = np.maximum(counts, 1).astype(np.float32)[labels]
        shares = scans.reader_votes(bits) / readers
        shares[counts[labels] < self.min_readers] = 0
        return shares

    def one(self, row: int, rng: np.random.Generator) -> np.ndarray:
        """Returns a (y, x) bool mask of one randomly drawn reader per nodule."""
        bits = self.table.read("reader_bits", row)
        labels = self.table.read("nodule_labels", row)
        chosen = np.zeros(256, np.uint8)
        scan = int(self.table.rows["scan"][row])
        for label, marked_by in self.bits(scan).items():
            readers = scans.readers_in(marked_by)
            if self.counts(scan)[label] < self.min_readers:
                continue
            chosen[label] = 1 << readers[int(rng.random() * len(readers))]
        return (bits & chosen[labels]) > 0

    def bits_of_scan(self, scan_index: int) -> dict[int, int]:
        """Collects, by nodule label, the bits of all readers who marked it on stored slices."""
        marked_by: dict[int, int] = {}
        for row in self.table.rows_of_scan(scan_index):
            if self.table.rows["nodule_px"][row]:
                bits = self.table.read("reader_bits", row)
                labels = self.table.read("nodule_labels", row)
                for label in np.unique(labels[bits > 0]).tolist():
                    found = np.bitwise_or.reduce(bits[labels == label])
                    marked_by[label] = marked_by.get(label, 0) | int(found)
        return marked_by


def validation_of_slices(
    table: SliceTable, rows: np.ndarray, batches: config.Batches, **options: Any
) -> Generator:
    """Builds the validation generator: all tiles of slices, or the centres of patches.

    The reference is the consensus. See `tiles_of_slices` for the arguments.
    """
    batches = replace(batches, reference="consensus")
    if batches.crop != "seed":
        return tiles_of_slices(table, rows, batches, **options)
    rows = usable_rows(table, rows, batches)
    most = options.pop("most", 0) or len(rows)
    spread = draw_rows(rows, min(most, len(rows)), None)
    return SliceGenerator(
        table, spread, batches, None, seed=0, shuffle=False, balanced=False, **options
    )


def tiles_of_slices(
    table: SliceTable, rows: np.ndarray, batches: config.Batches, **options: Any
) -> TileGenerator:
    """Builds a generator of all tiles of some slices.

    The tiles cover the lungs regardless of nodule positions, so the score includes how well
    a network searches. Without a lung mask they cover the whole slice.

    Args:
        table: The open table.
        rows: Rows of the table.
        batches: Window, target, tile size and batch size.
        options: Options of `TileGenerator`.
    """

    def read(row: int) -> tuple[np.ndarray, np.ndarray]:
        hu, mask, lung = read_row(table, row, batches)
        return hu, pack_marks(mask, lung)

    tiles = [
        (int(row), tile.start)
        for row in usable_rows(table, rows, batches)
        for tile in inputs.tiles(
            read_row(table, int(row), batches)[2] if reads_lung(batches) else None,
            inputs.resized_px(
                table.settings.size_px, stored_spacing_mm(table, int(row)), batches
            ),
            batches.slice_px,
        )
    ]
    return TileGenerator(tiles, read, batches, **options)


def read_row(
    table: SliceTable, row: int, batches: config.Batches
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Reads HU, target and, if the settings need it, the lung mask of a row, each (y, x).

    All are resized to pixels of `batches.pixel_mm`, if that is set.
    """
    hu = table.read("hu", row)
    if batches.target == "lung":
        lung = table.read("lung", row)
        if batches.pixel_mm:
            spacing_mm = stored_spacing_mm(table, row)
            size = inputs.resized_px(hu.shape, spacing_mm, batches)
            # Resize both lungs as one mask: where they touch, either may fill less than half of
            # a pixel.
            mask = inputs.resized_labels((lung > 0).view(np.uint8), size)
            return (
                inputs.resized(hu, size),
                mask,
                inputs.resized_labels(lung, size),
            )
        return hu, (lung > 0).view(np.uint8), lung
    lung = table.read("lung", row) if reads_lung(batches) else None
    return hu, row_target(table, row, batches), lung


def stored_spacing_mm(table: SliceTable, row: int) -> list[float]:
    """Returns the (y, x) pixel spacing of a row as stored in the table."""
    return table.scans["spacing_mm"][table.rows["scan"][row]][1:].tolist()


def pack_marks(mask: np.ndarray, lung: np.ndarray | None) -> np.ndarray:
    """Packs target and lung as bits of one image, so that one warp moves both."""
    return mask if lung is None else mask | (lung > 0) * np.uint8(augment2d.LUNG_BIT)


def usable_rows(
    table: SliceTable, rows: np.ndarray, batches: config.Batches
) -> np.ndarray:
    """Returns the rows with the masks that the settings need; see `batching.find_usable`."""
    rows = np.asarray(rows)
    return rows[find_usable(table, table.rows["scan"][rows], batches, of="rows")]


def balanced_groups(
    table: SliceTable, rows: np.ndarray, batches: config.Batches
) -> list[tuple[np.ndarray, int]]:
    """Splits rows into those with and without target, each with its rows per batch."""
    size = batches.batch_size
    if size == 1:
        return [(rows, 1)]
    has_target = rows_with_target(table, rows, batches)
    if has_target.all() or not has_target.any():
        return [(rows, size)]
    count = min(max(round(batches.nodule_fraction * size), 1), size)
    return [(rows[has_target], count), (rows[~has_target], size - count)]


def rows_with_target(
    table: SliceTable, rows: np.ndarray, batches: config.Batches
) -> np.ndarray:
    """Returns (rows,) bool, True where the slice has a target pixel.

    Reads the masks of all slices that any reader marked, because the consensus may be empty
    where only one of four readers drew an outline.
    """
    if batches.target == "lung":
        return table.rows["lung_px"][rows] > 0
    marked = table.rows["nodule_px"][rows] > 0
    marked[marked] = [
        row_target(table, int(row), batches).any() for row in rows[marked]
    ]
    return marked


def row_target(table: SliceTable, row: int, batches: config.Batches) -> np.ndarray:
    """Reads the (y, x) uint8 target mask of 0 and 1: nodule consensus, or both lungs."""
    if batches.target == "lung":
        return (table.read("lung", row) > 0).astype(np.uint8)
    if table.rows["nodule_px"][row] == 0:
        return np.zeros(table.settings.size_px, np.uint8)
    return augment2d.nodule_target(
        table.read("reader_bits", row),
        table.read("nodule_labels", row),
        table.readers_of_label(int(table.rows["scan"][row])),
        batches,
    )


def draw_rows(
    rows: np.ndarray, count: int, rng: np.random.Generator | None
) -> np.ndarray:
    """Draws `count` of `rows`; each occurs equally often, or once more than others.

    Without `rng` the rows keep their order, and fewer than all are spread evenly over it.
    """
    if rng is None:
        if count < len(rows):
            return rows[np.arange(count) * len(rows) // count]
        return np.resize(rows, count)
    rounds = count // len(rows) + 1
    return np.concatenate([rng.permutation(rows) for _ in range(rounds)])[:count]
