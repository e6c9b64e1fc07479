import subprocess
import sys

import pytest

import cohorts
import config
from ct.scan import scan_path


def test_every_cohort_of_the_settings_has_a_module():
    assert tuple(cohorts.COHORTS) == config.choices(config.CohortName)


def test_a_cohort_offers_find_and_load():
    module = cohorts.cohort("nifti")
    assert callable(module.find_scans)
    assert callable(module.load_scan)


def test_an_unknown_cohort_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no cohort 'kaggle'; .* lidc, luna16, nifti"):
        cohorts.cohort("kaggle")


def test_naming_the_cohorts_imports_no_reader():
    code = "import sys, cohorts; print('pydicom' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout.strip() == b"False"


def test_an_id_never_leads_out_of_the_folder_of_scan_files(tmp_path):
    assert scan_path(tmp_path, "1.2.3") == tmp_path / "1.2.3.h5"
    for scan_id in ("../escaped", "/tmp/escaped", "..", ""):
        with pytest.raises(ValueError, match="cannot name a file"):
            scan_path(tmp_path, scan_id)
