r"""Writes one page with the lungs of a scan in 3-D, coloured by their standard deviation.

The colour shows where not to trust the surface. Nodules are red, each with its measures.

Reads the results of infer.py for one scan with --save_as nifti, and writes one HTML file that
a browser shows offline: turn with the mouse, zoom with the wheel.

Example:
    python -m viewers.lungs OUT/PID --out OUT/PID.html
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

import config
import steps
from ct import files, resample
from ct.geometry import Grid
from ct.nifti_io import check_same_grid, read_nifti
from ct.scan import LEFT, RIGHT
from results.rows import LUNGS_CSV, NODULES_CSV, LungRow, read_lung_rows, read_rows

SMOOTHING = 0.8
"""Gaussian standard deviation, in coarse voxels, that smooths the steps of the surface."""

MARGIN = 4
"""Voxels of background around the mask, which close a lung cut by the field of view."""

MAX_STD = 0.5
"""End of the colour scale on every page: no standard deviation of values in 0..1 is larger."""

LUNG_OPACITY = 0.4
"""Opacity of lungs that contain nodules; lungs without nodules are opaque."""

FEW_VOXELS = 50
"""Most voxels of a nodule that is resampled to 1/4 of the voxel size; larger ones to 1/2."""

NODULE_COLOUR = "crimson"

NAMES = {RIGHT: "right lung", LEFT: "left lung"}

TOOLBAR = {
    "displaylogo": False,
    "responsive": True,
    # Otherwise Plotly adds a button that uploads the whole figure to its makers' server.
    "showSendToCloud": False,
}

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none';
 script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<title>Lungs of {pid}</title>
<style>
body {{ font: 15px sans-serif; margin: 12px 20px }}
h1 {{ font-size: 19px; margin: 0; overflow-wrap: anywhere }}
p {{ margin: 4px 0 }}
</style>
</head>
<body>
<h1>Lungs of {pid}</h1>
<p>{verdict}</p>
<p>{facts}</p>
<p>Research code, not a medical device.</p>
{figure}
</body>
</html>
"""


@dataclass(frozen=True, eq=False)
class Mesh:
    """A closed surface of triangles.

    Attributes:
        points_ras_mm: (points, 3) coordinates.
        faces: (triangles, 3) point indices, counter-clockwise seen from outside.
    """

    points_ras_mm: np.ndarray
    faces: np.ndarray

    @property
    def area_mm2(self) -> float:
        return float(np.linalg.norm(self._normals(), axis=1).sum() / 2)

    @property
    def volume_mm3(self) -> float:
        """The enclosed volume; negative if the faces are turned inside out."""
        first = self.points_ras_mm[self.faces[:, 0]]
        return float((first * self._normals()).sum() / 6)

    def _normals(self) -> np.ndarray:
        """Returns (triangles, 3) normals, each as long as twice the area of its triangle."""
        a, b, c = self.points_ras_mm[self.faces].swapaxes(0, 1)
        return np.cross(b - a, c - a)


def surface(mask: np.ndarray, grid: Grid, spacing_mm: float) -> Mesh:
    """Computes the smoothed surface of a mask.

    Args:
        mask: (z, y, x) bool, not all False.
        grid: Grid of the mask.
        spacing_mm: Edge of the voxels the mask is resampled to, and roughly of the
            triangles.

    Raises:
        ValueError: If the mask is too small to have a surface at this spacing.
    """
    from scipy import ndimage
    from skimage import measure

    weights, affine = resample.isotropic(grid, spacing_mm)
    inside = np.pad(resample.volume(mask, weights), MARGIN)
    inside = ndimage.gaussian_filter(inside, SMOOTHING)
    if inside.max() <= 0.5:
        raise ValueError(
            f"{np.count_nonzero(mask)} voxels of {grid.voxel_mm3:.3g} mm3 have no surface "
            f"at {spacing_mm:g} mm; expected a lung, or use a smaller --spacing_mm"
        )
    points, faces, *_ = measure.marching_cubes(inside, 0.5, allow_degenerate=False)
    coarse = Grid(inside.shape, affine)
    # Faces are clockwise in (z, y, x) order; a mirroring affine makes them counter-clockwise.
    if np.linalg.det(affine[:3, :3]) > 0:
        faces = faces[:, ::-1]
    return Mesh(coarse.index_to_ras_mm(points - MARGIN), faces)


def values_at(points_ras_mm: np.ndarray, values: np.ndarray, grid: Grid) -> np.ndarray:
    """Returns (points,) linearly interpolated values of a (z, y, x) volume at RAS points."""
    from scipy import ndimage

    index = grid.ras_mm_to_index(points_ras_mm).T
    return ndimage.map_coordinates(values, index, order=1, mode="nearest")


def read_lungs(folder: Path) -> tuple[LungRow, np.ndarray, np.ndarray, Grid]:
    """Reads the lungs of one scan: row of lungs.csv, labels, standard deviation and grid.

    Raises:
        ValueError: If a file is missing or damaged, or the files do not match.
    """
    folder = folder.absolute()
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: no such folder; expected RESULT_DIR/PID, which infer.py writes with "
            "a run for lungs and --save_as nifti"
        )
    pid = files.checked_id(folder.name, where="name of the scan's folder")
    for name in ("mask.nii.gz", "std.nii.gz"):
        if not (folder / name).is_file():
            found = ", ".join(sorted(file.name for file in folder.iterdir())[:5])
            raise ValueError(
                f"{folder}: no {name} (found {found or 'nothing'}); run infer.py with a run "
                "for lungs and --save_as nifti --overwrite"
            )
    table = folder.parent / LUNGS_CSV
    rows = {row.pid: row for row in read_lung_rows(table)}
    if pid not in rows:
        raise ValueError(
            f"{table}: no row of {pid}, so it is unknown whether its lungs can be trusted; "
            "run infer.py again with this --result_dir"
        )
    labels, grid = read_nifti(folder / "mask.nii.gz")
    std, std_grid = read_nifti(folder / "std.nii.gz")
    check_same_grid(std_grid, grid, folder / "std.nii.gz")
    if not np.isin(labels, tuple(NAMES)).any():
        raise ValueError(
            f"{folder / 'mask.nii.gz'}: no lung ({RIGHT} right, {LEFT} left), so there is "
            "nothing to show"
        )
    return rows[pid], labels, std, grid


def read_nodules(
    folder: Path, grid: Grid
) -> tuple[np.ndarray, dict[int, dict[str, Any]]]:
    """Reads the nodules of a scan: (z, y, x) labels, and rows of nodules.csv by label.

    There are no rows if no nodule was found or none were searched for.

    Raises:
        ValueError: If a file is missing or damaged, or the files do not match.
    """
    folder = folder.absolute()
    rows = read_rows(folder.parent / NODULES_CSV)
    by_id = {int(row["nodule_id"]): row for row in rows.get(folder.name, [])}
    path = folder / "nodules.nii.gz"
    if not by_id:
        return np.zeros(grid.shape, np.uint8), {}
    if not path.is_file():
        raise ValueError(
            f"{folder}: no nodules.nii.gz, but {len(by_id)} rows in nodules.csv; run "
            "infer.py again with this --result_dir"
        )
    labels, own_grid = read_nifti(path)
    check_same_grid(own_grid, grid, path)
    drawn = set(np.unique(labels).astype(int).tolist()) - {0}
    if drawn != set(by_id):
        raise ValueError(
            f"{path}: nodules {sorted(drawn)}; expected {sorted(by_id)} as in nodules.csv; "
            "run infer.py again with this --result_dir and --overwrite"
        )
    return labels.astype(np.int32), by_id


def add_nodules(
    shown: Any, labels: np.ndarray, rows: dict[int, dict[str, Any]], grid: Grid
) -> None:
    """Adds a surface per nodule to a figure, with its measures as hover text."""
    from scipy import ndimage

    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None:
            continue
        affine = grid.affine.copy()
        start = np.array([part.start for part in box])
        affine[:3, 3] = grid.index_to_ras_mm(start)
        mask = labels[box] == number
        # Smoothed as much as lungs, a very small nodule would have no surface.
        finer = 2 if np.count_nonzero(mask) > FEW_VOXELS else 4
        own = Grid(mask.shape, affine)
        mesh = surface(mask, own, min(grid.spacing_mm) / finer)
        row = rows[number]
        size = (
            f"{float(row['long_axis_mm']):.1f} x {float(row['short_axis_mm']):.1f} mm"
        )
        volume = f"{float(row['volume_mm3']):.0f} mm3"
        shown.add_mesh3d(
            **triangles_of(mesh),
            color=NODULE_COLOUR,
            name=f"nodule {number}",
            showlegend=True,
            hovertemplate=f"nodule {number}, {row['side'] or 'no'} lung<br>{size}, {volume}"
            f"<br>score {float(row['score']):.2f}<extra></extra>",
        )


def triangles_of(mesh: Mesh) -> dict[str, np.ndarray]:
    """Returns a mesh under the argument names of Plotly."""
    x, y, z = mesh.points_ras_mm.astype(np.float32).T
    i, j, k = mesh.faces.astype(np.int32).T
    return {"x": x, "y": y, "z": z, "i": i, "j": j, "k": k}


def figure_of(
    labels: np.ndarray,
    std: np.ndarray,
    grid: Grid,
    spacing_mm: float,
    *,
    opacity: float = 1.0,
) -> Any:
    """Builds a Plotly figure of the lungs, seen from the front with the head up.

    Args:
        labels: (z, y, x) lung labels.
        std: (z, y, x) standard deviation of the lung probability.
        grid: Grid of both.
        spacing_mm: See `surface`.
        opacity: Opacity of the lungs.
    """
    from plotly import graph_objects

    shown = graph_objects.Figure()
    for label, name in NAMES.items():
        if not (labels == label).any():
            continue
        mesh = surface(labels == label, grid, spacing_mm)
        shown.add_mesh3d(
            **triangles_of(mesh),
            opacity=opacity,
            intensity=values_at(mesh.points_ras_mm, std, grid).astype(np.float32),
            coloraxis="coloraxis",
            name=name,
            showlegend=True,
            hovertemplate=f"{name}<br>std %{{intensity:.3f}}<br>"
            "x %{x:.0f}, y %{y:.0f}, z %{z:.0f} mm<extra></extra>",
            lighting={"ambient": 0.75, "diffuse": 0.4, "specular": 0.05},
        )
    shown.update_layout(
        coloraxis={
            "cmin": 0,
            "cmax": MAX_STD,
            "colorscale": "Viridis",
            "colorbar": {
                "title": {
                    "text": "standard deviation of the probability of lung (no unit)",
                    "side": "right",
                }
            },
        },
        scene={
            "aspectmode": "data",
            "xaxis": {"title": "x to the right (mm)"},
            "yaxis": {"title": "y to the front (mm)"},
            "zaxis": {"title": "z to the head (mm)"},
            "camera": {"eye": {"x": 0.3, "y": 2.2, "z": 0.3}},
        },
        legend={"x": 0, "y": 1},
        margin={"l": 0, "r": 0, "t": 30, "b": 0},
    )
    return shown


def page_of(row: LungRow, figure: Any) -> str:
    """Renders the page: verdict, figure and the whole of Plotly, so that it works offline."""
    verdict = "Flag 0: the checks found no reason to distrust the mask."
    if row.flag:
        verdict = f"<b>Flag {row.flag}, do not trust:</b> {html.escape(row.reason)}"
    facts = (
        f"Right lung {row.right_ml:.0f} ml, left lung {row.left_ml:.0f} ml; expected Dice "
        f"{row.score:.3f}; {row.n} passes. Axes in RAS mm; seen from the front, the right "
        "lung is on the left."
    )
    return PAGE.format(
        pid=html.escape(row.pid),
        verdict=verdict,
        facts=facts,
        figure=figure.to_html(
            full_html=False,
            include_plotlyjs=True,
            default_height="82vh",
            config=TOOLBAR,
        ),
    )


@dataclass(frozen=True)
class Arguments:
    scan: Annotated[Path, tyro.conf.Positional]
    """RESULT_DIR/PID, the folder that infer.py wrote for the scan."""
    out: Path | None = None
    """Path of the page; by default RESULT_DIR/PID.html."""
    spacing_mm: float = 3.0
    """Edge of the voxels the masks are resampled to; smaller voxels make a larger page."""
    overwrite: bool = False
    """Replace an existing page."""

    def __post_init__(self) -> None:
        spacing = self.spacing_mm
        config.require(spacing > 0, "spacing_mm", spacing, "above 0")


def write_page(arguments: Arguments) -> steps.Report:
    """Writes the page; see `Arguments`.

    Raises:
        ValueError: If results are missing or the page exists.
    """
    row, labels, std, grid = read_lungs(arguments.scan)
    out = arguments.out or arguments.scan.absolute().parent / f"{row.pid}.html"
    if out.exists() and not arguments.overwrite:
        raise ValueError(f"{out} exists; add --overwrite to replace it")
    nodules, rows = read_nodules(arguments.scan, grid)
    opacity = LUNG_OPACITY if rows else 1.0
    figure = figure_of(labels, std, grid, arguments.spacing_mm, opacity=opacity)
    add_nodules(figure, nodules, rows, grid)
    with files.write_atomically(out) as partial:
        partial.write_text(page_of(row, figure), encoding="utf-8")
    triangles = sum(len(mesh.i) for mesh in figure.data)
    size = files.size_text(out.stat().st_size)
    found = f"{files.count_text(len(rows), 'nodule')}, " if rows else ""
    return steps.Report(f"wrote {out}: {found}{triangles} triangles, {size}")


def main(argv: Sequence[str] | None = None) -> None:
    steps.run(write_page, Arguments, argv=argv)


if __name__ == "__main__":
    main()
