"""Base classes of the batch generators for slices and for volumes."""

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
"""First numbers of the seeds of orders, batches and noise, which keep the seeds apart. They
come first, not last, because NumPy treats the seeds (1, 2) and (1, 2, 0) as equal."""

CANDIDATE_PX = (6, 6, 6)
"""Central voxels (z, y, x) of a crop: the candidate is a nodule if they hold any nodule."""


class Generator(ABC):
    """Sequence of batches, used as `len(generator)` and `generator[index]`.

    A batch depends on (seed, epoch, index) alone, not on the thread that makes it or on the
    batches made before. Any number of threads may request batches at once; one thread per
    core is fastest, as in `data_generator.as_pydataset`.

    Args:
        batches: Target, window, sample size and batch size.
        steps: Batches per epoch.
        seeds: First numbers of the seed of a batch; epoch and index are appended.
        shuffle: False makes all epochs the same.
        with_slice_label: Return y as {"mask": (b, y, x, 2), "slice": (b, 1) float32}, where
            "slice" is 1 if the sample (for candidates, its central part) holds any target.

    Attributes:
        epoch: Epoch for which batches are made; set it to resume.
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
        # The caller provides the threads; OpenCV's own would only compete with them.
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
        """Returns the table rows, scans or tiles of an epoch's samples, batch after batch."""

    @abstractmethod
    def sample(
        self, row: Any, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Makes a sample of size `batches.input_px`: float32 input and mask.

        The mask is uint8 of 0 and 1, or float32 with fractions between them.
        """

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> tuple[np.ndarray, Any]:
        """Makes a batch: x (b, y, x, 1) float32, y (b, y, x, 2) uint8 background and target.

        For volumes, z precedes y. With `reference=votes`, y is float32.

        Raises:
            IndexError: If `index` is negative or not below the number of batches.
        """
        epoch = (
            self.epoch if self.shuffle else 0
        )  # read once: the epoch may end meanwhile
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
        """Returns True if a mask, or the centre of a candidate's mask, holds the target."""
        if self.batches.crop == "candidate":
            start = boxes.crop_at_centre(mask.shape, CANDIDATE_PX).start
            mask = boxes.cut(mask, start, CANDIDATE_PX, fill=0)
        return bool((mask >= 0.5).any())

    def on_epoch_end(self) -> None:
        """Advances to the next epoch."""
        self.epoch += 1

    def rows_of_batch(self, index: int, epoch: int | None = None) -> Sequence[Any]:
        """Returns the table rows, scan indices or tiles of batch `index` of an epoch.

        The default is the current epoch.
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
    """Generator of all tiles of some slices or volumes, in order and not augmented.

    It is for validation: the tiles are those that inference will see.

    Args:
        tiles: Row (or scan index) and start of each tile.
        read: Function that returns HU and marks of a row, as `cut_sample` takes them.
        batches: Window, target, tile size and batch size.
        most: Upper limit of the number of tiles, spread evenly over all; 0 for all.
        with_slice_label: See `Generator`.
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
        steps = count_batches(count, batches)
        super().__init__(batches, steps, with_slice_label=with_slice_label)
        self.read = read

    def order_of_epoch(self, epoch: int) -> Sequence[Any]:
        return self.tiles

    def sample(self, row, rng):
        which, start = row
        return cut_sample(*self.read(which), start, self.batches)


def count_batches(samples: int, batches: config.Batches) -> int:
    """Returns the number of batches that hold all samples once; the last may be smaller."""
    return -(-samples // batches.batch_size)


def cut_sample(
    hu: np.ndarray, marks: np.ndarray, start: tuple[int, ...], batches: config.Batches
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a sample without augmentation: float32 input and uint8 mask of 0 and 1.

    Args:
        hu: HU of the slice or volume.
        marks: uint8 with the bits `augment2d.TARGET_BIT` and `augment2d.LUNG_BIT`.
        start: First pixel of the sample; pixels beyond the ends are air.
        batches: Size, window and normalisation.
    """
    hu = boxes.cut(hu, start, batches.input_px, fill=inputs.padding_value(hu, batches))
    marks = boxes.cut(marks, start, batches.input_px, fill=0)
    image = inputs.to_input(hu, marks & augment2d.LUNG_BIT, batches)
    return image, marks & augment2d.TARGET_BIT


def reads_lung(batches: config.Batches) -> bool:
    """Returns True if samples need the lung mask."""
    return batches.lung_mask or batches.crop not in ("centre", "seed")


def find_usable(
    table: SliceTable, scans: np.ndarray, batches: config.Batches, *, of: str
) -> np.ndarray:
    """Finds the rows with the masks that the settings need; logs how many are left out.

    A nodule target needs scans that readers annotated. A lung target, a masked input and a
    crop placed by the lungs need scans with a lung mask.

    Args:
        table: The open table.
        scans: Scan index of each row.
        batches: Settings of the batches.
        of: Noun for the rows in messages: "rows" or "scans".

    Returns:
        (rows,) bool.

    Raises:
        ValueError: If no row is usable, or the input would be masked by the target.
    """
    if batches.target == "lung" and batches.lung_mask:
        raise ValueError(
            "batches.target=lung with batches.lung_mask shows the network the answer; "
            "use --batches.no-lung-mask"
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
            f"with {' and '.join(needed) or of}; run preprocess.py and table.py on such scans"
        )
    if not found.all():
        left_out = len(scans) - np.count_nonzero(found)
        log.warning("%d %s left out: no %s", left_out, of, " and ".join(needed))
    return found
