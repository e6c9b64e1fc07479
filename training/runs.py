"""A run directory opened: its settings, its network, and whom its weights have seen."""

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import config
from ct import files
from dataset import split

log = logging.getLogger(__name__)

POSTPROCESS_JSON = "postprocess.json"
"""Settings and their origin: in a run its tuned values, in predictions what was used."""


def tuned_settings(
    run: Path, experiment: config.Experiment
) -> tuple[config.Postprocess, int]:
    """The settings that a run was tuned to, and on how many passes.

    Those of its configuration, and one pass, if it was not tuned.

    Raises:
        ValueError: If it was tuned with other weights.
    """
    base, path = experiment.postprocess, run / POSTPROCESS_JSON
    if base.method != "tuned" or not path.exists():
        return base, 1
    record = json.loads(path.read_text())
    tuned = record.get("tuned_on", {})
    if tuned.get("weights_sha256") != files.sha256(run / "best.weights.h5"):
        raise ValueError(
            f"{path} was tuned on other weights than {run} has; run infer.py and "
            "postprocess.py --tune with this run"
        )
    settings = config.from_json(config.Postprocess, record["settings"])
    return settings, int((tuned.get("passes") or {}).get("n", 1))


Precision = Literal["float32", "mixed_float16", "mixed_bfloat16"]


def read_settings(run_dir: Path) -> config.Experiment:
    """The experiment a run was trained with.

    Raises:
        FileNotFoundError: If the run is absent or not complete.
    """
    path = Path(run_dir) / "config.json"
    if not path.exists():
        raise FileNotFoundError(
            f"no finished run in {run_dir} (config.json is missing); run train.py first"
        )
    return config.from_json(config.Experiment, json.loads(path.read_text()))


def seen_mm(settings: config.Experiment) -> float:
    """Spacing of what the network sees of every scan; 0 where it is the scan's own."""
    on_volumes = settings.model.name == "unet3d"
    return settings.table.volume_spacing_mm if on_volumes else settings.batches.pixel_mm


def training_patients_of(weights: Path | None) -> list[str]:
    """Patients that the weights of another run have seen; none if that is unknown.

    Those that the weights that run started from had seen are among them.
    """
    if weights is None:
        return []
    split_path = weights.parent / "split.json"
    if not split_path.is_file():
        log.warning("no %s: who %s was trained on is unknown", split_path, weights)
        return []
    seen = split.patients_of_part(split.read_split(split_path), "train")
    made_by = json.loads((weights.parent / "provenance.json").read_text())
    return sorted({*seen, *made_by.get("init_training_patients", ())})


def names_of(scan_id: str, *patients: str) -> set[str]:
    """All that a scan's patient may be called among those a run was trained on.

    Beside `patients` these are the scan's id, which stands for a patient whom nothing
    names, and the patient of LIDC-IDRI whose series the scan is called after.
    """
    from nodules import lidc_database

    return {scan_id, *patients, lidc_database.known_patient(scan_id)} - {""}


def mask_of(output: Any) -> Any:
    """The mask among a network's outputs, beside those of slice or coarser levels."""
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
    """The run's network with its best weights.

    Args:
        run_dir: Made by train.py.
        settings: The run's.
        input_px: (y, x) or (z, y, x) of its inputs.
        masks: Take the noise of random masks as a second input.
        dropout: Drop in use as in training; `models.dropout.seed_dropout` says what. Batch
            normalisation still uses what it learnt.
        precision: Keras' policy; None for the one in force.

    Raises:
        ValueError: If the weights are of another network.
    """
    from models import build_model  # before keras: it keeps TensorFlow quiet

    model = replace(settings.model, weights="none")
    inputs = {"noise_input": True} if masks else {}
    if not masks:
        model = replace(model, mask_fraction=0.0)  # the layer would have nothing to do
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
        from models.dropout import with_dropout

        network = with_dropout(network)
    # XLA compiles for every shape anew, and is slower than oneDNN on a CPU.
    network.jit_compile = False
    return network


def load_weights(network: Any, path: Path) -> None:
    """Gives a network that is not compiled the weights in a file.

    Raises:
        ValueError: If they are of another network.
    """
    import h5py

    found: list[tuple[int, ...]] = []

    def note(_: str, item: Any) -> None:
        # Random generators have a state too, of whole numbers.
        if isinstance(item, h5py.Dataset) and item.dtype.kind == "f":
            found.append(item.shape)

    with h5py.File(path) as file:
        file.visititems(note)
    # Keras would take what fits, warn of the rest and then fail without a name.
    if sorted(found) != sorted(tuple(weight.shape) for weight in network.weights):
        raise ValueError(
            f"{path}: the weights are not of this network, {network.name} with "
            f"{network.count_params()} parameters; use the model settings in "
            f"{path.with_name('config.json')}"
        )
    network.load_weights(path)
