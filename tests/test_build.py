"""The package as it is built: with and without a compiler, with and without CUDA, complete."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hvp_engine import _C
from hvp_engine.ops import cpp as native

ROOT = Path(__file__).parent.parent
SOURCES = ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "LICENSE", "README.md", "constraints.txt")
FOLDERS = ("csrc", "kernels", "hvp_engine")
NOT_BUILT = ("baselines", "examples", "tests")
"""What a repository has beside the package; neither a wheel nor an sdist holds any of it."""


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of the sources, without anything built."""
    copy = tmp_path / "sources"
    copy.mkdir()
    for name in SOURCES:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    for name in (*FOLDERS, *NOT_BUILT):
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "results")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    return copy


def build(kind: str, sources: Path, output: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build a wheel or an sdist of `sources` with this environment's tools."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(output)!r})"
    output.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=sources,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


NO_COMPILER = {"CXX": "/bin/false", "CUDACXX": "/bin/false"}


def test_without_a_compiler_the_package_warns_and_runs_on_the_reference_backend(sources, tmp_path):
    result = build("wheel", sources, tmp_path / "dist", HVP_ENGINE_CUDA="AUTO", **NO_COMPILER)
    assert result.returncode == 0, result.stdout
    assert "WARNING: hvp_engine is built WITHOUT its C++ extension" in result.stdout
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        names = set(archive.namelist())

    assert not [name for name in names if name.endswith(".so")]
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"hvp_engine"}
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "hvp_engine").rglob("*.py")}
    expected |= {f"hvp_engine/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert expected <= names
    assert "hvp_engine/py.typed" in names

    # -S leaves out the hooks of this environment, one of which would find the extension of an editable install.
    code = f"""
import sys
sys.path[:0] = {[str(site), *sys.path]!r}
import torch, hvp_engine
from hvp_engine.ops import backend
from hvp_engine.diagnostics import doctor
print(hvp_engine.__file__)
print(backend.select(torch.device("cpu"))[0], "|", backend.why_not("cpp", "cpu"))
print(doctor.examine())
"""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stderr.count("UserWarning: backend 'auto' runs the slower 'reference' on cpu") == 1
    output = done.stdout.splitlines()
    assert output[0].startswith(str(site))
    assert output[1].startswith("reference | ImportError")
    assert "C++ compiler" in output[1]
    assert [line for line in output[2:] if re.search("cpp +not available: ImportError.*C\\+\\+ compiler", line)]
    assert "backends on cpu ('auto' uses 'reference')" in output


def test_cuda_on_fails_where_it_cannot_be_built(sources, tmp_path):
    result = build("wheel", sources, tmp_path / "dist", HVP_ENGINE_CUDA="ON", CUDACXX="/bin/false")
    assert result.returncode != 0
    assert "CUDA" in result.stdout


def test_an_unknown_cuda_setting_is_named(sources, tmp_path):
    result = build("wheel", sources, tmp_path / "dist", HVP_ENGINE_CUDA="maybe")
    assert result.returncode != 0
    assert "HVP_ENGINE_CUDA: expected AUTO, ON or OFF; got 'MAYBE'" in result.stdout


def test_an_error_in_the_sources_is_not_mistaken_for_a_missing_compiler(sources, tmp_path):
    header = sources / "csrc" / "ops.h"
    header.write_text("#error broken on purpose\n" + header.read_text())
    result = build("wheel", sources, tmp_path / "dist", HVP_ENGINE_CUDA="OFF")
    assert result.returncode != 0
    assert "broken on purpose" in result.stdout


def test_sdist_holds_all_that_a_build_needs(sources, tmp_path):
    result = build("sdist", sources, tmp_path / "dist")
    assert result.returncode == 0, result.stdout
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    needed = [
        path.relative_to(sources)
        for folder in FOLDERS
        for path in (sources / folder).rglob("*")
        if path.suffix in (".py", ".pyi", ".cpp", ".h", ".cu", ".typed")
    ]
    needed += [Path("CMakeLists.txt"), Path("setup.py"), Path("pyproject.toml"), Path("LICENSE")]
    assert len(needed) > 30
    assert [str(path) for path in needed if not (unpacked / path).exists()] == []
    assert [name for name in NOT_BUILT if (unpacked / name).exists()] == []


OBJECTS = [
    str(path)
    for path in (ROOT / "build").glob("cmake-*/CMakeFiles/*.dir/csrc/*.o")
    if path.parent.parent.name.startswith(("kernels_", "tiles"))
]


@pytest.mark.skipif(not OBJECTS, reason="the extension was not built here")
@pytest.mark.skipif(shutil.which("nm") is None, reason="there is no nm")
def test_no_function_of_one_instruction_set_can_replace_one_of_another():
    """As the linker would do with functions of one name, such as those of a `std::vector`, which are weak symbols."""
    symbols = subprocess.run(["nm", "--demangle", *OBJECTS], capture_output=True, text=True, check=True).stdout
    assert re.findall(r" [Tt] hvp::.*", symbols) and not re.findall(r" [Ww] [^_].*\(.*", symbols)


def test_extension_names_its_reason_without_a_gpu():
    code = "from hvp_engine.ops import cpp; print(cpp.missing('cuda'))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert "CUDA" in result.stdout


def cuobjdump() -> str | None:
    try:
        from triton.backends import nvidia

        bundled = str(Path(nvidia.__path__[0]) / "bin")
    except ImportError:
        bundled = ""
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=bundled)


@pytest.mark.skipif(not _C.has_cuda, reason="the extension was built without CUDA")
@pytest.mark.skipif(cuobjdump() is None, reason="there is no cuobjdump")
def test_extension_holds_code_for_both_architectures_and_ptx():
    listing = subprocess.run(
        [cuobjdump(), "-lelf", "-lptx", native._C.__file__], capture_output=True, text=True, check=True
    ).stdout
    assert set(re.findall(r"\.(sm_\d+)\.cubin", listing)) == {"sm_80", "sm_90"}
    assert re.findall(r"\.(sm_\d+)\.ptx", listing) == ["sm_90"]
