import os
import subprocess
import sys
import textwrap

import pytest
import torch

from hvp_engine.diagnostics.memory import peak_memory

MEGA = 1 << 20


def peak_of(run):
    with peak_memory("cpu") as meter:
        run()
    return meter.peak_bytes


def test_allocations_are_counted_exactly_and_frees_are_seen():
    def run():
        a = torch.empty(1000)
        b = torch.empty(500, dtype=torch.float64)
        del a
        c = torch.zeros(10)
        del b, c
        torch.zeros(1999)

    assert peak_of(run) == 8000


def test_views_and_in_place_operations_cost_nothing():
    def run():
        a = torch.ones(100, 10)
        views = [a.t(), a[3:], a.view(-1), a.detach(), a.unbind(), a.expand(7, 100, 10)]
        a.mul_(2).add_(1)
        del a
        return views

    assert peak_of(run) == 4000


def test_tensors_from_before_cost_nothing_until_they_are_freed():
    old = [torch.ones(1000), torch.ones(1000)]

    def use():
        old[0].view(10, 100).t().mul_(2)

    assert peak_of(use) == 0

    def replace():
        for position in range(2):
            old[position].mul_(2)
            old[position] = None
            old[position] = torch.zeros(1000)

    assert peak_of(replace) == 0


def test_several_results_and_out_arguments():
    values = torch.randn(64, 32)
    out = torch.empty(64, 32)
    assert peak_of(lambda: torch.add(values, 1, out=out)) == 0
    assert peak_of(lambda: torch.max(values, dim=1)) == 64 * 4 + 64 * 8
    assert peak_of(lambda: torch._foreach_add([values, values], 1.0)) == 2 * values.nbytes


def test_a_resized_tensor_counts_its_new_size():
    def run():
        torch.empty(10).resize_(1000)

    assert peak_of(run) == 4000


def test_literals_count():
    assert peak_of(lambda: torch.tensor([1.0, 2.0, 3.0])) == 12


def test_what_autograd_saves_is_included():
    leaf = torch.ones(1000, requires_grad=True)

    def chain(length):
        value = leaf
        for _ in range(length):
            value = value.exp()  # saves its result
        return value

    def scale(length):
        value = leaf
        for _ in range(length):
            value = value * 2.0  # saves nothing
        return value

    assert peak_of(lambda: chain(10)) == 10 * 4000
    assert peak_of(lambda: scale(10)) == 2 * 4000


def test_the_backward_pass_is_seen():
    leaf = torch.ones(1000, requires_grad=True)
    output = leaf * 2.0

    def backward():
        output.backward(torch.ones_like(output))

    assert peak_of(backward) == 2 * 4000  # the ones and the gradient
    assert leaf.grad is not None


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_sparse_and_compressed_tensors_count_their_parts():
    dense = torch.eye(100)
    assert peak_of(lambda: dense.to_sparse()) >= 100 * (2 * 8 + 4)
    sparse = dense.to_sparse()
    assert peak_of(lambda: sparse * 2.0) >= 100 * 4
    csr = dense.to_sparse_csr()
    assert peak_of(lambda: csr * 2.0) >= 100 * 4


def test_the_meter_can_be_read_inside_nested_and_after_an_error():
    with peak_memory() as outer:
        first = torch.empty(1000)
        assert outer.peak_bytes == 4000
        with pytest.raises(KeyError), peak_memory() as inner:
            torch.empty(500)
            raise KeyError
        second = torch.empty(1000)
        del first, second
    assert inner.peak_bytes == 2000
    assert outer.peak_bytes == 8000
    torch.empty(100_000)
    assert outer.peak_bytes == 8000


def test_results_are_unchanged_under_the_meter():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 3))
    images = torch.randn(5, 1, 8, 8)

    def gradients():
        return torch.autograd.grad(module(images).square().sum(), list(module.parameters()))

    plain = gradients()
    with peak_memory():
        measured = gradients()
    assert all(torch.equal(a, b) for a, b in zip(plain, measured, strict=True))


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="device: expected a CPU or CUDA device; got meta"), peak_memory("meta"):
        pass


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak resident memory is read from /proc")
def test_agrees_with_the_resident_memory_of_a_fresh_process():
    """A chain that saves 5 tensors of 64 MiB for its backward pass, against the kernel's high-water mark.

    (So large that malloc gives each back to the system at once.)
    """
    program = textwrap.dedent("""
        import sys, torch
        from hvp_engine.diagnostics.memory import peak_memory

        def resident(field):
            return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

        def run(size):
            value = torch.ones(size, requires_grad=True)
            for _ in range(5):
                value = value.exp().neg()
            value.sum().backward()

        run(1 << 10)
        if sys.argv[1] == "resident":
            before = resident("VmRSS")
            run(1 << 24)
            print(resident("VmHWM") - before)
        else:
            with peak_memory("cpu") as meter:
                run(1 << 24)
            print(meter.peak_bytes)
    """)
    counted, resident = (
        int(subprocess.run([sys.executable, "-c", program, what], check=True, capture_output=True, text=True).stdout)
        for what in ("counted", "resident")
    )
    assert counted >= 7 * 64 * MEGA
    assert counted == pytest.approx(resident, rel=0.05)


def test_the_reserved_memory_of_a_device_is_beside_the_peak(monkeypatch):
    """What a graph's pool holds is reserved, and no tensor's."""
    figures = {"memory_allocated": 100, "max_memory_allocated": 160, "max_memory_reserved": 1000}
    for name in figures:
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: figures[name])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    with peak_memory("cuda") as meter:
        figures["max_memory_reserved"] = 1200
        assert (meter.peak_bytes, meter.reserved_bytes) == (60, 1200)
    figures.update(dict.fromkeys(figures, 5000))
    assert (meter.peak_bytes, meter.reserved_bytes) == (60, 1200)  # as at the end of the block
    with peak_memory("cpu") as meter:
        pass
    assert meter.reserved_bytes is None


@pytest.mark.gpu
def test_cuda_counts_above_the_level_at_entry():
    kept = torch.empty(MEGA, device="cuda")
    with peak_memory("cuda") as meter:
        temporary = torch.empty(2 * MEGA, device="cuda")
        del temporary
    torch.empty(8 * MEGA, device="cuda")
    assert meter.peak_bytes == 2 * MEGA * 4
    assert meter.reserved_bytes >= 3 * MEGA * 4
    assert kept.numel() == MEGA
