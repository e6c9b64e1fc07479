"""Real nodules from cubes, pasted into the lungs of another scan where they fit.

A free nodule goes into aerated lung. A juxtapleural one goes where the lung's surface looks
like the wall in its cube, after the best of the 48 turns of the cube. Around the nodule the
cube fades into the host.
"""

from dataclasses import dataclass

import numpy as np

from augment.textures import Grain, draw_grain, measure_grain
from ct import boxes, resample
from ct.boxes import Box
from ct.geometry import Grid
from ct.scan import Scan
from experiments.nodule_cubes import SOFT_HU, TURNS, Cube, Turn, turned

STEP = 2
"""Distance in mm of the points at which places are compared."""

AROUND_MM, DECAY_MM = 10.0, 4.0
"""Distance from the nodule up to which host and cube are compared, and the distance over which
the weight of the comparison falls to 1 / e."""

LEAST_INSIDE = 0.9
"""Smallest share of a nodule that must lie in the lung of its host."""

FREE_MM = 5.0
"""Smallest distance of a free nodule from the surface of the lung."""

AT_PLEURA_MM = 3.0
"""Largest distance of a juxtapleural nodule from the surface of the lung."""

CENTRES_MM, GAP_MM = 25.0, 10.0
"""Smallest distance between the centres of two nodules, and between two nodules."""

DRAWN, COMPARED = 4000, 600
"""Number of places that are drawn for a nodule, and of those that are compared."""

CORE_MM, RIM_MM = 1.5, 6.0
"""Distances from the nodule between which the cube fades into the host."""

CONTACT_MM = 3.0
"""Distance from the nodule up to which the wall of its cube is pasted, too; it closes a gap of
a few mm between a juxtapleural nodule and the wall of the host."""

FACE_MM = 4.0
"""Distance from a face of the cube over which the cube fades into the host."""

DENSE_HU = -300.0
"""HU from which the density of a voxel is not adapted to the host's lung."""


@dataclass(frozen=True, eq=False)
class Host:
    """Lungs to paste into, on a grid of `STEP` mm; arrays are (z, y, x).

    Attributes:
        scan: The scan.
        grid: Grid of the arrays.
        tissue: float32, 1 in soft tissue outside the lungs, -1 in aerated lung, else 0.
        depth_mm: float32 distance from the lungs' surface, 0 outside.
    """

    scan: Scan
    grid: Grid
    tissue: np.ndarray
    depth_mm: np.ndarray


@dataclass(frozen=True, eq=False)
class Place:
    """Place of a nodule in a host.

    Attributes:
        centre: Index (z, y, x) in the host's volume, fractions allowed.
        turn: Turn of the cube.
        agreement: -1 to 1; 1 if lung and wall are where they are in the cube.
    """

    centre: np.ndarray
    turn: Turn
    agreement: float


def build_host(scan: Scan) -> Host:
    """Prepares a scan with lung labels for the search of places."""
    from scipy.ndimage import distance_transform_edt

    weights, affine = resample.isotropic(scan.grid, STEP)
    hu = resample.volume(np.asarray(scan.hu), weights)
    lung = resample.mask(np.asarray(scan.lung) > 0, weights)
    tissue = np.zeros(hu.shape, np.float32)
    tissue[~lung & (hu >= SOFT_HU)] = 1
    tissue[lung & (hu < SOFT_HU)] = -1
    # Beyond the scan there is no lung.
    depth_mm = np.asarray(distance_transform_edt(np.pad(lung, 1)))[1:-1, 1:-1, 1:-1]
    grid = Grid((hu.shape[0], hu.shape[1], hu.shape[2]), affine)
    return Host(scan, grid, tissue, (STEP * depth_mm).astype(np.float32))


def radius_mm(cube: Cube) -> float:
    """Returns the largest distance of the nodule from the middle of its cube."""
    return float(np.linalg.norm(np.argwhere(cube.mask) - cube.middle, axis=1).max())


def find_place(
    host: Host,
    cube: Cube,
    taken: list[tuple[np.ndarray, float]],
    rng: np.random.Generator,
) -> Place | None:
    """Finds the drawn place, and the turn of the cube, at which the cube fits best.

    Args:
        host: Lungs to search.
        cube: The nodule.
        taken: Centre in RAS mm and radius in mm of every nodule already there.
        rng: Draws the places.

    Returns:
        The place; None if the nodule fits nowhere.
    """
    drawn = draw_places(host, cube, rng)
    apart = far_from(host.grid.index_to_ras_mm(drawn), radius_mm(cube), taken)
    places = drawn[apart][:COMPARED]
    if not len(places):
        return None
    agreement = compare(host, cube, places)
    best = int(agreement.argmax())
    if not np.isfinite(agreement.flat[best]):
        return None
    place, turn = divmod(best, len(TURNS))
    ras_mm = host.grid.index_to_ras_mm(places[place])
    return Place(
        host.scan.grid.ras_mm_to_index(ras_mm),
        TURNS[turn],
        float(agreement.flat[best]),
    )


def draw_places(host: Host, cube: Cube, rng: np.random.Generator) -> np.ndarray:
    """Draws (n, 3) voxels of the host's grid at which the cube's middle may lie.

    A juxtapleural nodule lies as deep in the lung as in its own, to one step of the grid.
    """
    inside = host.depth_mm > 0
    if cube.juxtapleural:
        own_mm = max(cube.depth_mm, STEP)
        inside &= np.abs(host.depth_mm - own_mm) <= STEP
    else:
        inside = host.depth_mm >= FREE_MM
    found = np.flatnonzero(inside)
    drawn = rng.permutation(len(found))[:DRAWN]
    return np.stack(np.unravel_index(found[drawn], inside.shape), axis=1)


def far_from(
    points_mm: np.ndarray, radius: float, taken: list[tuple[np.ndarray, float]]
) -> np.ndarray:
    """Tells which (n, 3) centres in mm leave room to all nodules there; (n,) bool."""
    far = np.ones(len(points_mm), bool)
    for centre_mm, other in taken:
        least_mm = max(CENTRES_MM, radius + other + GAP_MM)
        far &= np.linalg.norm(points_mm - centre_mm, axis=1) >= least_mm
    return far


def compare(host: Host, cube: Cube, places: np.ndarray) -> np.ndarray:
    """Compares the surroundings of places with those of the nodule in every turn.

    Args:
        host: Lungs to search.
        cube: The nodule.
        places: (n, 3) voxels of the host's grid.

    Returns:
        (n, 48) agreement from -1 to 1; -inf where the nodule must not lie.
    """
    tissue = surroundings(host.tissue, places, cube)
    depth_mm = surroundings(host.depth_mm, places, cube)
    pattern = pattern_of(cube)
    agreement = np.full((len(places), len(TURNS)), -np.inf, np.float32)
    for number, turn in enumerate(TURNS):
        mask = coarse(turned(cube.mask, turn)).ravel()
        own_mm = depth_mm[:, mask]
        nearest_mm = own_mm.min(axis=1, initial=np.inf)
        if cube.juxtapleural:
            fits = (own_mm > 0).mean(axis=1) >= LEAST_INSIDE
            fits &= nearest_mm <= AT_PLEURA_MM
        else:
            fits = nearest_mm >= FREE_MM
        wanted = coarse(turned(pattern, turn)).ravel()
        scores = tissue @ wanted / np.abs(wanted).sum()
        agreement[fits, number] = scores[fits]
    return agreement


def coarse(values: np.ndarray) -> np.ndarray:
    """Returns every `STEP`-th voxel of a cube along each axis; the middle is one of them."""
    first = len(values) // 2 % STEP
    return values[first::STEP, first::STEP, first::STEP]


def pattern_of(cube: Cube) -> np.ndarray:
    """Returns what should surround a nodule: positive wall, negative lung, by weight.

    The nodule itself should lie in the lung. The wall near a free nodule is of no importance.
    """
    from scipy.ndimage import distance_transform_edt

    apart_mm = np.asarray(distance_transform_edt(~cube.mask))
    weight = np.where(apart_mm <= AROUND_MM, np.exp(-apart_mm / DECAY_MM), 0)
    wall = 1 if cube.juxtapleural else 0
    return (weight * np.where(cube.wall, wall, -1)).astype(np.float32)


def surroundings(values: np.ndarray, places: np.ndarray, cube: Cube) -> np.ndarray:
    """Cuts the surroundings of (n, 3) places out of a volume; 0 beyond its ends.

    Returns:
        (n, points) values at the points of `coarse`.
    """
    half = cube.middle // STEP
    padded = np.pad(values, half)
    cut = np.lib.stride_tricks.sliding_window_view(padded, (2 * half + 1,) * 3)
    return cut[tuple(places.T)].reshape(len(places), -1)


def paste(
    hu: np.ndarray, lung: np.ndarray, grid: Grid, cube: Cube, place: Place, rng
) -> tuple[Box, np.ndarray]:
    """Pastes a nodule into a volume, in place.

    Args:
        hu: (z, y, x) int16 HU, changed near the nodule.
        lung: (z, y, x) lung labels of the host, without pasted nodules.
        grid: Grid of both.
        cube: The nodule, as it was read.
        place: Where it goes, and how it is turned.
        rng: Source of the noise.

    Returns:
        A box of the volume, and the (z, y, x) bool mask of the nodule in it.
    """
    cube = cube.turned(place.turn)
    reach = (cube.middle,) * 3
    box = boxes.near(place.centre, reach, grid.spacing_mm, boxes.full_box(hu.shape))
    weights = [
        resample.linear_weights(
            len(cube.mask),
            (np.arange(part.start, part.stop) - centre) * step + cube.middle,
            step,
        )
        for part, centre, step in zip(box, place.centre, grid.spacing_mm, strict=True)
    ]
    host, in_lung = hu[box].astype(np.float32), lung[box] > 0
    own = resample.volume(cube.hu, weights)
    opacity = opacity_of(cube, weights, in_lung, grid.spacing_mm)
    around = (opacity > 0) & in_lung
    own = match_lung(own, host, around)
    own = match_noise(own, host, around, measure_grain(hu), rng)
    hu[box] = np.rint(host + opacity * (own - host)).astype(hu.dtype)
    return box, resample.mask(cube.mask, weights)


def opacity_of(cube: Cube, weights, in_lung: np.ndarray, spacing_mm) -> np.ndarray:
    """Computes the share of the cube in each voxel: 1 in the nodule, 0 beyond its rim.

    In the rim the cube is left out where it has wall and the host has lung, or vice versa.

    Args:
        cube: The nodule, turned.
        weights: Weights that resample the cube to the host's voxels.
        in_lung: (z, y, x) bool, the lung of the host.
        spacing_mm: (z, y, x) spacing of the host.
    """
    from scipy.ndimage import distance_transform_edt, gaussian_filter

    apart_mm = np.asarray(distance_transform_edt(~cube.mask))
    rim = np.clip((RIM_MM - apart_mm) / (RIM_MM - CORE_MM), 0, 1)
    offsets = np.abs(np.arange(len(cube.mask)) - cube.middle)
    faces = np.clip((cube.middle - offsets) / FACE_MM, 0, 1)
    rim *= np.minimum(np.minimum(faces[:, None, None], faces[:, None]), faces)
    same = (resample.volume(cube.wall, weights) >= 0.5) != in_lung
    same = gaussian_filter(same.astype(np.float32), 1 / np.array(spacing_mm))
    core = apart_mm <= np.where(cube.wall, CONTACT_MM, CORE_MM)
    core = resample.volume(core, weights)
    return np.maximum(core, resample.volume(rim, weights) * same)


def match_lung(own: np.ndarray, host: np.ndarray, around: np.ndarray) -> np.ndarray:
    """Shifts the density of a cube's lung to that of the host; soft tissue stays.

    Args:
        own: (z, y, x) HU of the cube.
        host: (z, y, x) HU of the host.
        around: (z, y, x) bool, the host's lung around the nodule.
    """
    aerated = [hu[around & (hu < SOFT_HU)] for hu in (own, host)]
    if not all(map(len, aerated)):
        return own
    own_hu, host_hu = map(np.median, aerated)
    share = np.clip((DENSE_HU - own) / (DENSE_HU - own_hu), 0, 1)
    return own + share * (host_hu - own_hu)


def match_noise(
    own: np.ndarray, host: np.ndarray, around: np.ndarray, grain: Grain, rng
) -> np.ndarray:
    """Adds noise to the HU of a cube, or weakens its fine detail, as the host has it.

    Args:
        own: (z, y, x) HU of the cube.
        host: (z, y, x) HU of the host.
        around: (z, y, x) bool, the host's lung around the nodule.
        grain: Noise of the host; only its correlation is used.
        rng: Source of the noise.
    """
    common = around & (own < SOFT_HU) & (host < SOFT_HU)
    if not common.any():
        return own
    own_sd, host_sd = deviation(own, common), deviation(host, common)
    if own_sd > host_sd:
        detail = fine_detail(own)
        return own + detail * (host_sd / own_sd - 1)
    noise = draw_grain(own.shape, grain, rng).astype(np.float32)
    missing_sd = np.sqrt(host_sd**2 - own_sd**2)
    return own + noise * (missing_sd / deviation(noise, common))


def fine_detail(hu: np.ndarray) -> np.ndarray:
    """Returns (z, y, x) HU minus their mean over neighbouring pixels of the slice."""
    from scipy.ndimage import gaussian_filter

    return hu - gaussian_filter(hu, (0, 1, 1))


def deviation(hu: np.ndarray, where: np.ndarray) -> float:
    """Measures the deviation of the fine detail within a mask; vessels count little."""
    return 1.4826 * float(np.median(np.abs(fine_detail(hu)[where]))) + 1e-3
