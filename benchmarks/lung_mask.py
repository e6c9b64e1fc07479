"""Slice rule against scikit-learn and scikit-image, and the time from file to lung mask.

    python -m benchmarks.lung_mask [--data ../shared/data/LIDC-IDRI]

Both masks of a slice are made one after the other in one process, so that their ratio holds on
a busy machine. If there are no real scans, a phantom is measured.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

import config
from cohorts import lidc
from ct.scan import Scan
from lungs import classical, slice_rule
from metrics import overlap
from phantoms import chest, write


@dataclass(frozen=True)
class Arguments:
    data: Path = Path("../shared/data/LIDC-IDRI")
    """Folder of LIDC-IDRI scans; a phantom is used if it is missing."""
    every: int = 4
    """Step between the slices that are measured."""


def plain_slice_rule(image_hu: np.ndarray) -> tuple[np.ndarray, float]:
    """Computes mask and threshold (HU) of the thesis' rule with scikit-learn and -image."""
    from skimage import measure, morphology
    from sklearn.cluster import KMeans

    image = image_hu.astype(np.float64)
    mean, sd = image.mean(), image.std()
    image = (image - mean) / sd
    middle = image[100:400, 100:400]
    low, high = image.min(), image.max()
    fill = middle.mean()
    image = np.where((image == low) | (image == high), fill, image)
    values = image[100:400, 100:400].reshape(-1, 1)
    centres = KMeans(n_clusters=2, random_state=0).fit(values).cluster_centers_
    threshold = centres.mean()
    air = image < threshold
    opened = morphology.dilation(
        morphology.erosion(air, np.ones((4, 4))), np.ones((10, 10))
    )
    labels = measure.label(opened)
    mask = np.zeros(air.shape, bool)
    for region in measure.regionprops(labels):
        top, left, bottom, right = region.bbox
        if bottom - top < 475 and right - left < 475 and top > 40 and bottom < 472:
            mask |= labels == region.label
    grown = morphology.dilation(mask, np.ones((10, 10)))
    return grown, float(threshold * sd + mean)


def read(data: Path) -> tuple[Scan, float]:
    """Returns the scan to measure, and the seconds it took to read it."""
    if data.is_dir():
        source = min(lidc.find_scans(data), key=lambda item: item.patient_id)
        started = time.perf_counter()
        return lidc.load_scan(source), time.perf_counter() - started
    return write.to_scan(chest.make_phantom(1)), float("nan")


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    scan, read_s = read(arguments.data)
    plain_s, ours_s, same, others = 0.0, 0.0, [], []
    for image in scan.hu[:: arguments.every]:
        started = time.perf_counter()
        plain, plain_threshold = plain_slice_rule(image)
        between = time.perf_counter()
        ours = slice_rule.slice_rule(image)
        ours_s += time.perf_counter() - between
        plain_s += between - started
        agree = abs(plain_threshold - slice_rule.slice_threshold(image)) < 10
        dice = overlap.dice(plain, ours)
        (same if agree else others).append(dice)
    slices = len(same) + len(others)
    print(f"scan {scan.patient_id}, {slices} of {len(scan.hu)} slices, one thread each")
    print(f"scikit-learn + scikit-image  {1000 * plain_s / slices:8.1f} ms per slice")
    print(f"lungs.slice_rule             {1000 * ours_s / slices:8.2f} ms per slice")
    print(f"ratio                        {plain_s / ours_s:8.1f}")
    print(
        f"thresholds within 10 HU in {len(same)} slices, Dice there: mean "
        f"{np.nanmean(same):.4f}, minimum {np.nanmin(same):.4f}"
    )
    if others:
        print(f"other thresholds in {len(others)} slices, Dice: {np.round(others, 3)}")
    deep = np.concatenate([scan.hu, scan.hu[::-1]])[:260]
    started = time.perf_counter()
    classical.segment_lungs(deep, scan.spacing_mm, config.LungMask())
    clean_s = time.perf_counter() - started
    reading = read_s * len(deep) / len(scan.hu)
    print(
        f"{len(deep)} slices (the scan and its mirror image): reading {reading:.2f} s "
        f"(scaled), cleaned mask {clean_s:.2f} s, total {reading + clean_s:.2f} s"
    )


if __name__ == "__main__":
    main()
