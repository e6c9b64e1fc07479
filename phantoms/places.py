"""Choice of places for nodules in a phantom's lungs."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from ct.boxes import Box
from ct.geometry import Mesh
from nodules import shapes
from phantoms import drawn_nodules
from phantoms.anatomy import Chest
from phantoms.drawn_nodules import PlacedNodule
from phantoms.render import Scene
from phantoms.settings import Settings
from phantoms.trees import Tree

PLACES_TRIED = 3
"""Number of free places tried for a nodule before it is dropped."""


def points_xyz(mesh: Mesh, voxels: np.ndarray) -> np.ndarray:
    """Converts (n, zyx) voxel indices to (n, xyz) mm."""
    z, y, x = voxels.T
    return np.stack(
        [mesh.x.ravel()[x], mesh.y.ravel()[y], mesh.z.ravel()[z]], axis=1
    ).astype(np.float64)


def place_nodules(
    settings: Settings,
    scene: Scene,
    trees: Sequence[tuple[str, Tree]],
    rng: np.random.Generator,
) -> list[tuple[PlacedNodule, Box]]:
    """Draws nodules, each with its box; drops those that fit nowhere."""
    fewest, most = settings.nodules
    small, large = settings.diameter_mm
    places = _Places.of(scene.chest, scene.coarse, trees)
    placed: list[tuple[PlacedNodule, Box]] = []
    for _ in range(int(rng.integers(fewest, most + 1))):
        diameter = float(
            np.clip(9.5 * np.exp(0.55 * rng.standard_normal()), small, large)
        )
        kind = shapes.KINDS[rng.choice(3, p=drawn_nodules.KIND_SHARES)]
        site = shapes.SITES[rng.choice(3, p=(0.4, 0.3, 0.3))]
        nodule = PlacedNodule(
            label=len(placed) + 1,
            kind=kind,
            site=site,
            centre_xyz=np.zeros(3),
            diameter_mm=diameter,
            shape=shapes.draw_shape(rng, diameter),
            hu=_solid_hu(kind, rng),
            haze_hu=scene.chest.parenchyma_hu.mean() + float(rng.uniform(140, 360)),
            core={"solid": 1.0, "part-solid": rng.uniform(0.4, 0.65)}.get(kind, 0.0),
        )
        others = [other for other, _ in placed]
        for centre in islice(places.find(site, diameter, others, rng), PLACES_TRIED):
            fit = drawn_nodules.fit_nodule(
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
    """Draws the HU of soft tissue; one solid nodule in twenty is calcified."""
    calcified = kind == "solid" and rng.random() < 0.05
    return float(rng.uniform(220, 480) if calcified else rng.uniform(-10, 70))


@dataclass(frozen=True, eq=False)
class _Places:
    """Candidate places for nodules.

    Attributes:
        points_xyz: (points, xyz) coarse voxels more than 1 mm inside the lungs, in mm.
        depth_mm: (points,) distance of each point to the pleura.
        vessels_xyz: (segments, xyz) centres of the vessel segments.
        vessel_radii: (segments,) radii in mm.
        vessel_axes: (segments, xyz) unit vectors along the segments.
        roots_xyz: (roots, xyz) lung roots.
        z_range_mm: z of the first and the last slice.
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
            points_xyz=points_xyz(coarse, voxels),
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
        """Draws centres (xyz) and yields those with room for the nodule."""
        radius = diameter_mm / 2
        candidates = self._beside_vessels(radius, rng) if site == "vascular" else None
        if candidates is None:
            candidates = self._at_depth(site, radius, rng)
        return (c for c in candidates if self._free(c, radius, others))

    def _beside_vessels(
        self, radius: float, rng: np.random.Generator
    ) -> Iterator[np.ndarray] | None:
        """Draws centres at which a nodule covers the flank of a vessel."""
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
    """Computes the distance to the pleura.

    The lungs' field is precise to fractions of a voxel near the pleura but far off deep
    in the lungs, so it is clipped to within a voxel of the exact distance transform.
    """
    import edt

    exact = edt.edt(chest.lungs < 0, anisotropy=coarse.spacing_mm, parallel=1)
    return np.clip(-chest.lungs, exact - max(coarse.spacing_mm), exact)
