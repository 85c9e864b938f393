"""The list of faults is of the code as it is; `make mutations` sees whether the tests notice them."""

from __future__ import annotations

import shlex

import pytest

from tools.faults import FAULTS, Fault
from tools.tree import ROOT


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.file}: {fault.why}")
def test_faults_can_be_planted(fault: Fault) -> None:
    assert (ROOT / fault.file).read_text().count(fault.original) == 1, "the code has changed: write the fault anew"
    assert fault.faulty != fault.original
    files = [word for word in shlex.split(fault.tests) if word.startswith("tests/")]
    assert files and all((ROOT / name.split("::")[0]).is_file() for name in files)
