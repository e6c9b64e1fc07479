"""LUNA16's coordinates land on the nodules, and the edge search finds known shapes."""

import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from cohorts import lidc, luna16
from ct.scan import LEFT, RIGHT, ScanError, consensus, readers_of_label
from nodules import lidc_database, wand

ROOT = Path(__file__).parents[2]
LIDC_DIR = Path(os.environ.get("LUNG_DATA", ROOT.parent / "shared/data")) / "LIDC-IDRI"

UID = "1.2.826.0.1.3680043.8.498.5"
SHAPE = (30, 72, 80)
SPACING_MM = (2.0, 0.8, 0.8)
ORIGIN_LPS_MM = (-30.0, -25.0, -70.0)
CENTRE_ZYX = np.array([14.3, 30.6, 25.2])
RADIUS_MM = 6.0
HEADER = "seriesuid,coordX,coordY,coordZ,diameter_mm\n"
DIRECTIONS = {
    "straight": (1, 1, 1),
    "mirrored": (-1, -1, 1),
    "left-right": (-1, 1, 1),
    "head first": (1, 1, -1),
}


def distance_mm(centre_zyx):
    """(z, y, x) distance of every voxel from a point, over the unmirrored spacing."""
    axes = np.ogrid[tuple(slice(n) for n in SHAPE)]
    squares = [
        ((axis - c) * s) ** 2
        for axis, c, s in zip(axes, centre_zyx, SPACING_MM, strict=True)
    ]
    return np.sqrt(sum(squares))


def volume_hu(*spheres, blur_mm=0.5, seed=0):
    """Lung in a body, with noise and spheres of (centre_zyx, radius_mm, hu)."""
    hu = np.full(SHAPE, -850.0)
    hu[:, :6] = hu[:, -6:] = hu[:, :, :4] = hu[:, :, -4:] = 40
    for centre_zyx, radius_mm, value in spheres:
        share = np.clip((radius_mm - distance_mm(centre_zyx)) / blur_mm + 0.5, 0, 1)
        hu += share * (value - hu)
    return np.rint(hu + np.random.default_rng(seed).normal(0, 20, SHAPE)).astype(
        np.int16
    )


def write_volume(path, array, signs=(1, 1, 1), compress=False):
    """Writes (k, j, i) voxels; `signs` mirror the world's x, y and z."""
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing(SPACING_MM[::-1])
    image.SetOrigin(ORIGIN_LPS_MM)
    image.SetDirection(np.diag(np.array(signs, float)).ravel().tolist())
    path.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(image, str(path), useCompression=compress)
    return image


def to_lps_mm(image, zyx):
    return image.TransformContinuousIndexToPhysicalPoint([float(v) for v in zyx[::-1]])


def write_csv(path, *rows):
    text = "".join(f"{uid},{x},{y},{z},{d}\n" for uid, (x, y, z), d in rows)
    path.write_text(HEADER + text)


@pytest.fixture
def luna(tmp_path):
    """Makes a LUNA16 folder of one volume with one sphere, and loads it."""

    def load(signs=(1, 1, 1), compress=False, array=None):
        if array is None:
            array = volume_hu((CENTRE_ZYX, RADIUS_MM, 30))
        image = write_volume(
            tmp_path / "subset3" / f"{UID}.mhd", array, signs, compress=compress
        )
        centre = to_lps_mm(image, CENTRE_ZYX)
        write_csv(tmp_path / "annotations.csv", (UID, centre, 2 * RADIUS_MM))
        (source,) = luna16.find_scans(tmp_path)
        return luna16.load_scan(source)

    return load


def dice(a, b):
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


@pytest.mark.parametrize("name", DIRECTIONS)
def test_the_mask_lies_on_the_sphere_whichever_way_the_axes_run(luna, name):
    scan = luna(DIRECTIONS[name])
    # Whatever the axes, the sphere is where the HU are, and the mask must be there.
    bright = scan.hu > -400
    bright[:, :7] = bright[:, -7:] = bright[:, :, :5] = bright[:, :, -5:] = False
    assert dice(scan.reader_bits > 0, bright) > 0.93
    assert np.array_equal(scan.nodule_labels, scan.reader_bits)
    (nodule,) = scan.nodules
    x, y, z, diameter_mm = scan.acquisition["annotated_lps_mm"][0]
    assert nodule.centre_ras_mm == pytest.approx((-x, -y, z))
    at = scan.grid.ras_mm_to_index(np.array(nodule.centre_ras_mm))
    assert at == pytest.approx(np.argwhere(bright).mean(0), abs=0.3)
    assert diameter_mm == 2 * RADIUS_MM


def test_the_mask_has_the_size_of_the_sphere(luna):
    scan = luna()
    (annotation,) = scan.nodules[0].annotations
    sphere_mm3 = 4 / 3 * np.pi * RADIUS_MM**3
    assert annotation.volume_mm3 == pytest.approx(sphere_mm3, rel=0.08)
    assert annotation.diameter_mm == pytest.approx(2 * RADIUS_MM, abs=1.0)
    assert dice(scan.reader_bits > 0, distance_mm(CENTRE_ZYX) <= RADIUS_MM) > 0.95


def test_compressed_volumes_are_the_same(luna, tmp_path):
    plain = luna()
    for path in (tmp_path / "subset3").iterdir():
        path.unlink()
    packed = luna(compress=True)
    assert (tmp_path / "subset3" / f"{UID}.zraw").is_file()
    assert np.array_equal(plain.hu, packed.hu)
    assert np.array_equal(plain.reader_bits, packed.reader_bits)


def test_a_scan_knows_its_subset_and_series(luna):
    scan = luna()
    assert (scan.subset, scan.series_uid, scan.patient_id) == ("subset3", UID, UID)


def test_the_patient_of_a_series_is_lidcs(tmp_path):
    uid, patient = lidc_database.query(
        "select series_instance_uid, patient_id from scans limit 1"
    )[0]
    write_volume(tmp_path / "subset0" / f"{uid}.mhd", volume_hu())
    (source,) = luna16.find_scans(tmp_path)
    assert source.patient_id == patient


def wand_on(*spheres, centre_zyx=CENTRE_ZYX, radius_mm=RADIUS_MM, hu=None):
    hu = volume_hu(*spheres) if hu is None else hu
    mask, box = wand.wand(hu, np.asarray(centre_zyx), 2 * radius_mm, SPACING_MM)
    whole = np.zeros(SHAPE, bool)
    whole[box] = mask
    return whole


@pytest.mark.parametrize("shift_zyx", [(0, 1.5, 0), (0, -1, 1.5), (0.5, 0, -1.5)])
def test_a_centre_that_is_a_little_off_does_not_matter(shift_zyx):
    mask = wand_on((CENTRE_ZYX, RADIUS_MM, 30), centre_zyx=CENTRE_ZYX + shift_zyx)
    assert dice(mask, distance_mm(CENTRE_ZYX) <= RADIUS_MM) > 0.9


def test_ground_glass_is_found():
    mask = wand_on((CENTRE_ZYX, RADIUS_MM, -600))
    assert dice(mask, distance_mm(CENTRE_ZYX) <= RADIUS_MM) > 0.9


def test_a_nodule_at_the_pleura_does_not_run_into_the_wall():
    centre = np.array([14.0, 8.0, 40.0])  # two rows below the wall of 40 HU
    mask = wand_on((centre, 5.0, 30), centre_zyx=centre, radius_mm=5.0)
    ball = distance_mm(centre) <= 5.0
    assert dice(mask, ball) > 0.85
    assert np.count_nonzero(mask & ~ball) < 0.15 * ball.sum()


def test_an_oval_nodule_is_followed_beyond_the_sphere():
    y, x = np.ogrid[: SHAPE[1], : SHAPE[2]]
    hu = volume_hu()
    oval = np.zeros(SHAPE, bool)
    oval[10:18] = ((y - 36) * 0.8 / 5) ** 2 + ((x - 40) * 0.8 / 8.5) ** 2 <= 1
    hu[oval] = 30
    radius_mm = (oval.sum() * np.prod(SPACING_MM) * 3 / 4 / np.pi) ** (1 / 3)
    centre = np.array([13.5, 36, 40])
    ball = distance_mm(centre) <= radius_mm
    mask = wand_on(hu=hu, centre_zyx=centre, radius_mm=radius_mm)
    assert dice(mask, oval) > 0.88
    assert dice(mask, oval) > dice(ball, oval) + 0.05


@pytest.mark.parametrize("radius_mm", [0.3, 1.5])
def test_the_smallest_nodule_has_a_voxel(radius_mm):
    mask = wand_on((CENTRE_ZYX, radius_mm, 30), radius_mm=radius_mm)
    assert mask[14, 31, 25]
    assert np.count_nonzero(mask) < 40


def test_a_nodule_in_the_corner_of_the_volume_stays_inside():
    mask = wand_on(centre_zyx=(0, 0, 0), radius_mm=6.0)
    assert mask[0, 0, 0]


def test_scans_without_a_row_were_read_and_have_none(luna, tmp_path):
    luna()
    write_volume(tmp_path / "subset0" / "1.2.3.mhd", volume_hu())
    first = next(s for s in luna16.find_scans(tmp_path) if s.scan_id == "1.2.3")
    scan = luna16.load_scan(first)
    assert scan.nodules == () and not scan.reader_bits.any()


def test_without_the_list_nothing_is_known_of_nodules(tmp_path):
    write_volume(tmp_path / f"{UID}.mhd", volume_hu())
    (source,) = luna16.find_scans(tmp_path)
    scan = luna16.load_scan(source)
    assert scan.reader_bits is None and scan.subset == ""


def test_excluded_findings_are_kept_and_have_no_mask(luna, tmp_path):
    write_csv(
        tmp_path / "annotations_excluded.csv",
        ("other", (0, 0, 0), 4.0),
        (UID, (1.5, 2.5, -50.0), -1.0),
    )
    scan = luna()
    assert scan.acquisition["excluded_lps_mm"] == [[1.5, 2.5, -50.0, -1.0]]
    assert [n.label for n in scan.nodules] == [1]


@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, -1, 1)])
def test_lung_sides_are_told_by_where_they_lie(luna, tmp_path, signs):
    lungs = np.zeros(SHAPE, np.uint8)
    lungs[5:25, 20:50, 10:30] = 3
    lungs[5:25, 20:50, 45:70] = 4
    lungs[5:25, 30:34, 36:40] = 5
    write_volume(tmp_path / "seg-lungs-LUNA16" / f"{UID}.mhd", lungs, signs)
    scan = luna(signs)
    x = np.arange(SHAPE[2])
    columns = {
        side: np.count_nonzero(scan.lung == side, axis=(0, 1)) for side in (RIGHT, LEFT)
    }
    # x rises to the patient's left.
    centres = [columns[side] @ x / columns[side].sum() for side in (RIGHT, LEFT)]
    assert centres[0] < centres[1]
    assert np.count_nonzero(scan.lung) == 20 * 30 * (20 + 25)


def test_an_unknown_lung_value_is_refused(luna, tmp_path):
    lungs = np.full(SHAPE, 7, np.uint8)
    write_volume(tmp_path / "seg-lungs-LUNA16" / f"{UID}.mhd", lungs)
    with pytest.raises(ScanError, match=r"values \[7\]; expected 0, 3 and 4"):
        luna()


def test_one_lung_alone_is_refused(luna, tmp_path):
    lungs = np.zeros(SHAPE, np.uint8)
    lungs[5:9] = 3
    write_volume(tmp_path / "seg-lungs-LUNA16" / f"{UID}.mhd", lungs)
    with pytest.raises(ScanError, match=r"lung labels \[3\]; expected both"):
        luna()


def test_a_nodule_outside_the_volume_is_refused(luna, tmp_path):
    luna()
    write_csv(tmp_path / "annotations.csv", (UID, (500, 0, 0), 5.0))
    (source,) = luna16.find_scans(tmp_path)
    with pytest.raises(ScanError, match=r"annotations\.csv has a nodule at .500\.0"):
        luna16.load_scan(source)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (f"{UID},1,2,three,5", r"line 2: .*'three'.*; expected four numbers"),
        (f"{UID},1,2", r"line 2: .*None.*; expected four numbers"),
        (f"{UID},-10,-10,-50,-1", "nodule of diameter -1 mm; expected above 0"),
    ],
)
def test_a_bad_row_is_named(luna, tmp_path, row, message):
    luna()
    (tmp_path / "annotations.csv").write_text(f"{HEADER}{row}\n")
    (source,) = luna16.find_scans(tmp_path)
    with pytest.raises(ScanError, match=message):
        luna16.load_scan(source)


def test_two_lists_of_one_name_must_say_the_same(luna, tmp_path):
    scan = luna()
    first = tmp_path / "annotations.csv"
    other = tmp_path / "evaluationScript/annotations/annotations.csv"
    other.parent.mkdir(parents=True)
    other.write_bytes(first.read_bytes().replace(b"\n", b"\r\n"))
    (source,) = luna16.find_scans(tmp_path)
    assert luna16.load_scan(source).nodules == scan.nodules
    write_csv(other)
    with pytest.raises(ValueError, match=r"annotations\.csv differ; expected one list"):
        luna16.find_scans(tmp_path)


def test_files_that_another_system_left_are_passed_over(luna, tmp_path):
    luna()
    (tmp_path / "subset3" / f"._{UID}.mhd").write_bytes(b"")
    assert len(luna16.find_scans(tmp_path)) == 1


def test_a_list_with_other_columns_is_refused(luna, tmp_path):
    luna()
    (tmp_path / "annotations.csv").write_text("seriesuid,x,y,z,diameter_mm\n")
    with pytest.raises(ValueError, match="no column coordX, coordY, coordZ; expected"):
        luna16.find_scans(tmp_path)


def test_a_series_that_lies_there_twice_is_refused(luna, tmp_path):
    luna()
    write_volume(tmp_path / "subset4" / f"{UID}.mhd", volume_hu())
    with pytest.raises(ValueError, match="is also in .*subset3"):
        luna16.find_scans(tmp_path)


def test_a_folder_without_volumes_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no \.mhd volume"):
        luna16.find_scans(tmp_path)


@pytest.fixture(scope="module", params=["LIDC-IDRI-0001", "LIDC-IDRI-0003"])
def real(request, tmp_path_factory):
    """A real scan as DICOM, and written as LUNA16 has it."""
    if not (LIDC_DIR / request.param).is_dir():
        pytest.skip(f"{LIDC_DIR} is absent; set LUNG_DATA to the folder of real scans")
    (source,) = lidc.find_scans(LIDC_DIR / request.param)
    scan = lidc.load_scan(source)
    folder = tmp_path_factory.mktemp("luna")
    image = SimpleITK.GetImageFromArray(scan.hu)
    image.SetSpacing(scan.spacing_mm[::-1])
    x, y, z = scan.grid.affine[:3, 3].tolist()
    image.SetOrigin((-x, -y, z))
    path = folder / "subset0" / f"{scan.series_uid}.mhd"
    path.parent.mkdir()
    SimpleITK.WriteImage(image, str(path))
    rows = []
    for nodule in scan.nodules:
        if nodule.readers >= 3:
            volume = np.mean([a.volume_mm3 for a in nodule.annotations])
            x, y, z = nodule.centre_ras_mm
            rows.append((scan.series_uid, (-x, -y, z), (6 * volume / np.pi) ** (1 / 3)))
    write_csv(folder / "annotations.csv", *rows)
    return scan, folder


@pytest.mark.lidc
def test_real_outlines_are_the_same_from_either_source(real):
    scan, folder = real
    (source,) = luna16.find_scans(folder)
    luna = luna16.load_scan(source)
    assert (luna.patient_id, luna.subset) == (scan.patient_id, "subset0")
    assert np.array_equal(luna.hu, scan.hu)
    kept = [nodule for nodule in scan.nodules if nodule.readers >= 3]
    assert luna.acquisition["nodules_from_outlines"] == len(kept) == len(luna.nodules)
    for label, nodule in enumerate(kept, start=1):
        there = luna.nodule_labels == label
        assert np.array_equal(there, scan.nodule_labels == nodule.label)
        assert np.array_equal(luna.reader_bits[there], scan.reader_bits[there])
        assert luna.nodules[label - 1].annotations[0].reader == 0
        assert luna.nodules[label - 1].readers == nodule.readers
    assert not luna.reader_bits[luna.nodule_labels == 0].any()


def test_outlines_that_do_not_fit_the_volume_give_way_to_the_edge_search(
    luna, tmp_path, caplog
):
    luna()
    uid = lidc_database.query("select series_instance_uid from scans where id = 12")[0][
        0
    ]
    for path in (tmp_path / "subset3").iterdir():
        path.write_bytes(path.read_bytes().replace(UID.encode(), uid.encode()))
        path.rename(path.with_name(path.name.replace(UID, uid)))
    lists = tmp_path / "annotations.csv"
    lists.write_text(lists.read_text().replace(UID, uid))
    (source,) = luna16.find_scans(tmp_path)
    scan = luna16.load_scan(source)
    assert "finding its nodules by edge search" in caplog.text
    assert scan.acquisition["nodules_from_outlines"] == 0
    assert dice(scan.reader_bits > 0, distance_mm(CENTRE_ZYX) <= RADIUS_MM) > 0.95


@pytest.mark.lidc
def test_the_wand_comes_near_the_readers_on_real_nodules(real):
    """Two readers of LIDC-IDRI agree with a Dice of 0.755 on average."""
    scan, folder = real
    agreed = consensus(
        scan.reader_bits, scan.nodule_labels, readers_of_label(scan.nodules), level=0.5
    )
    rows = luna16.read_rows(folder / "annotations.csv", scan.series_uid)
    kept = [nodule for nodule in scan.nodules if nodule.readers >= 3]
    for row, nodule in zip(rows, kept, strict=True):
        centre = luna16.checked_centre(row, scan)
        mask, box = wand.wand(scan.hu, centre, row.diameter_mm, scan.spacing_mm)
        reference = agreed & (scan.nodule_labels == nodule.label)
        assert np.count_nonzero(reference) == np.count_nonzero(reference[box])
        assert dice(mask, reference[box]) > 0.85
