"""Collections of patches: both layouts, folder and archive, and what is refused."""

import shutil
import zipfile

import cv2
import numpy as np
import pytest

from cohorts import patches
from ct.scan import ScanError

SIZE = 32


def disc(radius_px, size=SIZE):
    y, x = np.ogrid[:size, :size]
    middle = (size - 1) / 2
    return (y - middle) ** 2 + (x - middle) ** 2 <= radius_px**2


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


def index_layout(folder, *, nodules=2, readers=3, slices=2, ending=".webp"):
    """P-0, P-1, ...: reader r drew a disc of 4 + r pixels on every slice."""
    lines = ["name,patient_id,nodule,slice,readers"]
    bits = sum(disc(4 + r).astype(np.uint8) << r for r in range(readers))
    for number in range(nodules):
        for z in range(slices):
            name = f"P-{number}/nodule-0/slice-{z:03}"
            image = np.where(disc(5), 200, 20 + z).astype(np.uint8)
            write(folder / f"images/{name}.png", image)
            if ending != ".png":
                source = folder / f"images/{name}.png"
                lossless = [cv2.IMWRITE_WEBP_QUALITY, 101]
                cv2.imwrite(str(source.with_suffix(ending)), image, lossless)
                source.unlink()
            write(folder / f"reader_bits/{name}.png", bits.astype(np.uint8))
            lines.append(f"{name},P-{number},0,{z},{readers}")
    (folder / "index.csv").write_text("\n".join(lines) + "\n")
    return folder


def folder_layout(folder):
    """The same nodules as images and one mask per reader; a fourth drew nothing."""
    for number in range(2):
        nodule = folder / f"LIDC/P-{number}/nodule-0"
        for z in range(2):
            image = np.where(disc(5), 200, 20 + z).astype(np.uint8)
            write(nodule / f"images/slice-{z}.png", image)
            for r in range(4):
                mask = disc(4 + r) * (r < 3)
                write(nodule / f"mask-{r}/slice-{z}.png", mask.astype(np.uint8) * 255)
    return folder


def zipped(folder, path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(folder).as_posix())
    return path


def check(source):
    found = patches.find_scans(source)
    assert [s.scan_id for s in found] == ["P-0_nodule-0", "P-1_nodule-0"]
    assert [s.patient_id for s in found] == ["P-0", "P-1"]
    scan = patches.load_scan(found[0])
    assert scan.hu.dtype == np.int16 and scan.hu.shape == (2, SIZE, SIZE)
    assert scan.hu[1, 16, 16] == 200 and scan.hu[1, 0, 0] == 21
    for reader in range(3):
        assert np.array_equal(scan.reader_bits[0] >> reader & 1, disc(4 + reader))
    (nodule,) = scan.nodules
    assert nodule.readers == 3 and not scan.whole and scan.lung is None
    assert nodule.annotations[0].volume_mm3 == 2 * disc(4).sum()
    # The middle of 32 pixels lies between the two in the middle.
    index = scan.grid.ras_mm_to_index(np.array(nodule.centre_ras_mm))
    assert np.allclose(index, (0.5, 15.5, 15.5))


def test_both_layouts_as_folder_and_as_archive_hold_the_same(tmp_path):
    for made in (
        index_layout(tmp_path / "index"),
        index_layout(tmp_path / "png", ending=".png"),
        folder_layout(tmp_path / "folders"),
    ):
        check(made)
        check(zipped(made, tmp_path / f"{made.name}.zip"))


def test_numbers_of_slices_may_be_left_out(tmp_path):
    made = index_layout(tmp_path / "c", slices=3)
    text = (made / "index.csv").read_text().splitlines()
    (made / "index.csv").write_text("\n".join(t for t in text if "0,1,3" not in t))
    assert patches.load_scan(patches.find_scans(made)[0]).hu.shape[0] == 2


def test_colour_is_refused_and_grey_in_three_channels_is_not(tmp_path):
    made = index_layout(tmp_path / "c", ending=".png")
    path = made / "images/P-0/nodule-0/slice-000.png"
    grey = cv2.imread(str(path))
    assert grey.ndim == 3
    write(path, grey)
    assert patches.load_scan(patches.find_scans(made)[0]).hu[0, 0, 0] == 20
    grey[3, 4] = (1, 2, 3)
    write(path, grey)
    with pytest.raises(ScanError, match="colour"):
        patches.load_scan(patches.find_scans(made)[0])


def test_sixteen_bits_keep_their_order(tmp_path):
    made = index_layout(tmp_path / "c", ending=".png")
    for z in range(2):
        image = np.full((SIZE, SIZE), 65535, np.uint16)
        image[0] = 0
        write(made / f"images/P-0/nodule-0/slice-00{z}.png", image)
    scan = patches.load_scan(patches.find_scans(made)[0])
    assert (scan.hu[0, 0, 0], scan.hu[0, 9, 9]) == (-32768, 32767)


def test_what_is_wrong_is_named(tmp_path):
    good = index_layout(tmp_path / "good")

    def broken(name, change):
        folder = tmp_path / name
        shutil.copytree(good, folder)
        change(folder)
        return folder

    def edit(old, new):
        def change(folder):
            path = folder / "index.csv"
            path.write_text(path.read_text().replace(old, new))

        return change

    def load_first(folder):
        return patches.load_scan(patches.find_scans(folder)[0])

    mask = "reader_bits/P-0/nodule-0/slice-000.png"
    for name, change, message in (
        (
            "readers",
            edit("0,0,3", "0,0,2"),
            "another slice of the nodule has 2|2 readers",
        ),
        ("columns", edit("patient_id", "patient"), "no column patient_id"),
        ("evil", edit(",P-0,", ",../P-0,"), r"\.\./P-0"),
        ("missing", lambda f: (f / mask).unlink(), f"no file {mask}"),
        ("damaged", lambda f: (f / mask).write_bytes(b"no"), "is not an image"),
        ("empty", lambda f: (f / mask).write_bytes(b""), "is not an image"),
        ("size", lambda f: write(f / mask, np.zeros((8, 8), np.uint8)), "of sizes"),
        (
            "doubled",
            edit("slice-001,P-0,0,1", "slice-001,P-0,0,0"),
            "every number once",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            load_first(broken(name, change))


def test_other_readers_than_the_list_says_are_refused(tmp_path):
    made = index_layout(tmp_path / "c")
    path = made / "index.csv"
    path.write_text(path.read_text().replace(",3\n", ",4\n"))
    with pytest.raises(ScanError, match="3 readers drew on its slices; expected 4"):
        patches.load_scan(patches.find_scans(made)[0])


def test_no_collection_is_named(tmp_path):
    with pytest.raises(ValueError, match="nothing: no such path"):
        patches.find_scans(tmp_path / "nothing")
    (tmp_path / "text.zip").write_text("no archive")
    with pytest.raises(ValueError, match=r"not a \.zip .* expected a folder or"):
        patches.find_scans(tmp_path / "text.zip")
    with pytest.raises(ValueError, match="contains neither index.csv nor"):
        patches.find_scans(tmp_path)
