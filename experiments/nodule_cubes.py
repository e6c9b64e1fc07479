"""Real nodules in cubes of 1 mm: HU, the mask of one reader, and whether they touch the pleura.

A folder of cubes holds cubes.h5 with /hu, (n, side, side, side) int16, and /mask, the same
shape in uint8, and index.csv with the columns row and patient_id. Axes are (z, y, x), rising to
the head, the back and the left. The side is odd, so a cube turns about its middle voxel.
"""

import csv
import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ct import hdf5
from nodules.measures import axes_mm

SOFT_HU = -500.0
"""Lowest HU of tissue that is not aerated; midway between lung and water."""

VESSEL_MM = 8.0
"""Tissue thinner than this is a vessel or an airway, not chest wall or mediastinum."""

WALL_MM3 = 1000.0
"""Smallest volume of chest wall or mediastinum in a cube; smaller parts are vessels, too."""

TOUCH_MM = 2.0
"""Largest distance of a juxtapleural nodule from chest wall or mediastinum. Outlines and the
opening that removes vessels are each right to about one voxel of 1 mm."""

Turn = tuple[tuple[int, ...], tuple[int, ...]]
"""Order of the axes, and the axes that are mirrored afterwards."""

TURNS: tuple[Turn, ...] = tuple(
    (order, tuple(axis for axis in range(3) if mirrored[axis]))
    for order in itertools.permutations(range(3))
    for mirrored in itertools.product((False, True), repeat=3)
)
"""The 48 symmetries of a cube."""


@dataclass(frozen=True, eq=False)
class Cube:
    """One nodule with its surroundings; arrays are (z, y, x) at 1 mm.

    Attributes:
        row: Row in the file of cubes.
        patient_id: Patient of LIDC-IDRI.
        hu: float32 HU.
        mask: bool, the nodule.
        wall: bool, chest wall and mediastinum without the nodule.
        long_mm: Long axis of the nodule in an axial slice of its own scan.
        wall_mm: Distance of the nodule from the wall; inf without wall.
        depth_mm: Distance of the middle of the cube from the wall; inf without wall.
    """

    row: int
    patient_id: str
    hu: np.ndarray
    mask: np.ndarray
    wall: np.ndarray
    long_mm: float
    wall_mm: float
    depth_mm: float

    @property
    def middle(self) -> int:
        """Index of the middle voxel along each axis."""
        return len(self.mask) // 2

    @property
    def juxtapleural(self) -> bool:
        """Tells whether the nodule touches the chest wall or the mediastinum."""
        return self.wall_mm <= TOUCH_MM

    def turned(self, turn: Turn) -> "Cube":
        """Returns the cube after one of `TURNS`."""
        return replace(
            self,
            hu=turned(self.hu, turn),
            mask=turned(self.mask, turn),
            wall=turned(self.wall, turn),
        )


def turned(values: np.ndarray, turn: Turn) -> np.ndarray:
    """Returns a view of (z, y, x) values after one of `TURNS`."""
    order, mirrored = turn
    return np.flip(values.transpose(order), mirrored)


def build_cube(row: int, patient_id: str, hu: np.ndarray, mask: np.ndarray) -> Cube:
    """Finds the wall in a cube and measures its nodule.

    Args:
        row: Row in the file of cubes.
        patient_id: Patient of the nodule.
        hu: (z, y, x) HU at 1 mm.
        mask: (z, y, x), nonzero in the nodule.
    """
    from scipy.ndimage import distance_transform_edt

    inside = np.asarray(mask) > 0
    wall = find_wall(hu, inside)
    apart_mm = np.full(wall.shape, np.inf)
    if wall.any():
        apart_mm = np.asarray(distance_transform_edt(~wall))
    return Cube(
        row=row,
        patient_id=patient_id,
        hu=np.asarray(hu, np.float32),
        mask=inside,
        wall=wall,
        long_mm=axes_mm(inside, (1.0, 1.0))[0],
        wall_mm=float(apart_mm[inside].min()),
        depth_mm=float(apart_mm[tuple(n // 2 for n in wall.shape)]),
    )


def find_wall(hu: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Finds chest wall and mediastinum: large soft tissue, but not the nodule or a vessel.

    Args:
        hu: (z, y, x) HU at 1 mm.
        mask: (z, y, x) bool, the nodule.

    Returns:
        (z, y, x) bool.
    """
    import cc3d

    opened = open_by((hu >= SOFT_HU) & ~mask, VESSEL_MM / 2)
    parts = cc3d.connected_components(opened, connectivity=6)
    voxels = np.bincount(parts.ravel())
    voxels[0] = 0
    return (voxels >= WALL_MM3)[parts]


def open_by(mask: np.ndarray, radius: float) -> np.ndarray:
    """Opens a (z, y, x) bool mask by a ball, as if it went on beyond the array's ends."""
    from scipy.ndimage import distance_transform_edt

    margin = int(np.ceil(radius)) + 1
    padded = np.pad(mask, margin, mode="edge")
    eroded = np.asarray(distance_transform_edt(padded)) > radius
    if not eroded.any():
        return np.zeros_like(mask)
    near = np.asarray(distance_transform_edt(~eroded)) <= radius
    inner = (slice(margin, -margin),) * 3
    return near[inner] & mask


def read_cubes(folder: Path) -> list[Cube]:
    """Reads the nodules of a folder of cubes, without those that their cube cuts off.

    Raises:
        FileNotFoundError: If the folder lacks one of its two files.
        hdf5.Unreadable: If cubes.h5 is damaged.
    """
    with (folder / "index.csv").open(newline="") as file:
        patients = {
            int(line["row"]): line["patient_id"] for line in csv.DictReader(file)
        }
    if not (folder / "cubes.h5").exists():
        raise FileNotFoundError(f"{folder} has no cubes.h5; expected cubes of nodules")
    with hdf5.open_readonly(folder / "cubes.h5") as h5:
        volumes, masks = h5.root.hu[:], h5.root.mask[:]
    return [
        build_cube(row, patient_id, volumes[row], masks[row])
        for row, patient_id in sorted(patients.items())
        if not cut_off(masks[row])
    ]


def cut_off(mask: np.ndarray) -> bool:
    """Tells whether a (z, y, x) mask is empty or reaches a face of its cube."""
    inner = (slice(1, -1),) * mask.ndim
    count = np.count_nonzero(mask[inner])
    return count == 0 or count != np.count_nonzero(mask)
