"""Time of each stage from a CT scan to its nodules, with the shipped weights.

    python -m benchmarks.scan [--image ../shared/data/LIDC-IDRI/LIDC-IDRI-0001]

Prints the seconds and the share of each stage in one process from its start, imports included,
with the steps of infer.py. If there is no image, a phantom is used. The memory printed is the
peak.
"""

import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tyro

STARTED = time.perf_counter()


@dataclass
class Stages:
    """Seconds by name of the stage, in order of time."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started

    def watch(self, owner: Any, name: str, stage: str) -> None:
        """Times every call of a function of an object or module as a stage."""
        function = getattr(owner, name)

        def timed(*values: Any, **options: Any) -> Any:
            with self(stage):
                return function(*values, **options)

        setattr(owner, name, timed)

    def lines(self) -> Iterator[str]:
        total = sum(self.seconds.values())
        for name, seconds in self.seconds.items():
            yield f"{name}: {seconds:.1f} s, {seconds / total:.0%}"
        yield f"all: {total:.1f} s"


def main(
    image: Path = Path("../shared/data/LIDC-IDRI/LIDC-IDRI-0001"), n: int = 0
) -> None:
    """Prints the seconds of each stage.

    Args:
        image: A DICOM folder or a volume.
        n: Passes of the lung network; 0 makes as many as needed (n="auto").
    """
    stages = Stages()
    with stages("imports"):
        import keras  # noqa: F401 - infer.py imports it when it loads a network

        from cohorts import nifti
        from inference import finder as finder_module
        from inference import segment
        from inference.passes import Passes
        from lungs.labels import LungMap
        from phantoms import chest, write
        from results import result_folder

    with stages("reading"):
        if image.exists():
            scan = nifti.load_scan(nifti.find_scans(image)[0])
        else:
            scan = write.to_scan(chest.make_phantom(1))
    lungs = segment.Lungs(passes=Passes(n=n or "auto"), labels=LungMap())
    with stages("loading networks"):
        predictor, reach_mm, finder = segment.scan_networks(
            segment.SHIPPED, lungs, segment.SHIPPED_RUNS
        )
    with stages("lungs"):
        segmented = segment.lungs_of(scan, predictor, lungs.labels, reach_mm)
        maps, labels = segmented.maps, segmented.labels
    stages.watch(finder.predictor, "maps", "nodules: 3-D network")
    stages.watch(finder.slices, "probability", "nodules: slices")
    stages.watch(finder.classifier, "probabilities", "nodules: candidates judged")
    stages.watch(finder_module, "outline_nodules", "nodules: outlines")
    stages.watch(finder_module, "measure_nodules", "nodules: measures")
    found = finder.find(replace(scan, lung=labels), segmented.searched)
    with stages("writing"), tempfile.TemporaryDirectory() as folder:
        result_folder.write_niftis(Path(folder), maps, maps.mean, labels, scan, "nifti")
        result_folder.write_found(Path(folder), found, labels, scan, "")
    memory_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    before = time.perf_counter() - STARTED - sum(stages.seconds.values())
    sys.stdout.write(
        f"{scan.scan_id}: {scan.hu.shape[0]} slices, {maps.n} passes, {len(found.candidates)} "
        f"candidates, {len(found.nodules)} nodules\n"
    )
    sys.stdout.writelines(f"{line}\n" for line in stages.lines())
    sys.stdout.write(f"other {before:.1f} s; peak memory {memory_gb:.2f} GiB\n")


if __name__ == "__main__":
    tyro.cli(main)
