"""What a phantom looks like, beside its seed."""

from dataclasses import dataclass
from typing import Literal

FORMAT = 3
"""Part of every UID: raised when the same seed makes another phantom than before."""


@dataclass(frozen=True)
class Settings:
    """What a phantom looks like, beside its seed."""

    size_px: int = 512
    """Rows and columns."""
    slice_spacing_mm: float = 2.5
    """Distance between slices, and their thickness."""
    nodules: tuple[int, int] = (1, 5)
    """Fewest and most nodules."""
    diameter_mm: tuple[float, float] = (4.0, 30.0)
    """Smallest and largest in-plane diameter of a nodule, as painted within a tenth."""
    transfer_syntax: Literal["mixed", "explicit", "rle", "jpeg-ls"] = "mixed"
    """How pixels are stored; mixed: every fourth phantom as RLE, every fourth JPEG-LS."""

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
                f"diameter_mm is {self.diameter_mm}, expected 3 <= smallest <= largest <= 60"
            )


@dataclass(frozen=True)
class Kernel:
    """A reconstruction kernel: its name, blur and noise.

    Attributes:
        name: ConvolutionKernel.
        blur_mm: Standard deviation of the point spread.
        grain_mm: Standard deviations of the two Gaussians whose difference shapes noise.
        noise_hu: Range of the noise's standard deviation in the middle of the body.
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
