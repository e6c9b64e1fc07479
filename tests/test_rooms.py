"""The rooms and floors of docs/layout.md, which keep imports free of cycles."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = [
    re.findall(r"`(\w+)(?:\.py|/)`", line)
    for line in re.findall(r"^\| \d+ \|.*", (ROOT / "docs/layout.md").read_text(), re.M)
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
STEPS = (
    "preprocess",
    "table",
    "slice_idx",
    "data_generator",
    "train",
    "infer",
    "postprocess",
    "evaluate",
    "export",
)
MAY_IMPORT_A_STEP = {("train", "data_generator")}
MAY_IMPORT_KERAS = {"models", "training", "inference", "export"}


def sources(room):
    folder = ROOT / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [ROOT / f"{room}.py"]


def imported(path):
    """Top-level names that a file imports, in functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]


def modules(room):
    """Each module of a room, with the modules of the same room it imports."""
    for path in sources(room):
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == room:
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                first, _, rest = (node.module or "").partition(".")
                names |= {rest} if first == room and rest else set()
        yield path.stem, names


def test_every_room_has_a_floor():
    files = {path.stem for path in ROOT.glob("*.py")}
    folders = {path.parent.name for path in ROOT.glob("*/*.py")} - {"tests"}
    assert set(FLOOR_OF) == files | folders
    assert len(FLOORS) <= 9


@pytest.mark.parametrize("room", FLOOR_OF)
def test_a_room_imports_only_from_floors_below(room):
    for path in sources(room):
        for other in (set(imported(path)) & set(FLOOR_OF)) - {room}:
            below = FLOOR_OF[other] < FLOOR_OF[room]
            assert below or (room, other) in MAY_IMPORT_A_STEP, f"{path}: {other}"


@pytest.mark.parametrize("room", [room for room in FLOOR_OF if room not in STEPS])
def test_modules_of_a_room_import_each_other_in_no_circle(room):
    needs = dict(modules(room))
    names = set(needs)
    while needs:
        free = {name for name, other in needs.items() if not other & set(needs)}
        assert free, f"{room}: a cycle of imports among {sorted(needs)}"
        needs = {name: other for name, other in needs.items() if name not in free}
    assert names


@pytest.mark.parametrize(
    "room", [r for r in FLOOR_OF if FLOOR_OF[r] < FLOOR_OF["preprocess"] or r in STEPS]
)
def test_only_rooms_that_compute_with_networks_import_keras(room):
    if room in MAY_IMPORT_KERAS:
        pytest.skip("computes with networks")
    for path in sources(room):
        names = set(imported(path))
        if path.name == "data_generator.py":
            names.discard("keras")  # inside as_pydataset, which hands batches to Keras
        assert not names & {"keras", "tensorflow"}, path


@pytest.mark.parametrize("module", STEPS)
def test_help_loads_nothing_slow(module):
    """Showing a step's help loads no module that takes long to import."""
    program = (
        f"import sys, {module}\n"
        "slow = {'keras', 'tensorflow', 'scipy', 'pydicom', 'nibabel', 'SimpleITK',\n"
        "        'matplotlib', 'dask', 'distributed', 'skimage', 'pylidc', 'blosc2'}\n"
        "print(sorted(slow & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr


def report():
    """Prints the floors, file and function lengths, and the public names of each room."""
    for floor, rooms in enumerate(FLOORS):
        print(f"floor {floor}: {', '.join(rooms)}")
    code = [path for room in FLOOR_OF for path in sources(room)]
    lines = {path: len(path.read_text().splitlines()) for path in code}
    longest = max(lines, key=lines.get)
    lengths = sorted(
        node.end_lineno - node.lineno + 1
        for path in code
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    )
    print(
        f"{len(code)} files; longest {longest.relative_to(ROOT)}, {lines[longest]} lines"
    )
    print(f"functions: median {lengths[len(lengths) // 2]} lines, ", end="")
    print(f"p90 {lengths[len(lengths) * 9 // 10]}, longest {lengths[-1]}")
    for room in FLOOR_OF:
        names = [
            node.name
            for path in sources(room)
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
            and not node.name.startswith("_")
        ]
        print(f"{room}: {len(names)} public names in {len(sources(room))} files")


if __name__ == "__main__":
    report()
