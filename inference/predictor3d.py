"""Volumes seen in many passes of a 3-D network, with other masks or dropout in each.

A pass for lungs sees the whole body at once where memory allows, one for nodules the lungs in
tiles. Its masks and dropout follow from (seed, number of the pass). Several passes in one call
would differ in the last bits with their number, and gain nothing: on two cores, four passes in
one call took 0.96 s each, one by one 0.77 s.
"""

import functools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import config
from ct import boxes, resample
from ct.boxes import Box
from ct.geometry import Grid
from ct.inputs import to_input
from ct.scan import AIR_HU, Scan
from inference.moments import RunningMoments
from inference.passes import Maps, Passes, converge
from lungs import sides
from training import runs
from training.runs import Precision

MEMORY_GB = 4.0
"""What the passes may take; half of a small laptop's memory."""

BYTES_PER_VOXEL = 32
"""Memory of a pass per voxel and filter of the first level: 26 were measured with float32,
18 with bfloat16, at 128^3 voxels and 16 filters."""

PADDED_PX = 32
"""Volumes are padded to multiples of this, so that scans share few shapes: a network is
built and traced for each, which costs about as much as half a pass."""

NETWORKS = 3
"""Networks kept for shapes seen before; each has its own copy of the weights."""

BODY_SHARE = 0.1
"""Tissue counts as body in parts of at least this share of the largest: both halves of a
cut body and arms, but not what lies on the table."""

BODY_MARGIN_PX = 2
"""Air kept around the body."""

LUNG_MARGIN_PX = 8
"""Tissue kept around the lungs where nodules are looked for."""


class VolumePredictor:
    """A run's 3-D network for any number of scans, whatever their size.

    Args:
        run_dir: Made by train.py.
        settings: The run's.
        passes: How many, and what is drawn in them.
        precision: Keras' policy while the network is built.
        memory_gb: A scan that would take more is covered by tiles of the size trained on.

    Raises:
        ValueError: If the run has no spacing of volumes, sees lung masks only, or lacks
            what `passes` draws.
    """

    def __init__(
        self,
        run_dir: Path,
        settings: config.Experiment,
        passes: Passes,
        *,
        precision: Precision = "float32",
        memory_gb: float = MEMORY_GB,
    ) -> None:
        if not settings.table.volume_spacing_mm:
            raise ValueError(
                f"{run_dir}: table.volume_spacing_mm is 0, so the spacing of the network's "
                "volumes is unknown; train it on a table with volumes"
            )
        if settings.batches.crop == "candidate":
            raise ValueError(
                f"{run_dir}: the run judges candidates, not volumes; run infer.py with "
                "--reduction RUN to use it on what another one finds"
            )
        refuse_lung_masks(run_dir, settings.batches)
        self.run_dir = run_dir
        self.passes = passes
        self.masks, self.dropout = passes.drawn(settings.model)
        model = settings.model
        if self.masks:
            usual = model.mask_fraction / (2 if model.mask_varied else 1)
            model = replace(model, mask_fraction=passes.mask_fraction or usual)
        self.settings = replace(settings, model=model)
        self.precision: Precision = precision
        self.memory_gb = memory_gb
        self.networks: OrderedDict[tuple[int, ...], Any] = OrderedDict()

    def maps(self, scan: Scan, threshold: float) -> Maps:
        """Mean, standard deviation and mutual information of the passes over a scan.

        The scan is resampled to the run's spacing and cut to the body, for nodules to the
        lungs; what lies outside is not computed and has probability 0.
        """
        spacing_mm = self.settings.table.volume_spacing_mm
        weights, _ = resample.isotropic(scan.grid, spacing_mm)
        hu = resample.volume(scan.hu, weights)
        lung = scan.lung if self.settings.batches.target == "nodule" else None
        box = body_box(hu) if lung is None else lung_box(lung, weights)
        moments = self.moments(hu[box], threshold)
        return Maps(moments, functools.partial(onto, scan.grid, spacing_mm, box))

    def moments(self, hu: np.ndarray, threshold: float) -> RunningMoments:
        """Passes over a (z, y, x) volume of the run's spacing, in HU."""
        tile_px = self.tile_px(hu.shape)
        network = self.network(tile_px)
        tiles = boxes.tiles(boxes.whole(hu.shape), tile_px)
        cuts = [boxes.cut(hu, tile.start, tile_px, fill=AIR_HU) for tile in tiles]
        inputs = [to_input(cut, None, self.settings.batches) for cut in cuts]

        def one_pass(k: int) -> np.ndarray:
            prob = np.zeros(hu.shape, np.float32)
            if self.dropout:
                from models.dropout import seed_dropout

                seed_dropout(network, self.passes.seed, k)
            for tile, values in zip(tiles, inputs, strict=True):
                found = self.probability(network, values, k)
                boxes.add(prob, tile.weights * found, tile.start)
            # Weights of tiles sum to 1 but for rounding.
            return np.minimum(prob, 1, out=prob)

        n = self.passes.n if self.masks or self.dropout else 1
        return converge(one_pass, hu.shape, n, threshold)

    def probability(self, network: Any, values: np.ndarray, k: int) -> np.ndarray:
        """(z, y, x) float32 of the network's input in pass `k`."""
        inputs: Any = values[None, ..., None]
        if self.masks:
            from models.masking import mask_noise

            noise = mask_noise(
                range(k, k + 1),
                values.shape,
                self.settings.model.mask_cube_px,
                seed=self.passes.seed,
            )
            inputs = {"volume": inputs, "noise": noise}
        return np.asarray(runs.mask_of(network.predict_on_batch(inputs)))[0, ..., 1]

    def tile_px(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """What the network sees at once of a volume.

        For lungs all of it, if memory allows. Else, and for nodules, what it was trained
        on, whatever memory that takes: smaller tiles would show it less than it knows, and
        seeing all of the lungs at once it missed more small nodules.
        """
        model, batches = self.settings.model, self.settings.batches
        step = max(PADDED_PX, 2**model.depth)
        z, y, x = (-(-size // step) * step for size in shape)
        fits = z * y * x * model.filters * BYTES_PER_VOXEL <= self.memory_gb * 1e9
        if fits and batches.target == "lung":
            return z, y, x
        trained = batches.volume_px
        return min(z, trained[0]), min(y, trained[1]), min(x, trained[2])

    def network(self, tile_px: tuple[int, int, int]) -> Any:
        """The network for volumes of this size, built now or kept from before."""
        if tile_px not in self.networks:
            while len(self.networks) >= NETWORKS:
                self.networks.popitem(last=False)
            self.networks[tile_px] = runs.load_network(
                self.run_dir,
                self.settings,
                tile_px,
                masks=self.masks,
                dropout=self.dropout,
                precision=self.precision,
            )
        self.networks.move_to_end(tile_px)
        return self.networks[tile_px]


def onto(grid: Grid, spacing_mm: float, box: Box, values: np.ndarray) -> np.ndarray:
    """Values in a box of the cubic voxels over a grid, on that grid; elsewhere 0."""
    weights = zip(resample.from_isotropic(grid, spacing_mm), box, strict=True)
    return np.clip(resample.volume(values, [w[:, part] for w, part in weights]), 0, 1)


def refuse_lung_masks(run_dir: Path, batches: config.Batches) -> None:
    """Raises ValueError if a run needs to be told where lungs are."""
    if batches.lung_mask:
        raise ValueError(
            f"{run_dir}: batches.lung_mask is set, so this run sees nothing outside of lung "
            "masks; train it with --batches.no-lung-mask"
        )


def lung_box(lung: np.ndarray, weights: Sequence[np.ndarray]) -> Box:
    """The box around lung labels on the grid that `weights` lead to, and a margin.

    All of it without lungs.
    """
    shape = tuple(len(axis) for axis in weights)
    return boxes.around(
        resample.mask(lung > 0, weights), LUNG_MARGIN_PX
    ) or boxes.whole(shape)


def body_box(hu: np.ndarray) -> Box:
    """The box around the body in a (z, y, x) volume of HU, and a little air.

    The whole volume if there is no tissue.
    """
    import cc3d

    parts = cc3d.connected_components(hu > sides.TISSUE_HU, connectivity=6)
    counts = np.bincount(parts.ravel())
    counts[0] = 0
    large = (counts > 0) & (counts >= BODY_SHARE * counts.max())
    return boxes.around(large[parts], BODY_MARGIN_PX) or boxes.whole(hu.shape)
