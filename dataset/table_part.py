"""Makes a scan's part of the table: chosen slices, their records, resampled volumes."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

import config
from ct import fingerprint, resample
from ct.scan import AIR_HU, VOLUMES, Scan, ScanError
from dataset.slice_table import NODULE, ROW, SCAN, content_sha256, text_sha256

log = logging.getLogger(__name__)

HEALTHY_SLICES = 11
"""Number of nodule slices assumed, with `slices=nodule`, for a scan without nodules when
negatives are drawn: the median of the 883 LIDC-IDRI scans with a nodule."""


@dataclass(frozen=True, eq=False)
class Part:
    """Part of the table for one scan, in memory.

    Attributes:
        scan: (1,) `SCAN` record.
        rows: (rows,) `ROW` records.
        nodules: (nodules,) `NODULE` records.
        slices: (rows, y, x) slices by name.
        volumes: (z, y, x) resampled volumes by name; empty if none are stored.
        volume_affine: (4, 4) affine of the volumes, array index -> RAS mm.
    """

    scan: np.ndarray
    rows: np.ndarray
    nodules: np.ndarray
    slices: dict[str, np.ndarray]
    volumes: dict[str, np.ndarray]
    volume_affine: np.ndarray

    def arrays(self) -> Iterator[np.ndarray]:
        """Yields all arrays in the order of `SliceTable.checksum`."""
        yield from self.slices.values()
        if self.volumes:
            yield self.volume_affine
            yield from self.volumes.values()


def make_part(scan: Scan, settings: config.Table, source_sha256: str) -> Part:
    """Makes the part of the table for a scan.

    Raises:
        ScanError: If the scan lacks a mask that `settings.slices` needs, or has an id that
            is too long for the table.
    """
    volumes = {
        "hu": scan.hu,
        **{
            name: getattr(scan, name)
            if getattr(scan, name) is not None
            else np.broadcast_to(np.uint8(0), scan.hu.shape)
            for name in VOLUMES[1:]
        },
    }
    fitted = {
        name: fit(volumes[name], settings.size_px, fill=0) for name in VOLUMES[1:]
    }
    lung_px = np.count_nonzero(fitted["lung"], axis=(1, 2))
    nodule_px = np.count_nonzero(fitted["reader_bits"], axis=(1, 2))
    chosen = choose_slices(scan, lung_px, nodule_px, settings)
    rows = np.zeros(len(chosen), ROW)
    rows["z"], rows["z_mm"] = chosen, _z_mm(scan, chosen)
    rows["lung_px"], rows["nodule_px"] = lung_px[chosen], nodule_px[chosen]
    # Patches have their own intensity scale, far above the HU of air.
    beyond = AIR_HU if scan.whole else int(scan.hu.min())
    slices = {"hu": fit(scan.hu[chosen], settings.size_px, fill=beyond)}
    slices |= {name: masks[chosen] for name, masks in fitted.items()}
    cut_px = int(np.count_nonzero(volumes["reader_bits"]) - nodule_px.sum())
    if cut_px:
        log.warning(
            "scan %s: %d px that readers marked lie outside the slice size of %s px",
            scan.scan_id,
            cut_px,
            settings.size_px,
        )
    resampled, affine = _volumes(scan, volumes, settings.volume_spacing_mm)
    part = Part(
        _scan_record(scan, settings, len(rows), cut_px, source_sha256),
        rows,
        _nodule_records(scan),
        slices,
        resampled,
        affine,
    )
    part.scan["sha256"] = content_sha256((part.scan, rows, part.nodules), part.arrays())
    return part


def choose_slices(
    scan: Scan, lung_px: np.ndarray, nodule_px: np.ndarray, settings: config.Table
) -> np.ndarray:
    """Chooses the slices of a scan that go into the table.

    With `slices=nodule`, negatives are drawn among the slices with lung and without
    nodule. The draw depends on the seed and the scan's id alone, not on the cohort or on
    the order of the scans.

    Args:
        scan: The scan; `lung` or `reader_bits` may be missing.
        lung_px: (z,) lung pixels per slice.
        nodule_px: (z,) pixels per slice that any reader marked.
        settings: Settings of the choice.

    Returns:
        Sorted z indices.

    Raises:
        ScanError: If a mask that the choice needs is missing.
    """
    if settings.slices == "all":
        return np.arange(len(lung_px))
    if settings.slices == "none":
        return np.arange(0)
    if scan.lung is None:
        raise ScanError(
            f"scan {scan.scan_id} has no lung mask, which table.slices={settings.slices} "
            "needs; run preprocess.py again, or use --table.slices all"
        )
    if settings.slices == "lung":
        return np.flatnonzero(lung_px)
    if scan.reader_bits is None:
        raise ScanError(
            f"scan {scan.scan_id} has no nodule masks, which table.slices=nodule needs to "
            "choose training slices; segment it with infer.py --input, or store all slices "
            "with lung with --table.slices lung"
        )
    with_nodule = np.flatnonzero(nodule_px)
    negatives = np.flatnonzero((lung_px > 0) & (nodule_px == 0))
    ratio = settings.negatives_per_nodule_slice
    wanted = round(ratio * (len(with_nodule) or HEALTHY_SLICES))
    rng = np.random.default_rng(
        (settings.seed, int(text_sha256(scan.scan_id)[:16], 16))
    )
    drawn = rng.choice(negatives, min(wanted, len(negatives)), replace=False)
    return np.sort(np.concatenate((with_nodule, drawn)))


def offset_px(shape_px: Sequence[int], size_px: Sequence[int]) -> tuple[int, int]:
    """Computes the offset of an image in one of another size with the same centre.

    Args:
        shape_px: (y, x) size of the image.
        size_px: (y, x) size that it is padded or cut to.

    Returns:
        (y, x) position of pixel (0, 0), negative where the image is cut. An odd pixel is
        added or cut at the end.
    """
    y, x = (
        int((size - full) / 2) for full, size in zip(shape_px, size_px, strict=True)
    )
    return y, x


def fit(images: np.ndarray, size_px: tuple[int, int], *, fill: int) -> np.ndarray:
    """Pads or cuts images to `size_px` around their centre.

    Args:
        images: (z, y, x) images.
        size_px: (y, x) size.
        fill: Value of the padding.

    Returns:
        (z, y, x); `images` itself if it already has that size.
    """
    if images.shape[1:] == tuple(size_px):
        return images
    target, source = [slice(None)], [slice(None)]
    offsets = offset_px(images.shape[1:], size_px)
    for full, size, offset in zip(images.shape[1:], size_px, offsets, strict=True):
        length = min(full, size)
        target.append(slice(max(offset, 0), max(offset, 0) + length))
        source.append(slice(max(-offset, 0), max(-offset, 0) + length))
    fitted = np.full((len(images), *size_px), fill, images.dtype)
    fitted[tuple(target)] = images[tuple(source)]
    return fitted


def _z_mm(scan: Scan, z: np.ndarray) -> np.ndarray:
    """Returns the RAS z in mm of the centre of each slice."""
    _, height, width = scan.hu.shape
    centre = [(height - 1) / 2, (width - 1) / 2]
    index = np.column_stack((z, np.broadcast_to(centre, (len(z), 2))))
    return scan.grid.index_to_ras_mm(index)[:, 2]


def _scan_record(
    scan: Scan, settings: config.Table, rows: int, cut_px: int, source_sha256: str
) -> np.ndarray:
    record = np.zeros(1, SCAN)
    for name in ("scan_id", "patient_id", "series_uid", "subset"):
        text = getattr(scan, name).encode()
        if len(text) > SCAN[name].itemsize:
            raise ScanError(
                f"scan {scan.scan_id}: its {name} has {len(text)} bytes; the table "
                f"holds {SCAN[name].itemsize}"
            )
        record[name] = text
    record["spacing_mm"], record["affine"] = scan.spacing_mm, scan.grid.affine
    record["shape"] = scan.hu.shape
    record["offset_px"] = offset_px(scan.hu.shape[1:], settings.size_px)
    record["rows"], record["cut_px"] = rows, cut_px
    record["read"] = scan.reader_bits is not None
    record["has_lung"] = scan.lung is not None
    record["source_sha256"] = source_sha256
    record["hu_sha256"] = fingerprint.hu_sha256(scan.hu)
    return record


def _nodule_records(scan: Scan) -> np.ndarray:
    records = np.zeros(len(scan.nodules), NODULE)
    for record, nodule in zip(records, scan.nodules, strict=True):
        record["label"], record["readers"] = nodule.label, nodule.readers
        record["diameter_mm"] = nodule.diameter_mm
        record["volume_mm3"] = np.mean([a.volume_mm3 for a in nodule.annotations])
        record["centre_ras_mm"] = nodule.centre_ras_mm
        for name in ("subtlety", "malignancy"):
            rated = [a for a in nodule.annotations if name in a.characteristics]
            ratings = [a.characteristics[name] for a in rated]
            record[name] = np.mean(ratings) if ratings else np.nan
    return records


def _volumes(
    scan: Scan, volumes: Mapping[str, np.ndarray], spacing_mm: float
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Resamples the volumes; returns them by name with their affine, none if spacing is 0."""
    if not spacing_mm:
        return {}, np.eye(4)
    weights, affine = resample.isotropic(scan.grid, spacing_mm)
    bits, labels = resample.nodules(
        volumes["reader_bits"], volumes["nodule_labels"], weights
    )
    resampled = {
        "hu": np.rint(resample.volume(scan.hu, weights)).astype(np.int16),
        "lung": resample.labels(volumes["lung"], weights),
        "reader_bits": bits,
        "nodule_labels": labels,
    }
    return resampled, affine
