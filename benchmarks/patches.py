"""Speed of `segment_patches` against one `model.predict` per patch and against PyTorch.

Example:
    python -m benchmarks.patches --weights weights/nodule2d

All methods segment the same patches of 128 x 128 px on all cores and take turns; the median
over the rounds is reported. The naive method calls `model.predict` of the same network for each
patch, as in tutorials. The PyTorch U-Net (if torch is installed) has the same convolutions on
inputs of the same size, float32, in batches. Without --weights the network is an untrained
`nodule2d`: its masks reach the borders, so that most patches are segmented twice.
"""

import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tyro

import config
from configs import CONFIGS
from ct import files, inputs
from inference import seeded
from training import runs

ROUNDS = 5
MANY, FEW = 512, 64
"""Number of patches per round for the fast methods, and for the slow ones."""


def main(weights: Path | None = None) -> None:
    """Prints patches per second and their ratios."""
    with tempfile.TemporaryDirectory() as folder:
        compare(weights or untrained(Path(folder)))


def untrained(folder: Path) -> Path:
    """Writes the run files that `PatchPredictor` reads, with initial weights."""
    from models import build_model

    experiment = CONFIGS["nodule2d"][1]
    files.write_json(folder / "config.json", config.to_json(experiment))
    network = build_model(experiment.model, (*experiment.batches.input_px, 1), 2)
    network.save_weights(folder / "best.weights.h5")
    return folder


def compare(weights: Path) -> None:
    settings = runs.read_settings(weights)
    one_look = seeded.PatchPredictor(weights, settings)
    all_turns = seeded.PatchPredictor(weights, settings, turns=seeded.TURNS)
    rng = np.random.default_rng(0)
    some = np.stack([patch(rng) for _ in range(MANY)])
    ways: dict[str, tuple[Callable[[np.ndarray], Any], int]] = {
        "segment_patches, 8 turns": (all_turns.probability, FEW),
        "segment_patches, 1 turn": (one_look.probability, MANY),
        "model.predict, one by one": (naive(one_look), FEW),
    }
    torch_way = pytorch(settings)
    if torch_way:
        ways["PyTorch, batches of 64"] = (torch_way, MANY)
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for count in range(ROUNDS + 1):
        for name, (way, number) in ways.items():
            started = time.perf_counter()
            way(some[:number])
            if count:  # the first round traces and warms up
                speeds[name].append(number / (time.perf_counter() - started))
    base = statistics.median(speeds["segment_patches, 1 turn"])
    for name, found in speeds.items():
        speed = statistics.median(found)
        sys.stdout.write(
            f"{name}: {speed:.0f} patches/s, 1 turn is {base / speed:.1f}x\n"
        )


def patch(rng: np.random.Generator) -> np.ndarray:
    """Draws noise with a bright disc in the middle, small enough for a single look."""
    y, x = np.ogrid[-64:64, -64:64]
    inside = y**2 + x**2 < rng.uniform(4, 20) ** 2
    return rng.normal(60, 10, (128, 128)) + 100 * inside


def naive(predictor: seeded.PatchPredictor) -> Callable[[np.ndarray], None]:
    size = predictor.batches.slice_px

    def segment(some: np.ndarray) -> None:
        for image in some:
            seen = seeded.crop_to_centre(image.astype(np.float32), size)
            seen = inputs.to_input(seen, None, predictor.batches)
            predictor.network.predict(seen[None, ..., None], verbose=0)

    return segment


def pytorch(settings: Any) -> Callable[[np.ndarray], None] | None:
    """Returns a U-Net of the same convolutions; None without PyTorch or a 2-D U-Net."""
    try:
        import torch
    except ImportError:
        return None
    if settings.model.name != "unet2d":
        return None
    network = torch_unet(settings.model).eval()
    size, channels = settings.batches.slice_px, 1 + settings.model.seeded

    def segment(some: np.ndarray) -> None:
        seen = [
            inputs.to_input(seeded.crop_to_centre(image, size), None, settings.batches)
            for image in some.astype(np.float32)
        ]
        x = torch.from_numpy(np.stack(seen))[:, None].expand(-1, channels, -1, -1)
        with torch.inference_mode():
            for start in range(0, len(x), 64):
                network(x[start : start + 64].contiguous())

    return segment


def torch_level(into: int, width: int, *, residual: bool) -> Any:
    """Returns the two convolutions of one level, as in models/unet2d.py."""
    from torch import nn

    class Level(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolutions = nn.Sequential(
                nn.Conv2d(into, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.LeakyReLU(0.01),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
            )
            self.shortcut = None
            if residual:
                self.shortcut = nn.Sequential(
                    nn.Conv2d(into, width, 1, bias=False), nn.BatchNorm2d(width)
                )

        def forward(self, x: Any) -> Any:
            y = self.convolutions(x)
            if self.shortcut is not None:
                y = y + self.shortcut(x)
            return nn.functional.leaky_relu(y, 0.01)

    return Level()


def torch_unet(model: Any) -> Any:
    """Returns the network of models/unet2d.py in PyTorch."""
    import torch
    from torch import nn

    widths = [model.filters * 2**level for level in range(model.depth + 1)]
    into = [1 + model.seeded, *widths]

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.ModuleList(
                torch_level(i, w, residual=model.residual)
                for i, w in zip(into, widths, strict=False)
            )
            self.up = nn.ModuleList(
                torch_level(w + below, w, residual=False)
                for w, below in itertools.pairwise(widths)
            )
            self.head = nn.Conv2d(widths[0], 2, 1)

        def forward(self, x: Any) -> Any:
            skips = []
            for level in self.down[:-1]:
                x = level(x)
                skips.append(x)
                x = nn.functional.max_pool2d(x, 2)
            x = self.down[-1](x)
            for level in reversed(range(model.depth)):
                x = nn.functional.interpolate(x, scale_factor=2, mode="bilinear")
                x = self.up[level](torch.cat((x, skips[level]), 1))
            return self.head(x).softmax(1)

    return UNet()


if __name__ == "__main__":
    tyro.cli(main)
