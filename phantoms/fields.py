"""Distance fields on a regular grid: noise, unions, ellipsoids and tubes."""

import numpy as np

from ct.geometry import Mesh

FAR_MM = 1e3
"""Value of a field far from the organ."""


def spline_noise(
    rng: np.random.Generator, mesh: Mesh, knot_mm: float | tuple[float, float, float]
) -> np.ndarray:
    """Draws smooth noise of mean 0 and deviation 1: cubic B-splines of white knots.

    Args:
        rng: Draws one number per knot.
        mesh: Points of the noise.
        knot_mm: Distance between knots, one for all axes or (z, y, x).

    Returns:
        (z, y, x) float32.
    """
    pitches = np.broadcast_to(np.asarray(knot_mm, float), (3,))
    weights = [
        _spline_weights(axis.ravel(), pitch)
        for axis, pitch in zip((mesh.z, mesh.y, mesh.x), pitches, strict=True)
    ]
    knots = rng.standard_normal([w.shape[1] for w in weights], dtype=np.float32)
    # The squared cubic B-spline weights of a point sum to 0.479 per axis on average.
    noise = knots / np.float32(0.479**1.5)
    # One matrix product per axis; each appends its new axis as the last one.
    for weight in weights:
        noise = np.tensordot(noise, weight, (0, 1))
    return noise


def _spline_weights(axis_mm: np.ndarray, pitch_mm: float) -> np.ndarray:
    """Returns (points, knots) weights of uniform cubic B-splines."""
    at = (axis_mm - axis_mm[0]) / pitch_mm
    knots = np.arange(-1, int(np.ceil(at[-1])) + 2)
    away = np.abs(at[:, None] - knots)
    near = 2 / 3 - away**2 + away**3 / 2
    return np.where(away < 1, near, np.clip(2 - away, 0, None) ** 3 / 6).astype(
        np.float32
    )


def smooth_min(a: np.ndarray, b: np.ndarray, blend_mm: float) -> np.ndarray:
    """Returns the union of two fields, with a seam rounded over `blend_mm`."""
    overlap = np.maximum(blend_mm - np.abs(a - b), 0)
    return np.minimum(a, b) - overlap * overlap * np.float32(0.25 / blend_mm)


def smooth_max(a: np.ndarray, b: np.ndarray, blend_mm: float) -> np.ndarray:
    """Returns the intersection of two fields, with a seam rounded over `blend_mm`."""
    return -smooth_min(-a, -b, blend_mm)


def distance(level: np.ndarray, mesh: Mesh) -> np.ndarray:
    """Computes first-order distances in mm to the zero level of a smooth function."""
    slopes = np.gradient(level, *mesh.spacing_mm)
    steepness = np.sqrt(sum(slope * slope for slope in slopes))
    return level / np.maximum(steepness, np.float32(1e-3))


def ellipsoid(mesh: Mesh, centre_xyz, radii_xyz, turn_deg: float = 0.0) -> np.ndarray:
    """Computes the field of an ellipsoid, rotated about the body's axis."""
    dx, dy = mesh.x - np.float32(centre_xyz[0]), mesh.y - np.float32(centre_xyz[1])
    cos, sin = np.cos(np.radians(turn_deg)), np.sin(np.radians(turn_deg))
    u = np.float32(cos) * dx + np.float32(sin) * dy
    v = np.float32(cos) * dy - np.float32(sin) * dx
    w = mesh.z - np.float32(centre_xyz[2])
    ru, rv, rw = (np.float32(r) for r in radii_xyz)
    near = np.sqrt((u / ru) ** 2 + (v / rv) ** 2 + (w / rw) ** 2)
    slope = np.sqrt((u / ru**2) ** 2 + (v / rv**2) ** 2 + (w / rw**2) ** 2)
    return near * (near - 1) / np.maximum(slope, np.float32(1e-6))


def tube(mesh: Mesh, points_xyz, radii_mm, *, reach_mm: float = 16.0) -> np.ndarray:
    """Computes the field of a bent tube through points.

    The field is valid up to `reach_mm` from the surface; beyond, it may be `FAR_MM`.
    """
    field = np.full(mesh.shape, FAR_MM, np.float32)
    points = np.asarray(points_xyz, np.float32)
    radii = np.broadcast_to(np.asarray(radii_mm, np.float32), (len(points),))
    for start, end, r0, r1 in zip(
        points[:-1], points[1:], radii[:-1], radii[1:], strict=True
    ):
        margin = max(r0, r1) + reach_mm
        box = mesh.box_around(
            np.minimum(start, end) - margin, np.maximum(start, end) + margin
        )
        if box is not None:
            piece = capsule(mesh.part(box), start, end, r0, r1)
            np.minimum(field[box], piece, out=field[box])
    return field


def capsule(mesh: Mesh, start, end, r0: float, r1: float) -> np.ndarray:
    """Computes the field of a rounded cone from `start` (radius r0) to `end` (r1)."""
    axis = np.asarray(end, np.float32) - start
    dx, dy, dz = mesh.x - start[0], mesh.y - start[1], mesh.z - start[2]
    length2 = np.float32(max(float(axis @ axis), 1e-6))
    along = np.clip((dx * axis[0] + dy * axis[1] + dz * axis[2]) / length2, 0, 1)
    dx, dy, dz = dx - along * axis[0], dy - along * axis[1], dz - along * axis[2]
    return np.sqrt(dx * dx + dy * dy + dz * dz) - (r0 + along * np.float32(r1 - r0))
