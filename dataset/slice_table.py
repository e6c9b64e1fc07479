"""Reads the table of slices from any number of threads; defines its format and checksums.

table.py writes the table; docs/formats.md describes the format.
"""

import functools
import hashlib
import json
import os
import threading
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import config
from ct import hdf5
from ct.geometry import Grid
from ct.scan import VOLUMES
from nodules.lidc_database import known_patient

if TYPE_CHECKING:
    import tables

FORMAT_VERSION = 1
"""Format version of the table; increased when a change makes older tables unreadable."""

DTYPES = {
    "hu": np.dtype(np.int16),
    "lung": np.dtype(np.uint8),
    "reader_bits": np.dtype(np.uint8),
    "nodule_labels": np.dtype(np.uint8),
}
ROW = np.dtype(
    [
        ("scan", "<i4"),
        ("z", "<i4"),
        ("z_mm", "<f8"),
        ("lung_px", "<i4"),
        ("nodule_px", "<i4"),
    ]
)
SCAN = np.dtype(
    [
        ("scan_id", "S128"),
        ("patient_id", "S128"),
        ("series_uid", "S128"),
        ("subset", "S32"),
        ("spacing_mm", "<f8", (3,)),
        ("affine", "<f8", (4, 4)),
        ("shape", "<i4", (3,)),
        ("offset_px", "<i4", (2,)),
        ("first_row", "<i8"),
        ("rows", "<i4"),
        ("read", "u1"),
        ("has_lung", "u1"),
        ("cut_px", "<i8"),
        ("source_sha256", "S64"),
        ("sha256", "S64"),
        ("hu_sha256", "S64"),
    ]
)
NODULE = np.dtype(
    [
        ("scan", "<i4"),
        ("label", "u1"),
        ("readers", "u1"),
        ("diameter_mm", "<f8"),
        ("volume_mm3", "<f8"),
        ("centre_ras_mm", "<f8", (3,)),
        ("subtlety", "<f8"),
        ("malignancy", "<f8"),
    ]
)
SKIPPED = np.dtype([("scan_id", "S128"), ("reason", "S1000"), ("source_sha256", "S64")])

NOT_CONTENT = {"scan", "first_row", "sha256", "source_sha256", "hu_sha256"}
"""Columns left out of a scan's checksum: positions in the table, and checksums themselves."""


class SliceTable:
    """Table that is open for reading.

    Any number of threads may read at once: only the look-up of a slice's position in the file
    takes a lock; reading and decompression do not. Each process must open the table itself;
    unpickling does that.

    Attributes:
        path: Path of the file.
        settings: Settings that the table was made with.
        provenance: Provenance record from the table's creation.
        rows, scans, nodules: Structured arrays; docs/formats.md lists the fields.
        patient_ids: (rows,) str patient of each row.
        sha256: Checksum of the table's content, computed from the checksums of its scans.
    """

    def __init__(self, path: Path) -> None:
        import blosc2

        blosc2.set_releasegil(True)
        self.path = Path(path)
        self._lock = threading.Lock()
        self._h5 = _open_table(self.path)
        self._fd = os.open(self.path, os.O_RDONLY)
        self._close = weakref.finalize(self, _close_both, self._h5, self._fd)
        record = json.loads(self._h5.root._v_attrs.table)
        self.settings = config.from_json(config.Table, record["settings"])
        self.provenance: dict[str, Any] = record["provenance"]
        self.rows = self._h5.root.rows[:]
        self._stored_scans = self._h5.root.scans[:]
        self.scans = _as_text(self._stored_scans)
        self.nodules = self._h5.root.nodules[:]
        self.skipped = _as_text(self._h5.root.skipped[:])
        self.patient_ids = self.scans["patient_id"][self.rows["scan"]]
        self.sha256 = text_sha256("\n".join(self.scans["sha256"]))
        self._slices = {name: self._h5.get_node("/slices", name) for name in VOLUMES}
        # Cached positions of slices in the file: a look-up by PyTables takes as long as
        # decompressing 400x400 pixels.
        self._places = {name: np.zeros((len(self), 2), np.int64) for name in VOLUMES}

    def __enter__(self) -> "SliceTable":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return SliceTable, (self.path,)

    def __len__(self) -> int:
        return len(self.rows)

    def close(self) -> None:
        """Closes the table; a second call does nothing."""
        self._close()

    def read(self, name: str, row: int) -> np.ndarray:
        """Reads one slice.

        Args:
            name: "hu", "lung", "reader_bits" or "nodule_labels".
            row: Index in `rows`.

        Returns:
            (y, x) int16 HU or uint8, a new array.

        Raises:
            OSError: If the slice is damaged.
        """
        if not 0 <= row < len(self.rows):
            raise IndexError(f"{self.path} has rows 0 to {len(self) - 1}, not {row}")
        node, place = self._slices[name], self._places[name][row]
        if not place[1]:
            place[:] = self._place(node, int(row))
        return self._decompressed(node, int(row), *place.tolist())

    def readers_of_label(self, scan_index: int) -> np.ndarray:
        """Returns (256,) uint8 with the number of readers of each nodule label of a scan."""
        nodules = self.nodules[self.nodules["scan"] == scan_index]
        counts = np.zeros(256, np.uint8)
        counts[nodules["label"]] = nodules["readers"]
        return counts

    def rows_of_scan(self, scan_index: int) -> range:
        """Returns the row numbers of a scan, in order of z."""
        first, count = self.scans[["first_row", "rows"]][scan_index].tolist()
        return range(first, first + count)

    def other_patients(self, scans: np.ndarray) -> frozenset[str]:
        """Returns the patients who have none of these scans.

        LIDC-IDRI patients under another name are recognised by their series, and returned under
        their LIDC-IDRI name as well.
        """
        names = self.scans["patient_id"]
        others = ~np.isin(names, names[scans])
        series = zip(names[others], self.scans["series_uid"][others], strict=True)
        known = {known_patient(uid) for name, uid in series if name[:5] != "LIDC-"}
        return frozenset(names[others].tolist()) | (known - {""})

    def volume(self, scan_index: int, name: str) -> np.ndarray:
        """Reads a scan's resampled volume, (z, y, x); see `read` for names and dtypes.

        Raises:
            ValueError: If the table was made without volumes.
        """
        node, shape = self._volume_node(scan_index, name)
        volume = np.empty(shape, DTYPES[name])
        for z in range(len(volume)):
            volume[z] = self._read_chunk(node, z)
        return volume

    def volume_affine(self, scan_index: int) -> np.ndarray:
        """Reads the (4, 4) affine of a scan's volumes, array index -> RAS mm."""
        node, _ = self._volume_node(scan_index, "hu")
        with self._lock:
            return np.array(node._v_parent._v_attrs.affine)

    def volume_grid(self, scan_index: int) -> Grid:
        """Returns the grid of a scan's volumes."""
        _, shape = self._volume_node(scan_index, "hu")
        z, y, x = shape
        return Grid((z, y, x), self.volume_affine(scan_index))

    def checksum(self, scan_index: int) -> str:
        """Computes the SHA-256 of a scan's content; equals `scans["sha256"]` if intact."""
        rows = self.rows_of_scan(scan_index)
        facts = (
            self._stored_scans[scan_index : scan_index + 1],
            self.rows[rows.start : rows.stop],
            self.nodules[self.nodules["scan"] == scan_index],
        )
        return content_sha256(facts, self._arrays_of_scan(scan_index))

    def _arrays_of_scan(self, scan_index: int) -> Iterator[np.ndarray]:
        for name in VOLUMES:
            for row in self.rows_of_scan(scan_index):
                yield self.read(name, row)
        if self.settings.volume_spacing_mm:
            yield self.volume_affine(scan_index)
            for name in VOLUMES:
                yield from self.volume(scan_index, name)

    def _volume_node(self, scan_index: int, name: str) -> tuple[Any, tuple[int, ...]]:
        if not self.settings.volume_spacing_mm:
            raise ValueError(
                f"{self.path} was made with table.volume_spacing_mm=0 and holds no "
                "volumes; run table.py again with --table.volume_spacing_mm"
            )
        with self._lock:
            node = self._h5.get_node(f"/volumes/scan{scan_index}", name)
            return node, node.shape

    def _read_chunk(self, node: Any, index: int) -> np.ndarray:
        return self._decompressed(node, index, *self._place(node, index))

    def _place(self, node: Any, index: int) -> tuple[int, int]:
        """Finds offset and size of a chunk in the file."""
        with self._lock:
            place = node.chunk_info((index, 0, 0))
        if place.offset is None:
            raise self._damaged(node, index)
        return place.offset, place.size

    def _decompressed(
        self, node: Any, index: int, offset: int, size: int
    ) -> np.ndarray:
        frame = os.pread(self._fd, size, offset)
        image = np.empty(node.shape[1:], node.atom.dtype)
        try:
            _decompress(frame, image)
        except (RuntimeError, ValueError) as error:
            raise self._damaged(node, index) from error
        return image

    def _damaged(self, node: Any, index: int) -> OSError:
        return OSError(
            f"{self.path}: slice {index} of {node._v_pathname} is damaged; "
            "check it with table.py --verify, and make it again with --overwrite"
        )


def _open_table(path: Path) -> "tables.File":
    if not path.is_file():
        raise FileNotFoundError(f"no table {path}; run table.py first")
    try:
        h5 = hdf5.open_file(path)
    except hdf5.Unreadable as error:
        raise ValueError(
            f"not a readable table: {error}; run table.py again with --overwrite"
        ) from error
    found = None
    if "table" in h5.root._v_attrs:
        found = json.loads(h5.root._v_attrs.table)["format_version"]
    if found == FORMAT_VERSION:
        return h5
    h5.close()
    if found is None:
        raise ValueError(f"{path} is not a table; expected a file made by table.py")
    raise ValueError(
        f"{path} was made with table format {found}, expected {FORMAT_VERSION}; run "
        "table.py again with --overwrite"
    )


def _close_both(h5: "tables.File", fd: int) -> None:
    h5.close()
    os.close(fd)


def _as_text(array: np.ndarray) -> np.ndarray:
    """Converts the bytes fields of a structured array to str of the least width."""
    columns = {}
    for name in array.dtype.names or ():
        column = array[name]
        is_text = column.dtype.kind == "S"
        columns[name] = np.char.decode(column, "utf-8") if is_text else column
    fields = [(name, c.dtype, c.shape[1:]) for name, c in columns.items()]
    text = np.empty(len(array), fields)
    for name, column in columns.items():
        text[name] = column
    return text


def _decompress(frame: bytes, image: np.ndarray) -> None:
    """Fills `image` from the only chunk of a Blosc2 frame, without holding the GIL.

    The chunk follows the frame's header, whose length is a big-endian int32 at byte 11; the
    chunk's uncompressed length is at its byte 4 (Blosc2's cframe and chunk formats). A
    frame of a single repeated value has no chunk there; `_only_chunk` then makes one.
    """
    import blosc2

    chunk: Any = memoryview(frame)[int.from_bytes(frame[11:15], "big") :]
    if int.from_bytes(chunk[4:8], "little") != image.nbytes:
        chunk = _only_chunk(frame)
        if blosc2.get_cbuffer_sizes(chunk)[0] != image.nbytes:
            raise ValueError("the size of the chunk differs from that of the slice")
    blosc2.decompress2(chunk, dst=image, nthreads=1)


@functools.lru_cache(maxsize=64)
def _only_chunk(frame: bytes) -> bytes:
    """Reads the chunk of a frame slowly; cached, as empty masks of one size share a frame."""
    import blosc2

    return blosc2.schunk_from_cframe(frame).get_chunk(0)


def compressed(image: np.ndarray) -> bytes:
    """Compresses an image to a Blosc2 frame of one C-order chunk, as HDF5's filter reads it.

    PyTables itself would store blocks of 256x256 px, which only PyTables can reassemble.
    Masks are not shuffled: bit shuffling would make reading them four times slower and
    save only 2 of 250 kB per slice.
    """
    import blosc2

    cparams = {
        "codec": blosc2.Codec.LZ4,
        "clevel": 5,
        "filters": [
            blosc2.Filter.NOFILTER if image.itemsize == 1 else blosc2.Filter.SHUFFLE
        ],
        "filters_meta": [0],
        "typesize": image.itemsize,
        "nthreads": 1,
    }
    image = np.ascontiguousarray(image)
    return blosc2.SChunk(
        chunksize=image.nbytes, data=image, cparams=cparams
    ).to_cframe()


def text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def content_sha256(facts: Iterable[np.ndarray], arrays: Iterable[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for fact in facts:
        for name in fact.dtype.names or ():
            if name not in NOT_CONTENT:
                digest.update(np.ascontiguousarray(fact[name]).tobytes())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def verify_table(path: Path) -> list[str]:
    """Reads a whole table and returns the ids of the scans that are damaged or changed.

    Raises:
        ValueError: If `path` is not a table of this version.
    """
    from tqdm import tqdm

    with SliceTable(path) as table:
        scan_ids = tqdm(table.scans["scan_id"], "verify", unit="scan", disable=None)
        return [
            str(scan_id)
            for index, scan_id in enumerate(scan_ids)
            if not _scan_stands(table, index)
        ]


def _scan_stands(table: SliceTable, scan_index: int) -> bool:
    import tables

    try:
        return table.checksum(scan_index) == table.scans["sha256"][scan_index]
    except (OSError, tables.HDF5ExtError):
        return False
