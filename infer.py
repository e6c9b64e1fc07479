"""Step 6 of 9: scans + a run's weights -> one probability map per scan.

Example:
    python infer.py --exp_dir work/runs/smoke --result_dir work/predictions/smoke

Reads scan files of the validation and test patients, or with --input any CT: a DICOM
folder, a volume, a folder of volumes, or a CSV list with columns pid,image_path.
Research code, not a medical device.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

import augment
import config
import files
import postprocess
import provenance
import slice_idx
import steps
import train
from postprocess import Predictions
from preprocess import with_lungs, without_folders
from scan import Scan, ScanError, ScanSource, read_scan, scan_files, scan_identity

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arguments:
    """What is segmented, with which run, and where the result goes."""

    exp_dir: Path
    """Run directory made by train.py."""
    result_dir: Path
    """One folder per scan is written here."""
    scans: Path = Path("work/scans")
    """Folder of scan files made by preprocess.py."""
    parts: tuple[Literal["train", "validation", "test"], ...] = ("validation", "test")
    """Parts of the run's split to segment."""
    input: Path | None = None
    """Segment this CT instead of scan files: DICOM folder, volume, folder or CSV list.
    postprocess.py needs its scan file too: run preprocess.py --cohort nifti on it."""
    batch_size: int = 8
    """Tiles per pass."""
    overwrite: bool = False
    """Replace predictions made with other weights."""


class Predictor:
    """A run's network, built and loaded once for any number of scans.

    Args:
        run_dir: Made by train.py.
        settings: The run's.
        batch_size: Tiles per pass.
    """

    def __init__(
        self, run_dir: Path, settings: config.Experiment, *, batch_size: int
    ) -> None:
        self.settings = settings
        self.batch_size = batch_size
        self.network = load_network(run_dir, settings, settings.batches.slice_px)

    def probability(self, scan: Scan) -> np.ndarray:
        """Probability of the target at every voxel of a scan.

        The lungs of each slice, or the slice where the run does without lung masks, are
        covered by overlapping tiles of the size trained on; elsewhere it is 0.

        Args:
            scan: With lung labels if the run was trained with `batches.lung_mask`.

        Returns:
            (z, y, x) float32 on the scan's grid.

        Raises:
            ScanError: If it lacks lung labels.
        """
        batches = self.settings.batches
        size = batches.slice_px
        lung = lung_for(scan, batches)
        prob = np.zeros(scan.hu.shape, np.float32)
        tiles = [
            (z, tile)
            for z in range(len(scan.hu))
            for tile in augment.tiles(
                None if lung is None else lung[z], scan.hu.shape[1:], size
            )
        ]
        for start in range(0, len(tiles), self.batch_size):
            some = tiles[start : start + self.batch_size]
            images = np.stack([tile_input(scan, z, t.crop, batches) for z, t in some])
            # Full batches only: TensorFlow would trace the network again for the last.
            images = np.resize(images, (self.batch_size, *size))
            output = self.network.predict_on_batch(images[..., None])
            output = output["mask"] if isinstance(output, dict) else output
            for (z, tile), image in zip(some, np.asarray(output)[..., 1], strict=False):
                augment.paste(prob[z], tile.weight * image, tile.crop)
        # Weights of tiles sum to 1 but for rounding, which can lift a sum above it.
        return np.minimum(prob, 1, out=prob)


def lung_for(scan: Scan, batches: config.Batches) -> np.ndarray | None:
    """The lung labels a run needs to look at a scan; None if it needs none.

    Raises:
        ScanError: If they are missing.
    """
    if not batches.lung_mask and batches.crop == "centre":
        return None
    if scan.lung is None:
        raise ScanError(
            f"scan {scan.scan_id} has no lung mask, which the run was trained with; run "
            "preprocess.py again with --overwrite"
        )
    return scan.lung


def tile_input(
    scan: Scan, z: int, crop: augment.Crop, batches: config.Batches
) -> np.ndarray:
    """(y, x) float32 network input of a tile; beyond the slice is air."""
    hu = augment.cut(scan.hu[z], crop, batches.slice_px, fill=augment.AIR_HU)
    lung = None
    if scan.lung is not None:
        lung = augment.cut(scan.lung[z], crop, batches.slice_px, fill=0)
    return augment.to_input(hu, lung, batches)


def read_settings(run_dir: Path) -> config.Experiment:
    """The experiment a run was trained with.

    Raises:
        FileNotFoundError: If the run is absent or not complete.
    """
    path = run_dir / "config.json"
    if not path.exists():
        raise FileNotFoundError(
            f"no finished run in {run_dir} (config.json is missing); run train.py first"
        )
    return config.from_json(config.Experiment, json.loads(path.read_text()))


def load_network(
    run_dir: Path, settings: config.Experiment, size_px: tuple[int, int]
) -> Any:
    """The run's network for (y, x) inputs of `size_px`, with its best weights."""
    from models import build_model

    network = build_model(replace(settings.model, weights="none"), (*size_px, 1), 2)
    network.load_weights(run_dir / "best.weights.h5")
    return network


@dataclass(frozen=True)
class Task:
    """One scan to segment: a scan file, or a source that still has to be read."""

    scan_id: str
    patient_id: str
    part: str
    source: Path | ScanSource
    slices: dict[str, list[int]] = field(default_factory=dict)
    """Slices (z) in each part; only of a split by slice."""


def infer(
    exp_dir: Path,
    result_dir: Path,
    *,
    scans: Path = Path("work/scans"),
    parts: Sequence[str] = ("validation", "test"),
    input: Path | None = None,
    batch_size: int = 8,
    overwrite: bool = False,
) -> steps.Report:
    """Writes the probability map of every scan; see `Arguments`.

    Raises:
        FileNotFoundError: If the run or the scans are missing.
        ValueError: If `result_dir` holds predictions of other weights.
    """
    settings = read_settings(exp_dir)
    split = slice_idx.read_split(exp_dir / "split.json")
    predictions = new_predictions(exp_dir, split)
    tasks, unreadable = (
        (tasks_of_input(input), []) if input else tasks_of_parts(scans, split, parts)
    )
    if overwrite:
        remove_predictions(result_dir)
    start_predictions(result_dir, predictions)
    warn_of_leaks(tasks, predictions.training_patients)
    predictor = Predictor(exp_dir, settings, batch_size=batch_size)
    stood = sum(1 for task in tasks if map_path(result_dir, task).exists())

    def segment(task: Task) -> Task:
        path = map_path(result_dir, task)
        if overwrite or not path.exists():
            scan = read_source(task.source, settings)
            write_probability(path, predictor.probability(scan), scan)
        return task

    done, failures = steps.map_scans(segment, tasks, workers=1, label="infer")
    add_scans(result_dir, predictions, done)
    failures = [*unreadable, *failures]
    steps.write_failures(failures, result_dir / "skipped.csv")
    volume_bytes = sum(map_path(result_dir, task).stat().st_size for task in done)
    line = f"wrote {result_dir}: {len(done)} scans, {files.size_text(volume_bytes)}"
    if stood:
        line += f" ({stood} were there)"
    return steps.Report(line, failures)


def map_path(result_dir: Path, task: Task) -> Path:
    """Where the probability map of a scan is written."""
    return result_dir / task.scan_id / "prob.nii.gz"


def tasks_of_parts(
    scans_dir: Path, split: dict[str, Any], parts: Sequence[str]
) -> tuple[list[Task], list[steps.Failure]]:
    """The scan files of the patients in `parts` of a split, and those not readable."""
    part_of = {
        patient: part
        for part in parts
        for patient in slice_idx.patients_of_part(split, part)
    }
    slices = {
        part: slice_idx.slices_of_part(split, part) for part in parts if split["leaks"]
    }
    tasks, unreadable = [], []
    for path in scan_files(scans_dir):
        try:
            patient_id, scan_id = scan_identity(path)
        except ScanError as error:
            unreadable.append(steps.Failure(path.stem, str(error)))
            continue
        own = {part: s[scan_id] for part, s in slices.items() if scan_id in s}
        if split["leaks"] and own:
            tasks.append(Task(scan_id, patient_id, "", path, own))
        elif not split["leaks"] and patient_id in part_of:
            tasks.append(Task(scan_id, patient_id, part_of[patient_id], path))
    if not tasks:
        raise ValueError(
            f"{scans_dir} holds no scan of the {' or '.join(parts)} patients of the run's "
            "split; choose other --parts, or the --scans the run was made from"
        )
    return tasks, unreadable


def tasks_of_input(path: Path) -> list[Task]:
    """The CT scans a person names: DICOM folder, volume, folder of volumes, CSV list."""
    from cohorts import nifti

    return [
        Task(source.scan_id, source.patient_id, "", source)
        for source in nifti.find_scans(path)
    ]


def read_source(source: Path | ScanSource, settings: config.Experiment) -> Scan:
    """The scan, with lung labels made by the run's own settings if it has none."""
    if isinstance(source, Path):
        return read_scan(source)
    from cohorts import nifti

    try:
        return with_lungs(nifti.load_scan(source), settings.mask)
    except ScanError as error:
        raise ScanError(without_folders(str(error), source)) from error


def write_probability(path: Path, prob: np.ndarray, scan: Scan) -> None:
    from volume_io import write_volume

    write_volume(path, prob, scan.grid, scan.source_grid)


def new_predictions(run_dir: Path, split: dict[str, Any]) -> Predictions:
    """The record that goes beside the predictions, still without scans."""
    weights = run_dir / "best.weights.h5"
    return Predictions(
        run=run_dir.name,
        weights_sha256=files.sha256(weights),
        split_sha256=split["sha256"],
        training_patients=tuple(train.training_patients_of(weights)),
        scans={},
        provenance=provenance.record(),
    )


def remove_predictions(result_dir: Path) -> None:
    """Removes maps and what was made of them, so that none of other weights stays."""
    for folder in [path.parent for path in result_dir.glob("*/prob.nii.gz")]:
        files.remove(folder)
    for name in (postprocess.PREDICTIONS, postprocess.RECORD):
        files.remove(result_dir / name)


def start_predictions(result_dir: Path, predictions: Predictions) -> None:
    """Says whose predictions the folder holds before the first is written.

    Raises:
        ValueError: If it holds those of another network.
    """
    path = result_dir / postprocess.PREDICTIONS
    if not path.exists():
        predictions.write(result_dir)
        return
    found = postprocess.read_predictions(result_dir).weights_sha256
    if found != predictions.weights_sha256:
        raise ValueError(
            f"{path}: predictions of weights {found[:12]}; this run's are "
            f"{predictions.weights_sha256[:12]}; use --overwrite or another --result_dir"
        )


def add_scans(
    result_dir: Path, predictions: Predictions, tasks: Sequence[Task]
) -> None:
    """Lists scans in predictions.json, beside those that an earlier call listed."""
    scans = dict(postprocess.read_predictions(result_dir).scans)
    for task in tasks:
        facts: dict[str, Any] = {"part": task.part, "patient_id": task.patient_id}
        if task.slices:
            earlier = scans.get(task.scan_id, {}).get("slices", {})
            facts["slices"] = earlier | task.slices
        scans[task.scan_id] = facts
    replace(predictions, scans=scans).write(result_dir)


def warn_of_leaks(tasks: Sequence[Task], training_patients: Sequence[str]) -> None:
    known = set(training_patients)
    for task in tasks:
        if task.patient_id in known:
            log.warning(
                "patient %s was trained on; the result says nothing of new patients",
                task.patient_id,
            )


def main(argv: Sequence[str] | None = None) -> None:
    steps.run(lambda a: infer(**vars(a)), Arguments, argv=argv)


if __name__ == "__main__":
    main()
