"""Nodules of whole scans: found by a 3-D network, outlined slice by slice by a seeded one.

What slices cannot tell, a nodule from a vessel, the 3-D network knows; what three voxels of
1.5 mm cannot show, the border of a small nodule, the network on the scan's own pixels does.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

import boxes
import config
import files
import runs
from monte_carlo import MEMORY_GB, Passes, VolumePredictor
from nodules import FoundNodule, components, find_nodules, measure_nodules
from patches import PatchPredictor
from runs import Precision
from scan import Scan, ScanError

PATCH_PX = 128
"""Side of the patches around candidates: twice what the seeded network sees at first."""

NEAR_PX = 2
"""An outline counts if it comes as near as this to what the 3-D network found."""


@dataclass(frozen=True, eq=False)
class Found:
    """What was found in a scan.

    Attributes:
        labels: (z, y, x), 0 or the number of the nodule; 1 has the highest score.
        nodules: One for each label, in this order.
    """

    labels: np.ndarray
    nodules: list[FoundNodule]


class NoduleFinder:
    """A run of 3-D nodules, and a seeded one for their outlines, loaded once.

    Args:
        run_dir: Of the 3-D network; its tuned settings count if it has any.
        seeded_dir: Of the seeded network; None keeps the outlines of the 3-D one.
        passes: Passes of the 3-D network, each with other dropout, if it was trained with
            it; else it makes one.
        seed: Of the dropout.
        precision: Keras' policy for the 3-D network.
        memory_gb: As for `VolumePredictor`.

    Attributes:
        made_by: What decides the result, JSON-ready.

    Raises:
        FileNotFoundError: If a run is missing.
        ValueError: If the run does not find nodules in volumes.
    """

    def __init__(
        self,
        run_dir: Path,
        seeded_dir: Path | None,
        *,
        passes: int = 1,
        seed: int = 0,
        precision: Precision = "float32",
        memory_gb: float = MEMORY_GB,
    ) -> None:
        settings = runs.read_settings(run_dir)
        if settings.batches.target != "nodule" or settings.model.name != "unet3d":
            raise ValueError(
                f"{run_dir}: a {settings.model.name} for {settings.batches.target}; "
                "expected a unet3d for nodules, such as one of nodule3d"
            )
        self.settings = postprocess_settings(run_dir, settings)
        self.passes = passes if settings.model.dropout else 1
        self.predictor = VolumePredictor(
            run_dir,
            settings,
            Passes(n=self.passes, seed=seed),
            precision=precision,
            memory_gb=memory_gb,
        )
        self.seeded: PatchPredictor | None = None
        weights = [run_dir / "best.weights.h5"]
        if seeded_dir is not None:
            self.seeded = PatchPredictor(seeded_dir, runs.read_settings(seeded_dir))
            weights.append(seeded_dir / "best.weights.h5")
        self.made_by = {
            "weights_sha256": [files.sha256(path) for path in weights],
            "passes": self.passes,
            "settings": config.to_json(self.settings),
        }

    def find(self, scan: Scan) -> Found:
        """The nodules in the lungs of a scan.

        Raises:
            ScanError: If it has no lung labels.
        """
        if scan.lung is None:
            raise ScanError(f"scan {scan.scan_id} has no lung mask")
        if not scan.lung.any():
            return Found(np.zeros(scan.hu.shape, np.uint8), [])
        maps = self.predictor.maps(scan, self.settings.threshold)
        std = maps.std if maps.n > 1 else None
        about = {"std": std, "lung": scan.lung, "hu": scan.hu}
        labels, nodules = find_nodules(maps.mean, scan.grid, self.settings, **about)
        if self.seeded is None or not nodules:
            return Found(labels, nodules)
        labels = outlined(scan.hu, labels, self.seeded)
        chances = np.array([[nodule.score, nodule.max_prob] for nodule in nodules])
        return Found(labels, measure_nodules(labels, chances, scan.grid, **about))


def postprocess_settings(
    run_dir: Path, settings: config.Experiment
) -> config.Postprocess:
    """The settings a run was tuned to; those of its configuration if it was not."""
    path = run_dir / "postprocess.json"
    if settings.postprocess.method != "tuned" or not path.exists():
        return settings.postprocess
    record = json.loads(path.read_text())
    return config.from_json(config.Postprocess, record["settings"])


def outlined(hu: np.ndarray, labels: np.ndarray, seeded: PatchPredictor) -> np.ndarray:
    """The nodules as a seeded network outlines them, in the slices they were found in.

    Around the middle of each nodule in each of its slices a patch is cut out. Of what the
    network outlines there counts what touches, or nearly, what was found; where nothing
    does, what was found stays. Voxels of two nodules are those of the higher score.

    Args:
        hu: (z, y, x) HU.
        labels: (z, y, x) labels 1 to n, by falling score.
        seeded: The network.
    """
    from scipy.ndimage import find_objects

    places = [
        (label, z, boxes.around(labels[z] == label))
        for label, box in enumerate(find_objects(labels), start=1)
        for z in range(box[0].start, box[0].stop)
    ]
    places = [place for place in places if place[2] is not None]
    size = (PATCH_PX, PATCH_PX)
    starts = [seed_start(labels[z] == label, size) for label, z, _ in places]
    patches = np.stack(
        [
            boxes.cut(hu[z], start, size, fill=int(hu[z].min()))
            for (_, z, _), start in zip(places, starts, strict=True)
        ]
    )
    masks = seeded.probability(patches) >= seeded.threshold
    result = np.zeros_like(labels)
    for (label, z, _), start, mask in zip(places, starts, masks, strict=True):
        own = boxes.cut(labels[z], start, size, fill=0) == label
        outline = touching(mask, own)
        inside, covered = boxes.overlap(start, size, hu.shape[1:])
        free = result[z][inside] == 0
        result[z][inside][free & outline[covered]] = label
    # What others cover whole stays as it was found.
    lost = np.setdiff1d(labels, result)
    return np.where(np.isin(labels, lost), labels, result)


def seed_start(mask: np.ndarray, size: tuple[int, int]) -> tuple[int, ...]:
    """Where a patch begins whose middle is that of a (y, x) mask."""
    middle = np.argwhere(mask).mean(axis=0)
    return tuple(
        round(float(at)) - length // 2 for at, length in zip(middle, size, strict=True)
    )


def touching(mask: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The parts of a (y, x) mask that come near another one; that one if none does."""
    side = 2 * NEAR_PX + 1
    near = cv2.dilate(own.view(np.uint8), np.ones((side, side), np.uint8)) > 0
    parts = components(mask[None], 26)[0]
    found = np.unique(parts[near])
    found = found[found > 0]
    return np.isin(parts, found) if len(found) else own
