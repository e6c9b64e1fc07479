"""Stomach and bowel of an abdomen phantom: course, haustra and contents.

Coordinates are mm in the patient: x to the left, y to the back, z to the head. The gut is a
chain of points along the middle of its lumen. Each voxel takes the contents of the point whose
sphere is nearest.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import cv2
import numpy as np

from ct.geometry import Mesh
from phantoms.fields import spline_noise

STEP_MM = 2.0
"""Distance between neighbouring points of the gut."""

BLOCK = 4
"""Edge in voxels of the blocks that are tested first for being near the gut."""

FULL_MM = 1e3
"""Depth of gas in a part of the gut that holds only gas; minus that, one without gas."""

COLON = np.array(
    [
        (0.0, 0.66, -190, 20, 0.5),
        (0.0, 0.68, -145, 23, 0.5),
        (0.05, 0.5, -112, 17, 1.0),
        (0.1, 0.05, -90, 16, 2.5),
        (-0.05, -0.15, -50, 17, 3.5),
        (0.48, -0.1, -80, 14, 1.0),
        (0.68, 0.0, -30, 14, 1.0),
        (0.84, 0.35, 40, 15, 1.0),
        (0.8, 0.35, 95, 16, 1.0),
        (0.74, 0.1, 132, 21, 1.2),
        (0.55, -0.45, 100, 20, 1.2),
        (0.2, -0.68, 80, 21, 1.0),
        (-0.2, -0.68, 70, 22, 1.0),
        (-0.55, -0.45, 70, 22, 1.0),
        (-0.72, 0.0, 72, 23, 1.0),
        (-0.78, 0.15, 25, 26, 1.0),
        (-0.66, -0.05, -20, 28, 1.0),
        (-0.52, -0.15, -58, 26, 1.0),
    ]
)
"""Course of the colon from the rectum to the caecum: x and y as shares of the cavity's half
width and depth, z and radius in mm, and how freely a point moves."""

SAGGING = slice(11, 13)
"""Points of the transverse colon that hang down."""


@dataclass(frozen=True, eq=False)
class Gut:
    """Points along the gut and what surrounds each; lengths in mm.

    Attributes:
        points: (n, xyz) points.
        radius: (n,) radius of the outer surface.
        wall: (n,) thickness of the wall.
        fold: (n,) depth of the fold at the point, as a share of the radius.
        fold_side: (n, xyz) unit vector to the side from which the fold rises.
        level: (n,) y of the surface between gas and what lies below it.
        below_hu: (n,) HU of what lies below.
        bubbles: (n,) share of gas bubbles in it: 0 in fluid, up to 0.6 in stool.
        stretch: (n,) number of the stretch; a wall separates the contents of two.
    """

    points: np.ndarray
    radius: np.ndarray
    wall: np.ndarray
    fold: np.ndarray
    fold_side: np.ndarray
    level: np.ndarray
    below_hu: np.ndarray
    bubbles: np.ndarray
    stretch: np.ndarray


@dataclass(frozen=True)
class Diet:
    """Contents of the gut of one patient.

    Attributes:
        gas, level, stool, fluid: Odds of a stretch of colon that is full of gas, of one
            with gas above fluid or stool, and of one full of stool or fluid.
        loop_gas: Share of stretches of small bowel that hold gas.
        loop_radius: Mean radius of the small bowel in mm; above 15 it is dilated.
        colon_scale: Factor of the width of the colon.
        contrast_hu: HU of oral contrast medium; 0 for none.
        gas_side: 1 if gas rises to the front (supine), -1 if to the back (prone).
    """

    gas: float
    level: float
    stool: float
    fluid: float
    loop_gas: float
    loop_radius: float
    colon_scale: float
    contrast_hu: float
    gas_side: int


def draw_diet(rng: np.random.Generator, gas_side: int) -> Diet:
    """Draws the contents of a patient's gut."""
    gas, level, stool, fluid = rng.dirichlet((0.9, 0.8, 1.1, 0.35))
    blocked = rng.random() < 0.12
    return Diet(
        gas=gas,
        level=level,
        stool=stool,
        fluid=fluid,
        loop_gas=rng.uniform(0.4, 0.9) if blocked else rng.uniform(0.02, 0.3),
        loop_radius=rng.uniform(16, 22) if blocked else rng.uniform(8, 13),
        colon_scale=rng.uniform(0.75, 1.4),
        contrast_hu=rng.uniform(150, 500) if rng.random() < 0.3 else 0.0,
        gas_side=gas_side,
    )


def draw_gut(
    rng: np.random.Generator, diet: Diet, half_width: float, half_depth: float
) -> Gut:
    """Draws stomach, colon and small bowel in a cavity of a half width and depth in mm."""
    size_xyz = np.array([half_width, half_depth, 1.0])
    parts = [_stomach(rng, diet, size_xyz), _colon(rng, diet, size_xyz)]
    loops = rng.integers(3, 7)
    parts += [_loop(rng, diet, size_xyz) for _ in range(loops)]
    return _joined(parts)


def _joined(parts: Sequence[Gut]) -> Gut:
    """Joins loops into one gut and numbers their stretches anew."""
    columns = {
        field.name: np.concatenate([getattr(part, field.name) for part in parts])
        for field in fields(Gut)
    }
    ends = np.cumsum([part.stretch[-1] + 1 for part in parts])
    shift = np.repeat(np.append(0, ends[:-1]), [len(part.radius) for part in parts])
    columns["stretch"] = columns["stretch"] + shift
    return Gut(**columns)


def _colon(rng: np.random.Generator, diet: Diet, size_xyz: np.ndarray) -> Gut:
    """Draws the colon from the rectum to the caecum."""
    knots = COLON.copy()
    freedom = np.array((0.05, 0.07, 9.0)) * knots[:, 4:]
    knots[:, :3] += freedom * rng.standard_normal((len(knots), 3))
    knots[SAGGING, 2] -= rng.uniform(-15, 80)
    radii = diet.colon_scale * knots[:, 3] * rng.uniform(0.75, 1.2, len(knots))
    course = _smooth(knots[:, :3] * size_xyz, radii.clip(10, 40), 9.0)
    folds = _folds(rng, len(course[0]), (16, 34), (0.15, 0.75))
    return _filled(rng, diet, course, folds, stretch_mm=(40, 240))


def _stomach(rng: np.random.Generator, diet: Diet, size_xyz: np.ndarray) -> Gut:
    """Draws the stomach, whose gas lies above fluid or food."""
    knots = np.array(
        [
            (0.48, 0.3, 165),
            (0.55, -0.05, rng.uniform(110, 145)),
            (0.4, -0.4, rng.uniform(60, 110)),
            (0.05, -0.5, rng.uniform(55, 85)),
            (-0.22, -0.2, 85),
        ]
    )
    radii = rng.uniform(0.55, 1.15) * np.array([38, 38, 30, 22, 11.0])
    course = _smooth(knots * size_xyz, radii, 14.0)
    folds = _folds(rng, len(course[0]), (14, 30), (0.0, 0.15))
    food = replace(diet, gas=0.05, level=0.75, stool=0.1, fluid=0.1)
    return _filled(rng, food, course, folds, stretch_mm=(900, 1000))


def _loop(rng: np.random.Generator, diet: Diet, size_xyz: np.ndarray) -> Gut:
    """Draws a loop of small bowel that winds through the middle of the abdomen."""
    middle = rng.uniform((-0.4, -0.4, -90), (0.45, 0.15, 85))
    steps = rng.normal(0, (0.28, 0.24, 32), (rng.integers(7, 15), 3))
    knots = np.clip(middle + steps, (-0.68, -0.72, -150), (0.68, 0.4, 120))
    radii = diet.loop_radius * rng.uniform(0.8, 1.2, len(knots))
    course = _smooth(knots * size_xyz, radii, 11.0)
    folds = _folds(rng, len(course[0]), (6, 9), (0.05, 0.25))
    gas = diet.loop_gas
    juice = replace(diet, gas=0.35 * gas, level=0.65 * gas, stool=0.0, fluid=1 - gas)
    return _filled(rng, juice, course, folds, stretch_mm=(30, 160))


def _smooth(
    course_xyz: np.ndarray, radii: np.ndarray, blur_mm: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns points every 2 mm along a rounded course, and the radius at each."""
    lengths = np.linalg.norm(np.diff(course_xyz, axis=0), axis=1)
    at = np.append(0, np.cumsum(lengths))
    places = np.arange(0, at[-1], STEP_MM)
    columns = [np.interp(places, at, column) for column in (*course_xyz.T, radii)]
    blurred = cv2.GaussianBlur(
        np.stack(columns, 1),
        (1, 0),
        sigmaX=0.1,
        sigmaY=blur_mm / STEP_MM,
        borderType=cv2.BORDER_REPLICATE,
    )
    return blurred[:, :3], blurred[:, 3]


def _folds(
    rng: np.random.Generator,
    count: int,
    pitch_mm: tuple[float, float],
    depth: tuple[float, float],
) -> tuple[np.ndarray, np.ndarray]:
    """Draws thin folds across the lumen at irregular distances, each from one side."""
    gaps = rng.uniform(*pitch_mm, int(count * STEP_MM / pitch_mm[0]) + 2)
    places = np.cumsum(gaps) / STEP_MM
    at = np.arange(count)
    nearest = np.abs(at[:, None] - places).argmin(1)
    away_mm = (at - places[nearest]) * STEP_MM
    sides = rng.standard_normal((len(places), 3))
    sides /= np.linalg.norm(sides, axis=1, keepdims=True)
    depths = rng.uniform(*depth, len(places))
    return depths[nearest] * np.exp(-((away_mm / 2.2) ** 2)), sides[nearest]


def _filled(
    rng: np.random.Generator,
    diet: Diet,
    course: tuple[np.ndarray, np.ndarray],
    folds: tuple[np.ndarray, np.ndarray],
    stretch_mm: tuple[float, float],
) -> Gut:
    """Divides a loop into stretches and draws the contents of each."""
    points, radius = course
    count = len(points)
    level, below, bubbles = (np.empty(count) for _ in range(3))
    stretch = np.empty(count, int)
    number = start = 0
    while start < count:
        stop = min(count, start + round(rng.uniform(*stretch_mm) / STEP_MM))
        here = slice(start, stop)
        depth_mm, below[here], bubbles[here] = _draw_contents(
            rng, diet, float(radius[here].mean())
        )
        level[here] = points[here, 1].mean() + diet.gas_side * depth_mm
        stretch[here] = number
        number, start = number + 1, stop
    wall = np.full(count, rng.uniform(1.5, 3.0))
    return Gut(points, radius, wall, *folds, level, below, bubbles, stretch)


def _draw_contents(
    rng: np.random.Generator, diet: Diet, radius_mm: float
) -> tuple[float, float, float]:
    """Draws how far gas reaches below the middle in mm, HU below it, and bubbles."""
    odds = np.array([diet.gas, diet.level, diet.stool, diet.fluid])
    kind = rng.choice(("gas", "level", "stool", "fluid"), p=odds / odds.sum())
    depth_mm = {"gas": FULL_MM, "level": rng.uniform(-0.7, 0.7) * radius_mm}
    stool = kind == "stool" or (diet.stool > 0 and rng.random() < 0.4)
    below = rng.uniform(-100, 60) if stool else rng.uniform(0, 35)
    if diet.contrast_hu and rng.random() < 0.7:
        below += diet.contrast_hu
    bubbles = rng.uniform(0.05, 0.6) if stool else 0.0
    return depth_mm.get(kind, -FULL_MM), below, bubbles


def paint_gut(
    hu: np.ndarray,
    mesh: Mesh,
    gut: Gut,
    rng: np.random.Generator,
    *,
    wall_hu: float,
    gas_side: int,
) -> None:
    """Paints a gut into a (z, y, x) float32 image of HU, in place."""
    width = np.float32(mesh.spacing_mm[2])
    voxels, nearest, offset = _voxels_near(mesh, gut)
    away = np.linalg.norm(offset, axis=1)
    radius = gut.radius[nearest]
    outside = away - radius
    rise = (offset * gut.fold_side[nearest]).sum(1) / np.maximum(away, 1e-3)
    fold = gut.fold[nearest] * radius * np.clip(0.45 + 0.8 * rise, 0, 1)
    between = _between_stretches(mesh.shape, voxels, nearest, gut) * width
    lumen = np.maximum(outside + gut.wall[nearest] + fold, between)
    contents = _contents_hu(mesh, gut, rng, voxels, nearest, gas_side)
    for field, density in ((outside, wall_hu), (lumen, contents)):
        share = np.clip(0.5 - field / width, 0, 1).astype(np.float32)
        values = hu[voxels]
        hu[voxels] = values + share * (density - values)


def _contents_hu(
    mesh: Mesh, gut: Gut, rng: np.random.Generator, voxels, nearest, gas_side: int
) -> np.ndarray:
    """Computes the HU of the contents at some voxels: gas, and fluid or stool below."""
    gas_hu = rng.uniform(-1000, -950)
    lumps = spline_noise(rng, mesh, rng.uniform(4.0, 9.0))[voxels]
    coarse = spline_noise(rng, mesh, 22.0)[voxels]
    bubbles = gut.bubbles[nearest]
    # A normal variable is below this bound in about the share `bubbles` of all places.
    bound = 2.0 * (bubbles - 0.5) + 0.5 * coarse
    foam = np.clip(0.5 + 1.5 * (bound - lumps), 0, 1) * (bubbles > 0) * 0.9
    below = gut.below_hu[nearest] + 18 * coarse * (bubbles > 0)
    below = below + foam * (gas_hu - below)
    depth = gas_side * (gut.level[nearest] - mesh.y.ravel()[voxels[1]])
    share = np.clip(0.5 + depth / mesh.spacing_mm[1], 0, 1)
    return (below + share * (gas_hu - below)).astype(np.float32)


def _between_stretches(shape, voxels, nearest, gut: Gut) -> np.ndarray:
    """Returns 1 at voxels that touch another stretch or a distant part of their own.

    Those voxels are the walls between loops that lie against each other; elsewhere the
    result is -9.
    """
    along = np.full(shape, -1, np.int32)
    along[voxels] = nearest + 100 * gut.stretch[nearest]
    wall = np.zeros(shape, bool)
    for axis in range(3):
        step = np.diff(along, axis=axis)
        lower = [slice(None)] * 3
        lower[axis] = slice(0, -1)
        upper = [slice(None)] * 3
        upper[axis] = slice(1, None)
        apart = (np.abs(step) > 40) & (along[tuple(lower)] >= 0)
        wall[tuple(lower)] |= apart & (along[tuple(upper)] >= 0)
    return np.where(wall[voxels], 1.0, -9.0)


def _voxels_near(
    mesh: Mesh, gut: Gut
) -> tuple[tuple[np.ndarray, ...], np.ndarray, np.ndarray]:
    """Finds the voxels in and near the gut.

    Nearest is the point with the least squared distance less its squared radius; a fourth
    coordinate turns that into the nearest neighbour of a tree.

    Returns:
        The (z, y, x) indices of n voxels, the number of the nearest point of each, and the
        (n, xyz) mm from that point to the voxel.
    """
    from scipy.spatial import cKDTree

    largest = gut.radius.max()
    height = np.sqrt(largest**2 - gut.radius**2)
    tree = cKDTree(np.column_stack([gut.points, height]))

    def search(z, y, x):
        points = np.column_stack([x, y, z, np.zeros(len(x))])
        _, nearest = tree.query(points)
        return nearest, points[:, :3] - gut.points[nearest]

    axes = [axis.ravel() for axis in (mesh.z, mesh.y, mesh.x)]
    middles = [
        axis[
            np.minimum(
                np.arange(BLOCK // 2, len(axis) + BLOCK // 2, BLOCK), len(axis) - 1
            )
        ]
        for axis in axes
    ]
    grid = np.meshgrid(*middles, indexing="ij")
    nearest, offset = search(*(g.ravel() for g in grid))
    reach = BLOCK * max(mesh.spacing_mm)
    close = np.linalg.norm(offset, axis=1) < gut.radius[nearest] + reach
    near = close.reshape(grid[0].shape)
    for axis in range(3):
        near = near.repeat(BLOCK, axis)
    voxels = np.nonzero(near[tuple(slice(n) for n in mesh.shape)])
    nearest, offset = search(*(axis[at] for axis, at in zip(axes, voxels, strict=True)))
    return voxels, nearest, offset
