"""Batches by number, of slices or of volumes: what all generators share."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np

import config
from augment import augment2d
from ct import boxes, inputs
from dataset.slice_table import SliceTable

log = logging.getLogger(__name__)

SLICE_ORDER, SLICE_BATCH, SLICE_NOISE, VOLUME_ORDER, VOLUME_BATCH = 1, 2, 3, 4, 5
"""First words of the seeds of orders, batches and noise. They stand first because NumPy
takes the seeds (1, 2) and (1, 2, 0) for the same."""

CANDIDATE_PX = (6, 6, 6)
"""A candidate is a nodule if there is any within so many voxels in the middle of its crop."""


class Generator(ABC):
    """Batches by number: `len(generator)`, `generator[index]`.

    A batch depends on (seed, epoch, index) alone: not on the thread that makes it, nor on
    what was made before. Any number of threads may ask for batches at once; for speed, ask
    from as many as there are cores, as `data_generator.as_pydataset` does.

    Args:
        batches: Target, window, size of a sample and of a batch.
        steps: Batches per epoch.
        seeds: Of a batch, before epoch and index.
        shuffle: False makes all epochs the same.
        with_slice_label: Give y as {"mask": (b, y, x, 2), "slice": (b, 1) float32}, where
            "slice" is 1 if the sample holds any target; of candidates, if their middle does.

    Attributes:
        epoch: The epoch that batches are made for; set it to resume.
    """

    def __init__(
        self,
        batches: config.Batches,
        steps: int,
        *,
        seeds: tuple[int, ...] = (),
        shuffle: bool = False,
        with_slice_label: bool = False,
    ) -> None:
        # Threads are those of the caller; OpenCV's own would only compete with them.
        cv2.setNumThreads(1)
        self.batches = batches
        self.steps = steps
        self.seeds = seeds
        self.shuffle = shuffle
        self.with_slice_label = with_slice_label
        self.epoch = 0
        self.order: tuple[int, Sequence[Any]] | None = None

    @abstractmethod
    def order_of_epoch(self, epoch: int) -> Sequence[Any]:
        """What the samples of an epoch are made of, one batch after the other."""

    @abstractmethod
    def sample(
        self, row: Any, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """A sample as float32 input and mask, of `batches.input_px`.

        The mask is uint8 of 0 and 1, or float32 shares between them.
        """

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> tuple[np.ndarray, Any]:
        """One batch: x (b, y, x, 1) float32, y (b, y, x, 2) uint8 background and target.

        Of volumes, z stands before y. Shares of readers' votes are float32.

        Raises:
            IndexError: If `index` is not from 0 to the number of batches.
        """
        epoch = self.epoch if self.shuffle else 0  # once: it may end meanwhile
        rows = self.rows_of_batch(index, epoch)
        rng = np.random.default_rng((*self.seeds, epoch, index))
        x = np.empty((len(rows), *self.batches.input_px, 1), np.float32)
        shares = self.batches.reference == "votes"
        kind = np.float32 if shares else np.uint8
        y = np.empty((len(rows), *self.batches.input_px, 2), kind)
        for position, row in enumerate(rows):
            x[position, ..., 0], mask = self.sample(row, rng)
            y[position] = inputs.one_hot(mask)
        if self.with_slice_label:
            present = [[self.holds_target(mask)] for mask in y[..., 1]]
            return x, {"mask": y, "slice": np.array(present, np.float32)}
        return x, y

    def holds_target(self, mask: np.ndarray) -> bool:
        """What "slice" says of a sample with this mask."""
        if self.batches.crop == "candidate":
            start = boxes.crop_at_centre(mask.shape, CANDIDATE_PX).start
            mask = boxes.cut(mask, start, CANDIDATE_PX, fill=0)
        return bool((mask >= 0.5).any())

    def on_epoch_end(self) -> None:
        """Goes on to the next epoch."""
        self.epoch += 1

    def rows_of_batch(self, index: int, epoch: int | None = None) -> Sequence[Any]:
        """What batch `index` of an epoch, by default the present one, is made of.

        Rows of the table's slices or of its scans; of tiles, these.
        """
        if epoch is None:
            epoch = self.epoch if self.shuffle else 0
        if not 0 <= index < self.steps:
            raise IndexError(f"batch {index}; expected 0 to {self.steps - 1}")
        known = self.order
        if known is None or known[0] != epoch:
            known = (epoch, self.order_of_epoch(epoch))
            self.order = known
        size = self.batches.batch_size
        return known[1][index * size : (index + 1) * size]


class TileGenerator(Generator):
    """Every tile of some slices or volumes, in order, unchanged: for validation.

    It is what inference will look at.

    Args:
        tiles: Row and start of each.
        read: Gives HU and marks of a row, as `plain` takes them.
        batches: Window, target, size of the tiles and of a batch.
        most: Most tiles, spread evenly over all; 0 for all.
        with_slice_label: As for `Generator`.
    """

    def __init__(
        self,
        tiles: Sequence[tuple[int, tuple[int, ...]]],
        read: Callable[[int], tuple[np.ndarray, np.ndarray]],
        batches: config.Batches,
        *,
        most: int = 0,
        with_slice_label: bool = False,
    ) -> None:
        count = min(most or len(tiles), len(tiles))
        self.tiles = [tiles[i * len(tiles) // count] for i in range(count)]
        steps = batches_of(count, batches)
        super().__init__(batches, steps, with_slice_label=with_slice_label)
        self.read = read

    def order_of_epoch(self, epoch: int) -> Sequence[Any]:
        return self.tiles

    def sample(self, row, rng):
        which, start = row
        return plain(*self.read(which), start, self.batches)


def batches_of(samples: int, batches: config.Batches) -> int:
    """Batches that hold so many samples once; the last may be smaller."""
    return -(-samples // batches.batch_size)


def plain(
    hu: np.ndarray, marks: np.ndarray, start: tuple[int, ...], batches: config.Batches
) -> tuple[np.ndarray, np.ndarray]:
    """A part of a slice or volume as float32 input and uint8 mask of 0 and 1, unchanged.

    Args:
        hu: HU.
        marks: uint8, `augment.TARGET_BIT` and `augment.LUNG_BIT`.
        start: Where the part begins; beyond the ends is air.
        batches: Size, window and normalisation.
    """
    hu = boxes.cut(hu, start, batches.input_px, fill=inputs.fill(hu, batches))
    marks = boxes.cut(marks, start, batches.input_px, fill=0)
    image = inputs.to_input(hu, marks & augment2d.LUNG_BIT, batches)
    return image, marks & augment2d.TARGET_BIT


def reads_lung(batches: config.Batches) -> bool:
    """Whether samples need the lung mask."""
    return batches.lung_mask or batches.crop not in ("centre", "seed")


def usable(
    table: SliceTable, scans: np.ndarray, batches: config.Batches, *, of: str
) -> np.ndarray:
    """Which of some rows have what the settings ask for; says how many have not.

    A nodule target needs scans that readers saw; a lung target, a masked input and a
    crop that looks for lungs need scans with a lung mask.

    Args:
        table: The open table.
        scans: The scan of each row.
        batches: The settings.
        of: What the rows are, for messages.

    Returns:
        (rows,) bool.

    Raises:
        ValueError: If none has, or the input would be masked by the target.
    """
    if batches.target == "lung" and batches.lung_mask:
        raise ValueError(
            "batches.target=lung with batches.lung_mask shows the network the answer; "
            "add --batches.no-lung-mask"
        )
    found, needed = np.ones(len(scans), bool), []
    if batches.target == "nodule":
        needed.append("readers' outlines")
        found &= table.scans["read"][scans] > 0
    if reads_lung(batches) or batches.target == "lung":
        needed.append("a lung mask")
        found &= table.scans["has_lung"][scans] > 0
    if not found.any():
        raise ValueError(
            f"{table.path}: none of the {len(scans)} {of} can be used; expected scans "
            f"with {' and '.join(needed) or of}; run preprocess.py and table.py with them"
        )
    if not found.all():
        left_out = len(scans) - np.count_nonzero(found)
        log.warning("%d %s left out: no %s", left_out, of, " and ".join(needed))
    return found
