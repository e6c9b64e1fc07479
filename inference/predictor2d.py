"""Inference with a 2-D network on whole scans, slice by slice in overlapping tiles."""

import functools
from pathlib import Path
from typing import Any

import numpy as np

import config
from ct import boxes, inputs
from ct.scan import Scan, ScanError
from inference import predictor3d
from inference.passes import Maps, Passes, converge
from training import runs
from training.runs import Precision

ONE_PASS = Passes(n=1)


class Predictor:
    """A run's 2-D network, built and loaded once for any number of scans.

    Args:
        run_dir: Run directory made by train.py.
        settings: Settings of the run.
        batch_size: Tiles per network call; with dropout always 1, so that the dropped units do
            not depend on the batch size.
        passes: Passes that `maps` makes; they can draw only dropout.
        precision: Keras dtype policy while the network is built.

    Raises:
        ValueError: If a run for lungs was trained on lung masks, or the run was trained
            without what `passes` draws.
    """

    def __init__(
        self,
        run_dir: Path,
        settings: config.Experiment,
        *,
        batch_size: int,
        passes: Passes = ONE_PASS,
        precision: Precision | None = None,
    ) -> None:
        if settings.batches.target == "lung":
            predictor3d.refuse_lung_masks(run_dir, settings.batches)
        self.settings = settings
        self.passes = passes
        _, self.dropout = passes.drawn(settings.model)
        self.batch_size = 1 if self.dropout else batch_size
        self.network: Any = runs.load_network(
            run_dir,
            settings,
            settings.batches.slice_px,
            dropout=self.dropout,
            precision=precision,
        )

    def maps(self, scan: Scan, threshold: float) -> Maps:
        """Computes mean, standard deviation and mutual information of the passes."""
        own_px = scan.hu.shape[1:]
        seen_px = inputs.resized_px(own_px, scan.spacing_mm[1:], self.settings.batches)

        def one_pass(k: int) -> np.ndarray:
            if self.dropout:
                from models.dropout import seed_dropout

                seed_dropout(self.network, self.passes.seed, k)
            return self.probability(scan)

        def to_scan(values: np.ndarray) -> np.ndarray:
            if seen_px == own_px:
                return values
            return np.stack([inputs.resized(image, own_px) for image in values])

        n = self.passes.n if self.dropout else 1
        shape = (len(scan.hu), *seen_px)
        return Maps(converge(one_pass, shape, n, threshold), to_scan)

    def probability(self, scan: Scan) -> np.ndarray:
        """Computes the probability of the target in one pass over a scan.

        Overlapping tiles of the training size cover the lungs of each slice, or the whole
        slice if the run needs no lung labels. Outside the tiles the probability is 0.

        Args:
            scan: The scan, with lung labels if the run needs them; see `lung_for`.

        Returns:
            (z, y, x) float32, in pixels of `batches.pixel_mm` or else the scan's own.

        Raises:
            ScanError: If needed lung labels are missing.
        """
        batches = self.settings.batches
        size = batches.slice_px
        lung = lung_for(scan, batches)
        seen_px = inputs.resized_px(scan.hu.shape[1:], scan.spacing_mm[1:], batches)
        prob = np.zeros((len(scan.hu), *seen_px), np.float32)
        tiles = [
            (z, tile)
            for z in range(len(scan.hu))
            for tile in inputs.tiles(None if lung is None else lung[z], seen_px, size)
        ]
        seen = functools.lru_cache(maxsize=1)(lambda z: seen_slice(scan, z, batches))
        for start in range(0, len(tiles), self.batch_size):
            some = tiles[start : start + self.batch_size]
            images = np.stack([tile_input(*seen(z), t.start, batches) for z, t in some])
            # Full batches only: TensorFlow would trace the network again for a smaller one.
            images = np.resize(images, (self.batch_size, *size))
            mask = runs.mask_of(self.network.predict_on_batch(images[..., None]))
            for (z, tile), image in zip(some, np.asarray(mask)[..., 1], strict=False):
                boxes.add(prob[z], tile.weights * image, tile.start)
        # Tile weights sum to 1 up to rounding, which can lift a probability above 1.
        return np.minimum(prob, 1, out=prob)


def lung_for(scan: Scan, batches: config.Batches) -> np.ndarray | None:
    """Returns the lung labels that a run needs for a scan; None if it needs none.

    Raises:
        ScanError: If they are missing.
    """
    if batches.target == "lung":
        return None
    if not batches.lung_mask and batches.crop == "centre":
        return None
    if scan.lung is None:
        raise ScanError(
            f"scan {scan.scan_id} has no lung mask, which the run was trained with; run "
            "preprocess.py again with --overwrite"
        )
    return scan.lung


def seen_slice(
    scan: Scan, z: int, batches: config.Batches
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns (y, x) HU of a slice in the network's pixels, and lung labels that mask it."""
    hu, lung = scan.hu[z], None
    if batches.pixel_mm:
        size = inputs.resized_px(hu.shape, scan.spacing_mm[1:], batches)
        hu = inputs.resized(hu, size)
    if batches.lung_mask and scan.lung is not None:
        lung = scan.lung[z]
    return hu, lung


def tile_input(
    hu: np.ndarray,
    lung: np.ndarray | None,
    start: tuple[int, ...],
    batches: config.Batches,
) -> np.ndarray:
    """Returns the (y, x) float32 network input of a tile; air surrounds the slice."""
    size = batches.slice_px
    if lung is not None:
        lung = boxes.cut(lung, start, size, fill=0)
    hu = boxes.cut(hu, start, size, fill=inputs.padding_value(hu, batches))
    return inputs.to_input(hu, lung, batches)
