"""A run's 2-D network on whole scans, slice by slice in overlapping tiles."""

from pathlib import Path
from typing import Any

import numpy as np

import augment
import boxes
import config
import monte_carlo
import runs
from monte_carlo import Maps, Passes
from runs import Precision
from scan import Scan, ScanError

ONE_PASS = Passes(n=1)


class Predictor:
    """A run's network, built and loaded once for any number of scans.

    Args:
        run_dir: Made by train.py.
        settings: The run's.
        batch_size: Tiles the network is given at once; with dropout it is one, so that
            what is dropped does not depend on it.
        passes: For `maps`; only dropout can be drawn.
        precision: Keras' policy while the network is built.

    Raises:
        ValueError: If a run for lungs sees lung masks only, or lacks what `passes` draws.
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
            monte_carlo.refuse_lung_masks(run_dir, settings.batches)
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
        """Mean, standard deviation and mutual information of the passes over a scan."""

        def one_pass(k: int) -> np.ndarray:
            if self.dropout:
                from models.dropout import seed_dropout

                seed_dropout(self.network, self.passes.seed, k)
            return self.probability(scan)

        shape = scan.hu.shape
        n = self.passes.n if self.dropout else 1
        moments = monte_carlo.converge(one_pass, shape, n, threshold)
        return Maps(moments, boxes.whole(shape), shape)

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
            images = np.stack([tile_input(scan, z, t.start, batches) for z, t in some])
            # Full batches only: TensorFlow would trace the network again for the last.
            images = np.resize(images, (self.batch_size, *size))
            output = self.network.predict_on_batch(images[..., None])
            output = output["mask"] if isinstance(output, dict) else output
            for (z, tile), image in zip(some, np.asarray(output)[..., 1], strict=False):
                boxes.add(prob[z], tile.weights * image, tile.start)
        # Weights of tiles sum to 1 but for rounding, which can lift a sum above it.
        return np.minimum(prob, 1, out=prob)


def lung_for(scan: Scan, batches: config.Batches) -> np.ndarray | None:
    """The lung labels a run needs to look at a scan; None if it needs none.

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


def tile_input(
    scan: Scan, z: int, start: tuple[int, ...], batches: config.Batches
) -> np.ndarray:
    """(y, x) float32 network input of a tile; beyond the slice is air."""
    size = batches.slice_px
    hu = boxes.cut(scan.hu[z], start, size, fill=augment.fill(scan.hu[z], batches))
    lung = None
    if scan.lung is not None:
        lung = boxes.cut(scan.lung[z], start, size, fill=0)
    return augment.to_input(hu, lung, batches)
