"""Inference with a 3-D network in Monte Carlo passes of random masks or dropout.

A pass for lungs sees the whole body at once if memory allows; a pass for nodules sees the
lungs in tiles. The pair (seed, pass number) determines its masks and dropout. Each pass is a
call of its own: if passes shared a call, the last bits of each would depend on their number,
and batching gains nothing (on two cores four passes took 0.96 s each in one call, 0.77 s each
one by one).
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
"""Memory limit of a pass; half the memory of a small laptop."""

BYTES_PER_VOXEL = 32
"""Memory of a pass per voxel and first-level filter, rounded up: at 128^3 voxels and 16
filters, 26 bytes were measured with float32 and 18 with bfloat16."""

PADDED_PX = 32
"""Multiple to which volume sizes are padded, so that scans share few shapes: each shape needs
its own network, and building and tracing one costs about half a pass."""

NETWORKS = 3
"""Number of networks kept for reuse, one per shape; each holds a copy of the weights."""

BODY_SHARE = 0.1
"""Least size of a tissue component that counts as body, as a share of the largest one. It
includes arms and both halves of a cut body, but not objects on the table."""

BODY_MARGIN_PX = 2
"""Margin of air around the body."""

CUT_SHARE = 0.2
"""Share of tissue in an end plane of the scan above which the scan cuts the body there; a
table that reaches the end has less."""

EDGE_PX = 6
"""Least number of voxels by which a body is continued where the scan cuts it."""

LUNG_MARGIN_PX = 8
"""Margin of tissue around the lungs in runs for nodules."""


class VolumePredictor:
    """A run's 3-D network for any number of scans of any size.

    Args:
        run_dir: Run directory made by train.py.
        settings: Settings of the run.
        passes: Number of passes and what they draw.
        precision: Keras dtype policy while the network is built.
        memory_gb: Memory limit of a pass; larger scans are covered by tiles of the
            training size.

    Raises:
        ValueError: If the run has no volume spacing, classifies candidates, was trained on
            lung masks, or was trained without what `passes` draws.
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
                "--reduction RUN to judge the candidates of another run"
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
        """Computes mean, standard deviation and mutual information of the passes.

        The scan is resampled to the run's spacing and cropped to the body, or for nodules
        to the lungs. Outside the crop nothing is computed and the probability is 0. Where the
        scan cuts the body, its last plane is repeated: cut lungs that end in air look like
        something else to the network.
        """
        spacing_mm = self.settings.table.volume_spacing_mm
        weights, _ = resample.isotropic(scan.grid, spacing_mm)
        hu = resample.volume(scan.hu, weights)
        lung = scan.lung if self.settings.batches.target == "nodule" else None
        box = body_box(hu) if lung is None else lung_box(lung, weights)
        edges = cut_edges(hu, box) if lung is None else ((0, 0),) * 3
        moments = self.moments(np.pad(hu[box], edges, mode="edge"), threshold)
        to_scan = functools.partial(resample_to_grid, scan.grid, spacing_mm, box)

        def without_edges(values: np.ndarray) -> np.ndarray:
            inner = (
                slice(before, length - after)
                for (before, after), length in zip(edges, values.shape, strict=True)
            )
            return to_scan(values[tuple(inner)])

        return Maps(moments, without_edges)

    def moments(self, hu: np.ndarray, threshold: float) -> RunningMoments:
        """Makes the passes over a (z, y, x) volume in HU at the run's spacing."""
        tile_px = self.tile_px(hu.shape)
        network = self.network(tile_px)
        tiles = boxes.tiles(boxes.full_box(hu.shape), tile_px)
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
            # Tile weights sum to 1 up to rounding.
            return np.minimum(prob, 1, out=prob)

        n = self.passes.n if self.masks or self.dropout else 1
        return converge(one_pass, hu.shape, n, threshold)

    def probability(self, network: Any, values: np.ndarray, k: int) -> np.ndarray:
        """Returns the (z, y, x) float32 probability of a network input in pass `k`."""
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
        """Returns the tile size for a volume.

        For lungs it is the whole padded volume if memory allows. Otherwise, and for
        nodules, it is the training size, whatever memory that takes: smaller tiles give
        less context than in training, and with all of the lungs in one tile more small
        nodules were missed.
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
        """Returns the network for this tile size, building it unless it is cached."""
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


def resample_to_grid(
    grid: Grid, spacing_mm: float, box: Box, values: np.ndarray
) -> np.ndarray:
    """Resamples values in a box of the cubic voxels to the scan's grid, 0 outside."""
    weights = zip(resample.from_isotropic(grid, spacing_mm), box, strict=True)
    return np.clip(resample.volume(values, [w[:, part] for w, part in weights]), 0, 1)


def refuse_lung_masks(run_dir: Path, batches: config.Batches) -> None:
    """Raises ValueError if a run was trained on lung-masked input."""
    if batches.lung_mask:
        raise ValueError(
            f"{run_dir}: batches.lung_mask is set, so this run sees nothing outside lung "
            "masks; train one with --batches.no-lung-mask"
        )


def lung_box(lung: np.ndarray, weights: Sequence[np.ndarray]) -> Box:
    """Returns the box around the lungs, with a margin, on the resampled grid.

    It is the whole grid if there are no lungs.

    Args:
        lung: (z, y, x) lung labels on the scan's grid.
        weights: Resampling weights of each axis; see `resample.isotropic`.
    """
    shape = tuple(len(axis) for axis in weights)
    return boxes.bounding_box(
        resample.mask(lung > 0, weights), LUNG_MARGIN_PX
    ) or boxes.full_box(shape)


def cut_edges(hu: np.ndarray, box: Box) -> tuple[tuple[int, int], ...]:
    """Returns by how many voxels to continue the ends of a box where the scan cuts the body.

    Sizes become multiples of `PADDED_PX`, with `EDGE_PX` voxels or more at a cut end.

    Args:
        hu: (z, y, x) HU of the whole volume.
        box: Box of the body.

    Returns:
        (before, after) of each axis, as for numpy.pad.
    """
    tissue = hu[box] > sides.TISSUE_HU
    edges = []
    for axis, (part, length) in enumerate(zip(box, hu.shape, strict=True)):
        first, last = (
            tissue.take(end, axis).mean() > CUT_SHARE and at_end
            for end, at_end in ((0, part.start == 0), (-1, part.stop == length))
        )
        size, cuts = part.stop - part.start, int(first) + int(last)
        added = cuts and -(-(size + cuts * EDGE_PX) // PADDED_PX) * PADDED_PX - size
        before = added // cuts if first else 0
        edges.append((before, added - before))
    return tuple(edges)


def body_box(hu: np.ndarray) -> Box:
    """Returns the box around the body in a (z, y, x) volume of HU, with a margin of air.

    It is the whole volume if there is no tissue.
    """
    import cc3d

    parts = cc3d.connected_components(hu > sides.TISSUE_HU, connectivity=6)
    counts = np.bincount(parts.ravel())
    counts[0] = 0
    large = (counts > 0) & (counts >= BODY_SHARE * counts.max())
    return boxes.bounding_box(large[parts], BODY_MARGIN_PX) or boxes.full_box(hu.shape)
