"""Slice table against plain HDF5 and .npz files: size, and ratios of build and read times.

Example:
    LUNG_DATA=/path/to/data python -m benchmarks.table

Every contender runs once per round and the median over the rounds is reported, so a busy
machine slows all of them alike. Slices come from the LIDC-IDRI scans below LUNG_DATA (or
../shared/data), or else are synthetic. Files are in the page cache: this measures decompression
and overhead, not the disk.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import blosc2
import h5py
import numpy as np

import config
import table
from ct import scan as scans
from ct.scan import VOLUMES, Scan
from dataset import slice_table

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 7
CODECS = {
    "lz4 5": (blosc2.Codec.LZ4, 5),
    "lz4hc 5": (blosc2.Codec.LZ4HC, 5),
    "zstd 1": (blosc2.Codec.ZSTD, 1),
    "zstd 5": (blosc2.Codec.ZSTD, 5),
    "blosclz 5": (blosc2.Codec.BLOSCLZ, 5),
}
SHUFFLES = {
    "bytes": blosc2.Filter.SHUFFLE,
    "bits": blosc2.Filter.BITSHUFFLE,
}


def main() -> None:
    found, origin = bench_scans()
    print(f"{sum(len(s.hu) for s in found)} slices of 512x512 px, {origin}\n")
    hu = np.concatenate([scan.hu[::4] for scan in found])
    lung = np.concatenate([scan.lung[::4] for scan in found if scan.lung is not None])
    codec_table("HU", hu)
    codec_table("lung labels", lung)
    with tempfile.TemporaryDirectory() as folder:
        compare(found, Path(folder))


def bench_scans() -> tuple[list[Scan], str]:
    """Returns scans with thresholded lung masks, and the name of their source."""
    data = Path(os.environ.get("LUNG_DATA", ROOT.parent / "shared/data")) / "LIDC-IDRI"
    if data.is_dir():
        from cohorts import lidc

        loaded = [lidc.load_scan(source) for source in lidc.find_scans(data)]
        return [with_lung(scan) for scan in loaded], "LIDC-IDRI"
    return [with_lung(synthetic(seed)) for seed in range(2)], "synthetic"


def with_lung(scan: Scan) -> Scan:
    """Returns the scan with a crude lung mask: voxels between -980 and -500 HU, opened."""
    import cv2

    lung = ((scan.hu > -980) & (scan.hu < -500)).astype(np.uint8)
    kernel = np.ones((5, 5), np.uint8)
    return replace(
        scan, lung=np.stack([cv2.morphologyEx(s, cv2.MORPH_OPEN, kernel) for s in lung])
    )


def synthetic(seed: int) -> Scan:
    """Returns a water body with two lungs and correlated noise, read without any finding."""
    import cv2

    from ct.geometry import Grid

    rng = np.random.default_rng(seed)
    y, x = np.ogrid[-256:256, -256:256]
    body = np.where((x / 240) ** 2 + (y / 180) ** 2 < 1, 40, scans.AIR_HU)
    for centre in (-105, 105):
        body[((x - centre) / 80) ** 2 + (y / 130) ** 2 < 1] = -850
    noise = rng.normal(0, 60, (130, 512, 512)).astype(np.float32)
    smooth = np.stack([cv2.GaussianBlur(image, (0, 0), 0.8) for image in noise])
    hu = np.where(body > scans.AIR_HU, body + smooth, scans.AIR_HU).astype(np.int16)
    affine = np.array(
        [[0, 0, -0.7, 0], [0, -0.7, 0, 0], [2.5, 0, 0, 0], [0, 0, 0, 1.0]]
    )
    grid = Grid(hu.shape, affine)
    nothing = np.zeros(hu.shape, np.uint8)
    return Scan(
        f"synthetic-{seed}",
        f"synthetic-{seed}",
        hu,
        grid,
        grid,
        reader_bits=nothing,
        nodule_labels=nothing,
    )


def codec_table(name: str, images: np.ndarray) -> None:
    """Prints size and times per slice of every codec; times relative to the one in use."""
    frames: dict[str, list[bytes]] = {}
    written_s: dict[str, float] = {}
    for codec in CODECS:
        for shuffle in SHUFFLES:
            started = time.perf_counter()
            frames[f"{codec}, {shuffle}"] = [
                frame(image, codec, shuffle) for image in images
            ]
            written_s[f"{codec}, {shuffle}"] = time.perf_counter() - started
    image = np.empty_like(images[0])
    read_s = rounds(
        {key: lambda f=f: read_frames(f, image) for key, f in frames.items()}
    )
    used = "lz4 5, bits" if images.itemsize == 1 else "lz4 5, bytes"
    print(f"| {name}: codec, shuffle | kB/slice | read | write |\n|---|---|---|---|")
    for key, stored in frames.items():
        kilobytes = sum(map(len, stored)) / len(stored) / 1000
        read, write = read_s[key] / read_s[used], written_s[key] / written_s[used]
        mark = " (in use)" if key == used else ""
        print(f"| {key}{mark} | {kilobytes:.1f} | {read:.2f}x | {write:.1f}x |")
    print()


def frame(image: np.ndarray, codec: str, shuffle: str) -> bytes:
    kind, level = CODECS[codec]
    cparams = {
        "codec": kind,
        "clevel": level,
        "filters": [SHUFFLES[shuffle]],
        "filters_meta": [0],
        "typesize": image.itemsize,
        "nthreads": 1,
    }
    return blosc2.SChunk(
        chunksize=image.nbytes, data=image, cparams=cparams
    ).to_cframe()


def read_frames(frames: list[bytes], image: np.ndarray) -> None:
    for stored in frames:
        chunk = blosc2.schunk_from_cframe(stored).get_chunk(0)
        blosc2.decompress2(chunk, dst=image, nthreads=1)


def rounds(contenders: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Measures the median seconds of each contender; all of them run once per round."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, contender in contenders.items():
            started = time.perf_counter()
            contender()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def compare(found: list[Scan], folder: Path) -> None:
    """Prints times to build and read all four arrays, table against naive formats."""
    for scan in found:
        scans.write_scan(scan, scans.scan_path(folder / "scans", scan.scan_id), {})
    built_s = {
        "table": timed(lambda: build_table(folder)),
        "h5py gzip 4": timed(lambda: build_h5py(folder, "gzip")),
        "h5py lzf": timed(lambda: build_h5py(folder, "lzf")),
        "npz per slice": timed(lambda: build_npz(folder)),
    }
    size = {
        "table": (folder / "table.h5").stat().st_size,
        "h5py gzip 4": (folder / "gzip.h5").stat().st_size,
        "h5py lzf": (folder / "lzf.h5").stat().st_size,
        "npz per slice": sum(p.stat().st_size for p in folder.glob("npz/*")),
    }
    with slice_table.SliceTable(folder / "table.h5") as opened:
        total = len(opened)
        readers = {
            "table": lambda row: [opened.read(name, row) for name in VOLUMES],
            "npz per slice": lambda row: read_npz(folder / f"npz/{row}.npz"),
        }
        for name in ("gzip", "lzf"):
            file = h5py.File(folder / f"{name}.h5")
            label = "h5py gzip 4" if name == "gzip" else "h5py lzf"
            readers[label] = lambda row, f=file: [f[v][row] for v in VOLUMES]
        order = np.random.default_rng(0).permutation(total)[:64].tolist()
        read_s = rounds(
            {
                f"{name} {threads}": lambda r=reader, t=threads: read_all(r, order, t)
                for name, reader in readers.items()
                for threads in (1, 2)
            }
        )
    print(
        "| HU and three masks of a slice | kB/slice | build | read, 1 thread | read, 2 "
        "threads | slices/s, 1 and 2 threads |\n|---|---|---|---|---|---|"
    )
    for name in built_s:
        ratios = [read_s[f"{name} {t}"] / read_s[f"table {t}"] for t in (1, 2)]
        speeds = [len(order) / read_s[f"{name} {t}"] for t in (1, 2)]
        print(
            f"| {name} | {size[name] / total / 1000:.0f} "
            f"| {built_s[name] / built_s['table']:.2f}x "
            f"| {ratios[0]:.2f}x | {ratios[1]:.2f}x | {speeds[0]:.0f}, {speeds[1]:.0f} |"
        )


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def read_all(reader: Callable[[int], object], order: list[int], threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(reader, order):
            pass


def build_table(folder: Path) -> None:
    settings = config.Table(slices="all")
    table.write_table(folder / "scans", folder / "table.h5", settings)


def build_h5py(folder: Path, compression: str) -> None:
    with h5py.File(folder / f"{compression}.h5", "w") as file:
        for path in scans.scan_files(folder / "scans"):
            scan = scans.read_scan(path)
            for name in VOLUMES:
                append(file, name, getattr(scan, name), compression)


def append(file: h5py.File, name: str, volume: np.ndarray, compression: str) -> None:
    if name not in file:
        image = volume.shape[1:]
        file.create_dataset(
            name,
            (0, *image),
            volume.dtype,
            maxshape=(None, *image),
            chunks=(1, *image),
            compression=compression,
        )
    stored = file[name]
    stored.resize(len(stored) + len(volume), axis=0)
    stored[-len(volume) :] = volume


def build_npz(folder: Path) -> None:
    (folder / "npz").mkdir()
    row = 0
    for path in scans.scan_files(folder / "scans"):
        scan = scans.read_scan(path)
        for z in range(len(scan.hu)):
            slices = {name: getattr(scan, name)[z] for name in VOLUMES}
            np.savez_compressed(folder / f"npz/{row}.npz", **slices)
            row += 1


def read_npz(path: Path) -> list[np.ndarray]:
    with np.load(path, allow_pickle=False) as stored:
        return [stored[name] for name in VOLUMES]


if __name__ == "__main__":
    main()
