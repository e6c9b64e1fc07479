"""Rendering of a phantom slice by slice: organs, vessels, nodules and noise."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from ct import boxes
from ct.boxes import Box
from ct.geometry import Mesh
from ct.scan import AIR_HU, LEFT, RIGHT
from phantoms import anatomy, drawn_nodules, fields
from phantoms.anatomy import Body, Chest
from phantoms.drawn_nodules import PlacedNodule
from phantoms.settings import Kernel
from phantoms.trees import Tree


@dataclass(frozen=True, eq=False)
class Scene:
    """Body, anatomy and meshes of a phantom, as rendering needs them."""

    body: Body
    chest: Chest
    mesh: Mesh
    coarse: Mesh
    stride: int

    def nodule_limit(self, box: Box) -> np.ndarray:
        """Returns the field in mm that bounds all nodules, at the voxels of a box."""
        lungs = [self.upsampled(plane)[box[1:]] for plane in self.chest.lungs[box[0]]]
        return np.stack(lungs) - drawn_nodules.WALL_MM

    def upsampled(self, plane: np.ndarray) -> np.ndarray:
        """Interpolates a coarse (y, x) plane to the pixels of the scan."""
        _, height, width = self.mesh.shape
        return _enlarged(plane, self.stride)[:height, :width]


def _enlarged(plane: np.ndarray, stride: int) -> np.ndarray:
    size = plane.shape[1] * stride, plane.shape[0] * stride
    return cv2.resize(plane, size, interpolation=cv2.INTER_LINEAR)


@dataclass(frozen=True, eq=False)
class _Tubes:
    """(z, y, x) uint8 voxel fractions, in 255ths, of vessel, airway wall and lumen."""

    vessel: np.ndarray
    wall: np.ndarray
    lumen: np.ndarray


def draw_tubes(trees: Sequence[tuple[str, Tree]], scene: Scene) -> _Tubes:
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
    """Paints one segment, sampling slices at three heights for partial volume."""
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
    depth = fields.capsule(
        Mesh(heights, part.y, part.x), start, end, float(r0), float(r1)
    )
    share = np.clip(0.5 - depth / np.float32(dx), 0, 1)
    # A tube thinner than a pixel fills only a fraction of the pixels it crosses.
    share *= np.float32(255 * min(1.0, 2 * max(r0, r1) / dx))
    share = share.reshape(-1, 3, *share.shape[1:]).mean(1)
    np.maximum(volume[box], share.astype(np.uint8), out=volume[box])


@dataclass(frozen=True, eq=False)
class Patch:
    """A nodule in its box of voxels: mask, opacity, density and bounding field."""

    nodule: PlacedNodule
    box: Box
    mask: np.ndarray
    opacity: np.ndarray
    hu: np.ndarray
    limit: np.ndarray

    @classmethod
    def of(
        cls, nodule: PlacedNodule, box: Box, scene: Scene, rng: np.random.Generator
    ) -> "Patch":
        limit = scene.nodule_limit(box)
        field_mm, opacity, hu = drawn_nodules.paint_nodule(
            nodule, scene.mesh.part(box), limit, rng
        )
        return cls(nodule, box, field_mm < 0, opacity, hu, limit)


@dataclass(frozen=True, eq=False)
class _Layer:
    """An organ ready for painting: cut to its box, in units of its border width."""

    organ_hu: float
    borders: np.ndarray
    box: Box

    @classmethod
    def of(cls, organ: anatomy.Organ, scene: Scene) -> "_Layer | None":
        borders = _borders(organ.field, scene)
        box = boxes.bounding_box(borders < 0.5, margin=2)
        if box is None:
            return None
        return cls(float(organ.hu), np.ascontiguousarray(borders[box]), box)

    def paint(self, image: np.ndarray, z: int, stride: int) -> None:
        """Blends the organ into slice `z` of the image."""
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


def _borders(field_mm: np.ndarray, scene: Scene) -> np.ndarray:
    """Divides a field by the width in mm over which partial volume blurs its border.

    A border parallel to the slice is blurred by the slice thickness.
    """
    dz, _, dx = scene.mesh.spacing_mm
    if len(field_mm) == 1:
        return field_mm / np.float32(dx)
    tilt = np.clip(np.gradient(field_mm, dz, axis=0), -1, 1)
    return field_mm / np.sqrt((tilt * dz) ** 2 + dx**2).astype(np.float32)


def render(
    scene: Scene,
    tubes: _Tubes,
    patches: Sequence[Patch],
    kernel: Kernel,
    outside: np.ndarray | None,
    draws,
) -> tuple[np.ndarray, np.ndarray]:
    """Renders the scan and the exact lung labels, slice by slice.

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


def _paint_lungs(image, border, scene: Scene, tubes: _Tubes, z: int) -> None:
    """Paints lung tissue, fissures, vessels and bronchi of slice `z`."""
    inside = boxes.bounding_box(border < 0.5)
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


def _paint_patch(image: np.ndarray, patch: Patch, z: int) -> None:
    """Blends a nodule into slice `z`; denser structures in it stay visible."""
    index = z - patch.box[0].start
    if 0 <= index < len(patch.opacity):
        view = image[patch.box[1:]]
        mixed = view + patch.opacity[index] * (patch.hu[index] - view)
        np.maximum(view, mixed, out=view)


def _couch(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Draws air with the table: a mattress on a thin, bright, slightly hollow shell."""
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


def outside_fov(mesh: Mesh) -> np.ndarray:
    """Returns (y, x) bool, True outside the circle that a scanner reconstructs."""
    rows, columns = mesh.shape[1:]
    y, x = np.ogrid[:rows, :columns]
    middle_y, middle_x = (rows - 1) / 2, (columns - 1) / 2
    return np.hypot(y - middle_y, x - middle_x) > min(rows, columns) / 2


@dataclass(frozen=True, eq=False)
class _Grain:
    """Noise of a reconstruction: band-passed, and stronger where more is absorbed."""

    kernel: Kernel
    pixel_mm: float
    scale_hu: float
    amount: np.ndarray
    shoulders: np.ndarray

    @classmethod
    def of(cls, scene: Scene, kernel: Kernel, rng: np.random.Generator) -> "_Grain":
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
        """Draws the (y, x) noise of slice `z` in HU."""
        white = rng.standard_normal(self.amount.shape, dtype=np.float32)
        fine, wide = (grain / self.pixel_mm for grain in self.kernel.grain_mm)
        noise = _blurred(white, fine) - 0.85 * _blurred(white, wide)
        shoulder = float(self.shoulders[z])
        noise *= np.float32(
            self.scale_hu * (1 + 0.9 * shoulder) / max(noise.std(), 1e-6)
        )
        if shoulder > 0.05:
            # Few photons pass through both shoulders, which causes left-right streaks.
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
