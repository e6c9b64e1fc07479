r"""Step 4 of 9: stream augmented batches from the table; by itself, it draws a contact sheet.

Batches are made in dataset/; this step draws them and hands them to Keras. The sheet shows
samples as a network would see them in training, with the outlines of the reference. The step
also prints the speed of batch generation with one and with two threads.

Example:
    python data_generator.py thesis --table work/table.h5 --split work/split.json \
        --part train --out work/contact_sheet.png

With --show, a window steps through the samples instead, by arrow keys or slider; `a` shows a
sample with and without augmentation.
"""

import copy
import functools
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

import config
import steps
from ct import files
from dataset.batching import Generator
from dataset.contact_sheet import grey, middle_planes, sheet, visible
from dataset.generator2d import SliceGenerator
from dataset.generator3d import VolumeGenerator
from dataset.slice_table import SliceTable
from dataset.split import read_split, rows_of_part, scans_of_part
from viewers import slice_window
from viewers.slice_window import Picture

log = logging.getLogger(__name__)


def slices_per_second(generator: Generator, *, threads: int, seconds: float) -> float:
    """Measures how many slices, or crops of volumes, some threads make per second."""
    numbers = itertools.count()
    started = time.perf_counter()

    def make_batches(_: int) -> int:
        made = 0
        while time.perf_counter() < started + seconds:
            made += len(generator[next(numbers) % len(generator)][0])
        return made

    with ThreadPoolExecutor(threads) as pool:
        made = sum(pool.map(make_batches, range(threads)))
    return made / (time.perf_counter() - started)


def as_pydataset(
    generator: Generator,
    *,
    workers: int = 1,
    max_queue_size: int = 10,
) -> Any:
    """Wraps the generator in a `keras.utils.PyDataset`, for `fit` and `evaluate`.

    Call `fit(dataset, shuffle=False)`; otherwise Keras shuffles the batches with Python's
    global random state. The class is defined here because importing Keras takes seconds.

    Keras ends an epoch before the first one begins (when `fit` resets its iterator), and
    starts its workers before it announces an epoch. The generator's epoch therefore
    advances only when an epoch ends, because the workers have stopped by then, and only if
    that epoch had begun. Under a `tf.distribute` strategy Keras also draws a batch to build
    the model, which counts as an epoch; `training.callbacks.SetGeneratorEpoch` sets Keras'
    own number and is always right.

    Args:
        generator: Source of the batches; its `epoch` is the first one.
        workers: Number of threads.
        max_queue_size: Number of batches made ahead.
    """
    import keras

    class Dataset(keras.utils.PyDataset):
        def __init__(self) -> None:
            super().__init__(workers=workers, max_queue_size=max_queue_size)
            self.generator = generator
            self.begun = False

        def __len__(self) -> int:
            return len(generator)

        def __getitem__(self, index: int) -> tuple[np.ndarray, Any]:
            return generator[index]

        def on_epoch_begin(self) -> None:
            self.begun = True

        def on_epoch_end(self) -> None:
            if self.begun:
                generator.on_epoch_end()
            self.begun = False

    return Dataset()


@dataclass(frozen=True)
class Arguments:
    """Samples to draw, and the table to draw them from."""

    batches: config.Batches
    augment: config.Augment
    lesions: config.Lesions
    table: Path = Path("work/table.h5")
    split: Path = Path("work/split.json")
    part: Literal["train", "validation", "test"] = "train"
    """Part of the split to show."""
    out: Path = Path("work/contact_sheet.png")
    """Picture to write."""
    slices: int = 24
    """Number of slices on the sheet; for volumes, of crops with three slices each."""
    show: bool = False
    """Open a window that steps through the samples, and write nothing."""
    seconds: float = 3.0
    """Duration of each speed measurement."""
    seed: int = 0
    """Seed of order, crops and augmentation."""

    def __post_init__(self) -> None:
        config.require(self.slices > 0, "slices", self.slices, "1 or more")
        config.require(self.seconds > 0, "seconds", self.seconds, "above 0")


def run_step(arguments: Arguments) -> steps.Report:
    """Draws the sheet and measures the speed, or opens the window.

    Only the training part is augmented; the others are shown as validation sees them.
    """
    with SliceTable(arguments.table) as table:
        if len(arguments.batches.input_px) == 3:
            generator = generator_of_volumes(table, arguments)
            shown = f"{len(generator.scans)} {arguments.part} scans"
        else:
            generator = generator_of_slices(table, arguments)
            shown = f"{len(generator.rows)} {arguments.part} rows"
        if arguments.show:
            slice_window.browse(*make_views(generator))
            return steps.Report(f"showed samples of {shown}")
        picture = sheet(generator, arguments.slices)
        with files.write_atomically(arguments.out) as partial:
            if not cv2.imwrite(str(partial), picture):
                raise OSError(f"{arguments.out} was not written; expected a .png")
        speeds = ", ".join(
            speed_text(generator, threads, arguments.seconds) for threads in (1, 2)
        )
    return steps.Report(f"wrote {arguments.out}: {shown}; {speeds}")


def generator_of_slices(table: SliceTable, arguments: Arguments) -> SliceGenerator:
    """Returns the generator of the slices to show."""
    training = arguments.part == "train"
    split = read_split(arguments.split)
    return SliceGenerator(
        table,
        rows_of_part(split, table, arguments.part),
        arguments.batches,
        arguments.augment if training else None,
        pathology=arguments.lesions if training else None,
        seed=arguments.seed,
        shuffle=training,
        balanced=training,
    )


def generator_of_volumes(table: SliceTable, arguments: Arguments) -> VolumeGenerator:
    """Returns the generator of the volumes to show; training scans are repeated if needed."""
    training = arguments.part == "train"
    split = read_split(arguments.split)
    size = arguments.batches.batch_size
    return VolumeGenerator(
        table,
        scans_of_part(split, table, arguments.part),
        arguments.batches,
        arguments.augment if training else None,
        pathology=arguments.lesions if training else None,
        seed=arguments.seed,
        steps_per_epoch=-(-arguments.slices // size) if training else 0,
        shuffle=training,
    )


def speed_text(
    generator: SliceGenerator | VolumeGenerator, threads: int, seconds: float
) -> str:
    """Measures the speed; for slices, also in bytes of HU read from the table."""
    speed = slices_per_second(generator, threads=threads, seconds=seconds)
    if isinstance(generator, VolumeGenerator):
        return f"{speed:.1f} crops/s with {threads} thread(s)"
    read = files.size_text(speed * 2 * np.prod(generator.table.settings.size_px))
    return f"{speed:.0f} slices/s ({read}/s of HU) with {threads} thread(s)"


@dataclass(frozen=True)
class Data:
    """Batches for training and, if the split has a validation part, for validation."""

    training: Any
    validation: Any | None = None


def open_data(
    table: SliceTable,
    split: Mapping[str, Any],
    experiment: config.Experiment,
    candidates: Mapping[str, np.ndarray] | None = None,
) -> Data:
    """Returns the generators of the training and validation parts, for slices or volumes.

    Args:
        table: The open table.
        split: The split of its patients.
        experiment: Settings.
        candidates: Result of `train.read_candidates`; only for volumes.

    Raises:
        ValueError: If the training part is empty.
    """
    from dataset import generator2d, generator3d

    batches, settings = experiment.batches, experiment.train
    if len(batches.input_px) == 3:
        rows_of, kind = scans_of_part, "scans"
        training, validation = (
            generator3d.VolumeGenerator,
            generator3d.validation_of_volumes,
        )
    else:
        rows_of, kind = rows_of_part, "slices"
        training = generator2d.SliceGenerator
        validation = generator2d.validation_of_slices
    options: dict[str, Any] = {"with_slice_label": experiment.model.slice_classifier}
    if candidates is not None:
        options["candidates"] = candidates
    rows = {part: rows_of(split, table, part) for part in ("train", "validation")}
    if not len(rows["train"]):
        raise ValueError(
            f"the training part has no {kind} in {table.path}; run slice_idx.py with other "
            "fractions or table.py with more scans"
        )
    made = training(
        table,
        rows["train"],
        batches,
        experiment.augment,
        pathology=experiment.lesions,
        seed=settings.seed,
        steps_per_epoch=settings.steps_per_epoch,
        **options,
    )
    if not len(rows["validation"]):
        log.warning("the validation part is empty: the last epoch counts as the best")
        return Data(made)
    most = settings.validation_tiles
    return Data(
        made, validation(table, rows["validation"], batches, most=most, **options)
    )


def make_picture_function(
    generator: SliceGenerator | VolumeGenerator,
) -> Callable[[int], Picture]:
    """Returns a function that draws a sample, given its number in the generator's epoch.

    Samples look as in `contact_sheet`; volumes show their middle planes.
    """
    shown = copy.copy(generator)
    shown.batches = visible(generator.batches)
    batch = functools.lru_cache(maxsize=2)(shown.__getitem__)
    changes = "plain" if generator.augmentation is None else "augmented"

    def picture(number: int) -> Picture:
        index, place = divmod(number, shown.batches.batch_size)
        x, y = batch(index)
        image, mask = x[place, ..., 0], (y[place, ..., 1] >= 0.5).view(np.uint8)
        if isinstance(shown, VolumeGenerator):
            image, mask = (np.hstack(middle_planes(v)) for v in (image, mask))
            scan = shown.rows_of_batch(index)[place]
            name = f"{shown.table.scans['scan_id'][scan]}\n"
        else:
            row = shown.table.rows[shown.rows_of_batch(index)[place]]
            name = f"{shown.table.scans['scan_id'][row['scan']]}\nz {row['z']}, "
        return Picture(grey(image), {shown.batches.target: mask}, name + changes)

    return picture


def make_views(
    generator: SliceGenerator | VolumeGenerator,
) -> tuple[int, list[Callable[[int], Picture]]]:
    """Returns the number of samples in an epoch and the views to show in a window.

    The second view, if there is one, shows the sample without augmentation; a random crop
    may then lie elsewhere.
    """
    count = len(generator.order_of_epoch(generator.epoch))
    shown = [make_picture_function(generator)]
    if generator.augmentation is not None:
        unchanged = copy.copy(generator)
        unchanged.augmentation = None
        shown.append(make_picture_function(unchanged))
    return count, shown


def main(argv: Sequence[str] | None = None) -> None:
    steps.run(run_step, Arguments, argv=argv)


if __name__ == "__main__":
    main()
