"""Makes chest phantoms with nodules and four readers, in the form of LIDC-IDRI.

Every phantom is a separate patient, named after its seed:

    OUT/PHANTOM-0001/STUDY_UID/SERIES_UID/*.dcm, 001.xml    CT series, readers' outlines
    OUT/truth/SERIES_UID.h5                                 scan file of the exact truth

In the scan file of the truth, `lung` is the region inside the pleura, including vessels
and nodules and excluding trachea and main bronchi; bit 0 of `reader_bits` is the true
nodule mask.

Example:
    python -m phantoms.write --out work/phantoms --count 12 --seed 1 --workers 2
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import steps
from ct import files
from ct.boxes import Box
from ct.geometry import Grid
from ct.scan import Annotation, Nodule, Scan, write_scan
from nodules import shapes
from nodules.outlines import diameter_mm, volume_mm3
from phantoms import dicom_series
from phantoms.chest import Phantom, make_phantom, patient_id, random_stream, series_uid
from phantoms.settings import FORMAT, Settings


def to_scan(phantom: Phantom) -> Scan:
    """Returns the truth as a scan: exact lungs, and the true nodules as reader 0."""
    from scipy import ndimage

    truth = phantom.nodule_labels
    return Scan(
        scan_id=phantom.series_uid,
        patient_id=phantom.patient_id,
        series_uid=phantom.series_uid,
        hu=phantom.hu,
        grid=phantom.grid,
        source_grid=phantom.grid,
        lung=phantom.lung,
        reader_bits=(truth > 0).astype(np.uint8),
        nodule_labels=truth,
        nodules=tuple(
            _nodule_record(label, truth[box] == label, box, phantom.grid)
            for label, box in enumerate(ndimage.find_objects(truth), start=1)
        ),
        acquisition={
            "kernel": phantom.kernel.name,
            "slice_thickness_mm": phantom.settings.slice_spacing_mm,
            "nodules": [
                {"label": n.label, "kind": n.kind, "site": n.site}
                for n in phantom.nodules
            ],
        },
    )


def _nodule_record(label: int, region: np.ndarray, box: Box, grid: Grid) -> Nodule:
    """Returns the true record of a nodule, measured on its mask in a box."""
    start = [span.start for span in box]
    x, y, z = grid.index_to_ras_mm(np.argwhere(region).mean(0) + start).tolist()
    reading = Annotation(
        reader=0,
        volume_mm3=volume_mm3(region, grid.voxel_mm3),
        diameter_mm=diameter_mm(region, grid.spacing_mm),
    )
    return Nodule(label, (x, y, z), (reading,))


def to_series(phantom: Phantom) -> dicom_series.PhantomSeries:
    """Returns the DICOM series of a phantom."""
    series, grid = phantom.series_uid, phantom.grid
    x, y, z = grid.affine[:3, 3].tolist()
    dz, _, dx = grid.spacing_mm
    return dicom_series.PhantomSeries(
        patient_id=phantom.patient_id,
        study_uid=dicom_series.uid(series, "study"),
        series_uid=series,
        frame_uid=dicom_series.uid(series, "frame"),
        sop_uids=tuple(
            dicom_series.uid(series, index) for index in range(len(phantom.hu))
        ),
        hu=phantom.hu,
        outside_fov=phantom.outside_fov,
        first_lps_mm=(-x, -y, z),
        pixel_mm=dx,
        slice_spacing_mm=dz,
        kernel=phantom.kernel.name,
        contrast=phantom.body.blood_hu > 100,
        transfer_syntax=transfer_syntax(phantom.seed, phantom.settings),
    )


def transfer_syntax(seed: int, settings: Settings) -> dicom_series.TransferSyntax:
    """Returns the encoding of the pixels of phantom `seed`."""
    if settings.transfer_syntax != "mixed":
        return settings.transfer_syntax
    order: tuple[dicom_series.TransferSyntax, ...] = (
        "explicit",
        "explicit",
        "jpeg-ls",
        "rle",
    )
    return order[seed % 4]


def write_phantom(phantom: Phantom, out: Path) -> None:
    """Writes a phantom's truth, DICOM series and XML below `out`.

    The patient's folder is written last, in one step: if it exists, the phantom is
    complete.
    """
    series = to_series(phantom)
    provenance = {
        "made_by": "cohorts.phantom",
        "format": FORMAT,
        "seed": phantom.seed,
        "settings": dataclasses.asdict(phantom.settings),
    }
    write_scan(to_scan(phantom), truth_path(out, phantom.series_uid), provenance)
    order = random_stream(phantom.seed, "files").permutation(len(phantom.hu)) + 1
    with files.write_atomically(out / phantom.patient_id) as folder:
        target = folder / series.study_uid / series.series_uid
        target.mkdir(parents=True)
        dicom_series.write_dicom_series(series, target, order.tolist())
        dicom_series.write_lidc_xml(
            series, phantom.readings, phantom.marks, target / f"{phantom.seed:03}.xml"
        )


def truth_path(out: Path, uid: str) -> Path:
    """Returns the path of the scan file with a phantom's truth."""
    return Path(out) / "truth" / f"{uid}.h5"


@dataclass(frozen=True)
class _Job:
    """One phantom to write."""

    seed: int
    settings: Settings
    out: Path

    @property
    def scan_id(self) -> str:
        return patient_id(self.seed)


def _write_job(job: _Job) -> int:
    write_phantom(make_phantom(job.seed, job.settings), job.out)
    return job.seed


def write_phantoms(
    out: Path,
    count: int,
    *,
    seed: int = 1,
    workers: int = 1,
    overwrite: bool = False,
    settings: Settings = Settings(),
) -> steps.Report:
    """Writes phantoms of seeds `seed` to `seed + count - 1`; keeps complete ones.

    Raises:
        ValueError: If a phantom in `out` was made with other settings and `overwrite`
            is off.
    """
    if count < 1 or seed < 0:
        raise ValueError(
            f"count is {count}, seed is {seed}; expected count >= 1 and seed >= 0"
        )
    jobs = [_Job(number, settings, Path(out)) for number in range(seed, seed + count)]
    wanted = [job for job in jobs if overwrite or not _complete(job)]
    if wanted and settings.nodules[1]:
        shapes.shape_index()
    done, failures = steps.map_scans(
        _write_job, wanted, workers=workers, label="phantoms"
    )
    line = f"wrote {out}: {len(done)} phantoms, {len(jobs) - len(wanted)} already there"
    return steps.Report(line, failures)


def _complete(job: _Job) -> bool:
    """Returns True if the phantom is complete; raises if another one has its place."""
    folder = job.out / patient_id(job.seed)
    if not folder.is_dir():
        return False
    uid = series_uid(job.seed, job.settings)
    if not any(folder.glob(f"*/{uid}")):
        raise ValueError(
            f"{folder} was made with other settings or another version; expected "
            f"series {uid}; choose another --out or add --overwrite"
        )
    return truth_path(job.out, uid).is_file()


@dataclass(frozen=True)
class Arguments:
    """Command line of `python -m phantoms.write`."""

    out: Path = Path("work/phantoms")
    """Output folder."""
    count: int = 12
    """Number of phantoms."""
    seed: int = 1
    """Seed and number of the first phantom; the others follow."""
    workers: int = 1
    """Number of processes."""
    overwrite: bool = False
    """Make existing phantoms again."""
    phantom: Settings = field(default_factory=Settings)
    """Settings of the phantoms."""


def _run(arguments: Arguments) -> steps.Report:
    return write_phantoms(
        arguments.out,
        arguments.count,
        seed=arguments.seed,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
        settings=arguments.phantom,
    )


def main(argv: Sequence[str] | None = None) -> None:
    steps.run(_run, Arguments, argv=argv)


if __name__ == "__main__":
    main()
