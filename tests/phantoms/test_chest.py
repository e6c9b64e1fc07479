"""Phantoms are what they say: sizes, places and densities, readers, noise, and files.

One small phantom is made for the module; its seed gives nodules of every kind and site,
a round field of view, and pixels stored as run lengths.
"""

import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from cohorts import lidc
from ct import files, geometry
from ct.geometry import Grid
from ct.scan import AIR_HU, LEFT, RIGHT, Scan, read_scan
from metrics.overlap import dice
from nodules import shapes
from nodules.outlines import READERS, diameter_mm, fill_outline
from phantoms import anatomy, chest, dicom_series, drawn_nodules, render, write
from phantoms.settings import KERNELS, Settings

ROOT = Path(__file__).parents[2]
SEED = 62
SETTINGS = Settings(
    size_px=192, slice_spacing_mm=5.0, nodules=(6, 6), diameter_mm=(10.0, 24.0)
)
SPACING_MM = (2.5, 0.75, 0.75)


@dataclass(frozen=True, eq=False)
class Written:
    made: chest.Phantom
    out: Path
    read: Scan
    truth: Scan

    @property
    def grid(self) -> Grid:
        return self.made.grid

    def hu_around(self, point_xyz, radius_mm):
        """HU of the voxels near a point of the anatomy, within one slice."""
        x, y, z = point_xyz
        at = self.grid.ras_mm_to_index(np.array([-x, -y, z]))
        _, rows, columns = np.ogrid[tuple(slice(n) for n in self.grid.shape)]
        away_mm = np.hypot(rows - at[1], columns - at[2]) * self.grid.spacing_mm[1]
        return self.made.hu[round(at[0])][away_mm[0] <= radius_mm]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The phantom, its folder, the scan read from its DICOM and XML, and its truth."""
    out = tmp_path_factory.mktemp("phantoms")
    made = chest.make_phantom(SEED, SETTINGS)
    write.write_phantom(made, out)
    (source,) = lidc.find_scans(out)
    truth = read_scan(write.truth_path(out, made.series_uid))
    return Written(made, out, lidc.load_scan(source), truth)


# --- sizes --------------------------------------------------------------------------


def nodule_of(diameter, rng, **changes):
    nodule = drawn_nodules.PlacedNodule(
        label=1,
        kind="solid",
        site="isolated",
        centre_xyz=rng.uniform(-1, 1, 3),
        diameter_mm=diameter,
        shape=shapes.draw_shape(rng, diameter),
        hu=20.0,
        haze_hu=-600.0,
        core=1.0,
    )
    return replace(nodule, **changes)


def fine_mesh(half_mm=40.0):
    return geometry.mesh_from_axes(
        *(np.arange(-half_mm, half_mm, step) for step in SPACING_MM)
    )


def beside_wall(mesh, away_mm, box):
    """Field of a wall whose surface is `away_mm` to the left."""
    part = mesh.part(box)
    return np.broadcast_to(part.x - np.float32(away_mm), part.shape)


@pytest.mark.parametrize("room", [9.0, 0.2])
def test_nodules_are_painted_as_large_as_asked_for(room):
    """24 shapes, free or cut by a wall `room` diameters beside their middle."""
    rng = np.random.default_rng(5)
    mesh = fine_mesh()
    for asked_mm in [4.0] * 6 + [5.0] * 6 + [8.0, 12.0, 15.0, 20.0] * 3:
        fit = drawn_nodules.fit_nodule(
            nodule_of(asked_mm, rng),
            mesh,
            partial(beside_wall, mesh, room * asked_mm),
            rng,
            smallest_mm=4.0,
        )
        assert fit is not None
        nodule, box = fit
        field_mm, _, _ = drawn_nodules.paint_nodule(
            nodule, mesh.part(box), beside_wall(mesh, room * asked_mm, box), rng
        )
        painted_mm = diameter_mm(field_mm < 0, SPACING_MM)
        assert max(0.9 * asked_mm, 4.0) <= painted_mm <= 1.1 * asked_mm


def test_a_nodule_that_cannot_have_its_size_is_refused():
    """Within a pipe 3 mm wide there is no room for 15 mm."""
    rng = np.random.default_rng(0)
    mesh = fine_mesh()

    def limit_at(box):
        part = mesh.part(box)
        return np.broadcast_to(np.hypot(part.x, part.y) - 1.5, part.shape)

    nodule = nodule_of(15.0, rng)
    assert (
        drawn_nodules.fit_nodule(nodule, mesh, limit_at, rng, smallest_mm=4.0) is None
    )


def test_no_nodule_of_the_truth_is_missing_or_of_another_size(written):
    made, truth = written.made, written.truth
    assert len(made.nodules) == 6
    labels = [nodule.label for nodule in made.nodules]
    assert labels == list(range(1, len(labels) + 1))
    assert [nodule.label for nodule in truth.nodules] == labels
    assert [record["label"] for record in truth.acquisition["nodules"]] == labels
    half_pixel_mm = made.grid.spacing_mm[2] / 2
    for asked, painted in zip(made.nodules, truth.nodules, strict=True):
        got_mm = painted.annotations[0].diameter_mm
        slack_mm = max(0.1 * asked.diameter_mm, half_pixel_mm) + 1e-3
        assert abs(got_mm - asked.diameter_mm) <= slack_mm
        assert got_mm >= SETTINGS.diameter_mm[0] - 1e-3
        inside = truth.nodule_labels == asked.label
        assert got_mm == pytest.approx(diameter_mm(inside, made.grid.spacing_mm))
        assert painted.annotations[0].volume_mm3 == pytest.approx(
            inside.sum() * made.grid.voxel_mm3
        )
        centre = made.grid.index_to_ras_mm(np.argwhere(inside).mean(0))
        assert painted.centre_ras_mm == pytest.approx(centre)


# --- what the picture shows ---------------------------------------------------------


def test_nodules_lie_in_one_lung_and_as_near_to_the_pleura_as_their_site_says(written):
    """At the pleura, no deeper than 0.75 radii; elsewhere, deeper than a radius."""
    made = written.made
    depth_mm = ndimage.distance_transform_edt(made.lung > 0, made.grid.spacing_mm)
    slack_mm = drawn_nodules.WALL_MM + made.grid.spacing_mm[2]
    for nodule in made.nodules:
        inside = made.nodule_labels == nodule.label
        assert np.unique(made.lung[inside]).tolist() in ([RIGHT], [LEFT])
        x, y, z = nodule.centre_xyz
        at = made.grid.ras_mm_to_index(np.array([-x, -y, z])).round().astype(int)
        radius_mm = nodule.diameter_mm / 2
        if nodule.site == "juxtapleural":
            assert depth_mm[tuple(at)] <= 0.75 * radius_mm + slack_mm
            assert depth_mm[inside].min() <= 2 * made.grid.spacing_mm[2] + 0.1
        else:
            assert depth_mm[tuple(at)] >= radius_mm - slack_mm


def test_nodules_have_the_density_of_their_kind(written):
    """Away from its border, and as the median, for vessels run through nodules."""
    made = written.made
    kinds = set()
    for nodule in made.nodules:
        inside = made.nodule_labels == nodule.label
        deep = ndimage.binary_erosion(inside, np.ones((1, 3, 3), bool))
        hu = np.median(made.hu[deep])
        kinds.add(nodule.kind)
        if nodule.kind == "solid":
            assert -10 <= nodule.hu <= 70 or 220 <= nodule.hu <= 480
            assert abs(hu - nodule.hu) < 60
        else:
            lung_hu = np.median(made.hu[(made.lung > 0) & (made.nodule_labels == 0)])
            assert 100 < nodule.haze_hu - lung_hu < 400
            assert lung_hu + 60 < hu < -100
        if nodule.kind == "part-solid":
            middle = ndimage.distance_transform_edt(inside, made.grid.spacing_mm)
            core_hu = np.median(made.hu[middle > 0.8 * middle.max()])
            assert core_hu > nodule.haze_hu + 150
    assert kinds == set(shapes.KINDS)


def test_lung_bone_and_air_have_their_densities(written):
    made = written.made
    body = made.body
    lung = (made.lung > 0) & (made.nodule_labels == 0)
    assert abs(np.median(made.hu[lung]) - body.parenchyma_hu) < 40
    heights = np.linspace(0.2, 0.8, 30) * body.lung_height
    spine = np.concatenate(
        [written.hu_around((0, anatomy._spine_y(body, z), z), 8) for z in heights]
    )
    assert 85 < np.median(spine) < 420  # discs and marrow to the cortical shell
    trachea = written.hu_around((0, 8, 0.85 * body.lung_height), 4)
    assert np.median(trachea) == pytest.approx(-990, abs=30)
    corners = made.hu[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners < -900).all()
    assert made.outside_fov is not None
    assert (made.hu[:, made.outside_fov] == AIR_HU).all()
    assert made.hu.max() > 300
    assert 2500e3 < lung.sum() * made.grid.voxel_mm3 < 8000e3  # mm3: 2.5 to 8 litres


def neighbours_agree(noise, pixels):
    """Correlation between pixels that many columns apart."""
    return np.corrcoef(noise[:, pixels:].ravel(), noise[:, :-pixels].ravel())[0, 1]


def noise_of(kernel, pixel_mm):
    """Noise of 20 HU where everything absorbs alike."""
    flat = np.ones((384, 384), np.float32)
    grain = render._Grain(kernel, pixel_mm, 20.0, flat, np.zeros(1))
    return grain.at(0, np.random.default_rng(0))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_noise_is_correlated_and_band_passed(kernel):
    """White noise of as many pixels stays below 0.01, at any distance."""
    noise = noise_of(kernel, 0.7)
    assert noise.std() == pytest.approx(20, rel=0.01)
    assert neighbours_agree(noise, 1) > 0.1
    assert neighbours_agree(noise, round(2 * kernel.grain_mm[1] / 0.7)) < -0.005


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_noise_is_the_difference_of_its_kernels_gaussians(kernel):
    """Its correlation by hand, on pixels fine enough for the integral to hold."""
    pixel_mm = 0.3
    a, b = (sigma / pixel_mm for sigma in kernel.grain_mm)
    terms = ((1, 2 * a**2), (-2 * 0.85, a**2 + b**2), (0.85**2, 2 * b**2))
    here, beside = (
        sum(w * np.exp(-(away**2) / (2 * v)) / v for w, v in terms) for away in (0, 1)
    )
    noise = noise_of(kernel, pixel_mm)
    assert neighbours_agree(noise, 1) == pytest.approx(beside / here, abs=0.03)


# --- readers ------------------------------------------------------------------------


def test_readers_disagree_and_their_consensus_is_near_the_truth():
    """Two readers agree as LIDC's do: mean Dice 0.75 where three or more outlined."""
    rng = np.random.default_rng(2)
    mesh = fine_mesh()
    of_pairs, of_consensus = [], []
    for asked_mm in rng.uniform(6, 24, 24).tolist():
        nodule = nodule_of(asked_mm, rng)
        part = mesh.part(nodule.box(mesh))
        free = np.full(part.shape, -50, np.float32)
        readings = dict(drawn_nodules.read_nodule(nodule, free, part, rng))
        masks = [mask for mask in readings.values() if mask.any()]
        if len(masks) < 3:
            continue
        of_pairs += [dice(a, b) for a, b in combinations(masks, 2)]
        agreed = np.sum(masks, 0) >= len(masks) / 2
        of_consensus.append(dice(agreed, nodule.field(part) < 0))
    assert len(of_consensus) >= 18
    assert max(of_pairs) < 1
    assert np.mean(of_pairs) == pytest.approx(0.75, abs=0.05)
    assert np.mean(of_consensus) > 0.8


def test_readers_of_a_phantom_differ_and_mark_its_nodules(written):
    read, truth = written.read, written.truth
    masks = [read.reader_bits >> reader & 1 for reader in range(READERS)]
    assert all(mask.any() for mask in masks)
    assert all((a != b).any() for a, b in combinations(masks, 2))
    for nodule in read.nodules:
        own = read.nodule_labels == nodule.label
        assert (truth.nodule_labels[own] > 0).any()


# --- files --------------------------------------------------------------------------


def test_the_written_phantom_reads_back_as_it_was_made(written):
    made, read = written.made, written.read
    assert read.scan_id == read.series_uid == made.series_uid
    assert read.patient_id == made.patient_id
    assert np.array_equal(read.hu, made.hu)
    assert read.grid.shape == made.grid.shape
    assert np.allclose(read.grid.affine, made.grid.affine, atol=1e-5)
    bits = np.zeros(made.hu.shape, np.uint8)
    for reading in made.readings:
        for z, outline in reading.outlines.items():
            inside = fill_outline(outline, made.hu.shape[1:])
            bits[z] |= inside.astype(np.uint8) << reading.reader
    assert np.array_equal(read.reader_bits, bits)
    assert len(read.nodules) == len(made.nodules)
    small = sum(mark.small_nodule for mark in made.marks)
    assert read.acquisition["small_nodules"] == small
    assert read.acquisition["non_nodules"] == len(made.marks) - small
    assert np.array_equal(written.truth.hu, made.hu)
    assert np.array_equal(written.truth.lung, made.lung)


def test_run_lengths_of_every_length_read_back(written):
    """Runs and what lies between them, shorter and longer than a packet's 128."""
    rng = np.random.default_rng(0)
    lengths = [1, 2, 3, 4, 127, 128, 129, 130, 257, 300]
    runs = [np.repeat(rng.integers(-1024, 3071), n) for n in lengths]
    mixed = [rng.integers(-1024, 3071, n) for n in lengths]
    row = np.concatenate(
        [part for pair in zip(runs, mixed, strict=True) for part in pair]
    )
    hu = np.stack([row, row[::-1], np.full_like(row, 7)]).astype(np.int16)[None]
    series = replace(
        write.to_series(written.made), hu=hu, outside_fov=None, transfer_syntax="rle"
    )
    image = dicom_series.dicom_slice(series, 0)
    assert np.array_equal(image.pixel_array + dicom_series.INTERCEPT_HU, hu[0])


def checksums(folder):
    paths = [path for path in folder.rglob("*") if path.suffix in (".dcm", ".xml")]
    return {path.relative_to(folder).name: files.sha256(path) for path in paths}


def test_a_seed_gives_the_same_bytes_in_another_process_and_another_seed_others(
    written, tmp_path
):
    command = [sys.executable, "-m", "phantoms.write", "--out", str(tmp_path)]
    command += ["--count", "2", "--seed", str(SEED - 1), "--phantom.size-px", "192"]
    command += ["--phantom.slice-spacing-mm", "5", "--phantom.nodules", "6", "6"]
    command += ["--phantom.diameter-mm", "10", "24"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    first = checksums(written.out / chest.patient_id(SEED))
    assert len(first) == len(written.made.hu) + 1
    assert checksums(tmp_path / chest.patient_id(SEED)) == first
    other = checksums(tmp_path / chest.patient_id(SEED - 1))
    assert not set(first.values()) & set(other.values())


@pytest.fixture
def copied(written, tmp_path, monkeypatch):
    """The phantom's folder to harm; making it anew is counted and costs nothing."""
    made = []

    def make(seed, settings):
        made.append(seed)
        return written.made

    monkeypatch.setattr(write, "make_phantom", make)
    write.write_phantom(written.made, tmp_path)
    return tmp_path, made


def write_again(out, **options):
    options = {"settings": SETTINGS, **options}
    return write.write_phantoms(out, 1, seed=SEED, **options)


def test_a_phantom_that_is_there_is_not_made_again(copied):
    out, made = copied
    assert "0 phantoms, 1 already there" in write_again(out).line
    assert made == []
    write_again(out, overwrite=True)
    assert made == [SEED]


@pytest.mark.parametrize("lost", ["truth", "series"])
def test_a_phantom_that_is_half_there_is_made_again(copied, written, lost):
    out, made = copied
    patient = out / chest.patient_id(SEED)
    files.remove(out / "truth" if lost == "truth" else patient)
    write_again(out)
    assert made == [SEED]
    assert checksums(patient) == checksums(written.out / patient.name)
    assert write.truth_path(out, written.made.series_uid).is_file()


def test_a_phantom_of_other_settings_is_not_taken_for_this_one(copied):
    out, made = copied
    with pytest.raises(ValueError, match="made with other settings"):
        write_again(out, settings=replace(SETTINGS, size_px=128))
    assert made == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"size_px": 31},
        {"slice_spacing_mm": 0.4},
        {"nodules": (3, 2)},
        {"diameter_mm": (2.0, 9.0)},
    ],
)
def test_settings_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is .*expected"):
        Settings(**wrong)
