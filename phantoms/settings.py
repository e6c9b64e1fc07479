"""Settings of a phantom, besides its seed."""

from dataclasses import dataclass
from typing import Literal

FORMAT = 3
"""Format version, part of every UID; increase it when a seed gives another phantom."""


@dataclass(frozen=True)
class Settings:
    """Settings of a phantom, besides its seed."""

    size_px: int = 512
    """Number of rows and of columns."""
    slice_spacing_mm: float = 2.5
    """Distance between slices in mm; also their thickness."""
    nodules: tuple[int, int] = (1, 5)
    """Minimum and maximum number of nodules."""
    diameter_mm: tuple[float, float] = (4.0, 30.0)
    """Smallest and largest in-plane nodule diameter in mm; painted to within 10 %."""
    transfer_syntax: Literal["mixed", "explicit", "rle", "jpeg-ls"] = "mixed"
    """Encoding of the pixels; mixed: of four phantoms, one is RLE and one JPEG-LS."""

    def __post_init__(self) -> None:
        if self.size_px < 32:
            raise ValueError(f"size_px is {self.size_px}, expected 32 or more")
        if not 0.5 <= self.slice_spacing_mm <= 20:
            raise ValueError(
                f"slice_spacing_mm is {self.slice_spacing_mm}, expected 0.5 to 20"
            )
        fewest, most = self.nodules
        if not 0 <= fewest <= most <= 30:
            raise ValueError(
                f"nodules is {self.nodules}, expected 0 <= fewest <= most <= 30"
            )
        small, large = self.diameter_mm
        if not 3 <= small <= large <= 60:
            raise ValueError(
                f"diameter_mm is {self.diameter_mm}, expected "
                "3 <= smallest <= largest <= 60"
            )


@dataclass(frozen=True)
class Kernel:
    """A reconstruction kernel: its name, blur and noise.

    Attributes:
        name: DICOM ConvolutionKernel.
        blur_mm: Standard deviation of the point spread function.
        grain_mm: Standard deviations of the two Gaussians whose difference filters
            noise.
        noise_hu: Range of the standard deviation of the noise at the centre of the
            body.
    """

    name: str
    blur_mm: float
    grain_mm: tuple[float, float]
    noise_hu: tuple[float, float]


KERNELS = (
    Kernel("SOFT", 0.65, (0.75, 2.4), (7, 14)),
    Kernel("STANDARD", 0.5, (0.55, 2.0), (10, 22)),
    Kernel("LUNG", 0.36, (0.38, 1.1), (22, 45)),
)
