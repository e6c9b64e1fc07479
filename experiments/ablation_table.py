r"""Ablation table: the scores of every run, and their differences from the first run.

A difference is paired if both runs were scored on the same scans: every bootstrap draw of
patients scores both runs. A run that was scored on other scans or slices (the split by slice)
has no paired difference, and the table says so.

    python -m experiments.ablation_table --scores work/scores/smoke \
        work/scores/smoke-no-gcn --out work/scores/ablations-smoke
"""

import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import steps
from ct import files
from ct.files import refuse_other_folder, write_rows
from ct.provenance import DISCLAIMER
from experiments import paired

MEASURES = (
    paired.pooled_dice("Dice, pooled"),
    paired.mean_of("dice", "Dice per scan"),
    paired.mean_of("dice_nodule_slices", "Dice per scan, nodule slices"),
    paired.ratio_of("nodules_hit", "nodules", "Nodule sensitivity"),
    paired.mean_of("false_positives", "False positives per scan"),
)


@dataclass(frozen=True)
class Arguments:
    """Runs to compare; the first one is the baseline."""

    scores: tuple[Path, ...]
    """Folders written by evaluate.py."""
    out: Path
    """Output folder for ablations.csv, ablations.md and ablations.tex."""
    draws: int = 2000
    """Number of bootstrap draws."""


def read_scores(folder: Path) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """Reads the rows of scores.csv, sorted by scan, and the record in scores.json.

    Raises:
        FileNotFoundError: If the folder holds no scores.
    """
    for name in ("scores.csv", "scores.json"):
        if not (folder / name).exists():
            raise FileNotFoundError(f"no {folder / name}; run evaluate.py first")
    with (folder / "scores.csv").open(newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row["scan_id"])
    return rows, json.loads((folder / "scores.json").read_text())


def same_cases(rows: Sequence[dict[str, str]], base: Sequence[dict[str, str]]) -> bool:
    """Returns True if both runs have the same scans and the same reference voxel counts."""

    def cases(rows: Sequence[dict[str, str]]) -> list[tuple[str, float]]:
        return [(row["scan_id"], float(row["tp"]) + float(row["fn"])) for row in rows]

    return cases(rows) == cases(base)


def ablation_table(arguments: Arguments) -> steps.Report:
    """Writes the table as CSV, Markdown and LaTeX.

    Raises:
        FileNotFoundError: If a run has no scores.
        ValueError: If two folders share a name, or runs were scored with other settings.
    """
    names = [folder.name for folder in arguments.scores]
    if len(set(names)) < len(names):
        raise ValueError(f"two folders share a name: {', '.join(names)}")
    refuse_other_folder(arguments.out, "ablations.csv")
    base, base_record = read_scores(arguments.scores[0])
    patients = len({row["patient_id"] for row in base})
    cells = paired.compare(names[0], base, None, MEASURES, draws=arguments.draws)
    facts = [
        f"Differences are relative to {names[0]}, with the same {patients} patients in every "
        "draw; unpaired: the run was scored on other cases.",
        paired.caution(patients),
        f"{names[0]}: {' '.join(base_record['protocol'][:-1])}",
    ]
    for name, folder in zip(names[1:], arguments.scores[1:], strict=True):
        rows, record = read_scores(folder)
        found, expected = record["setting"], base_record["setting"]
        if found | {"by_slice": False} != expected | {"by_slice": False}:
            raise ValueError(
                f"{folder} was scored with {found}, {names[0]} with {expected}; run "
                "evaluate.py on both with the same options"
            )
        if found["by_slice"]:
            facts.append(
                f"{name}: split by slice, so tested patients were also TRAINED on."
            )
        cells += paired.compare(
            name,
            rows,
            base if same_cases(rows, base) else None,
            MEASURES,
            draws=arguments.draws,
        )
    facts.append(DISCLAIMER)
    with files.write_atomically(arguments.out) as out:
        out.mkdir()
        rows = [paired.csv_row(cell) for cell in cells]
        write_rows(rows, paired.COLUMNS, out / "ablations.csv")
        marked = patients >= paired.FEW_PATIENTS
        text = paired.markdown(cells, facts, marked=marked)
        (out / "ablations.md").write_text(text)
        (out / "ablations.tex").write_text(paired.latex(cells, facts, marked=marked))
    sys.stdout.write(text + "\n")
    return steps.Report(
        f"wrote {arguments.out}: {len(names)} runs, {patients} patients"
    )


def main(argv: Sequence[str] | None = None) -> None:
    steps.run(ablation_table, Arguments, argv=argv)


if __name__ == "__main__":
    main()
