"""Abdomen phantom: HU of an abdomen and pelvis without lungs, for training lung networks.

Coordinates are mm in the patient: x to the left, y to the back, z to the head; x = 0 is the
midline, y = 0 the middle of the abdominal cavity, z = 0 the top of the iliac crests. Sizes are
those of textbook adults; no patient's anatomy was copied. It is made to look right at voxels of
2 mm and more.
"""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from ct.boxes import Box
from ct.geometry import Mesh, mesh_from_axes
from ct.scan import AIR_HU
from phantoms import bowel
from phantoms.bowel import Diet
from phantoms.fields import distance, ellipsoid, smooth_max, spline_noise, tube
from phantoms.settings import KERNELS

FAT_HU = -104.0
MUSCLE_HU = 52.0

SEED_WORD = 0xABD0
"""Part of the seed, so that an abdomen shares no random numbers with a chest."""


@dataclass(frozen=True)
class Body:
    """Body parameters that vary between abdomens; lengths in mm.

    Attributes:
        half_width, half_depth: Half the width and depth of the abdominal cavity.
        fat: Mean thickness of the fat under the skin.
        belly: Further thickness of that fat in front of the navel.
        filling: Share of the cavity's fat that is replaced by collapsed bowel.
        hips: Widening of the outline at the hips, as a share.
        pitch: Distance between neighbouring vertebrae.
        top: Height of the highest slice.
        length: Length of the scan.
        blood_hu: HU of blood; about 42 without contrast agent.
        liver_hu, kidney_hu: HU of both organs.
        supine: True if the patient lies on the back, False if on the belly.
    """

    half_width: float
    half_depth: float
    fat: float
    belly: float
    filling: float
    hips: float
    pitch: float
    top: float
    length: float
    blood_hu: float
    liver_hu: float
    kidney_hu: float
    supine: bool

    @property
    def spine_y(self) -> float:
        """Position of the middle of the vertebral bodies in y, at z = 50."""
        return 0.3 * self.half_depth + 20

    @property
    def outline_half_width(self) -> float:
        return self.half_width + 17 + 0.9 * self.fat

    @property
    def outline_front(self) -> float:
        return -self.half_depth - 11 - 0.8 * self.fat

    @property
    def outline_back(self) -> float:
        return self.spine_y + 66 + 0.6 * self.fat


def draw_body(rng: np.random.Generator) -> Body:
    """Draws a body, from thin to obese."""
    weight = rng.beta(1.3, 1.6)
    contrast = rng.random() < 0.6
    fatty = rng.random() < 0.2
    liver = rng.uniform(0, 35) if fatty else rng.uniform(50, 66)
    return Body(
        half_width=rng.uniform(100, 118) + 34 * weight,
        half_depth=rng.uniform(58, 72) + 50 * weight * rng.uniform(0.5, 1.0),
        fat=rng.uniform(3, 9) + 52 * weight * rng.uniform(0.4, 1.0),
        belly=45 * max(weight - 0.45, 0) * rng.uniform(0, 1.5),
        filling=float(np.clip(0.75 - 0.75 * weight + rng.normal(0, 0.12), 0.05, 0.85)),
        hips=rng.uniform(0.02, 0.2) * (1 - 0.6 * weight),
        pitch=rng.uniform(32, 39),
        top=rng.uniform(140, 175),
        length=rng.uniform(160, 320),
        blood_hu=rng.uniform(110, 300) if contrast else 42.0,
        liver_hu=liver + (rng.uniform(30, 60) if contrast else 0),
        kidney_hu=rng.uniform(120, 220) if contrast else 34.0,
        supine=rng.random() > 0.08,
    )


@dataclass(frozen=True, eq=False)
class _Canvas:
    """An image of HU that organs are painted into.

    Attributes:
        hu: (z, y, x) float32.
        mesh: Points of its voxels.
    """

    hu: np.ndarray
    mesh: Mesh

    def paint(
        self, field: np.ndarray, hu: float, box: Box = (slice(None),) * 3
    ) -> None:
        """Blends an organ into a box, with partial volume at its border."""
        share = np.clip(0.5 - field / np.float32(self.mesh.spacing_mm[2]), 0, 1)
        view = self.hu[box]
        view += share * (np.float32(hu) - view)

    def blob(self, centre_xyz, radii_xyz, hu: float, turn_deg: float = 0.0) -> None:
        """Paints an ellipsoid."""
        centre, reach = np.asarray(centre_xyz), max(radii_xyz) + 4.0
        self._boxed(
            lambda part: ellipsoid(part, centre, radii_xyz, turn_deg),
            [(hu, 0.0)],
            centre - reach,
            centre + reach,
        )

    def pipe(self, points_xyz, radii_mm, *layers: tuple[float, float]) -> None:
        """Paints a bent tube as layers, each with its HU and its depth in mm."""
        points, reach = np.asarray(points_xyz, float), np.max(radii_mm) + 4.0
        self._boxed(
            lambda part: tube(part, points, radii_mm, reach_mm=4.0),
            layers,
            points.min(0) - reach,
            points.max(0) + reach,
        )

    def _boxed(
        self, field_of: Callable[[Mesh], np.ndarray], layers, low_xyz, high_xyz
    ) -> None:
        box = self.mesh.box_around(low_xyz, high_xyz)
        if box is None:
            return
        field = field_of(self.mesh.part(box))
        for hu, depth in layers:
            self.paint(field + np.float32(depth), hu, box)


def make_abdomen(seed: int, spacing_mm: float = 2.0) -> np.ndarray:
    """Makes the abdomen of a seed; it depends on the arguments alone.

    Args:
        seed: Seed of everything that is drawn.
        spacing_mm: Edge of the cubic voxels; 1.5 to 5.

    Returns:
        (z, y, x) int16 HU in canonical orientation, 160 to 320 mm long. No voxel is lung.

    Raises:
        ValueError: If the voxels are too large or too small.
    """
    if not 1.5 <= spacing_mm <= 5:
        raise ValueError(f"spacing_mm is {spacing_mm}, expected 1.5 to 5")
    rng = np.random.default_rng([SEED_WORD, seed])
    body = draw_body(rng)
    diet = bowel.draw_diet(rng, 1 if body.supine else -1)
    mesh = _mesh(body, spacing_mm, rng)
    canvas = _Canvas(np.full(mesh.shape, -1000, np.float32), mesh)
    outline = _outline(body, mesh, rng)
    cavity = _cavity(body, mesh, rng)
    _paint_outside(canvas, body, outline, rng)
    _paint_wall(canvas, body, outline, cavity, rng)
    _paint_filling(canvas, body, cavity, rng)
    _paint_gut(canvas, body, diet, rng)
    _paint_organs(canvas, body, cavity, rng)
    _paint_bones(canvas, body, rng)
    if rng.random() < 0.1:
        _paint_free_gas(canvas, body, cavity, rng)
    return _scanned(canvas, rng)


def _mesh(body: Body, spacing_mm: float, rng: np.random.Generator) -> Mesh:
    half_x = body.outline_half_width * (1 + body.hips) + rng.uniform(8, 50)
    front = body.outline_front - body.belly - rng.uniform(8, 45)
    back = body.outline_back + rng.uniform(8, 45)
    if body.supine:
        back += 30
    else:
        front -= 30
    z = np.arange(body.top - body.length, body.top, spacing_mm)
    y = np.arange(front, back, spacing_mm)
    x = np.arange(-half_x, half_x, spacing_mm)
    return mesh_from_axes(z, y, x)


def _outline(body: Body, mesh: Mesh, rng: np.random.Generator) -> np.ndarray:
    """Computes the field of the skin: narrow at the waist, wide at the hips."""
    hips = body.hips * np.exp(-(((mesh.z + 130) / 75) ** 2))
    belly = body.belly * np.exp(-(((mesh.z + 10) / 85) ** 2))
    front, back = body.outline_front - belly, body.outline_back
    half_depth, middle = (back - front) / 2, (front + back) / 2
    half_width = body.outline_half_width * (0.97 + hips)
    level = (
        (np.abs(mesh.x) / half_width) ** 2.4
        + (np.abs(mesh.y - middle) / half_depth) ** 2.4
    ) ** (1 / 2.4) - 1
    return distance(level.astype(np.float32), mesh) + 2.5 * spline_noise(rng, mesh, 70)


def _cavity(body: Body, mesh: Mesh, rng: np.random.Generator) -> np.ndarray:
    """Computes the field of the abdominal cavity, which narrows into the pelvis."""
    into = np.clip((-mesh.z - 10) / 150, 0, 1)
    half_width = body.half_width * (1 - 0.5 * into)
    half_depth = body.half_depth * (1 - 0.25 * into)
    dy = mesh.y - 0.25 * body.half_depth * into
    level = (
        (np.abs(mesh.x) / half_width) ** 2.4 + (np.abs(dy) / half_depth) ** 2.4
    ) ** (1 / 2.4) - 1
    return distance(level.astype(np.float32), mesh) + 2 * spline_noise(rng, mesh, 45)


def _paint_outside(
    canvas: _Canvas, body: Body, outline: np.ndarray, rng: np.random.Generator
) -> None:
    """Paints table, mattress, and sometimes a blanket and the arms."""
    mesh, side = canvas.mesh, 1 if body.supine else -1
    surface = body.outline_back if body.supine else -body.outline_front
    radius = rng.uniform(300, 900)
    top = surface + rng.uniform(3, 12)
    depth = np.hypot(mesh.x, side * mesh.y - (top - radius)) - np.float32(radius)
    beside = np.abs(mesh.x) - rng.uniform(190, 230)
    for middle, half_mm, hu in ((-4, 5.0, -955.0), (2, 1.4, 130.0), (20, 17.0, -962.0)):
        plate = np.maximum(np.abs(depth - middle) - half_mm, beside)
        canvas.paint(plate, hu)
    if rng.random() < 0.4:
        gap = 9 + 6 * spline_noise(rng, mesh, (120, 35, 35))
        canvas.paint(np.abs(outline - gap.clip(2)) - 1, rng.uniform(-900, -650))
    if rng.random() < 0.12:
        _paint_arms(canvas, body)


def _paint_arms(canvas: _Canvas, body: Body) -> None:
    """Paints forearms beside the body, where the field of view reaches them."""
    for side in (-1, 1):
        x = side * (body.outline_half_width + 36)
        arm = [(x, 20, body.top + 40), (x, 0, body.top - 130), (0.9 * x, -30, -90)]
        canvas.pipe(arm, (38, 32, 24), (FAT_HU, 0), (MUSCLE_HU, 5))
        canvas.pipe(arm, (9, 7, 6), (600, 0), (200, 3))


def _paint_wall(
    canvas: _Canvas,
    body: Body,
    outline: np.ndarray,
    cavity: np.ndarray,
    rng: np.random.Generator,
) -> None:
    """Paints skin, fat, muscle with planes of fat, and the fat of the cavity."""
    mesh = canvas.mesh
    belly = body.belly * np.exp(-(((mesh.z + 10) / 85) ** 2)) * (mesh.y < 0)
    thickness = (body.fat + belly) * (1 + 0.25 * spline_noise(rng, mesh, 70)).clip(
        0.4, 2
    )
    muscle = np.maximum(outline + 2 + thickness, cavity - 50)
    planes = 1.6 - 10 * np.abs(spline_noise(rng, mesh, (60, 26, 26)))
    canvas.paint(outline, 25.0)
    canvas.paint(outline + 2, FAT_HU)
    canvas.paint(np.maximum(muscle, planes), MUSCLE_HU)
    canvas.paint(cavity, FAT_HU)


def _paint_filling(
    canvas: _Canvas, body: Body, cavity: np.ndarray, rng: np.random.Generator
) -> None:
    """Paints collapsed bowel, mesentery and vessels between the fat of the cavity."""
    lumps = spline_noise(rng, canvas.mesh, 13)
    strands = np.abs(spline_noise(rng, canvas.mesh, 17)) - 0.07
    bound = 3.0 * (body.filling - 0.5)
    bowel_like = np.maximum(6 * (lumps - bound), cavity + 3)
    canvas.paint(bowel_like, rng.uniform(25, 45) + (15 if body.blood_hu > 100 else 0))
    canvas.paint(np.maximum(14 * strands, cavity + 2), 20.0)


def _paint_gut(
    canvas: _Canvas, body: Body, diet: Diet, rng: np.random.Generator
) -> None:
    gut = bowel.draw_gut(rng, diet, body.half_width - 6, body.half_depth - 4)
    bowel.paint_gut(
        canvas.hu,
        canvas.mesh,
        gut,
        rng,
        wall_hu=rng.uniform(30, 50) + (35 if body.blood_hu > 100 else 0),
        gas_side=diet.gas_side,
    )


def _paint_organs(
    canvas: _Canvas, body: Body, cavity: np.ndarray, rng: np.random.Generator
) -> None:
    """Paints the solid organs, the great vessels and the bladder over the bowel."""
    width, depth, spine = body.half_width, body.half_depth, body.spine_y
    _paint_liver(canvas, body, cavity, rng)
    spleen_xyz = (0.74 * width, 0.45 * depth, rng.uniform(120, 150))
    radii = rng.uniform(0.7, 1.2) * np.array([24, 36, 46])
    canvas.blob(spleen_xyz, radii, body.liver_hu + 5, 30)
    for side in (-1, 1):
        x, z = side * (46 + 0.12 * width), rng.uniform(62, 90) + 6 * side
        turn = -25 * side
        canvas.blob(
            (x, spine - 4, z), (27, 25, rng.uniform(46, 60)), body.kidney_hu, turn
        )
        canvas.blob((x - 8 * side, spine - 10, z), (13, 9, 26), -60.0, turn)
        psoas = [(side * 24, spine, 125), (side * 40, spine - 4, 10)]
        psoas += [(side * 58, spine - 30, -80), (side * 84, -10, -170)]
        canvas.pipe(psoas, (8, 21, 19, 14), (MUSCLE_HU + 5, 0))
    _paint_vessels(canvas, body)
    pancreas = [(-35, -6, 62), (-15, -14, 80), (30, 0, 95), (70, 20, 110)]
    canvas.pipe(pancreas, (13, 9, 9, 8), (body.liver_hu - 8, 0))
    size = rng.uniform(18, 42)
    bladder_xyz = (0, -0.35 * depth, -172 + 0.5 * size)
    canvas.blob(bladder_xyz, (size + 12, size + 2, size), 40.0)
    canvas.blob(bladder_xyz, (size + 9, size - 1, size - 3), rng.uniform(0, 12))


def _paint_liver(
    canvas: _Canvas, body: Body, cavity: np.ndarray, rng: np.random.Generator
) -> None:
    """Paints the liver, whose lower edge rises to the left, and the gall bladder."""
    low, reach = rng.uniform(25, 85), rng.uniform(-10, 55)
    box = canvas.mesh.box_around((-1e3, -1e3, low - 30), (1e3, 1e3, 1e3))
    if box is None:
        return
    mesh, cavity = canvas.mesh.part(box), cavity[box]
    wave = 6 * spline_noise(rng, mesh, 45)
    edge = low + 0.4 * (mesh.x + body.half_width) + 0.12 * (mesh.y + 30) - mesh.z
    slant = 0.85 * (mesh.x - reach + 0.5 * (mesh.y + 20)) + wave
    behind = 0.8 * (mesh.y - 0.45 * body.half_depth + 0.4 * (mesh.x + 40))
    liver = smooth_max(smooth_max(cavity + 3, slant, 20.0), edge + wave, 16.0)
    liver = smooth_max(liver, behind.astype(np.float32), 20.0)
    canvas.paint(liver, body.liver_hu, box)
    gall_xyz = (-0.4 * body.half_width, -0.35 * body.half_depth, low + 30)
    canvas.blob(gall_xyz, (13, 18, 26), rng.uniform(0, 18))


def _paint_vessels(canvas: _Canvas, body: Body) -> None:
    """Paints aorta, vena cava and the iliac vessels of both sides."""
    front = body.spine_y - 28
    cava = 0.75 * body.blood_hu + 10
    canvas.pipe([(8, front, 240), (5, front, 0)], (11, 9), (body.blood_hu, 0))
    canvas.pipe([(-24, front - 4, 240), (-18, front, -8)], (13, 11), (cava, 0))
    for side in (-1, 1):
        course = [(4, front, 0), (side * 34, front + 10, -55), (side * 74, -45, -150)]
        canvas.pipe(course, (8, 7, 6), (body.blood_hu, 0))
        vein = [(x + 10 * side, y + 10, z) for x, y, z in course]
        canvas.pipe(vein, (8, 7, 7), (cava, 0))


def _paint_bones(canvas: _Canvas, body: Body, rng: np.random.Generator) -> None:
    marrow = rng.uniform(110, 230)
    _paint_spine(canvas, body, marrow)
    _paint_ribs(canvas, body)
    for side in (-1, 1):
        _paint_hip(canvas, body, side, marrow)


def _paint_spine(canvas: _Canvas, body: Body, marrow: float) -> None:
    """Paints lumbar vertebrae with discs and arches, and the sacrum."""
    y = body.spine_y
    box = canvas.mesh.box_around((-50, y - 30, -48), (50, y + 75, 1e3))
    if box is not None:
        mesh = canvas.mesh.part(box)
        # The lumbar spine bends forwards; its lowest vertebra lies behind it.
        dy = mesh.y - y - 10 * ((mesh.z - 50) / 100) ** 2
        wrapped = (mesh.z + body.pitch / 2) % body.pitch - body.pitch / 2
        waist = 1 + 0.1 * np.cos(2 * np.pi * (wrapped / body.pitch - 0.5))
        column = 17 * (
            ((np.abs(mesh.x) / 23) ** 2.5 + (np.abs(dy) / 17) ** 2.5) ** 0.4 - waist
        )
        vertebra = np.maximum(column, np.abs(wrapped) - 0.5 * body.pitch + 4)
        canal = np.hypot(mesh.x / 1.2, dy - 26)
        arch = np.maximum(np.abs(canal - 12) - 3, np.abs(wrapped) - 0.36 * body.pitch)
        spinous = np.maximum(np.abs(mesh.x) - 3.5, np.abs(dy - 52) - 16)
        across = np.maximum(np.abs(np.abs(mesh.x) - 26) - 16, np.abs(dy - 20) - 4)
        spinous = np.maximum(spinous, np.abs(wrapped + 6) - 9)
        across = np.maximum(across, np.abs(wrapped) - 6)
        canvas.paint(column, 85.0, box)
        for shell, hu in ((0, 420.0), (2.5, marrow)):
            canvas.paint(vertebra + shell, hu, box)
        for bone in (arch, spinous, across):
            canvas.paint(bone, 450.0, box)
        canvas.paint(canal - 8, 25.0, box)
    for back, z, radii in (
        (24, -74, (46, 17, 32)),
        (46, -110, (34, 12, 28)),
        (42, -146, (17, 8, 24)),
    ):
        canvas.blob((0, y + back, z), radii, 380.0)
        canvas.blob((0, y + back, z), np.subtract(radii, 2.5), marrow)


def _paint_ribs(canvas: _Canvas, body: Body) -> None:
    """Paints the lowest ribs, which slope down around the upper abdomen."""
    width, depth = body.half_width + 6, body.half_depth + 5
    for rib in range(6):
        end = 0.9 + 0.42 * rib
        angle = np.linspace(0.3, min(end, 2.4), 14)
        z = (
            body.pitch * (2.2 + rib)
            - 55 * (1 - np.cos(angle))
            + 30 * (angle > 2) * (angle - 2)
        )
        x, y = width * np.sin(angle) ** 0.9, depth * np.cos(angle) + 6
        for side in (-1, 1):
            course = np.column_stack([side * x, y, z])
            canvas.pipe(course, 4.8, (480, 0), (200, 2))


def _paint_hip(canvas: _Canvas, body: Body, side: int, marrow: float) -> None:
    """Paints ilium, hip joint, femur, ischium and pubis of one side."""
    s, y = 0.55 + 0.45 * body.half_width / 120, body.spine_y - 40
    box = canvas.mesh.box_around((-165, y - 60, -170), (165, y + 90, 30))
    if box is not None:
        mesh = canvas.mesh.part(box)
        # The wing runs from the sacrum forwards and outwards; along is 0 at the sacrum.
        dx, dy = side * mesh.x - 42, mesh.y - y - 72
        along, across = 0.62 * dx - 0.78 * dy, 0.78 * dx + 0.62 * dy
        across = across - 0.28 * (mesh.z + 30) + 0.0025 * (along - 62) ** 2 - 4
        thick = np.abs(across) - 6 + 0.03 * np.clip(along, 0, 100)
        crest = mesh.z + 0.008 * (along - 55) ** 2 - 3
        ends = np.abs(along - 58 * s) - 60 * s + 0.25 * np.clip(-60 - mesh.z, 0, None)
        wing = np.maximum(
            np.maximum(thick, crest), np.maximum(ends, 20 - side * mesh.x)
        )
        for shell, hu in ((0, 480.0), (2.2, marrow)):
            canvas.paint(wing + shell, hu, box)
    joint = np.array([side * 92 * s, y + 2, -158])
    canvas.blob(joint, (36, 33, 34), 450.0)
    canvas.blob(joint, (27, 27, 27), 30.0)
    canvas.blob(joint, (24, 24, 24), marrow + 120)
    x, y, z = joint
    shaft = [joint, (x + side * 42, y + 10, z - 22), (x + side * 38, y + 4, z - 90)]
    canvas.pipe(shaft, (13, 17, 14), (550, 0), (marrow, 4))
    ischium = [(x - side * 14, y + 24, z), (x - side * 28, y + 40, z - 60)]
    canvas.pipe(ischium, (14, 15), (450, 0), (marrow, 2.5))
    pubis = [(x - side * 18, y - 22, z - 6), (side * 12, y - 52, z - 20)]
    canvas.pipe(pubis, (10, 11), (450, 0), (marrow, 2.5))


def _paint_free_gas(
    canvas: _Canvas, body: Body, cavity: np.ndarray, rng: np.random.Generator
) -> None:
    """Paints free gas, which rises to the highest place under the wall."""
    rise = canvas.mesh.y if body.supine else -canvas.mesh.y
    level = -body.half_depth + rng.uniform(8, 40)
    canvas.paint(np.maximum(cavity + 1, rise - np.float32(level)), -985.0)


def _scanned(canvas: _Canvas, rng: np.random.Generator) -> np.ndarray:
    """Blurs the image, adds noise and cuts it to the round field of view."""
    spacing = canvas.mesh.spacing_mm[2]
    kernel = KERNELS[rng.choice(len(KERNELS), p=(0.5, 0.35, 0.15))]
    hu = _blurred_in_z(canvas.hu, rng.uniform(0, 2.2) / spacing)
    # Larger voxels average the noise of the kernel's own pixels.
    noise_hu = rng.uniform(*kernel.noise_hu) / np.sqrt(spacing)
    sigma = max(kernel.blur_mm / spacing, 0.3)
    height, width = hu.shape[1:]
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
    # Noise is strongest in the middle of the body, where most is absorbed.
    amount = noise_hu * (0.35 + 0.75 * np.exp(-1.5 * (y * y + x * x)))
    for plane in hu:
        plane[:] = cv2.GaussianBlur(plane, (0, 0), sigma)
        grain = rng.standard_normal((height, width), dtype=np.float32)
        grain = cv2.GaussianBlur(grain, (0, 0), max(kernel.grain_mm[0] / spacing, 0.3))
        plane += grain / grain.std() * amount
    if rng.random() < 0.5:
        away = np.hypot(y * height, x * width)
        hu[:, away > max(height, width)] = AIR_HU
    return np.rint(np.clip(hu, AIR_HU, 3071, out=hu)).astype(np.int16)


def _blurred_in_z(hu: np.ndarray, sigma: float) -> np.ndarray:
    """Blurs a volume across slices, as thick slices do."""
    if sigma < 0.2:
        return hu
    flat = hu.reshape(len(hu), -1)
    blurred = cv2.GaussianBlur(
        flat, (1, 0), sigmaX=0.1, sigmaY=sigma, borderType=cv2.BORDER_REPLICATE
    )
    return blurred.reshape(hu.shape)
