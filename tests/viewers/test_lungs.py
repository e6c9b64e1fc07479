from dataclasses import replace
from html.parser import HTMLParser

import nibabel
import numpy as np
import pytest

from ct.geometry import Grid
from ct.nifti_io import read_nifti, write_nifti
from ct.scan import LEFT, RIGHT
from results import result_folder
from results.rows import (
    NODULE_COLUMNS,
    NODULES_CSV,
    LungRow,
    write_lung_rows,
    write_scan_rows,
)
from tests.conftest import canonical_grid
from viewers import lungs

ROW = LungRow("scan-1", 12, 900.0, 800.0, 0.97, 0, "", 3.0)
RADIUS_MM = 40
CENTRE_RAS_MM = np.array([12.0, -7.0, 30.0])
TURNED = np.diag([1.5, 1.5, 2.5, 1.0])
"""Array axes that rise to R, A and S, as those of many NIfTI files."""


def ball_on(grid):
    """Bool: voxels within `RADIUS_MM` of `CENTRE_RAS_MM`."""
    index = np.moveaxis(np.indices(grid.shape), 0, -1)
    apart_mm = grid.index_to_ras_mm(index) - CENTRE_RAS_MM
    return np.linalg.norm(apart_mm, axis=-1) <= RADIUS_MM


def mirrored_grid():
    """z, y, x rise to S, P, L: a mirror image of x, y, z in RAS."""
    grid = canonical_grid((40, 70, 70))
    affine = grid.affine.copy()
    affine[:3, 3] = (60, 50, -20)
    return Grid(grid.shape, affine)


def straight_grid():
    """Axes rise to R, A and S."""
    affine = TURNED.copy()
    affine[:3, 3] = (-40, -60, -20)
    return Grid((70, 70, 40), affine)


@pytest.mark.parametrize("grid", [mirrored_grid(), straight_grid()])
def test_the_surface_of_a_ball_has_its_area_volume_and_place(grid):
    mesh = lungs.surface(ball_on(grid), grid, 2.5)
    assert mesh.area_mm2 == pytest.approx(4 * np.pi * RADIUS_MM**2, rel=0.03)
    # Positive only if faces are counter-clockwise seen from outside.
    assert mesh.volume_mm3 == pytest.approx(4 / 3 * np.pi * RADIUS_MM**3, rel=0.02)
    middle = (mesh.points_ras_mm.min(axis=0) + mesh.points_ras_mm.max(axis=0)) / 2
    assert np.allclose(middle, CENTRE_RAS_MM, atol=1)


def test_a_lung_cut_by_the_field_of_view_is_closed():
    grid = canonical_grid((20, 30, 30), (2.0, 2.0, 2.0))
    mesh = lungs.surface(np.ones(grid.shape, bool), grid, 2.0)
    assert mesh.volume_mm3 == pytest.approx(40 * 60 * 60, rel=0.02)
    edges = np.sort(mesh.faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
    _, times = np.unique(edges, axis=0, return_counts=True)
    assert (times == 2).all()


def test_values_are_those_of_the_voxels_at_the_points():
    grid = mirrored_grid()
    index = np.moveaxis(np.indices(grid.shape), 0, -1)
    slope = np.array([0.5, -2.0, 3.0])
    values = grid.index_to_ras_mm(index) @ slope  # linear between voxels as well
    points = np.random.default_rng(0).uniform((-30, -40, -10), (50, 40, 70), (50, 3))
    assert np.allclose(lungs.values_at(points, values, grid), points @ slope)


@pytest.fixture
def folder(scan, tmp_path):
    """Results of one scan whose source's axes rise to R, A and S; std 0.3 in the left."""
    shape = scan.hu.shape[::-1]
    grid = scan.grid
    affine = TURNED.copy()
    affine[:3, 3] = grid.index_to_ras_mm(np.array([0, grid.shape[1] - 1, shape[0] - 1]))
    source = Grid(shape, affine)
    std = np.where(np.arange(64) < 32, 0.1, 0.3) * np.ones(scan.hu.shape)
    write_nifti(tmp_path / "scan-1/mask.nii.gz", scan.lung, grid, source)
    write_nifti(tmp_path / "scan-1/std.nii.gz", std, grid, source)
    write_lung_rows(tmp_path / "lungs.csv", [ROW])
    return tmp_path / "scan-1"


def test_the_right_lung_lies_at_greater_x_and_has_its_own_colours(folder):
    _, labels, std, grid = lungs.read_lungs(folder)
    right, left = lungs.figure_of(labels, std, grid, 2.0).data
    image = nibabel.load(folder / "mask.nii.gz")
    for mesh, name, label, value in (
        (right, "right lung", RIGHT, 0.1),
        (left, "left lung", LEFT, 0.3),
    ):
        assert mesh.name == name
        assert np.allclose(mesh.intensity, value, atol=1e-4)
        # Where another reader of NIfTI finds the middle of the label, in RAS mm.
        index = np.argwhere(np.asarray(image.dataobj) == label)
        low, high = index.min(axis=0), index.max(axis=0)
        expected = nibabel.affines.apply_affine(image.affine, (low + high) / 2)
        found = [(axis.min() + axis.max()) / 2 for axis in (mesh.x, mesh.y, mesh.z)]
        assert np.allclose(found, expected, atol=0.5)
    assert right.x.mean() > left.x.mean()


def test_one_lung_alone_is_shown(folder):
    _, labels, std, grid = lungs.read_lungs(folder)
    labels[labels == RIGHT] = 0
    (left,) = lungs.figure_of(labels, std, grid, 2.0).data
    assert left.name == "left lung"


def add_found(folder, scan, ids=(1, 2)):
    """Two nodules beside the lungs' results, as infer.py leaves them."""
    source = read_nifti(folder / "mask.nii.gz")[1]
    found = np.zeros(scan.hu.shape, np.uint8)
    found[5:9, 20:26, 12:18], found[7, 30, 44] = 1, 2
    write_nifti(folder / "nodules.nii.gz", found, scan.grid, source)
    rows = [
        dict.fromkeys(NODULE_COLUMNS, "7.5")
        | {"case_id": "scan-1", "nodule_id": number, "side": "left", "score": "0.91"}
        for number in ids
    ]
    path = folder.parent / NODULES_CSV
    write_scan_rows(path, {"scan-1": rows})
    return found


def test_nodules_are_closed_surfaces_where_they_were_found(folder, scan, capsys):
    found = add_found(folder, scan)
    _, labels, std, grid = lungs.read_lungs(folder)
    nodules, rows = lungs.read_nodules(folder, grid)
    figure = lungs.figure_of(labels, std, grid, 2.0, opacity=0.4)
    lungs.add_nodules(figure, nodules, rows, grid)
    right, left, large, small = figure.data
    assert right.opacity == left.opacity == 0.4
    for mesh, number in ((large, 1), (small, 2)):
        index = np.argwhere(found == number)
        expected = scan.grid.index_to_ras_mm(
            (index.min(axis=0) + index.max(axis=0)) / 2
        )
        middle = [(axis.min() + axis.max()) / 2 for axis in (mesh.x, mesh.y, mesh.z)]
        assert np.allclose(middle, expected, atol=0.5)
        assert f"nodule {number}, left lung" in mesh.hovertemplate
        assert "7.5 x 7.5 mm" in mesh.hovertemplate
    with pytest.raises(SystemExit, match="0"):
        lungs.main([str(folder), "--spacing_mm", "2"])
    assert "2 nodules" in capsys.readouterr().out


def test_nodules_and_their_rows_fit(folder, scan):
    grid = lungs.read_lungs(folder)[3]
    assert lungs.read_nodules(folder, grid)[1] == {}
    add_found(folder, scan, ids=(1,))
    with pytest.raises(ValueError, match=r"nodules \[1, 2\]; expected \[1\] as in"):
        lungs.read_nodules(folder, grid)
    (folder / "nodules.nii.gz").unlink()
    with pytest.raises(ValueError, match="no nodules.nii.gz, but 1 rows"):
        lungs.read_nodules(folder, grid)


class Loads(HTMLParser):
    """Collects what a page loads, and its text outside of scripts and styles."""

    def __init__(self):
        super().__init__()
        self.loads, self.text, self.tags = [], "", [""]

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        names = ("src", "href", "srcset", "data", "action")
        self.loads += [value for name, value in attrs if name in names]

    def handle_data(self, data):
        if self.tags[-1] not in ("script", "style"):
            self.text += data


def parsed(page):
    parser = Loads()
    parser.feed(page)
    return parser


def test_the_page_loads_nothing_and_says_what_it_shows(folder, capsys):
    with pytest.raises(SystemExit) as ended:
        lungs.main([str(folder)])
    assert ended.value.code == 0
    out = folder.parent / "scan-1.html"
    assert f"wrote {out}: " in capsys.readouterr().out
    assert out.stat().st_size < 8e6
    page = out.read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    assert '"showSendToCloud": false' in page
    found = parsed(page)
    assert found.loads == []
    assert "Lungs of scan-1" in found.text
    assert "Flag 0" in found.text
    assert "Research code, not a medical device." in found.text
    assert "standard deviation of the probability of lung" in page
    assert {file.name for file in folder.iterdir()} <= result_folder.MAPS


def test_a_reason_is_shown_as_text_whatever_it_holds(folder):
    reason = "too </script><script src=http://x.invalid></script> small"
    row = replace(ROW, flag=1, reason=reason)
    _, labels, std, grid = lungs.read_lungs(folder)
    page = lungs.page_of(row, lungs.figure_of(labels, std, grid, 4.0))
    found = parsed(page)
    assert found.loads == []
    assert f"do not trust: {reason}" in found.text


def test_what_is_missing_is_named_with_what_to_do(folder):
    (folder / "std.nii.gz").unlink()
    with pytest.raises(
        ValueError, match=r"no std.nii.gz \(found mask.*--save_as nifti"
    ):
        lungs.read_lungs(folder)
    with pytest.raises(ValueError, match="no such folder; expected RESULT_DIR/PID"):
        lungs.read_lungs(folder.parent / "scan-2")
    (folder.parent / ".scan").mkdir()
    with pytest.raises(ValueError, match="the id '.scan' cannot name a file"):
        lungs.read_lungs(folder.parent / ".scan")


def test_results_without_a_verdict_are_refused(folder):
    write_lung_rows(folder.parent / "lungs.csv", [replace(ROW, pid="other")])
    with pytest.raises(
        ValueError, match=r"lungs.csv: no row of scan-1.*infer.py again"
    ):
        lungs.read_lungs(folder)


def test_maps_of_different_grids_and_empty_masks_are_refused(folder, scan):
    grid = canonical_grid()
    write_nifti(folder / "mask.nii.gz", np.zeros_like(scan.lung), grid, grid)
    with pytest.raises(ValueError, match="no lung .1 right, 2 left."):
        lungs.read_lungs(folder)
    thin = canonical_grid(spacing_mm=(2.5, 1.0, 1.0))
    write_nifti(folder / "std.nii.gz", np.zeros(scan.hu.shape), thin, thin)
    with pytest.raises(ValueError, match=r"std.nii.gz: its grid .* is not the scan's"):
        lungs.read_lungs(folder)


def test_a_page_is_replaced_only_when_told(folder):
    out = folder.parent / "page.html"
    out.write_text("mine")
    with pytest.raises(ValueError, match="page.html exists; add --overwrite"):
        lungs.write_page(lungs.Arguments(folder, out))
    assert out.read_text() == "mine"


def test_a_mask_too_small_for_the_spacing_is_an_error():
    grid = canonical_grid()
    mask = np.zeros(grid.shape, bool)
    mask[10, 20, 20] = True
    with pytest.raises(ValueError, match="1 voxels .* no surface at 10 mm"):
        lungs.surface(mask, grid, 10)
