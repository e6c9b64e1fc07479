"""Small CT volumes, and DICOM series written from them."""

from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from ct.scan import AIR_HU

SERIES_UID = "1.2.826.0.1.3680043.8.498.1"
AXIAL = (1, 0, 0, 0, 1, 0)
SPACING_MM = (0.9, 0.7)
STEP_MM = 2.5


def chest_hu(slices=8, rows=40, columns=36, seed=0):
    """(z, y, x) int16: a body of water in air, two lungs, all of it noisy."""
    rng = np.random.default_rng(seed)
    hu = np.full((slices, rows, columns), -1000.0)
    hu[:, 5:35, 3:33] = 40
    hu[:, 9:28, 6:16] = -850
    hu[:, 9:28, 20:30] = -850
    noisy = np.rint(hu + rng.normal(0, 12, hu.shape))
    return noisy.clip(AIR_HU, None).astype(np.int16)


def slice_dataset(stored, k, *, position, orientation=AXIAL, uid=SERIES_UID):
    """One CT image; `stored` is (rows, columns) int16 or uint16."""
    image = pydicom.Dataset()
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image.file_meta.MediaStorageSOPClassUID = CTImageStorage
    image.SOPClassUID = CTImageStorage
    image.SOPInstanceUID = f"{uid}.{k + 1}"
    image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
    image.StudyInstanceUID = f"{uid}.999"
    image.SeriesInstanceUID = uid
    image.FrameOfReferenceUID = f"{uid}.998"
    image.Modality = "CT"
    image.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    image.PatientID = "LIDC-IDRI-0042"
    image.PatientName = "Secret^Name"
    image.PatientBirthDate = "19500101"
    image.Manufacturer = "Maker"
    image.ConvolutionKernel = "STANDARD"
    image.KVP = "120"
    image.InstanceNumber = k + 1
    image.ImagePositionPatient = [f"{value:.6f}" for value in position]
    image.ImageOrientationPatient = [f"{value:.10f}" for value in orientation]
    image.PixelSpacing = [*map(str, SPACING_MM)]
    image.SliceThickness = str(STEP_MM)
    image.RescaleSlope, image.RescaleIntercept = "1", "-1024"
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.Rows, image.Columns = stored.shape
    image.BitsAllocated, image.BitsStored, image.HighBit = 16, 16, 15
    image.PixelRepresentation = int(stored.dtype.kind == "i")
    image["PixelData"] = pydicom.DataElement(0x7FE00010, "OW", stored.tobytes())
    return image


def ct_series(hu=None, *, orientation=AXIAL, origin=(-7.0, -11.0, -30.0), step=None):
    """The images of a series; slices follow each other along the normal, or `step`."""
    hu = chest_hu() if hu is None else hu
    row, column = np.reshape(orientation, (2, 3)).astype(float)
    step = STEP_MM * np.cross(row, column) if step is None else np.asarray(step)
    return [
        slice_dataset(
            (image + 1024).astype(np.int16),
            k,
            position=np.asarray(origin) + k * step,
            orientation=orientation,
        )
        for k, image in enumerate(hu)
    ]


def save_series(images, folder: Path, *, suffix=".dcm"):
    """Writes the images in an order that is not that of their positions."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for k, image in enumerate(images):
        path = folder / f"{(k * 7) % 97:03}-{k}{suffix}"
        image.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


@pytest.fixture
def chest():
    return chest_hu


@pytest.fixture
def series():
    return ct_series


@pytest.fixture
def saved(tmp_path):
    """Writes images to tmp_path/series and gives the paths."""

    def save(images, name="series", **options):
        return save_series(images, tmp_path / name, **options)

    return save
