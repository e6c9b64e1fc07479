"""Chest anatomy of a phantom as distance fields: organs, airway, fissures, lung roots.

Coordinates are mm in the patient: x to the left, y to the back, z to the head; x = 0 is
the midline, y = 0 the middle of the rib cage, z = 0 the lowest point of the lungs. A
field is negative within its organ and gives the distance to its surface in mm to first
order. Sizes are those of textbook adults; no patient's anatomy was copied.
"""

from dataclasses import dataclass

import numpy as np

from ct.geometry import Mesh
from phantoms.fields import (
    FAR_MM,
    distance,
    ellipsoid,
    smooth_max,
    smooth_min,
    spline_noise,
    tube,
)

RIB_SLOPE_MM = 85.0
"""Descent of a rib from the spine to its front end."""


@dataclass(frozen=True)
class Body:
    """Body parameters that vary between phantoms; lengths in mm.

    Attributes:
        lung_height: Height from the lowest recess to the apex.
        half_width, half_depth: Half the width and depth of the rib cage's inside.
        fat: Mean thickness of the fat under the skin.
        dome_right, dome_left: Height of the diaphragm's domes above z = 0.
        heart: Scale factor of the heart.
        pitch: Distance between neighbouring vertebrae and between neighbouring ribs.
        blood_hu: HU of blood; about 40 without contrast agent.
        gas: Fraction of the stomach's depth that is filled with gas.
        breast: Height of the breasts above the chest wall; 0 for none.
        parenchyma_hu: Mean HU of the lungs.
        emphysema: Strength of low-density patches, 0 to 1.
    """

    lung_height: float
    half_width: float
    half_depth: float
    fat: float
    dome_right: float
    dome_left: float
    heart: float
    pitch: float
    blood_hu: float
    gas: float
    breast: float
    parenchyma_hu: float
    emphysema: float

    @property
    def wall_back(self) -> float:
        return 46 + 0.4 * self.fat

    @property
    def wall_front(self) -> float:
        return 13 + 0.7 * self.fat

    @property
    def outline_half_width(self) -> float:
        return self.half_width + 15 + 0.9 * self.fat

    @property
    def outline_half_depth(self) -> float:
        return self.half_depth + (self.wall_front + self.wall_back) / 2

    @property
    def outline_centre_y(self) -> float:
        return (self.wall_back - self.wall_front) / 2


def draw_body(rng: np.random.Generator) -> Body:
    """Draws a body from the range of adults."""
    height = rng.uniform(200, 270)
    dome_right = rng.uniform(50, 78)
    contrast = rng.random() < 0.5
    return Body(
        lung_height=height,
        half_width=rng.uniform(116, 140),
        half_depth=rng.uniform(76, 98),
        fat=rng.uniform(5, 22),
        dome_right=dome_right,
        dome_left=dome_right - rng.uniform(0, 16),
        heart=rng.uniform(0.85, 1.12),
        pitch=height / rng.uniform(9.8, 11),
        blood_hu=rng.uniform(140, 280) if contrast else 42.0,
        gas=rng.uniform(0.2, 0.75),
        breast=rng.uniform(10, 35) if rng.random() < 0.45 else 0.0,
        parenchyma_hu=rng.uniform(-895, -835),
        emphysema=rng.uniform(0.3, 1) if rng.random() < 0.25 else 0.0,
    )


@dataclass(frozen=True, eq=False)
class Organ:
    """One tissue of the image: its place and its density.

    Attributes:
        field: (z, y, x) float32 distance field in mm.
        hu: Density in HU; a number or (z, y, x) float32.
    """

    field: np.ndarray
    hu: float | np.ndarray


@dataclass(frozen=True, eq=False)
class Chest:
    """All organs of a phantom on a coarse mesh.

    Attributes:
        organs: Organs in the order of painting; later ones cover earlier ones.
        lungs: Field of both lungs, without lung roots and airway.
        airway: Field of the lumen of the trachea and main bronchi.
        fissures: Distance to the nearest fissure, never negative.
        parenchyma_hu: (z, y, x) density of lung tissue.
        roots_xyz: Points at which the arteries, veins and bronchi enter each lung,
            right lung first.
    """

    organs: tuple[Organ, ...]
    lungs: np.ndarray
    airway: np.ndarray
    fissures: np.ndarray
    parenchyma_hu: np.ndarray
    roots_xyz: tuple[np.ndarray, np.ndarray]


def build_chest(body: Body, mesh: Mesh, rng: np.random.Generator) -> Chest:
    """Builds all organs of `body` on `mesh`."""
    cage = _cage(body, mesh)
    diaphragm = _diaphragm(body, mesh, rng)
    vessels, blood = _great_vessels(body, mesh)
    heart, chambers = _heart(body, mesh)
    spine = _vertebral_bodies(body, mesh)
    airway = _airway(body, mesh)
    mediastinum = _mediastinum(body, mesh, heart, vessels, spine, airway)
    lungs = smooth_max(
        smooth_max(cage + 2 + spline_noise(rng, mesh, 45) * 1.2, -mediastinum, 8.0),
        -diaphragm,
        3.0,
    )
    organs = [
        *_wall(body, mesh, cage, rng),
        Organ(_neck(body, mesh, cage), 45.0),
        *_abdomen(body, mesh, cage, diaphragm, rng),
        Organ(heart, 45.0 if body.blood_hu < 100 else 0.45 * body.blood_hu),
        *(Organ(field, body.blood_hu) for field in (*chambers, *blood)),
        Organ(_oesophagus(body, mesh), 35.0),
        *_bones(body, mesh, cage, spine),
        Organ(airway - 1.5, 30.0),
        Organ(airway, -990.0),
    ]
    roots = tuple(_roots(body, side) for side in (-1, 1))
    return Chest(
        organs=tuple(organs),
        lungs=lungs,
        airway=airway,
        fissures=_fissures(body, mesh, rng),
        parenchyma_hu=_parenchyma(body, mesh, rng),
        roots_xyz=(roots[0], roots[1]),
    )


def _cage(body: Body, mesh: Mesh) -> np.ndarray:
    """Computes the inside of the rib cage, whose axis leans back towards the apex."""
    t = np.clip(mesh.z / body.lung_height, 0, None)
    y = mesh.y - 18 * t**2
    level = (
        (np.abs(mesh.x) / body.half_width) ** 2.4
        + (np.abs(y) / body.half_depth) ** 2.4
        + t**2.8
    ) ** (1 / 2.4) - 1
    return distance(level.astype(np.float32), mesh)


def _diaphragm(body: Body, mesh: Mesh, rng: np.random.Generator) -> np.ndarray:
    """Computes the distance to the diaphragm's two domes, positive in the chest."""
    top = []
    for side, height in ((-1, body.dome_right), (1, body.dome_left)):
        across = (mesh.x - side * 0.48 * body.half_width) / (0.62 * body.half_width)
        along = (mesh.y + 12) / (1.08 * body.half_depth)
        top.append(height - 62 * (across**2 + along**2))
    surface = smooth_max(top[0], top[1], 12.0)
    surface = surface + 3 * spline_noise(rng, mesh, 70)[:1]
    slope_y, slope_x = np.gradient(surface[0], *mesh.spacing_mm[1:])
    return (mesh.z - surface) / np.sqrt(1 + slope_x**2 + slope_y**2).astype(np.float32)


def _spine_y(body: Body, z):
    """Returns y of the centre of the vertebral bodies at `z`."""
    t = np.clip(z / body.lung_height, 0, 1.2)
    return 14 * t**2 + 0.7 * body.half_depth + 5 * np.sin(np.pi * t)


def _wrapped(z: np.ndarray, pitch: float) -> np.ndarray:
    """Returns the signed distance to the nearest multiple of `pitch`."""
    return (z + pitch / 2) % pitch - pitch / 2


def _vertebral_bodies(body: Body, mesh: Mesh) -> np.ndarray:
    """Computes the column of vertebral bodies and discs, without gaps."""
    dy = mesh.y - _spine_y(body, mesh.z)
    waist = 1 + 0.08 * np.cos(2 * np.pi * (mesh.z / body.pitch - 0.5))
    level = ((np.abs(mesh.x) / 17) ** 2.5 + (np.abs(dy) / 14) ** 2.5) ** 0.4 - waist
    return (15 * level).astype(np.float32)


def _heart(body: Body, mesh: Mesh) -> tuple[np.ndarray, list[np.ndarray]]:
    """Computes the heart with its wall, and the blood in its chambers."""
    s, height = body.heart, body.lung_height
    base = 0.13 * height + 0.45 * body.dome_left
    main = ellipsoid(mesh, (22 * s, -24, base), (60 * s, 42 * s, 46 * s), 28)
    right = ellipsoid(mesh, (-26 * s, -12, base + 14), (30 * s, 32 * s, 42 * s))
    heart = smooth_min(main, right, 14.0)
    chambers = [
        ellipsoid(mesh, (42 * s, -14, base), (30 * s, 20 * s, 26 * s), 28),
        ellipsoid(mesh, (2 * s, -42, base + 4), (38 * s, 15 * s, 32 * s), 12),
        ellipsoid(mesh, (-28 * s, -12, base + 14), (24 * s, 26 * s, 36 * s)),
        ellipsoid(mesh, (4 * s, 16, base + 24), (32 * s, 15 * s, 22 * s)),
    ]
    return heart, [np.maximum(chamber, heart + 2) for chamber in chambers]


def _great_vessels(body: Body, mesh: Mesh) -> tuple[np.ndarray, list[np.ndarray]]:
    """Computes the union of the great vessels, and the field of each vessel."""
    height = body.lung_height

    def path(*points):
        return [(x, y, t * height) for x, y, t in points]

    spine_front = float(_spine_y(body, 0.5 * height)) - 20
    aorta = tube(
        mesh,
        path(
            (-4, -14, 0.38),
            (-12, -26, 0.5),
            (-10, -24, 0.62),
            (4, -6, 0.7),
            (20, 18, 0.705),
            (28, spine_front, 0.64),
            (27, spine_front + 8, 0.5),
            (18, spine_front + 2, 0.2),
            (8, spine_front - 4, -0.3),
        ),
        (15, 16, 15, 14, 13, 12.5, 12, 11.5, 10.5),
    )
    trunk = path((12, -36, 0.42), (16, -26, 0.52), (22, -6, 0.57), (44, 8, 0.57))
    vessels = [
        aorta,
        tube(mesh, trunk, (14, 14, 12, 9)),
        tube(mesh, path((14, -16, 0.53), (-20, -2, 0.53), (-42, 4, 0.53)), (12, 11, 8)),
        tube(mesh, path((-27, -14, 0.36), (-25, -14, 0.72), (-22, -18, 0.86)), 9.5),
        tube(mesh, path((-22, -18, 0.84), (0, -26, 0.79), (26, -24, 0.86)), (8, 7, 6)),
        tube(mesh, path((-6, -14, 0.7), (-17, -6, 0.86), (-24, -4, 1.2)), (7, 6, 5)),
        tube(mesh, path((4, -4, 0.7), (14, -4, 0.88), (22, -4, 1.2)), (5, 4.5, 4.5)),
        tube(mesh, path((14, 8, 0.7), (26, 10, 0.9), (66, 0, 1.03)), (6, 5.5, 5)),
        tube(mesh, path((-20, -6, 0.9), (-64, 0, 1.03)), (5.5, 5)),
        tube(mesh, path((-18, 14, 0.44), (-42, 6, 0.45)), (9, 6)),
        tube(mesh, path((24, 16, 0.46), (44, 8, 0.46)), (9, 6)),
    ]
    union = vessels[0]
    for vessel in vessels[1:]:
        union = smooth_min(union, vessel, 6.0)
    return union, vessels


def _oesophagus(body: Body, mesh: Mesh) -> np.ndarray:
    z = np.linspace(-0.2, 1.2, 8, dtype=np.float32) * body.lung_height
    front = _spine_y(body, z) - 22
    return tube(mesh, np.stack([np.full_like(z, 4), front, z], 1), 7.0)


def _airway(body: Body, mesh: Mesh) -> np.ndarray:
    """Computes the lumen of the trachea and the main bronchi."""
    height = body.lung_height
    fork = (1, 12, 0.63 * height)
    trachea = tube(mesh, [(0, 2, 1.3 * height), (0, 8, 0.85 * height), fork], 8.5)
    right = tube(
        mesh, [fork, (-20, 14, 0.55 * height), (-40, 15, 0.48 * height)], (7, 6.2, 5)
    )
    left = tube(
        mesh, [fork, (22, 16, 0.55 * height), (43, 18, 0.47 * height)], (7, 5.6, 4.6)
    )
    return smooth_min(smooth_min(trachea, right, 5.0), left, 5.0)


def _mediastinum(body, mesh, heart, vessels, spine, airway) -> np.ndarray:
    """Computes the mediastinum, with the space between its organs filled."""
    height = body.lung_height
    union = smooth_min(heart - 3, vessels - 3, 16.0)
    union = smooth_min(union, airway - 3, 12.0)
    union = smooth_min(union, spine - 4, 14.0)
    septum = np.abs(mesh.x) - 3 - np.maximum(0, -mesh.y - 0.66 * body.half_depth)
    thymus = ellipsoid(
        mesh, (0, -0.5 * body.half_depth, 0.66 * height), (26, 34, 0.2 * height)
    )
    inlet = ellipsoid(mesh, (0, 22, 0.98 * height), (33, 46, 0.26 * height))
    union = smooth_min(union, np.broadcast_to(septum, mesh.shape), 10.0)
    return smooth_min(smooth_min(union, thymus, 10.0), inlet, 10.0)


def _wall(
    body: Body, mesh: Mesh, cage: np.ndarray, rng: np.random.Generator
) -> list[Organ]:
    """Builds skin, fat, muscle, and the fat that fills the rib cage around organs."""
    outline = _outline(body, mesh) + 2 * spline_noise(rng, mesh, 60)
    thickness = body.fat * (1 + 0.3 * spline_noise(rng, mesh, 70)).clip(0.3, 2)
    t = np.clip(mesh.z / body.lung_height, 0, 1.2)
    angle = _around(body, mesh)
    # Muscle: thin in front, thicker beside the spine and under the arms, thickest at
    # the shoulders.
    sheet = (
        13
        + 12 * np.exp(-((angle / 0.7) ** 2))
        + 9 * np.exp(-(((angle - 1.2) / 0.5) ** 2))
    )
    sheet = sheet + 70 * np.clip(t - 0.66, 0, 1) + 3 * spline_noise(rng, mesh, 50)
    muscle = np.maximum(outline + 2 + thickness, cage - sheet)
    planes = np.abs(spline_noise(rng, mesh, (60, 26, 26))) * 12 - 1.4
    return [
        Organ(outline, 30.0),
        Organ(outline + 2, -108.0),
        Organ(np.maximum(muscle, -planes).astype(np.float32), 52.0),
        Organ(cage - 1, -98.0),
    ]


def _neck(body: Body, mesh: Mesh, cage: np.ndarray) -> np.ndarray:
    """Computes the muscles between and above the apices."""
    spine = _spine_y(body, mesh.z)
    column = ellipsoid(mesh, (0, 0, 0), (44, 40, 1e4))
    shifted = np.hypot(mesh.x / 1.25, mesh.y - spine + 6) - 34
    top = (0.86 * body.lung_height - mesh.z) * np.float32(0.8)
    return np.maximum(np.minimum(shifted, column + 6), top).astype(np.float32)


def _outline(body: Body, mesh: Mesh) -> np.ndarray:
    """Computes the skin, wider and flatter at the shoulders, with breasts if any."""
    t = mesh.z / body.lung_height
    shoulder = np.clip((t - 0.72) / 0.3, 0, 1) ** 2
    half_width = body.outline_half_width * (1 + 0.16 * shoulder)
    half_depth = body.outline_half_depth * (1 - 0.24 * shoulder)
    dy = mesh.y - body.outline_centre_y - 12 * shoulder
    level = (
        (np.abs(mesh.x) / half_width) ** 2.5 + (np.abs(dy) / half_depth) ** 2.3
    ) ** (1 / 2.4) - 1
    outline = distance(level.astype(np.float32), mesh)
    if body.breast:
        for side in (-1, 1):
            centre = (
                side * 0.52 * body.half_width,
                -0.72 * body.half_depth,
                0.4 * body.lung_height,
            )
            radii = (58, 30 + body.breast, 62)
            outline = smooth_min(outline, ellipsoid(mesh, centre, radii), 18.0)
    return outline


def _abdomen(
    body: Body,
    mesh: Mesh,
    cage: np.ndarray,
    diaphragm: np.ndarray,
    rng: np.random.Generator,
) -> list[Organ]:
    """Builds diaphragm, liver, spleen, and the stomach with fluid below its gas."""
    contrast = body.blood_hu > 100
    below = smooth_max(cage + 1, diaphragm, 4.0)
    inner = np.maximum(cage + 5, diaphragm + 3)
    slant = mesh.x - 18 + 0.45 * (mesh.y + 20) + 0.008 * (mesh.y + 10) ** 2
    slant = 0.8 * slant + 5 * spline_noise(rng, mesh, 40)
    behind = mesh.y - 0.55 * body.half_depth + 0.5 * (mesh.x + 30)
    liver = smooth_max(smooth_max(inner, slant, 20.0), 0.7 * behind, 24.0)
    base = body.dome_left - 46
    stomach_xyz = (0.42 * body.half_width, -18, base)
    stomach = np.maximum(
        ellipsoid(mesh, stomach_xyz, (42, 40, 44), -15), np.maximum(inner, -liver) + 2
    )
    spleen_xyz = (0.66 * body.half_width, 0.42 * body.half_depth, base - 4)
    spleen = np.maximum(ellipsoid(mesh, spleen_xyz, (26, 40, 42), 35), inner + 1)
    level_y = stomach_xyz[1] - 40 + 80 * body.gas
    gas = np.maximum(stomach + 3, mesh.y - np.float32(level_y))
    return [
        Organ(np.maximum(below, -(diaphragm + 3)), 48.0),
        Organ(liver, 105.0 if contrast else 58.0),
        Organ(spleen, 115.0 if contrast else 48.0),
        Organ(stomach, 45.0),
        Organ(stomach + 3, 18.0),
        Organ(gas, -985.0),
    ]


def _bones(body: Body, mesh: Mesh, cage: np.ndarray, spine: np.ndarray) -> list[Organ]:
    """Builds ribs, cartilage, spine, sternum, scapulae, clavicles and humeral heads."""
    bodies = np.maximum(
        spine, np.abs(_wrapped(mesh.z, body.pitch)) - (0.5 * body.pitch - 2.5)
    )
    ribs, cartilage = _ribs(body, mesh, cage)
    return [
        Organ(spine + 1, 85.0),
        Organ(cartilage, 100.0),
        *_bone(bodies, 2.0, 420.0, 190.0),
        *_bone(_arches(body, mesh), 2.0, 520.0, 260.0),
        Organ(_canal(body, mesh), 28.0),
        *_bone(ribs, 1.4, 560.0, 200.0),
        *_bone(_sternum(body, mesh, cage), 1.6, 430.0, 130.0),
        *_bone(_scapulae(body, mesh, cage), 1.4, 560.0, 240.0),
        *_bone(_shoulders(body, mesh), 2.4, 650.0, 230.0),
    ]


def _bone(field, shell_mm, cortical_hu, marrow_hu) -> list[Organ]:
    return [Organ(field, cortical_hu), Organ(field + shell_mm, marrow_hu)]


def _canal(body: Body, mesh: Mesh) -> np.ndarray:
    dy = mesh.y - _spine_y(body, mesh.z) - 23
    return np.broadcast_to(np.hypot(mesh.x, dy) - 8, mesh.shape).astype(np.float32)


def _arches(body: Body, mesh: Mesh) -> np.ndarray:
    """Computes the laminae around the canal, and spinous and transverse processes."""
    dy = mesh.y - _spine_y(body, mesh.z) - 23
    z = _wrapped(mesh.z + 0.35 * np.clip(dy, 0, 40), body.pitch)
    lamina = np.maximum(
        np.abs(np.hypot(mesh.x, dy) - 10.5) - 2.4, np.abs(z) - 0.38 * body.pitch
    )
    spinous = np.maximum(
        np.maximum(np.abs(mesh.x) - 2.6, np.abs(dy - 24) - 14),
        np.abs(z) - 0.3 * body.pitch,
    )
    sideways = np.abs(dy - 2 - 0.2 * np.abs(mesh.x)) - 4
    transverse = np.maximum(
        np.maximum(np.abs(np.abs(mesh.x) - 20) - 11, sideways), np.abs(z) - 6
    )
    union = np.minimum(np.minimum(lamina, spinous), transverse)
    return np.broadcast_to(union, mesh.shape).astype(np.float32)


def _around(body: Body, mesh: Mesh) -> np.ndarray:
    """Computes the angle around the rib cage: 0 at the spine, pi at the sternum."""
    t = np.clip(mesh.z / body.lung_height, 0, 1.2)
    y = (mesh.y - 18 * t**2) * np.float32(body.half_width / body.half_depth)
    return np.arctan2(np.abs(mesh.x), y)


def _ribs(body: Body, mesh: Mesh, cage: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Computes ribs and their cartilage.

    One rib per vertebra slopes down around the cage; cartilage rises to the sternum.
    """
    angle = _around(body, mesh)
    turn = np.minimum(angle, 2.2) * (np.pi / 2.2)
    drop = RIB_SLOPE_MM * (1 - np.cos(turn)) / 2 - 26 * np.clip(angle - 2.2, 0, None)
    height = mesh.z + drop.astype(np.float32)
    across = _wrapped(height, body.pitch) / 6.0
    depth = (cage - 5.5) / 3.6
    shape = 3.6 * (np.sqrt(across**2 + depth**2) - 1)
    span = np.maximum(height - body.lung_height * 1.04, -70 - height)
    ribs = np.maximum(np.maximum(shape, span), 24 - np.abs(mesh.x))
    front = (2.35 - angle) * 90
    return np.maximum(ribs, -front), np.maximum(np.maximum(ribs - 1, front), -mesh.z)


def _sternum(body: Body, mesh: Mesh, cage: np.ndarray) -> np.ndarray:
    t = mesh.z / body.lung_height
    half_width = 15 + 14 * np.clip((t - 0.68) / 0.16, 0, 1)
    plate = np.maximum(np.abs(cage - 8.5) - 5, np.abs(mesh.x) - half_width)
    ends = np.maximum(t - 0.87, 0.3 - t) * np.float32(body.lung_height)
    return np.maximum(np.maximum(plate, ends), mesh.y + 0.2 * body.half_depth)


def _scapulae(body: Body, mesh: Mesh, cage: np.ndarray) -> np.ndarray:
    """Computes thin curved plates behind the ribs, broad above and pointed below."""
    angle = _around(body, mesh)
    t = mesh.z / body.lung_height
    middle = 0.78 + 0.12 * t
    half_span = np.clip(0.62 * (t - 0.42), 0, 0.36)
    plate = np.abs(cage - 17 - 26 * (angle - middle) ** 2 - 6 * np.clip(t, 0, 1)) - 2.4
    edge = (np.abs(angle - middle) - half_span) * 110
    ridge_angle = np.abs(angle - middle + 0.1) * 110 - 2.6
    ridge = np.maximum(np.maximum(ridge_angle, np.abs(cage - 28) - 9), (0.78 - t) * 200)
    blade = np.maximum(plate, edge)
    return np.maximum(np.minimum(blade, ridge), (t - 1.02) * 200).astype(np.float32)


def _shoulders(body: Body, mesh: Mesh) -> np.ndarray:
    """Computes the clavicles and humeral heads."""
    height, union = body.lung_height, np.full(mesh.shape, FAR_MM, np.float32)
    front = -0.55 * body.half_depth
    for side in (-1, 1):
        shoulder = side * (body.half_width + 8)
        clavicle = [
            (side * 22, front, 0.89 * height),
            (side * 62, front + 4, 0.95 * height),
            (shoulder, 14, 1.06 * height),
        ]
        head = ellipsoid(mesh, (shoulder + side * 10, 22, 1.07 * height), (23, 23, 25))
        union = np.minimum(union, np.minimum(tube(mesh, clavicle, 6.0), head))
    return union


def _fissures(body: Body, mesh: Mesh, rng: np.random.Generator) -> np.ndarray:
    """Computes distances to both oblique fissures and the right horizontal fissure."""
    wave = 4 * spline_noise(rng, mesh, 60)
    height = body.lung_height
    slope = 0.62 * height / (2 * body.half_depth)
    oblique = (mesh.z - 0.42 * height - slope * mesh.y) / np.sqrt(1 + slope**2) + wave
    horizontal = mesh.z - 0.52 * height - 0.08 * mesh.x + wave
    minor = np.where((mesh.x < 0) & (oblique > 0), np.abs(horizontal), FAR_MM)
    return np.minimum(np.abs(oblique), minor).astype(np.float32)


def _parenchyma(body: Body, mesh: Mesh, rng: np.random.Generator) -> np.ndarray:
    """Computes the HU of lung tissue.

    It is denser at the back, where blood pools, and at the base; it is patchy, with
    emphysema towards the apex.
    """
    t = mesh.z / body.lung_height
    density = body.parenchyma_hu + 28 * mesh.y / body.half_depth - 18 * (t - 0.4)
    density = density + 9 * spline_noise(rng, mesh, 35) + 9 * spline_noise(rng, mesh, 9)
    patches = np.clip(spline_noise(rng, mesh, 16) - 0.3, 0, 1.2) * np.clip(t, 0, 1)
    return (density - 75 * body.emphysema * patches).clip(-985).astype(np.float32)


def _roots(body: Body, side: int) -> np.ndarray:
    """Returns the (3, xyz) entry points of artery, vein and bronchus into one lung.

    `side` is -1 for the right lung and 1 for the left.
    """
    height = body.lung_height
    return np.array(
        [
            (side * 43, 6, (0.53 if side < 0 else 0.57) * height),
            (side * 43, 7, (0.45 if side < 0 else 0.46) * height),
            (side * 42, 16, (0.48 if side < 0 else 0.47) * height),
        ]
    )
