"""The parts of the build that pyproject.toml cannot say: the package mapping and the CMake-driven extension.

HVP_ENGINE_CUDA=AUTO|ON|OFF decides about CUDA: AUTO (the default) builds it where nvcc works, ON fails without it.
Without a working C++ compiler the package is installed without its extension and runs on the reference backend;
an error in compiling the sources themselves always fails the build.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def tool(name: str) -> str:
    """A build tool from PATH, or from beside this interpreter when the environment is not activated."""
    found = shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))
    if found is None:
        raise FileNotFoundError(f"{name} was not found: pip install {name}")
    return found


class CMakeBuild(build_ext):
    """Builds every extension by CMake, in build/ beside the sources so that a second build is incremental."""

    def build_extension(self, ext: Extension) -> None:
        cuda = os.environ.get("HVP_ENGINE_CUDA", "AUTO").upper()
        if cuda not in ("AUTO", "ON", "OFF"):
            raise ValueError(f"HVP_ENGINE_CUDA: expected AUTO, ON or OFF; got {cuda!r}")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.unlink(missing_ok=True)  # never leave a stale extension behind a failed build
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        try:
            cmake = self.configure(build, target.parent, cuda)
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            if cuda == "ON":
                raise
            print(
                f"\nWARNING: hvp_engine is built WITHOUT its C++ extension, because CMake could not configure it "
                f"({error}).\nWARNING: It will run on the slower reference backend. Install a C++ compiler and "
                "install again to get the extension.\n",
                file=sys.stderr,
            )
            return
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
        subprocess.run([cmake, "--build", str(build), "--parallel", jobs], check=True)

    @staticmethod
    def configure(build: Path, output: Path, cuda: str) -> str:
        import pybind11  # here, since a machine without it can still install the Python part

        cmake = tool("cmake")
        # Forget which compilers an earlier build found, but keep its objects (--fresh would delete them as well).
        for found in (build / "CMakeCache.txt", *(build / "CMakeFiles").glob("[0-9]*")):
            shutil.rmtree(found) if found.is_dir() else found.unlink(missing_ok=True)
        command = [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        definitions = {
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(output),
            "HVP_ENGINE_CUDA": cuda,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        subprocess.run(command + [f"-D{name}={value}" for name, value in definitions.items()], check=True)
        return cmake


setup(
    packages=[*find_packages(include=["hvp_engine", "hvp_engine.*"]), "hvp_engine.kernels"],
    package_dir={"hvp_engine.kernels": "kernels"},
    package_data={"hvp_engine": ["py.typed", "*.pyi"]},
    # optional: setuptools then accepts that the file is missing; CMakeBuild itself decides which failures count.
    ext_modules=[Extension("hvp_engine._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
)
