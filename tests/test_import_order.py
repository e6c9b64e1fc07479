"""The order of modules in docs/layout.md, which keeps a flat root healthy."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORDER = re.findall(
    r"`(\w+)(?:\.py|/)`",
    "\n".join(re.findall(r"^\| `.*", (ROOT / "docs/layout.md").read_text(), re.M)),
)
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


def sources(module):
    package = ROOT / module
    return (
        sorted(package.rglob("*.py")) if package.is_dir() else [ROOT / f"{module}.py"]
    )


def imported(path):
    """Names of the top-level modules a file imports, wherever in the file it does."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]


def test_every_module_at_the_root_is_in_the_layout():
    modules = {path.stem for path in ROOT.glob("*.py")}
    assert modules <= set(ORDER)
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_what_stands_above_it(module):
    allowed = {*ORDER[: ORDER.index(module)], module}
    for path in sources(module):
        assert set(imported(path)) & set(ORDER) <= allowed, path


@pytest.mark.parametrize(
    "module", [*ORDER[: ORDER.index("models")], "postprocess", "evaluate"]
)
def test_only_models_and_the_steps_that_compute_import_keras(module):
    for path in sources(module):
        names = set(imported(path))
        if path.name == "data_generator.py":
            names.discard("keras")  # inside as_pydataset, which hands batches to Keras
        assert not names & {"keras", "tensorflow"}, path


@pytest.mark.parametrize("module", STEPS)
def test_help_loads_nothing_slow(module):
    """No module that takes long to import is loaded to show a step's help."""
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
