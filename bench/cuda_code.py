"""What nvcc makes of the CUDA kernels: registers, spills, widths of loads and stores; and what limits each on a GPU.

    python -m bench.cuda_code        writes bench/results/cuda-code.csv; needs nvcc, and a cuobjdump (Triton has one)

Nothing is run and no GPU is needed. The least time of a step is that of its traffic: 4 bytes for each float32 that it
reads or writes, for 50 million weights at the memory's nominal bandwidth.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from bench import tables
from bench.report import grid
from bench.results import FOLDER, ROOT
from hvp_engine.ops import OPS

ARCHITECTURES = ("sm_90", "sm_100")
FILE = FOLDER / "cuda-code.csv"
THREADS, THREADS_OF_SM, REGISTERS_OF_SM = 256, 2048, 65536
"""Threads of a block, as in csrc/cuda_kernels.cuh; threads and registers of a multiprocessor, on sm_90 and sm_100."""

BANDWIDTHS = {"H100": 3.35e12, "H200": 4.8e12, "B200": 8.0e12}
"""Nominal bytes per second."""

WEIGHTS = 50_000_000
MEASURED = ("cg_step",)
"""Ops with a measuring pass, and one launch more that adds up its sums."""


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel. `wide` is for float64 states; `capacity` is how many tensors it takes; loads and
    stores are counted by their bits."""

    architecture: str
    name: str
    measuring: bool
    wide: bool
    capacity: int
    registers: int
    spilled: int
    shared: int
    loads_128: int
    stores_128: int
    local: int

    @property
    def occupancy(self) -> float:
        """Share of a multiprocessor's threads that its registers leave room for."""
        of_warp = 32 * (-(-self.registers // 8) * 8)
        blocks = REGISTERS_OF_SM // of_warp // (THREADS // 32)
        return min(1.0, blocks * THREADS / THREADS_OF_SM)


def cuobjdump() -> str | None:
    """The disassembler: on the path, or Triton's."""
    triton = find_spec("triton")
    folders = [] if triton is None else [str(Path(place)) for place in triton.submodule_search_locations or []]
    bundled = [str(Path(folder, "backends", "nvidia", "bin")) for folder in folders]
    return shutil.which("cuobjdump") or next(
        filter(None, (shutil.which("cuobjdump", path=one) for one in bundled)), None
    )


def missing() -> str | None:
    """Why the kernels cannot be compiled and looked at here, or None if they can."""
    if shutil.which("nvcc") is None:
        return "there is no nvcc"
    return "there is no cuobjdump" if cuobjdump() is None else None


def compiled(architecture: str) -> list[Kernel]:
    """The kernels of csrc/cuda.cu for one architecture, compiled as CMakeLists.txt says."""
    program = cuobjdump()
    assert program is not None
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder, "cuda.cubin"))
        command = ["nvcc", "-O3", "-std=c++17", "-cubin", f"-arch={architecture}", "-Xptxas", "-v", "-o", cubin]
        done = subprocess.run([*command, str(ROOT / "csrc" / "cuda.cu")], capture_output=True, text=True, check=True)
        code = subprocess.run([program, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    bodies = dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", code, re.S))
    found = re.findall(
        r"entry function '(\S+)' for.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
        r"(?:.*?(\d+) bytes smem)?",
        done.stdout + done.stderr,
        re.S,
    )
    return sorted((_kernel(architecture, bodies[line[0]], *line) for line in found), key=lambda k: (k.name, k.capacity))


def _kernel(architecture: str, body: str, mangled: str, stores: str, loads: str, registers: str, shared: str) -> Kernel:
    operations = Counter(re.findall(r"\b(?:LDG|STG|LDL|STL)\S*", body))

    def count(kind: str, bits: str = "") -> int:
        return sum(n for name, n in operations.items() if name.startswith(kind) and bits in name)

    parts = re.search(r"step_kernelINS_\d+(\w+?)ELb([01])E([fd])Li(\d+)E", mangled)
    name = "total_kernel" if parts is None else re.sub(r"(?<!^)(?=[A-Z])", "_", parts[1]).lower()
    return Kernel(
        architecture,
        name,
        parts is not None and parts[2] == "1",
        parts is None or parts[3] == "d",
        0 if parts is None else int(parts[4]),
        int(registers),
        int(stores) + int(loads),
        int(shared or 0),
        count("LDG", ".128"),
        count("STG", ".128"),
        count("LDL") + count("STL"),
    )


def words(name: str) -> int:
    """Numbers that each weight makes an op read and write, its measuring pass included."""
    op = OPS[name]
    return len(op.states) + len(op.mutated) + 1 + (2 if name in MEASURED else 0)


def launches(name: str) -> int:
    """Kernels that a step of at most 3,600 tensors launches."""
    return 3 if name in MEASURED else 1


def markdown(file: Path = FILE) -> str:
    """The table of the documentation: float32, for up to 440 tensors."""
    kernels = {
        (k.architecture, k.name, k.measuring): k for k in tables.read(file, Kernel) if not k.wide and k.capacity == 440
    }
    body = []
    for name in OPS:
        row = [f"`{name}`", str(launches(name)), str(4 * words(name))]
        for architecture in ARCHITECTURES:
            found = [kernels[key] for m in (False, True) if (key := (architecture, name, m)) in kernels]
            row.append(" + ".join(f"{kernel.registers}, {100 * kernel.occupancy:.0f}%" for kernel in found))
        least = (4 * words(name) * WEIGHTS / bandwidth for bandwidth in BANDWIDTHS.values())
        body.append([*row, " / ".join(f"{1e6 * seconds:.0f}" for seconds in least)])
    head = ["op", "launches", "bytes a weight", *(f"registers, occupancy on {a}" for a in ARCHITECTURES)]
    return grid([*head, f"least us at {WEIGHTS:,} weights, {' / '.join(BANDWIDTHS)}"], body)


def main() -> int:
    """Compile, and write the results file."""
    if reason := missing():
        print(f"nothing to look at: {reason}")
        return 1
    kernels = [kernel for architecture in ARCHITECTURES for kernel in compiled(architecture)]
    tables.write(FILE, Kernel, kernels)
    print(markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
