"""Step 9 of 9: export a run as a SavedModel for TensorFlow Serving.

Example:
    python export.py --run work/runs/smoke --out work/export/smoke

The signature takes HU; window, normalisation and network are part of the graph. As a check,
a process that can import neither Keras nor this project loads the written model, and its
output must match that of Python. Research code, not a medical device.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import config
import steps
from ct import files, provenance
from ct.inputs import EPSILON, POPULATION_HU, to_input
from training import runs

TOLERANCE = 1e-4
"""Largest difference allowed between the SavedModel and Python, in probability."""

CLIENT = """
import sys

HIDDEN = {"keras", "tf_keras", "config", "ct", "models", "augment", "training", "inference"}

class WithoutProject:
    # Delegates to another finder, but hides Keras and this project.
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            return None
        return self.finder.find_spec(name, path, target)

sys.meta_path[:] = [WithoutProject(finder) for finder in sys.meta_path]
import numpy as np
import tensorflow as tf

served = tf.saved_model.load(sys.argv[1]).signatures["serving_default"]
inputs = {k: tf.constant(v) for k, v in np.load(sys.argv[2]).items()}
np.save(sys.argv[3], served(**inputs)["probability"].numpy())
"""
"""Program of a serving client; run by `python -I -c` outside of the checkout."""


@dataclass(frozen=True)
class Arguments:
    """Run to export, and the output folder."""

    run: Path
    """Run directory made by train.py."""
    out: Path
    """Folder of the model; its versions are numbered folders inside."""
    version: int = 1
    """Version number shown by TensorFlow Serving."""
    size_px: tuple[int, ...] | None = None
    """Input size of the model, (y, x) for slices or (z, y, x) for volumes. The default is the
    size of the training tiles, which infer.py also uses."""
    overwrite: bool = False
    """Replace this version."""


def export(
    run: Path,
    out: Path,
    *,
    version: int = 1,
    size_px: tuple[int, ...] | None = None,
    overwrite: bool = False,
) -> steps.Report:
    """Writes OUT/VERSION and compares it with Python on random slices or volumes.

    Raises:
        FileExistsError: If the version exists with other weights or another size.
        ValueError: If the SavedModel differs from Python by more than `TOLERANCE`, or
            `size_px` has the wrong number of axes.
    """
    target = out / str(version)
    settings = runs.read_settings(run)
    trained_px = settings.batches.input_px
    size_px = size_px or trained_px
    if len(size_px) != len(trained_px):
        raise ValueError(
            f"size_px is {size_px}; expected {len(trained_px)} sizes as in {trained_px}, "
            f"the training input of {run}"
        )
    made_of = {
        "weights_sha256": files.sha256(run / "best.weights.h5"),
        "size_px": list(size_px),
    }
    if target.exists() and not overwrite:
        if found_record(target).items() >= made_of.items():
            return steps.Report(f"{target} is complete")
        raise FileExistsError(
            f"{target} exists with other weights or another size; choose another --version "
            "or use --overwrite"
        )
    network = runs.load_network(run, settings, size_px)
    with files.write_atomically(target) as partial:
        write_saved_model(partial, network, settings.batches, size_px)
        record = provenance.record(settings, **made_of)
        files.write_json(partial / "assets.extra/provenance.json", record)
        difference = largest_difference(partial, network, settings.batches, size_px)
        if difference > TOLERANCE:
            raise ValueError(
                f"{target}: the SavedModel differs from Python by {difference:.2g} in "
                f"probability; expected at most {TOLERANCE:g}; nothing was written"
            )
    num_bytes = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    return steps.Report(
        f"wrote {target}: {'x'.join(map(str, size_px))} px, "
        f"{files.size_text(num_bytes)}, equal to Python within {difference:.1g}"
    )


def found_record(target: Path) -> dict[str, Any]:
    """Reads the provenance of an exported version; returns {} if there is none."""
    path = target / "assets.extra/provenance.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def write_saved_model(
    path: Path, network: Any, batches: config.Batches, size_px: tuple[int, ...]
) -> None:
    """Writes the SavedModel.

    Its signature `serving_default` takes `hu`, (n, y, x) int16, and, if the run was trained
    with `batches.lung_mask`, `lung`, (n, y, x) uint8 (0 is outside); it returns
    `probability`, (n, y, x) float32. If `batches.pixel_mm` is set, pixels must have that
    size. For volumes all arrays are (n, z, y, x) at the spacing of the training; no cubes
    are hidden.
    """
    import keras
    import tensorflow as tf

    specs = [tf.TensorSpec((None, *size_px), tf.int16, name="hu")]
    if batches.lung_mask:
        specs.append(tf.TensorSpec((None, *size_px), tf.uint8, name="lung"))
    archive = keras.export.ExportArchive()
    archive.track(network)
    archive.add_endpoint(
        "serving_default", make_serving_function(network, batches), specs
    )
    archive.write_out(path, verbose=False)


def make_serving_function(
    network: Any, batches: config.Batches
) -> Callable[..., dict[str, Any]]:
    """Returns the served function, with the arithmetic of `inputs.to_input` in TensorFlow."""
    import tensorflow as tf

    low, high = batches.window_hu
    axes = list(range(1, len(batches.input_px) + 1))

    def serve(hu: Any, lung: Any = None) -> dict[str, Any]:
        image = tf.cast(hu, tf.float32)
        if batches.normalisation == "relative":
            least = tf.reduce_min(image, axis=axes, keepdims=True)
            span = tf.reduce_max(image, axis=axes, keepdims=True) - least
            image = (image - least) / tf.where(span > 0, span, 1.0)
        else:
            image = tf.clip_by_value((image - low) / (high - low), 0.0, 1.0)
        if lung is not None:
            image = tf.where(lung > 0, image, 0.0)
        if batches.normalisation in ("zscore", "relative"):
            mean, variance = tf.nn.moments(image, axes=axes, keepdims=True)
            image = (image - mean) / (tf.sqrt(variance) + EPSILON)
        elif batches.normalisation == "minmax":
            least = tf.reduce_min(image, axis=axes, keepdims=True)
            most = tf.reduce_max(image, axis=axes, keepdims=True)
            image = (image - least) / (most - least + EPSILON)
        elif batches.normalisation == "population":
            mean, sd = POPULATION_HU
            image = (image * (high - low) + low - mean) / sd
        output = network(tf.expand_dims(image, -1), training=False)
        return {"probability": runs.mask_of(output)[..., 1]}

    return serve


def largest_difference(
    model_dir: Path, network: Any, batches: config.Batches, size_px: tuple[int, ...]
) -> float:
    """Returns the largest difference in probability between the SavedModel and Python."""
    rng = np.random.default_rng(0)
    hu = rng.integers(-1100, 600, (2, *size_px)).astype(np.int16)
    inputs: dict[str, np.ndarray] = {"hu": hu}
    if batches.lung_mask:
        inputs["lung"] = (rng.random((2, *size_px)) < 0.5).astype(np.uint8)
    lungs = inputs.get("lung", [None, None])
    images = [
        to_input(image, lung, batches) for image, lung in zip(hu, lungs, strict=True)
    ]
    expected = runs.mask_of(network.predict_on_batch(np.stack(images)[..., None]))
    return float(
        np.abs(run_saved_model(model_dir, inputs) - np.asarray(expected)[..., 1]).max()
    )


def run_saved_model(model_dir: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Runs the SavedModel in a process without Keras and without this project."""
    with tempfile.TemporaryDirectory() as folder:
        sent, received = Path(folder) / "inputs.npz", Path(folder) / "output.npy"
        np.savez(sent, allow_pickle=False, **inputs)
        command = [
            sys.executable,
            "-I",
            "-c",
            CLIENT,
            model_dir.resolve(),
            sent,
            received,
        ]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        if done.returncode:
            raise ValueError(
                f"{model_dir}: the SavedModel does not run without Keras: "
                f"{done.stderr.strip().splitlines()[-1]}"
            )
        return np.load(received)


def main(argv: Sequence[str] | None = None) -> None:
    steps.run(lambda a: export(**vars(a)), Arguments, argv=argv)


if __name__ == "__main__":
    main()
