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
import provenance
import slice_idx
import steps
from scan import Scan, ScanSource, read_scan, scan_files

log = logging.getLogger(__name__)

MANIFEST = "predictions.json"
FORMAT_VERSION = 1
STRIDE_PX = 64
"""Crops are rounded up to this, so that few shapes of the network have to be built."""


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
    """Segment this CT instead of scan files: DICOM folder, volume, folder or CSV list."""
    batch_size: int = 8
    """Slices per pass."""
    overwrite: bool = False
    """Replace predictions made with other weights."""


class Predictor:
    """A run's network; it is built once per input shape and loads its weights once each."""

    def __init__(self, run_dir: Path, *, batch_size: int) -> None:
        self.run_dir = run_dir
        self.settings = read_settings(run_dir)
        self.batch_size = batch_size
        self._networks: dict[tuple[int, int], Any] = {}

    def network(self, size_px: tuple[int, int]) -> Any:
        """The Keras model for (y, x) inputs of `size_px`."""
        if size_px not in self._networks:
            self._networks[size_px] = load_network(self.run_dir, self.settings, size_px)
        return self._networks[size_px]

    def probability(self, scan: Scan) -> np.ndarray:
        """Probability of the target at every voxel of a scan.

        The network sees the box around both lungs, whole slices where there is no lung
        mask; elsewhere the probability is 0.

        Args:
            scan: With lung labels if the run was trained with `batches.lung_mask`.

        Returns:
            (z, y, x) float32 on the scan's grid.
        """
        batches = self.settings.batches
        lung = scan.lung if batches.lung_mask or batches.crop == "lung" else None
        slices, window = network_window(scan.hu.shape, lung, batches.input_px)
        size_px = tuple(side.stop - side.start for side in window)
        network = self.network(size_px)
        prob = np.zeros(scan.hu.shape, np.float32)
        inside = clipped(window, scan.hu.shape[1:])
        for start in range(0, len(slices), self.batch_size):
            rows = slices[start : start + self.batch_size]
            images = np.stack([network_input(scan, z, window, batches) for z in rows])
            output = network.predict_on_batch(images[..., None])
            output = output["mask"] if isinstance(output, dict) else output
            prob[rows, inside[0], inside[1]] = within(
                output[..., 1], window, scan.hu.shape[1:]
            )
        return prob


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


def network_window(
    shape: tuple[int, ...], lung: np.ndarray | None, least_px: tuple[int, int]
) -> tuple[np.ndarray, tuple[slice, slice]]:
    """Which slices enter the network, and which window of each.

    Args:
        shape: (z, y, x) of the scan.
        lung: (z, y, x) lung labels, or None for whole slices.
        least_px: (y, x) the window is at least as large as.

    Returns:
        Slice numbers, and (y, x) slices that may reach beyond the image. The window is
        centred on the lungs and its sides are multiples of `STRIDE_PX`.
    """
    if lung is None or not lung.any():
        bounds = [(0, shape[1]), (0, shape[2])]
        rows = np.arange(shape[0])
    else:
        rows = np.flatnonzero(lung.any(axis=(1, 2)))
        marked = [np.flatnonzero(lung.any(axis=other)) for other in ((0, 2), (0, 1))]
        bounds = [(int(m[0]), int(m[-1]) + 1) for m in marked]
    window = []
    for (low, high), least in zip(bounds, least_px, strict=True):
        side = -(-max(high - low, least) // STRIDE_PX) * STRIDE_PX
        start = (low + high - side) // 2
        window.append(slice(start, start + side))
    return rows, (window[0], window[1])


def clipped(window: tuple[slice, slice], shape: tuple[int, ...]) -> tuple[slice, slice]:
    """The part of `window` that lies on an image of (y, x) `shape`."""
    y, x = (
        slice(max(side.start, 0), min(side.stop, length))
        for side, length in zip(window, shape, strict=True)
    )
    return y, x


def within(
    images: np.ndarray, window: tuple[slice, slice], shape: tuple[int, ...]
) -> np.ndarray:
    """The part of (..., y, x) images cut by `window` that lies on the full image."""
    inside = clipped(window, shape)
    y, x = (
        slice(part.start - side.start, part.stop - side.start)
        for part, side in zip(inside, window, strict=True)
    )
    return images[..., y, x]


def network_input(
    scan: Scan, z: int, window: tuple[slice, slice], batches: config.Batches
) -> np.ndarray:
    """(y, x) float32 network input of one slice; beyond the image is air."""
    hu = cut(scan.hu[z], window, fill=augment.AIR_HU)
    lung = None if scan.lung is None else cut(scan.lung[z], window, fill=0)
    return augment.to_input(hu, lung, batches)


def cut(image: np.ndarray, window: tuple[slice, slice], *, fill: int) -> np.ndarray:
    """A (y, x) window of an image; `fill` where it reaches beyond."""
    size = tuple(side.stop - side.start for side in window)
    result = np.full(size, fill, image.dtype)
    inside = clipped(window, image.shape)
    within(result, window, image.shape)[...] = image[inside]
    return result


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
    predictor = Predictor(exp_dir, batch_size=batch_size)
    split = slice_idx.read_split(exp_dir / "split.json")
    manifest = new_manifest(exp_dir, split)
    check_same_weights(result_dir, manifest, overwrite=overwrite)
    tasks = tasks_of_input(input) if input else tasks_of_parts(scans, split, parts)
    warn_of_leaks(tasks, manifest["training_patients"])

    def segment(task: Task) -> Task:
        path = result_dir / task.scan_id / "prob.nii.gz"
        if overwrite or not path.exists():
            scan = read_source(task.source, predictor.settings)
            write_probability(path, predictor.probability(scan), scan)
        return task

    done, failures = steps.map_scans(segment, tasks, workers=1, label="infer")
    manifest["scans"] = {
        task.scan_id: {"part": task.part, "patient_id": task.patient_id}
        | ({"slices": task.slices} if task.slices else {})
        for task in done
    }
    write_manifest(result_dir, manifest)
    steps.write_failures(failures, result_dir / "skipped.csv")
    volume_bytes = sum(
        (result_dir / task.scan_id / "prob.nii.gz").stat().st_size for task in done
    )
    line = f"wrote {result_dir}: {len(done)} scans, {files.size_text(volume_bytes)}"
    return steps.Report(line, failures)


def tasks_of_parts(
    scans_dir: Path, split: dict[str, Any], parts: Sequence[str]
) -> list[Task]:
    """The scan files of the patients in `parts` of a split."""
    part_of = {
        patient: part
        for part in parts
        for patient in slice_idx.patients_of_part(split, part)
    }
    slices = {
        part: slice_idx.slices_of_part(split, part) for part in parts if split["leaks"]
    }
    tasks = []
    for path in scan_files(scans_dir):
        patient_id, scan_id = scan_identity(path)
        if patient_id in part_of:
            own = {part: s[scan_id] for part, s in slices.items() if scan_id in s}
            tasks.append(Task(scan_id, patient_id, part_of[patient_id], path, own))
    if not tasks:
        raise ValueError(
            f"{scans_dir} holds no scan of the {' or '.join(parts)} patients of the run's "
            "split; choose other --parts, or the --scans the run was made from"
        )
    return tasks


def scan_identity(path: Path) -> tuple[str, str]:
    """Patient id and scan id of a scan file, without reading its volumes."""
    import tables

    from scan import read_record

    with tables.open_file(path) as h5:
        record = read_record(h5, path)
    return record["patient_id"], record["scan_id"]


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
    from lung_mask import lung_labels

    scan = nifti.load_scan(source)
    return replace(scan, lung=lung_labels(scan.hu, scan.spacing_mm, settings.mask))


def write_probability(path: Path, prob: np.ndarray, scan: Scan) -> None:
    from volume_io import write_volume

    write_volume(path, prob, scan.grid, scan.source_grid)


def new_manifest(run_dir: Path, split: dict[str, Any]) -> dict[str, Any]:
    """The record that goes beside the predictions, still without scans."""
    return {
        "format_version": FORMAT_VERSION,
        "run": run_dir.name,
        "weights_sha256": files.sha256(run_dir / "best.weights.h5"),
        "split_sha256": split["sha256"],
        "training_patients": slice_idx.patients_of_part(split, "train"),
        "provenance": provenance.record(),
        "scans": {},
    }


def check_same_weights(
    result_dir: Path, manifest: dict[str, Any], *, overwrite: bool
) -> None:
    """Refuses to mix predictions of two networks in one folder."""
    path = result_dir / MANIFEST
    if overwrite or not path.exists():
        return
    found = json.loads(path.read_text())["weights_sha256"]
    if found != manifest["weights_sha256"]:
        raise ValueError(
            f"{path}: predictions of weights {found[:12]}; this run's are "
            f"{manifest['weights_sha256'][:12]}; use --overwrite or another --result_dir"
        )


def write_manifest(result_dir: Path, manifest: dict[str, Any]) -> None:
    """Writes predictions.json; scans listed by an earlier call are kept."""
    path = result_dir / MANIFEST
    if path.exists():
        earlier = json.loads(path.read_text())
        if earlier["weights_sha256"] == manifest["weights_sha256"]:
            manifest["scans"] = earlier["scans"] | manifest["scans"]
    with files.written_whole(path) as partial:
        partial.write_text(json.dumps(manifest, indent=1))


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
