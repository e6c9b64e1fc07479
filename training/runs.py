"""Reads a run directory: its settings, its network, and the patients it was trained on."""

import csv
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import config
from ct import files
from dataset import split

if TYPE_CHECKING:
    from dataset.slice_table import SliceTable

log = logging.getLogger(__name__)

POSTPROCESS_JSON = "postprocess.json"
"""File with postprocessing settings and their origin: in a run, those that were tuned; in
predictions, those that were used."""

TRAINING_SCANS_CSV = "training_scans.csv"
"""File of a run with the scans that it was trained on; older runs have none."""

SCAN_MARKS = ("series_uid", "hu_sha256")
"""Columns of `TRAINING_SCANS_CSV`, beside patient_id, that recognise a scan."""


def tuned_settings(
    run: Path, experiment: config.Experiment
) -> tuple[config.Postprocess, int]:
    """Returns a run's tuned postprocessing and the number of passes it was tuned on.

    If the run was not tuned, returns the settings of its configuration and one pass.

    Raises:
        ValueError: If the run was tuned on other weights.
    """
    base, path = experiment.postprocess, run / POSTPROCESS_JSON
    if base.method != "tuned" or not path.exists():
        return base, 1
    record = json.loads(path.read_text())
    tuned = record.get("tuned_on", {})
    if tuned.get("weights_sha256") != files.sha256(run / "best.weights.h5"):
        raise ValueError(
            f"{path} was tuned on other weights than those in {run}; run infer.py and "
            "postprocess.py --tune with this run"
        )
    settings = config.from_json(config.Postprocess, record["settings"])
    return settings, int((tuned.get("passes") or {}).get("n", 1))


Precision = Literal["float32", "mixed_float16", "mixed_bfloat16"]


def read_settings(run_dir: Path) -> config.Experiment:
    """Reads the settings that a run was trained with.

    Raises:
        FileNotFoundError: If the run is missing or not complete.
    """
    path = Path(run_dir) / "config.json"
    if not path.exists():
        raise FileNotFoundError(
            f"no finished run in {run_dir} (config.json is missing); run train.py first"
        )
    return config.from_json(config.Experiment, json.loads(path.read_text()))


def input_spacing_mm(settings: config.Experiment) -> float:
    """Returns the spacing in mm of the network's input; 0 if it is the scan's own spacing."""
    on_volumes = settings.model.name == "unet3d"
    return settings.table.volume_spacing_mm if on_volumes else settings.batches.pixel_mm


def training_patients_of(weights: Path | None) -> list[str]:
    """Returns the names of patients that a run's weights were trained on; empty if unknown.

    These are their ids and the marks of their scans: series UIDs, and checksums of HU. They
    include those of the weights that the run itself started from.
    """
    if weights is None:
        return []
    split_path = weights.parent / "split.json"
    if not split_path.is_file():
        log.warning(
            "no %s: the training patients of %s are unknown",
            split_path,
            weights,
        )
        return []
    seen = split.patients_of_part(split.read_split(split_path), "train")
    made_by = json.loads((weights.parent / "provenance.json").read_text())
    return sorted(
        {*seen, *made_by.get("init_training_patients", ()), *_marks_of(weights.parent)}
    )


def _marks_of(run: Path) -> set[str]:
    """Returns the marks of a run's training scans; empty for an older run."""
    path = run / TRAINING_SCANS_CSV
    if not path.is_file():
        return set()
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {row.get(name) or "" for row in rows for name in SCAN_MARKS} - {""}


def training_scans(
    table: "SliceTable", record: Mapping[str, Any]
) -> list[dict[str, str]]:
    """Lists the scans of the training patients, with the columns of `TRAINING_SCANS_CSV`.

    Args:
        table: The table; an older one has no checksums of HU, and the column stays empty.
        record: Split of this table.
    """
    patients = set(split.patients_of_part(record, "train"))
    known = table.scans.dtype.names or ()
    return [
        {
            "patient_id": str(row["patient_id"]),
            **{name: str(row[name]) if name in known else "" for name in SCAN_MARKS},
        }
        for row in table.scans
        if row["patient_id"] in patients
    ]


def write_training_scans(run: Path, scans: Sequence[dict[str, str]]) -> None:
    """Writes the training scans of a run."""
    files.write_rows(scans, ("patient_id", *SCAN_MARKS), run / TRAINING_SCANS_CSV)


def names_of(scan_id: str, *patients: str) -> set[str]:
    """Returns all names that a scan's patient may have among a run's training patients.

    Besides `patients`, which may hold marks of the scan, these are the scan's id, which
    stands in for a patient without a name, and the LIDC-IDRI patient if the scan's id is a
    series of LIDC-IDRI.
    """
    from nodules import lidc_database

    return {scan_id, *patients, lidc_database.known_patient(scan_id)} - {""}


def mask_of(output: Any) -> Any:
    """Returns the full-resolution mask from a network's outputs."""
    if isinstance(output, dict):
        return output["mask"]
    return output[0] if isinstance(output, list | tuple) else output


def load_network(
    run_dir: Path,
    settings: config.Experiment,
    input_px: Sequence[int],
    *,
    masks: bool = False,
    dropout: bool = False,
    precision: Precision | None = None,
) -> Any:
    """Builds a run's network and loads its best weights.

    Args:
        run_dir: Run directory made by train.py.
        settings: Settings of the run.
        input_px: (y, x) or (z, y, x) size of the input.
        masks: Take the noise of random cube masks as a second input.
        dropout: Keep dropout active at inference, seeded by `models.dropout.seed_dropout`.
            Batch normalisation still uses its learnt statistics.
        precision: Keras precision policy; None for the current one.

    Raises:
        ValueError: If the weights belong to another network.
    """
    from models import build_model  # before keras, to keep TensorFlow quiet

    model = replace(settings.model, weights="none")
    inputs = {"noise_input": True} if masks else {}
    if not masks:
        model = replace(model, mask_fraction=0.0)  # the masking layer would do nothing
    import keras

    before = keras.config.dtype_policy()
    if precision is not None:
        keras.config.set_dtype_policy(precision)
    try:
        network = build_model(model, (*input_px, 1), 2, **inputs)
    finally:
        keras.config.set_dtype_policy(before)
    load_weights(network, run_dir / "best.weights.h5")
    if dropout:
        from models.dropout import activate_dropout

        network = activate_dropout(network)
    # XLA recompiles for every shape and is slower than oneDNN on a CPU.
    network.jit_compile = False
    return network


def load_weights(network: Any, path: Path) -> None:
    """Loads the weights in a file into an uncompiled network.

    Raises:
        ValueError: If the weights belong to another network.
    """
    import h5py

    found: list[tuple[int, ...]] = []

    def note(_: str, item: Any) -> None:
        # The states of random generators are stored too, as integers.
        if isinstance(item, h5py.Dataset) and item.dtype.kind == "f":
            found.append(item.shape)

    with h5py.File(path) as file:
        file.visititems(note)
    # Keras would load what fits, warn about the rest and fail without naming the file.
    if sorted(found) != sorted(tuple(weight.shape) for weight in network.weights):
        raise ValueError(
            f"{path}: the weights do not fit this network, {network.name} with "
            f"{network.count_params()} parameters; use the model settings in "
            f"{path.with_name('config.json')}"
        )
    network.load_weights(path)
