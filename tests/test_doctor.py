import dataclasses
import subprocess
import sys

import pytest
import torch

from hvp_engine import engines
from hvp_engine.diagnostics import doctor
from hvp_engine.ops import backend

MAPS = """\
7f00-7f01 r--p 00000000 08:01 11   {folder}/libgomp-98b21ff3.so.1
7f01-7f02 r-xp 00001000 08:01 11   {folder}/libgomp-98b21ff3.so.1
7f02-7f03 r-xp 00001000 08:01 12   {folder}/libiomp5.so
7f03-7f04 r-xp 00001000 08:01 11   {folder}/link/libgomp.so.1
7f04-7f05 r-xp 00001000 08:01 13   {folder}/libomptarget.so
7f05-7f06 r-xp 00001000 08:01 14   {folder}/my libomp.so
7f06-7f07 rw-p 00000000 00:00 0
7f07-7f08 rw-p 00000000 00:00 0    [heap]
7f08-7f09 r-xp 00000000 08:01 15   {folder}/a folder/libomp.so
"""


def unspaced(text):
    """Columns with one space between them."""
    return " ".join(text.split())


@pytest.fixture(scope="module")
def diagnosis():
    return doctor.examine()


def test_openmp_runtimes_are_counted_by_real_file(tmp_path):
    real = tmp_path / "libgomp-98b21ff3.so.1"
    real.touch()
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "libgomp.so.1").symlink_to(real)
    found = doctor.openmp_runtimes(MAPS.format(folder=tmp_path))
    assert found == tuple(sorted([str(tmp_path / "a folder" / "libomp.so"), str(real), str(tmp_path / "libiomp5.so")]))
    assert doctor.openmp_runtimes("") == ()


def test_every_backend_is_listed_for_both_devices_with_its_original_reason(diagnosis):
    for device_type in ("cpu", "cuda"):
        reasons = diagnosis.backends[device_type]
        assert tuple(reasons) == backend.BACKENDS
        for name, reason in reasons.items():
            assert reason == backend.why_not(name, device_type)
            assert reason is None or reason in str(diagnosis)
        assert reasons[diagnosis.chosen[device_type]] is None
    assert diagnosis.backends["cpu"]["reference"] is None
    assert "does not run on" in diagnosis.backends["cpu"]["cuda"]


def test_a_backend_that_cannot_be_imported_shows_the_error(monkeypatch):
    monkeypatch.setitem(backend._MODULES, "cpp", "hvp_engine.no_such_module")
    backend._load.cache_clear()
    try:
        found = doctor.examine()
    finally:
        monkeypatch.undo()
        backend._load.cache_clear()
    assert found.backends["cpu"]["cpp"] == "ModuleNotFoundError: No module named 'hvp_engine.no_such_module'"
    assert found.chosen["cpu"] == "reference"
    assert "cpp not available: ModuleNotFoundError" in unspaced(str(found))


def test_an_engine_that_cannot_be_made_shows_the_error(monkeypatch):
    def broken():
        raise OSError("no such device")

    monkeypatch.setitem(engines.ENGINES, "broken", broken)
    found = doctor.examine()
    assert found.engines["eager"] is None
    assert found.engines["broken"] == "OSError: no such device"
    assert "broken not available: OSError: no such device" in unspaced(str(found))


def test_versions_devices_and_threads(diagnosis):
    assert diagnosis.versions["torch"].split(",")[0] == torch.__version__
    assert diagnosis.threads == torch.get_num_threads()
    assert "logical cores" in diagnosis.devices["cpu"]
    if torch.cuda.is_available():
        assert "sm_" in diagnosis.devices["cuda:0"]
    else:
        assert diagnosis.devices["cuda"].startswith("none: ")


def test_the_running_version_is_shown_beside_another_installed_one(monkeypatch):
    installed = doctor.importlib.metadata.version("torch")
    monkeypatch.setattr(torch, "__version__", "9.9.9+cu999")
    assert doctor.examine().versions["torch"] == f"9.9.9+cu999, installed as {installed}"
    monkeypatch.setattr(torch, "__version__", installed)
    assert doctor.examine().versions["torch"] == installed
    monkeypatch.setattr(doctor, "_PACKAGES", ("no_such_package",))
    assert doctor.examine().versions["no_such_package"] is None


def test_several_openmp_runtimes_are_pointed_out(diagnosis):
    two = dataclasses.replace(diagnosis, openmp=("/a/libgomp.so.1", "/b/libiomp5.so"))
    assert "OpenMP runtimes loaded: 2\n  /a/libgomp.so.1\n  /b/libiomp5.so\n  more than one" in str(two)
    assert "unknown" in str(dataclasses.replace(diagnosis, openmp=None))


def test_the_command_prints_the_diagnosis_of_a_fresh_process():
    done = subprocess.run([sys.executable, "-m", "hvp_engine", "doctor"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "backends on cpu" in done.stdout and "eager available" in unspaced(done.stdout)
    if sys.platform == "linux":
        assert "OpenMP runtimes loaded: 1\n" in done.stdout
