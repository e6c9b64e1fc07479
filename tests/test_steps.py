"""What a step answers to a command line that cannot be meant."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import data_generator
import infer
import steps
import train

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("module", "words", "message"),
    [
        (train, ("smoke", "--name", "x", "--batches.batch-size", "0"), "expected 1 or"),
        (train, ("smoke", "--name", "x", "--train.ema", "2"), "ema is 2.0; expected"),
        (data_generator, ("tiny", "--slices", "0"), "slices is 0; expected 1 or more"),
        (
            data_generator,
            ("tiny", "--seconds", "-1"),
            "seconds is -1.0; expected above",
        ),
        (infer, ("--result-dir", "x", "--n", "-1"), "n is -1; expected auto"),
        (infer, ("--result-dir", "x", "--thresh", "7"), "thresh is 7.0; expected"),
        (train, ("smok",), "did you mean smoke?"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_in_words_of_ours(
    module, words, message, capsys
):
    with pytest.raises(SystemExit) as ended:
        module.main(words)
    assert ended.value.code == steps.USAGE
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown and "dummy" not in shown


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("table.py", "--help"), steps.DONE),
        (("train.py", "smoke", "--help"), steps.DONE),
        (("train.py", "smoke", "--bogus"), steps.USAGE),
        (("train.py", "nonsense"), steps.USAGE),
    ],
)
def test_a_step_whose_help_or_complaint_nobody_reads_ends_quietly(words, code):
    read, written = os.pipe()
    os.close(read)
    for errors in (subprocess.PIPE, written):
        command = (sys.executable, *words)
        done = subprocess.run(command, cwd=ROOT, stdout=written, stderr=errors)
        assert done.returncode == code
        if code == steps.DONE:
            assert not done.stderr
    os.close(written)


def test_without_a_terminal_long_work_says_how_far_it_is(monkeypatch, caplog):
    scans = [SimpleNamespace(scan_id=name) for name in "abc"]

    def work(scan):
        return scan.scan_id

    monkeypatch.setattr(steps.sys, "stderr", None)  # no terminal, as under a service
    with caplog.at_level(logging.INFO, "steps"):
        steps.map_scans(work, scans, workers=1, label="masks")
        assert not caplog.messages  # not for what is done in a moment
        monkeypatch.setattr(steps, "PROGRESS_LOG_S", 0.0)
        found, _ = steps.map_scans(work, scans, workers=1, label="masks")
    assert found == ["a", "b", "c"]
    assert [text.rsplit(",", 1)[0] for text in caplog.messages] == [
        "masks: 1 of 3 scans",
        "masks: 2 of 3 scans",
    ]
