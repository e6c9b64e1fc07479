r"""Step 5 of 9: train a network on the table and the split; write a run directory.

The run directory is called NAME.partial until training ends. If training is interrupted, the
same command resumes it, with the same result as an uninterrupted run. A complete run is not
trained again; only its postprocessing settings can still be changed.

Example:
    python train.py thesis --table work/table.h5 --split work/split.json \
        --runs work/runs --name thesis --workers 2
"""

import dataclasses
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tyro

import config
import steps
from ct import files, provenance
from dataset.slice_table import SliceTable
from dataset.split import patients_of_part, read_split, scans_of_part
from metrics import froc_points
from training import runs

if TYPE_CHECKING:
    import data_generator

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Format version of training.json."""

WEIGHT_SECTIONS = ("batches", "augment", "lesions", "model", "loss", "train")
"""Sections that determine the weights; the others are stored for later steps."""

PICTURED_SLICES = 6
"""Number of validation slices or volumes in the picture of each epoch."""


@dataclass(frozen=True)
class Arguments:
    """Settings of the experiment and its paths."""

    name: str = tyro.MISSING
    """Name of the run and of its directory in `runs`."""
    table: Path = Path("work/table.h5")
    """Table made by table.py."""
    split: Path = Path("work/split.json")
    """Split of this table, made by slice_idx.py."""
    runs: Path = Path("work/runs")
    """Folder of all runs."""
    workers: int = 2
    """Number of threads that make batches; it does not change the result."""
    init: Path | None = None
    """Weights of the same network to start from, e.g. work/runs/OTHER/best.weights.h5."""
    candidates: Path | None = None
    """For batches.crop=candidate: candidates.csv that infer.py --input wrote for the scans of
    the table. A third of the samples without a nodule then show false positives from it."""
    overwrite: bool = False
    """Replace a run of this name that has other settings or data."""
    batches: config.Batches = field(default_factory=config.Batches)
    augment: config.Augment = field(default_factory=config.Augment)
    lesions: config.Lesions = field(default_factory=config.Lesions)
    model: config.Model = field(default_factory=config.Model)
    loss: config.Loss = field(default_factory=config.Loss)
    train: config.Train = field(default_factory=config.Train)
    postprocess: config.Postprocess = field(default_factory=config.Postprocess)


def train(
    table_path: Path,
    split_path: Path,
    run_dir: Path,
    experiment: config.Experiment,
    *,
    workers: int = 1,
    init: Path | None = None,
    candidates: Path | None = None,
    overwrite: bool = False,
) -> steps.Report:
    """Trains a run, resumes it, or reports that it is complete.

    Args:
        table_path: Table made by table.py.
        split_path: Split made by slice_idx.py.
        run_dir: Directory of the complete run.
        experiment: Settings; those of table and split are taken from their files.
        workers: Number of threads that make batches.
        init: Weights to start from.
        candidates: CSV of candidates in the scans of the table.
        overwrite: Replace a run with other settings or data.

    Raises:
        FileExistsError: If there is a run with other settings or data.
        FileNotFoundError: If the CSV of candidates does not exist.
        ValueError: If table and split do not match, weights to start from are missing, the
            candidates are from other scans, or the loss becomes NaN.
    """
    if experiment.train.freeze_normalisation and init is None:
        raise ValueError(
            "train.freeze_normalisation is set without --init, so there are no statistics to "
            "keep; give weights to start from with --init"
        )
    import data_generator

    split = read_split(split_path)
    with SliceTable(table_path) as table:
        marked = None
        if candidates is not None:
            marked = read_candidates(candidates, table, split, experiment.batches)
        experiment = dataclasses.replace(
            experiment,
            mask=mask_settings(table, experiment.mask),
            table=table.settings,
            split=split_settings(split),
        )
        record = provenance.record(
            experiment,
            table_sha256=table.sha256,
            split_sha256=split["sha256"],
            init_sha256=None if init is None else files.sha256(init),
            init_training_patients=runs.training_patients_of(init),
            candidates_sha256=None if candidates is None else files.sha256(candidates),
        )
        partial = run_dir.with_name(run_dir.name + ".partial")
        for directory in (run_dir, partial):
            refuse_other_run(directory, record, overwrite=overwrite)
        if run_dir.exists():
            changed = update_postprocess(run_dir, experiment.postprocess)
            return steps.Report(
                f"{run_dir} is complete: {closing_line(run_dir)}{changed}"
            )
        warn_of_seen_patients(record["init_training_patients"], split)
        warn_of_other_spacing(init, experiment)
        data = data_generator.open_data(table, split, experiment, marked)
        scans = runs.training_scans(table, split)
        start_run(partial, record, experiment, split, scans)
        if not (partial / "training.json").is_file():  # else only the rename is missing
            fit(partial, data, experiment, workers=workers, init=init)
    partial.replace(run_dir)
    return steps.Report(f"wrote {run_dir}: {closing_line(run_dir)}")


def mask_settings(table: SliceTable, otherwise: config.LungMask) -> config.LungMask:
    """Returns the lung mask settings recorded in a table, or `otherwise` if there are none."""
    record = table.provenance.get("mask")
    return otherwise if record is None else config.from_json(config.LungMask, record)


def update_postprocess(run_dir: Path, settings: config.Postprocess) -> str:
    """Updates the postprocessing settings of a complete run, which do not affect weights.

    Returns:
        Text for the closing line that lists the changes.
    """
    path = run_dir / "config.json"
    record = json.loads(path.read_text())
    before = config.with_defaults(config.Postprocess, record["postprocess"])
    now = config.to_json(settings)
    if before == now:
        return ""
    files.write_json(path, record | {"postprocess": now})
    changed = (f"{k} {before[k]} -> {v}" for k, v in now.items() if before[k] != v)
    return f"; postprocessing changed: {', '.join(changed)}"


def split_settings(split: Mapping[str, Any]) -> config.Split:
    """Returns the settings of a split; those missing from a hand-written one are defaults."""
    record = config.to_json(config.Split()) | split["settings"]
    return config.from_json(config.Split, record)


def warn_of_other_spacing(init: Path | None, experiment: config.Experiment) -> None:
    """Warns if the weights to start from were trained at another pixel or voxel size."""
    if init is None or not init.with_name("config.json").exists():
        return
    before = runs.input_spacing_mm(runs.read_settings(init.parent))
    now = runs.input_spacing_mm(experiment)
    if before != now:
        log.warning(
            "%s was trained at %s, this run trains at %s",
            init,
            *(f"{mm:g} mm" if mm else "original pixel size" for mm in (before, now)),
        )


def warn_of_seen_patients(seen: Sequence[str], split: Mapping[str, Any]) -> None:
    for part in ("validation", "test"):
        shared = set(seen) & set(patients_of_part(split, part))
        if shared:
            log.warning(
                "the weights to start from were trained on %d patients of the %s part",
                len(shared),
                part,
            )


def refuse_other_run(
    directory: Path, record: Mapping[str, Any], *, overwrite: bool
) -> None:
    """Removes a run with other settings or data if `overwrite` is set, else raises.

    Raises:
        FileExistsError: If the run has other settings or data; the message lists them.
    """
    if not directory.exists():
        return
    path = directory / "provenance.json"
    if not path.is_file():
        raise FileExistsError(
            f"{directory} exists and is not a run of train.py (provenance.json is missing); "
            "choose another --name or --runs"
        )
    found = json.loads(path.read_text())
    differences = differing_fields(found, json.loads(json.dumps(record)))
    if not differences:
        return
    if not overwrite:
        raise FileExistsError(
            f"{directory} was trained with other settings or data: "
            f"{'; '.join(differences)}. Choose another --name, or replace it with "
            "--overwrite"
        )
    files.remove(directory)


def differing_fields(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Lists the differences between two provenance records that affect the weights.

    Settings missing from the older record count as defaults.
    """
    pairs = {
        key: (found.get(key), wanted[key])
        for key in ("table_sha256", "split_sha256", "init_sha256", "candidates_sha256")
    }
    known = config.with_defaults(config.Experiment, found["settings"])
    before = json.loads(json.dumps(known))
    for section in WEIGHT_SECTIONS:
        for name, value in wanted["settings"][section].items():
            pairs[f"{section}.{name}"] = (before[section].get(name), value)
    return [
        f"{name} was {before}, is {now}"
        for name, (before, now) in pairs.items()
        if before != now
    ]


def read_candidates(
    path: Path, table: SliceTable, split: Mapping[str, Any], batches: config.Batches
) -> dict[str, np.ndarray]:
    """Reads the candidates of the table's scans as (n, 3) LPS mm per scan id.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it cannot be read or is from other scans, or `batches.crop` is not
            "candidate".
    """
    from dataset import generator3d

    if batches.crop != "candidate":
        raise ValueError(
            f"--candidates {path} is given, but batches.crop is {batches.crop}; expected "
            "candidate, as in reduction3d"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"no file {path}; expected a candidates.csv of infer.py"
        )
    marked = froc_points.read_candidate_positions(path)
    ids = table.scans["scan_id"].tolist()
    known = {scan_id: marked[scan_id] for scan_id in ids if scan_id in marked}
    for scan_id, places in known.items():
        grid = table.volume_grid(ids.index(scan_id))
        try:
            generator3d.voxels_at(places, grid)
        except ValueError as error:
            raise ValueError(f"{path}, scan {scan_id}: {error}") from error
    training = scans_of_part(split, table, "train").tolist()
    trained = [ids[index] for index in training if ids[index] in known]
    if not trained:
        raise ValueError(
            f"{path}: none of its {len(marked)} scans ({', '.join([*marked][:2])}) is in the "
            f"training part; expected {', '.join(ids[index] for index in training[:2])} or "
            "others; run infer.py --input on the source that preprocess.py read"
        )
    log.info(
        "%s: %d candidates in %d of %d training scans",
        path,
        sum(len(known[scan_id]) for scan_id in trained),
        len(trained),
        len(training),
    )
    return known


def start_run(
    directory: Path,
    record: Mapping[str, Any],
    experiment: config.Experiment,
    split: Mapping[str, Any],
    scans: Sequence[dict[str, str]],
) -> None:
    """Writes a run directory with settings, split, training scans and provenance.

    A directory that exists is left as it is.
    """
    if directory.exists():
        return
    with files.write_atomically(directory) as partial:
        partial.mkdir()
        files.write_json(partial / "config.json", config.to_json(experiment))
        files.write_json(partial / "split.json", split)
        runs.write_training_scans(partial, scans)
        files.write_json(partial / "provenance.json", record)


def fit(
    directory: Path,
    data: "data_generator.Data",
    experiment: config.Experiment,
    *,
    workers: int = 1,
    init: Path | None = None,
) -> None:
    """Trains to the last epoch, from the saved state if there is one.

    Args:
        directory: Run directory with config.json; history, weights and pictures go here.
        data: Generators with `len`, `[index]` and `epoch`.
        experiment: Settings.
        workers: Number of threads that make batches.
        init: Weights to start from.
    """
    from data_generator import as_pydataset
    from training import callbacks, loop

    settings = experiment.train
    model = loop.build_compiled_model(experiment, steps_per_epoch=len(data.training))
    progress = callbacks.Progress()
    if (directory / callbacks.STATE).is_file():
        progress = callbacks.read_state(directory / callbacks.STATE, model)
        log.info("resuming after epoch %d", progress.epoch)
    elif init is not None:
        runs.load_weights(callbacks.without_optimizer(model), init)
    log.info(
        "%s: %d parameters, %d steps of %d %s per epoch",
        model.name,
        model.count_params(),
        len(data.training),
        experiment.batches.batch_size,
        "slices" if len(experiment.batches.input_px) == 2 else "volumes",
    )
    if progress.epoch < settings.epochs and not progress.stopped:
        loop.run_epochs(
            model,
            as_pydataset(data.training, workers=workers),
            None
            if data.validation is None
            else as_pydataset(data.validation, workers=workers),
            settings,
            progress,
            run_dir=directory,
            pictured=pick_pictured_samples(data.validation or data.training),
            by_slice=experiment.batches.crop == "candidate",
        )
    callbacks.write_weights(directory / "last.weights.h5", model)
    files.write_json(
        directory / "training.json", summary(progress, model.count_params())
    )
    files.remove(directory / callbacks.STATE)


def pick_pictured_samples(generator: Any) -> tuple[np.ndarray, np.ndarray]:
    """Picks a few slices or volumes for the pictures, spread evenly, with target if possible.

    Returns:
        (slices, y, x, 1) input and (slices, y, x) bool reference; for volumes, z before y.
    """
    images, masks = [], []
    looked_at = 16 if len(generator.batches.input_px) == 2 else PICTURED_SLICES
    for index in np.unique(np.linspace(0, len(generator) - 1, looked_at).astype(int)):
        x, y = generator[int(index)]
        masks.extend((y["mask"] if isinstance(y, dict) else y)[..., 1] >= 0.5)
        images.extend(x)
    found = [i for i, mask in enumerate(masks) if mask.any()] or range(len(masks))
    spread = np.linspace(0, len(found) - 1, PICTURED_SLICES)
    shown = [found[i] for i in np.unique(np.rint(spread).astype(int))]
    return np.stack([images[i] for i in shown]), np.stack([masks[i] for i in shown])


def summary(progress: Any, parameters: int) -> dict[str, Any]:
    """Returns the content of training.json."""
    known = not math.isnan(progress.best_dice)
    return {
        "format_version": FORMAT_VERSION,
        "epochs": progress.epoch,
        "stopped_early": progress.stopped,
        "best_epoch": progress.best_epoch,
        "best_validation_dice": progress.best_dice if known else None,
        "seconds": round(sum(row["seconds"] for row in progress.history), 1),
        "parameters": parameters,
    }


def closing_line(run_dir: Path) -> str:
    facts = json.loads((run_dir / "training.json").read_text())
    dice = facts["best_validation_dice"]
    score = "no validation" if dice is None else f"validation Dice {dice:.4f}"
    return (
        f"{facts['epochs']} epochs, best {facts['best_epoch']}, {score}, trained for "
        f"{steps.duration_text(facts['seconds'])}"
    )


def run_step(arguments: Arguments) -> steps.Report:
    """Trains the run that the command line describes."""
    name = files.checked_id(arguments.name, where="--name")
    return train(
        arguments.table,
        arguments.split,
        arguments.runs / name,
        config.Experiment(
            batches=arguments.batches,
            augment=arguments.augment,
            lesions=arguments.lesions,
            model=arguments.model,
            loss=arguments.loss,
            train=arguments.train,
            postprocess=arguments.postprocess,
        ),
        workers=arguments.workers,
        init=arguments.init,
        candidates=arguments.candidates,
        overwrite=arguments.overwrite,
    )


def main(argv: Sequence[str] | None = None) -> None:
    steps.run(run_step, Arguments, argv=argv)


if __name__ == "__main__":
    main()
