"""The record predictions.json, which lies next to the predictions of infer.py."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import config
from ct import files


def settings_text(settings: config.Postprocess) -> str:
    """Describes postprocessing settings in a phrase."""
    threshold = (
        "K-means threshold"
        if settings.method == "kmeans"
        else f"threshold {settings.threshold:g}"
    )
    text = f"{threshold}, erosion {settings.erosion_px} px, "
    if settings.fill_holes:
        text += "holes filled, "
    if settings.one_nodule:
        text += "only the most probable component, "
    text += f"at least {settings.min_volume_mm3:g} mm3"
    if settings.min_voxels:
        text += f", {settings.min_voxels} voxels"
    return f"{text} and mean probability {settings.min_score:g}"


FORMAT_VERSION = 1
"""Format version of predictions.json and postprocess.json."""

PREDICTIONS_JSON = "predictions.json"

STD_NIFTI = "std.nii.gz"
"""File with the standard deviation over passes, next to prob.nii.gz; only with several
passes."""


@dataclass(frozen=True)
class Predictions:
    """Contents of predictions.json, which infer.py writes beside its predictions.

    Attributes:
        run: Name of the run.
        weights_sha256: Checksum of the weights.
        split_sha256: Checksum of the split the run was trained with.
        training_patients: Names of the patients that the weights were trained on; see
            `training.runs.training_patients_of`.
        scans: scan_id -> {"part": "train", "validation", "test" or "", "patient_id"}; a
            split by slice adds {"slices": {part: [z, ...]}}, and an odd source adds
            {"warnings": [text, ...]}. A scan in which nodules were searched only in
            part of the lungs, or not at all, has {"nodules_searched": "partly" or "no"}.
        provenance: Versions, commit and machine that wrote the predictions.
        passes: Settings of the passes; empty for a single pass, and for lungs.
        repair: Defects of DICOM series that were repaired.
    """

    run: str
    weights_sha256: str
    split_sha256: str
    training_patients: tuple[str, ...]
    scans: dict[str, dict[str, Any]]
    provenance: dict[str, Any] = field(default_factory=dict)
    passes: dict[str, Any] = field(default_factory=dict)
    repair: tuple[str, ...] = ()

    def of_part(self, part: str) -> dict[str, tuple[int, ...] | None]:
        """Returns the scans of a part by sorted id, each with its slices (z) in the part.

        None stands for all slices; only a split by slice lists some. The part "all"
        contains every scan.
        """
        found: dict[str, tuple[int, ...] | None] = {}
        for scan_id, facts in sorted(self.scans.items()):
            slices = facts.get("slices")
            if part == "all" or (slices is None and facts["part"] == part):
                found[scan_id] = None
            elif slices is not None and part in slices:
                found[scan_id] = tuple(slices[part])
        return found

    def write(self, folder: Path) -> None:
        """Writes predictions.json into `folder`."""
        record = {"format_version": FORMAT_VERSION, **asdict(self)}
        if not self.repair:
            del record["repair"]
        files.write_json(Path(folder) / PREDICTIONS_JSON, record)


def read_predictions(folder: Path) -> Predictions:
    """Reads predictions.json.

    Raises:
        FileNotFoundError: If it is missing.
        ValueError: If it has another format version.
    """
    path = Path(folder) / PREDICTIONS_JSON
    if not path.exists():
        raise FileNotFoundError(f"no {path}; run infer.py first")
    record = json.loads(path.read_text())
    if record.pop("format_version", None) != FORMAT_VERSION:
        raise ValueError(
            f"{path}: not of format {FORMAT_VERSION}; run infer.py again with --overwrite"
        )
    for scan_id in record["scans"]:
        files.checked_id(scan_id, where=str(path))
    for name in ("training_patients", "repair"):
        record[name] = tuple(record.get(name, ()))
    return Predictions(**record)
