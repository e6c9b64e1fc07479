"""Time of one 3-D U-Net pass in Keras and in PyTorch, and peak memory of n passes.

    python -m benchmarks.monte_carlo [--shape 96 128 128] [--filters 8]

Both networks have the same layers and random weights, and segment the same masked volume in
turn, so that their ratio holds on a busy machine. PyTorch is measured only if it is installed;
this project does not require it. Peak memory is measured for each n in two separate processes:
one computes running moments, the other keeps all passes, as Zhuang et al. do.
"""

import importlib.util
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

import config
from inference.passes import Passes
from inference.predictor3d import VolumePredictor
from training.runs import Precision


@dataclass(frozen=True)
class Arguments:
    shape: tuple[int, int, int] = (96, 128, 128)
    """(z, y, x) of the volume."""
    filters: int = 8
    depth: int = 4
    repeats: int = 5
    """Timed passes of each network, after one pass to warm up."""
    n: tuple[int, int] = (10, 100)
    """Numbers of passes for which the peak memory is measured."""
    memory: bool = True
    """Measure the peak memory, which takes 220 more passes by default."""
    precision: Precision = "float32"


def settings_of(arguments: Arguments) -> config.Experiment:
    return config.Experiment(
        table=config.Table(volume_spacing_mm=2.0),
        batches=config.Batches(
            target="lung",
            input_px=arguments.shape,
            normalisation="population",
            lung_mask=False,
        ),
        model=config.Model(
            name="unet3d",
            filters=arguments.filters,
            depth=arguments.depth,
            mask_fraction=0.7,
        ),
    )


def write_run(folder: Path, settings: config.Experiment) -> None:
    """Writes the run file that `VolumePredictor` reads, with random weights."""
    from models import build_model

    network = build_model(settings.model, (*settings.batches.volume_px, 1), 2)
    network.save_weights(folder / "best.weights.h5")


def torch_pass(arguments: Arguments) -> Callable[[np.ndarray], Any]:
    """Returns the same network in PyTorch, as a function of the (z, y, x) masked volume."""
    import torch
    from torch import nn

    def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
        parts: list[nn.Module] = []
        for place in range(2):
            parts += [
                nn.Conv3d(
                    outputs if place else inputs,
                    outputs,
                    3,
                    stride=1 if place else stride,
                    padding=1,
                    bias=False,
                ),
                nn.InstanceNorm3d(outputs, affine=True),
                nn.LeakyReLU(0.01, inplace=True),
            ]
        return nn.Sequential(*parts)

    widths = [arguments.filters * 2**level for level in range(arguments.depth + 1)]
    pairs = list(zip(widths[1:], widths[:-1], strict=True))
    down = nn.ModuleList(
        [block(1, widths[0]), *(block(fine, deep, 2) for deep, fine in pairs)]
    )
    up = nn.ModuleList(
        nn.ConvTranspose3d(deep, fine, 2, 2, bias=False) for deep, fine in pairs
    )
    joined = nn.ModuleList(block(2 * fine, fine) for _, fine in pairs)
    head = nn.Conv3d(widths[0], 2, 1)

    @torch.inference_mode()
    def run(volume: np.ndarray) -> Any:
        x = torch.from_numpy(volume)[None, None]
        skips = []
        for layer in down:
            x = layer(x)
            skips.append(x)
        for level in reversed(range(arguments.depth)):
            x = joined[level](torch.cat([up[level](x), skips[level]], 1))
        return torch.softmax(head(x), 1)[0, 1].numpy()

    return run


def timed_in_turn(
    functions: dict[str, Callable[[int], Any]], repeats: int
) -> dict[str, list[float]]:
    """Times calls of the functions in turn, in seconds; the first round is dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for k in range(repeats + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function(k)
            seconds[name].append(time.perf_counter() - started)
    return {name: values[1:] for name, values in seconds.items()}


def peak_mb(
    connection: Any, arguments: Arguments, run_dir: str, n: int, keep: bool
) -> None:
    """Makes n passes in this process and sends its peak memory in MB.

    Args:
        connection: End of the pipe that takes the result.
        arguments: Settings of the benchmark.
        run_dir: Folder of `write_run`.
        n: Number of passes.
        keep: Keep all passes instead of running moments.
    """
    settings = settings_of(arguments)
    predictor = VolumePredictor(
        Path(run_dir),
        settings,
        Passes(n=n),
        precision=arguments.precision,
        memory_gb=1e3,
    )
    hu = noise_hu(arguments.shape)
    if keep:
        network = predictor.network(predictor.tile_px(hu.shape))
        passes = [predictor.probability(network, hu, k) for k in range(n)]
        np.stack(passes).std(axis=0)
    else:
        predictor.moments(hu, 0.55)
    connection.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def peak_in_own_process(
    arguments: Arguments, run_dir: str, n: int, *, keep: bool
) -> float:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=peak_mb, args=(sender, arguments, run_dir, n, keep)
    )
    process.start()
    peak = receiver.recv()
    process.join()
    return peak


def noise_hu(shape: tuple[int, int, int]) -> np.ndarray:
    """Returns a (z, y, x) float32 volume of noise in HU."""
    return np.random.default_rng(0).normal(-400, 300, shape).astype(np.float32)


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    settings = settings_of(arguments)
    with tempfile.TemporaryDirectory() as folder:
        write_run(Path(folder), settings)
        predictor = VolumePredictor(
            Path(folder),
            settings,
            Passes(n=100),
            precision=arguments.precision,
            memory_gb=1e3,
        )
        volume = noise_hu(arguments.shape) / 400
        started = time.perf_counter()
        network = predictor.network(arguments.shape)
        built = time.perf_counter()
        predictor.probability(network, volume, 0)
        first_s = time.perf_counter() - built
        functions: dict[str, Callable[[int], Any]] = {
            "keras": lambda k: predictor.probability(network, volume, k)
        }
        if importlib.util.find_spec("torch"):
            in_torch = torch_pass(arguments)
            functions["torch"] = lambda _: in_torch(volume)
        seconds = timed_in_turn(functions, arguments.repeats)
        facts: dict[str, Any] = {
            "shape": arguments.shape,
            "filters": arguments.filters,
            "precision": arguments.precision,
            "build_s": round(built - started, 2),
            "first_pass_s": round(first_s, 2),
        }
        for name, values in seconds.items():
            facts[f"{name}_pass_s"] = round(statistics.median(values), 3)
        if "torch" in seconds:
            facts["torch_over_keras"] = round(
                facts["torch_pass_s"] / facts["keras_pass_s"], 2
            )
        for n in arguments.n if arguments.memory else ():
            for keep in (False, True):
                name = f"peak_mb_n{n}" + ("_all_kept" if keep else "")
                peak = peak_in_own_process(arguments, folder, n, keep=keep)
                facts[name] = round(peak)
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
