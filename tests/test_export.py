"""Networks on volumes as SavedModels; those on slices are exported in test_chain.py."""

from dataclasses import replace

import pytest

import export
from tests.conftest import LUNG_RUN


@pytest.mark.parametrize("deep_supervision", [False, True])
def test_a_network_on_volumes_is_served_as_python_runs_it(
    make_lung_run, tmp_path, deep_supervision
):
    model = replace(LUNG_RUN.model, depth=2, deep_supervision=deep_supervision)
    run = make_lung_run(
        tmp_path / "run", experiment=replace(LUNG_RUN, model=model), by_hand=False
    )
    report = export.export(run, tmp_path / "model", size_px=(16, 24, 32))
    assert "16x24x32 px" in report.line
    assert "equal to Python" in report.line
    assert (tmp_path / "model/1/saved_model.pb").is_file()


def test_the_size_is_of_what_the_network_sees(make_lung_run, tmp_path):
    run = make_lung_run(tmp_path / "run")
    with pytest.raises(ValueError, match="expected 3 sizes"):
        export.export(run, tmp_path / "model", size_px=(16, 24))
    assert not (tmp_path / "model").exists()
