"""The commands of README and docs/ run as they stand, on tiny phantoms and small settings.

A fenced block below the line `<!-- test -->` is executed. Below `<!-- test: options -->` its
files and options are checked. Below `<!-- test: download -->` all but the download itself runs.
"""

import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    "README.md",
    "docs/tutorial.md",
    *sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs/howto").glob("*.md")),
]
BLOCK = re.compile(
    r"^<!-- test(?:: (\w+))? -->\n```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL
)
SMALLER = {
    # Words of a command that would need hours or missing data -> words that suit a test.
    "data/lidc_idri": "work/phantoms",
    "/data/LIDC-IDRI": "work/phantoms",
    "/fast/work": "work",
    "WORK=work/lidc": "WORK=work",
    "work/lidc": "work",
    "CONFIG=thesis": "CONFIG=tiny",
    "CONFIG=smoke": "CONFIG=tiny",
    "scores/thesis": "scores/tiny",
    "export/thesis": "export/tiny",
    "train.py smoke": "train.py tiny",
    "--train.epochs 5": "--train.epochs 1",
}
FEW = ["--train.epochs", "1", "--train.steps_per_epoch", "2"]


def blocks(kind):
    for page in PAGES:
        for number, found in enumerate(BLOCK.finditer((ROOT / page).read_text()), 1):
            if (found[1] or "") == kind:
                yield pytest.param(found[2], found[3], id=f"{page} {number}")


def commands(text):
    """The commands of a block; a backslash at the end of a line joins it with the next."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def smaller(command):
    for found, replacement in SMALLER.items():
        command = command.replace(found, replacement)
    if "train.py" in command and "--train.epochs" not in command:
        command += " " + shlex.join(FEW)
    if "infer.py" in command and "--n " not in command:
        command += " --n 1"
    return command


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder of links to the checkout, so that commands write outside the checkout."""
    folder = tmp_path_factory.mktemp("checkout")
    for path in ROOT.iterdir():
        if path.name not in {"work", "OUT", ".git"}:
            (folder / path.name).symlink_to(path)
    return folder


def run(command, folder):
    environment = os.environ | {"PHANTOMS": "4", "WORKERS": "2", "NODULES": "3 4"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 3), f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize(("language", "text"), [*blocks("")])
def test_a_block_runs(language, text, checkout):
    if language == "python":
        hu = np.full((90, 140, 140), -800, np.int16)
        hu[75:78, 67:73, 67:73] = 0
        names = {"hu": hu, "y": 70, "x": 70}
        exec(compile(text, "block", "exec"), names)
        assert names["labels"].max() == 3  # the phantom has three nodules
        assert names["mask"].any()
        return
    ran = set()
    for command in map(smaller, commands(text)):
        if command not in ran:
            run(command, checkout)
        ran.add(command)


@pytest.mark.parametrize(("language", "text"), [*blocks("options")])
def test_files_and_options_of_a_block_exist(language, text):
    for command in commands(text):
        words = shlex.split(command, comments=True)
        while "=" in words[0]:
            words.pop(0)
        if words[0] == "bash":
            assert (ROOT / words[1]).is_file(), command
        elif words[0] == "python":
            shown = run(f"{words[0]} {words[1]} --help", ROOT)
            for option in (word for word in words if word.startswith("--")):
                name = re.escape(option.replace("_", "-"))
                assert re.search(rf"{name}(?![\w-])", shown.replace("_", "-")), command


@pytest.mark.parametrize(("language", "text"), [*blocks("download")])
def test_a_download_asks_the_installed_client_for_what_it_has(
    language, text, monkeypatch, capsys
):
    idc_index = pytest.importorskip("idc_index")
    signature = inspect.signature(idc_index.IDCClient.download_from_selection)
    asked = {}

    def download(self, *arguments, **options):
        bound = signature.bind(self, *arguments, **options)
        asked.update(bound.arguments)

    monkeypatch.setattr(idc_index.IDCClient, "download_from_selection", download)
    exec(compile(text, "block", "exec"), {})
    assert len(asked["seriesInstanceUID"]) == 20
    assert "20 series, 1.9 GB" in capsys.readouterr().out


def test_links_lead_to_files():
    for page in [
        *PAGES,
        *(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").glob("*.md")),
    ]:
        text = (ROOT / page).read_text()
        for link in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert (ROOT / page).parent.joinpath(link).exists(), f"{page}: {link}"
