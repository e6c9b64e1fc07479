"""Real and drawn nodules in cubes, pasted into lungs drawn by hand."""

import csv
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tables
from scipy import ndimage

from augment import textures
from ct.geometry import canonical_grid
from ct.scan import (
    Scan,
    ScanError,
    read_provenance,
    read_scan,
    reference_mask,
    scan_path,
    write_scan,
)
from experiments import lung_comparison, lung_inclusion, nodule_cubes, pasted_nodules
from experiments.nodule_cubes import TURNS, build_cube, turned

ROOT = Path(__file__).parents[2]
CUBES = Path(os.environ.get("LUNG_DATA", ROOT.parent / "shared/data")) / "lidc-cubes"
needs_cubes = pytest.mark.skipif(
    not CUBES.exists(), reason=f"the cubes of real nodules are not in {CUBES}"
)
SIDE = 51
LUNG_HU, TISSUE_HU = -850, 40


def ball(radius, at=(25, 25, 25)):
    axes = np.ogrid[tuple(slice(SIDE) for _ in range(3))]
    return sum((axis - c) ** 2 for axis, c in zip(axes, at, strict=True)) <= radius**2


def drawn_cube(row=0, *, wall_from=None, radius=6, vessel=False, hu=TISSUE_HU):
    """A ball in lung; its wall fills the cube from `wall_from` on along x."""
    values = np.full((SIDE,) * 3, LUNG_HU, np.int16)
    mask = ball(radius)
    values[mask] = hu
    if vessel:
        values[:, 22:26, 30:34] = hu
    if wall_from is not None:
        values[..., wall_from:] = TISSUE_HU
        mask[..., wall_from:] = False
    return build_cube(row, f"LIDC-IDRI-{row:04}", values, mask)


def host_scan(spacing_mm=(3.0, 1.5, 1.5)):
    """Two lungs of about 150 x 120 x 70 mm in a body of water, with noise."""
    shape = tuple(
        round(length / step)
        for length, step in zip((180, 180, 240), spacing_mm, strict=True)
    )
    z, y, x = (np.arange(n) * step for n, step in zip(shape, spacing_mm, strict=True))
    z, y, x = z[:, None, None], y[:, None], x
    hu = np.full(shape, TISSUE_HU, np.int16)
    lung = np.zeros(shape, np.uint8)
    for label, middle in ((1, 70.0), (2, 170.0)):
        inside = ((z - 90) / 75) ** 2 + ((y - 90) / 60) ** 2 + ((x - middle) / 38) ** 2
        lung[inside <= 1] = label
    hu[lung > 0] = LUNG_HU
    hu += np.random.default_rng(0).normal(0, 20, shape).astype(np.int16)
    grid = canonical_grid(shape, spacing_mm)
    return Scan("host", "patient", hu, grid, grid, lung=lung)


def test_the_48_turns_are_different_and_keep_the_middle():
    values = np.arange(27).reshape(3, 3, 3)
    all_turned = {turned(values, turn).tobytes() for turn in TURNS}
    assert len(all_turned) == 48
    assert {int(turned(values, turn)[1, 1, 1]) for turn in TURNS} == {13}


@pytest.mark.parametrize(
    ("wall_from", "touches"), [(30, True), (33, True), (34, False), (None, False)]
)
def test_a_nodule_is_juxtapleural_within_2_mm_of_the_wall(wall_from, touches):
    # The ball ends at x = 31, so the wall from 33 on is 2 mm away.
    cube = drawn_cube(wall_from=wall_from)
    assert cube.juxtapleural == touches
    assert cube.wall_mm == (np.inf if wall_from is None else max(wall_from - 31, 1))


def test_a_vessel_at_the_nodule_is_no_wall():
    cube = drawn_cube(vessel=True)  # 4 mm thick, through the cube
    assert not cube.wall.any()
    assert not cube.juxtapleural


def test_the_long_axis_is_that_of_a_disc():
    assert drawn_cube(radius=6).long_mm == pytest.approx(13, abs=0.7)


def test_a_free_nodule_lies_in_lung_and_its_voxels_are_the_ball():
    scan = host_scan()
    pasted, [row] = lung_inclusion.paste_nodules(scan, [drawn_cube()], 1e9, seed=0)
    marked = np.asarray(pasted.nodule_labels) > 0
    assert marked.sum() * scan.grid.voxel_mm3 == pytest.approx(
        drawn_cube().mask.sum(), rel=0.1
    )
    assert (np.asarray(scan.lung)[marked] > 0).all()
    assert row["in_host_lung"] == 1
    assert np.array_equal(np.asarray(pasted.lung), np.asarray(scan.lung))
    marks = lung_comparison.nodule_marks(pasted, np.asarray(pasted.lung) > 0)
    assert marks[0].pleura_mm > lung_comparison.AT_PLEURA_MM
    inner = ndimage.binary_erosion(marked)  # without voxels that are partly lung
    assert pasted.hu[inner].mean() == pytest.approx(TISSUE_HU, abs=10)


def test_a_juxtapleural_nodule_touches_the_pleura():
    scan = host_scan()
    cube = drawn_cube(wall_from=31)
    pasted, [row] = lung_inclusion.paste_nodules(scan, [cube], 1e9, seed=0)
    marks = lung_comparison.nodule_marks(pasted, np.asarray(pasted.lung) > 0)
    assert marks[0].pleura_mm <= lung_comparison.AT_PLEURA_MM
    assert row["in_host_lung"] >= pasted_nodules.LEAST_INSIDE
    marked = np.asarray(pasted.nodule_labels) > 0
    assert (np.asarray(pasted.lung)[marked] > 0).all()


def test_the_wall_of_the_cube_is_turned_onto_the_wall_of_the_host():
    host = pasted_nodules.build_host(host_scan())
    cube = drawn_cube(wall_from=31)
    # At the side of the right lung, about as deep as the middle of the cube in its own.
    places = np.array([[45, 45, 18]])
    agreement = pasted_nodules.compare(host, cube, places)[0]
    wall_sides = [turned(cube.wall, turn)[25, 25, 0] for turn in TURNS]
    assert wall_sides[int(agreement.argmax())]
    assert agreement.max() > 0.85


def test_beyond_the_rim_the_host_stays_and_in_the_nodule_the_cube_is_used():
    scan, cube = host_scan((1.0, 1.0, 1.0)), drawn_cube(hu=200)
    hu = scan.hu.copy()
    place = pasted_nodules.Place(np.array([90.0, 90.0, 70.0]), TURNS[0], 1.0)
    box, mask = pasted_nodules.paste(
        hu, scan.lung, scan.grid, cube, place, np.random.default_rng(0)
    )
    at_mm = np.linalg.norm(np.argwhere(np.ones(hu.shape, bool)) - [90, 90, 70], axis=1)
    far = (at_mm > 6 + pasted_nodules.RIM_MM).reshape(hu.shape)
    assert np.array_equal(hu[far], scan.hu[far])
    assert np.array_equal(mask, cube.mask)
    noise = hu[box][mask] - 200.0
    assert abs(noise.mean()) < 3
    assert noise.std() == pytest.approx(20, rel=0.25)  # as the host has it


def test_the_lung_of_a_cube_takes_the_density_of_the_host_and_tissue_stays():
    own = np.array([[[-950.0, -950.0, 40.0, -625.0]]])
    host = np.array([[[-800.0, -800.0, -800.0, 40.0]]])
    matched = pasted_nodules.match_lung(own, host, np.ones(own.shape, bool))
    # -625 HU lies midway between the lung (-950) and -300 HU, and moves half as far.
    assert matched.ravel() == pytest.approx([-800, -800, 40, -550])


def test_detail_of_a_noisy_cube_is_weakened():
    rng, everywhere = np.random.default_rng(0), np.ones((9, 40, 40), bool)
    own, host = (rng.normal(LUNG_HU, sd, everywhere.shape) for sd in (60, 15))
    grain = textures.Grain(15, 0.3)
    matched = pasted_nodules.match_noise(own, host, everywhere, grain, rng)
    before, after, wanted = (
        pasted_nodules.deviation(hu, everywhere) for hu in (own, matched, host)
    )
    assert before == pytest.approx(4 * wanted, rel=0.1)
    assert after == pytest.approx(wanted, rel=0.3)


def test_nodules_keep_apart_and_the_seed_decides():
    cubes = [drawn_cube(row, radius=3 + row % 4) for row in range(8)]
    scan = host_scan()
    pasted, rows = lung_inclusion.paste_nodules(scan, cubes, 100, seed=0)
    assert len(rows) > 4
    centres = np.array([nodule.centre_ras_mm for nodule in pasted.nodules])
    apart = np.linalg.norm(centres[:, None] - centres, axis=-1)
    assert apart[~np.eye(len(rows), dtype=bool)].min() > pasted_nodules.CENTRES_MM - 1
    again, _ = lung_inclusion.paste_nodules(scan, cubes, 100, seed=0)
    assert np.array_equal(pasted.hu, again.hu)
    other, _ = lung_inclusion.paste_nodules(scan, cubes, 100, seed=1)
    assert not np.array_equal(pasted.hu, other.hu)


def test_cubes_of_the_patient_of_the_host_are_left_out():
    scan = replace(host_scan(), patient_id="LIDC-IDRI-0000")
    cubes = [drawn_cube(0), drawn_cube(1)]
    _, rows = lung_inclusion.paste_nodules(scan, cubes, 1, seed=0)
    assert [row["row"] for row in rows] == [1]


def test_hosts_without_lungs_or_room_are_refused():
    scan = host_scan()
    with pytest.raises(ScanError, match="host has no lung labels"):
        lung_inclusion.paste_nodules(
            replace(scan, lung=None), [drawn_cube()], 60, seed=0
        )
    tiny = np.zeros_like(scan.lung)
    tiny[30, 60:64, 40:44] = 1
    with pytest.raises(ScanError, match="no nodule fits into its lungs"):
        lung_inclusion.paste_nodules(
            replace(scan, lung=tiny), [drawn_cube()], 60, seed=0
        )


def write_cubes(folder, cubes):
    folder.mkdir()
    with tables.open_file(folder / "cubes.h5", "w") as h5:
        h5.create_carray(
            "/", "hu", obj=np.stack([c.hu for c in cubes]).astype(np.int16)
        )
        h5.create_carray(
            "/", "mask", obj=np.stack([c.mask for c in cubes]).astype(np.uint8)
        )
    with (folder / "index.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "patient_id"])
        writer.writerows([cube.row, cube.patient_id] for cube in cubes)


def test_nodules_that_their_cube_cuts_off_are_not_read(tmp_path):
    whole, cut = drawn_cube(0), drawn_cube(1, radius=25)
    write_cubes(tmp_path / "cubes", [whole, cut])
    [cube] = nodule_cubes.read_cubes(tmp_path / "cubes")
    assert (cube.row, cube.patient_id) == (0, "LIDC-IDRI-0000")
    assert np.array_equal(cube.hu, whole.hu)
    (tmp_path / "cubes/cubes.h5").unlink()
    with pytest.raises(FileNotFoundError, match="has no cubes.h5"):
        nodule_cubes.read_cubes(tmp_path / "cubes")


def test_the_written_scans_are_scored_by_the_comparison(tmp_path):
    scan = host_scan()
    write_scan(scan, scan_path(tmp_path / "hosts", scan.scan_id), {})
    write_cubes(tmp_path / "cubes", [drawn_cube(0), drawn_cube(1, wall_from=31)])
    call = ["--hosts", f"{tmp_path}/hosts", "--cubes", f"{tmp_path}/cubes"]
    with pytest.raises(SystemExit) as ended:
        lung_inclusion.main([*call, "--out", f"{tmp_path}/out"])
    assert ended.value.code == 0
    truth = read_scan(scan_path(tmp_path / "out/truth", "host-pasted"))
    holed = np.where(np.asarray(truth.nodule_labels) == 1, 0, truth.lung).astype(
        np.uint8
    )
    write_scan(
        replace(truth, lung=holed), scan_path(tmp_path / "holed", "host-pasted"), {}
    )
    lung_comparison.compare_lungs(
        lung_comparison.Arguments(
            methods=(f"truth={tmp_path}/out/truth", f"holed={tmp_path}/holed"),
            out=tmp_path / "scores",
            scans=tmp_path / "out/truth",
            truth=tmp_path / "out/truth",
            draws=20,
        )
    )
    with (tmp_path / "scores/nodules.csv").open(newline="") as file:
        kept = {(row["method"], row["label"]): row for row in csv.DictReader(file)}
    assert kept["truth", "1"]["kept"] == kept["truth", "1"]["voxels"]
    assert kept["holed", "1"]["kept"] == "0"
    assert kept["holed", "2"]["kept"] == kept["holed", "2"]["voxels"]


def test_every_cube_is_in_one_part():
    cubes = [drawn_cube(row) for row in range(7)]
    rows = {
        part: [cube.row for cube in lung_inclusion.cubes_of_part(cubes, part)]
        for part in ("all", "train", "test")
    }
    assert rows == {
        "all": [0, 1, 2, 3, 4, 5, 6],
        "train": [0, 2, 3, 5, 6],
        "test": [1, 4],
    }


def test_nodules_of_excluded_patients_are_not_pasted(tmp_path):
    scan = host_scan()
    write_scan(scan, scan_path(tmp_path / "hosts", scan.scan_id), {})
    cubes = [drawn_cube(0), drawn_cube(1)]
    write_cubes(tmp_path / "cubes", cubes)
    paths = tmp_path / "hosts", tmp_path / "cubes", tmp_path / "out"
    excluded = (cubes[0].patient_id,)
    report = lung_inclusion.write_all(
        lung_inclusion.Arguments(*paths, lung_ml=1.0, exclude_patients=excluded)
    )
    assert not report.failures
    record = read_provenance(scan_path(tmp_path / "out/truth", "host-pasted"))
    assert record["nodule_patients"] == [cubes[1].patient_id]


def test_hosts_without_labels_are_listed(tmp_path):
    scan = host_scan()
    write_scan(replace(scan, lung=None), scan_path(tmp_path / "hosts", "host"), {})
    write_cubes(tmp_path / "cubes", [drawn_cube()])
    arguments = lung_inclusion.Arguments(
        tmp_path / "hosts", tmp_path / "cubes", tmp_path / "out"
    )
    report = lung_inclusion.write_all(arguments)
    assert [failure.scan_id for failure in report.failures] == ["host"]


@needs_cubes
def test_real_nodules_that_look_juxtapleural_are_and_others_are_not():
    # Looked at in three planes: rows 17, 43 and 60 lie on the pleura, row 49 on the
    # diaphragm; rows 2, 11, 35 and 58 are surrounded by lung.
    rows = {cube.row: cube for cube in nodule_cubes.read_cubes(CUBES)}
    assert len(rows) == 117
    assert all(rows[row].juxtapleural for row in (17, 43, 49, 60))
    assert not any(rows[row].juxtapleural for row in (2, 11, 35, 58))


@needs_cubes
def test_real_nodules_keep_their_volume_in_a_host():
    rows = {cube.row: cube for cube in nodule_cubes.read_cubes(CUBES)}
    scan = host_scan()
    cubes = [rows[9], rows[47]]
    pasted, found = lung_inclusion.paste_nodules(scan, cubes, 100, seed=0)
    marked = reference_mask(pasted, consensus_level=0.5, min_readers=1)
    for row in found:
        voxels = np.count_nonzero(marked & (pasted.nodule_labels == row["label"]))
        own_mm3 = rows[row["row"]].mask.sum()
        assert voxels * scan.grid.voxel_mm3 == pytest.approx(own_mm3, rel=0.1)
