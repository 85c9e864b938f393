"""What nvcc makes of the CUDA kernels, without a GPU: nothing spills, and vectors move 16 bytes at a time."""

from __future__ import annotations

import pytest

from bench import cuda_code, tables
from bench.cuda_code import ARCHITECTURES, MEASURED, Kernel
from hvp_engine.ops import OPS

VARIANTS = 2 * 2  # narrow and wide, for few tensors and for many


@pytest.mark.skipif(cuda_code.missing() is not None, reason=str(cuda_code.missing()))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_do_not_spill_and_move_whole_vectors(architecture: str) -> None:
    kernels = cuda_code.compiled(architecture)
    assert len(kernels) == VARIANTS * (len(OPS) + len(MEASURED)) + 1
    for kernel in kernels:
        assert kernel.spilled == kernel.local == 0, kernel
        assert kernel.registers <= 128, kernel  # two blocks on a multiprocessor
        if kernel.name == "total_kernel":
            continue
        op = OPS[kernel.name]
        read = 2 if kernel.measuring else len(op.states) + 1
        batches = 2 * 2 if kernel.wide else 4  # of 16 bytes: two vectors of 32, or four of 16
        assert kernel.loads_128 >= read * batches, kernel
        if kernel.measuring:
            assert kernel.stores_128 == 0, kernel
        else:
            assert kernel.stores_128 >= len(op.mutated) * batches, kernel


def test_the_table_is_of_all_ops() -> None:
    """The committed results, whatever is installed here."""
    kernels = tables.read(cuda_code.FILE, Kernel)
    assert {(k.architecture, k.name) for k in kernels if k.name != "total_kernel"} == {
        (architecture, name) for architecture in ARCHITECTURES for name in OPS
    }
    assert all(f"| `{name}` |" in cuda_code.markdown() for name in OPS)


def test_occupancy_is_what_registers_leave_room_for() -> None:
    def of(registers: int) -> float:
        return Kernel("sm_90", "cg_step", False, False, 440, registers, 0, 128, 0, 0, 0).occupancy

    assert [of(registers) for registers in (32, 33, 64, 96, 98, 128)] == [1.0, 0.75, 0.5, 0.25, 0.25, 0.25]
