"""Run tests of the compiled code on the extension built with sanitizers: `make sanitize`.

python tests/run_sanitized.py FOLDER solves|layers|overflow
python tests/run_sanitized.py FOLDER [arguments for pytest]
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

TESTS = Path(__file__).parent
FILES = {
    "solves": ("native", "native_fuzz", "ops", "native_operations", "native_convolution", "engines_native"),
    "layers": ("attention", "recurrent", "cross_entropy", "normalization"),
}
"""Two halves, which can run at the same time."""
ARGUMENTS = [
    *("-q", "-p", "no:cacheprovider", "-W", "ignore"),
    # Without what tests other backends, measures time, or starts a Python of its own; and without what demands of the
    # float64 sums of cg_step the accuracy of vectorized ones, which sanitizers prevent.
    "-k",
    "not reference and not triton and not other_threads and not one_openmp and not avx2 and not (cg_step and f64)",
]


def load_extension(folder: Path) -> None:
    """Make the extension in `folder` the one that hvp_engine imports."""
    (file,) = folder.glob("_C.*.so")
    spec = importlib.util.spec_from_file_location("hvp_engine._C", file)
    assert spec is not None and spec.loader is not None
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])


def overflow() -> None:
    """Give an op that trusts its caller too small an output buffer."""
    from hvp_engine._support.flat_vector import Layout
    from hvp_engine.ops import cpp as native
    from hvp_engine.ops.backend import Binding

    layout, short = Layout.of([torch.ones(64)]), (torch.ones(16), torch.ones(16))
    scalars = (torch.ones((), dtype=torch.float64),)
    native.bind(Binding("neumann_step", short, layout, scalars, 0.0, layout.empty_partials()))([torch.ones(64)])


def main(folder: str, *arguments: str) -> int:
    load_extension(Path(folder))
    if arguments == ("overflow",):
        overflow()
        return 0
    seen = subprocess.run([sys.executable, __file__, folder, "overflow"], capture_output=True, text=True)
    if "heap-buffer-overflow" not in seen.stderr or "hvp::run_cpu" not in seen.stderr:
        print(f"expected a report of an overflow that was made on purpose; got\n{seen.stdout}{seen.stderr}")
        return 1
    settings.register_profile("sanitized", max_examples=600)
    settings.load_profile("sanitized")
    if len(arguments) == 1 and arguments[0] in FILES:
        arguments = (*ARGUMENTS, *(str(TESTS / f"test_{name}.py") for name in FILES[arguments[0]]))
    return pytest.main(list(arguments))


if __name__ == "__main__":
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):
        sys.exit("LD_PRELOAD: expected libasan, which must come before everything else: run make sanitize")
    sys.exit(main(*sys.argv[1:]))
